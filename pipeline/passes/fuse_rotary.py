# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding as com.microsoft's RotaryEmbedding, before heads are brought to the front.

    x cos + rotate_half(x) sin,  rotate_half(x) = Concat(-x[h:], x[:h]),  for all or the first few features of a head

The operator looks cosines and sines up in a table by position, and tables end somewhere. So the table is what the
graph computes anyway, the cosines of this very input, one row a token, and the position of a token is its number in
the input: no limit to the positions, and the same numbers. It reads queries and keys as the projection leaves them,
[batch, length, heads x size]; written out, the rotation makes five copies of them, in five to eight operators.

References: Su et al., "RoFormer" (arXiv 2104.09864), 3.4; RotaryEmbedding in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .attention import split_heads
from .attention_nodes import flat_heads, int64_weight
from .graph import MICROSOFT, attribute, constant, dims, is_op, make_node, only_consumer, producer, replace_node

_ELEMENTWISE = ("Cos", "Sin", "Mul", "Cast", "Div")


@dataclass(frozen=True)
class RotaryMatch:
    """One rotation.

    Attributes:
        data: [batch, heads, length, size] or, if not `heads_first`, [batch, length, heads, size].
        cosine, sine: [batch or 1, length, rotated], both halves alike.
        rotated: How many features of a head are rotated, the first ones.
        last: The node whose output is replaced.
    """

    data: ir.Value
    cosine: ir.Value
    sine: ir.Value
    rotated: int
    heads_first: bool
    last: ir.Node


def match_rotary(node: ir.Node) -> RotaryMatch | str | None:
    """The rotation that ends in this Add, or why it stays; None if it is none."""
    if not is_op(node, "Add"):
        return None
    for index in (0, 1):
        plain, turned = producer(node.inputs[index], "Mul"), producer(node.inputs[1 - index], "Mul")
        if plain is None or turned is None:
            continue
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            data, size = _half_turned(turned.inputs[j])
            if data is not None and plain.inputs[i] is data:
                return _finish(node, data, size, plain.inputs[1 - i], turned.inputs[1 - j])
    return None


def _half_turned(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """x and its size for Concat(Neg(x[h:]), x[:h]) over the last axis."""
    join = producer(value, "Concat")
    shape = dims(value)
    if join is None or shape is None or len(shape) != 4 or attribute(join, "axis", 0) not in (-1, 3):
        return None, 0
    size = shape[3]
    negative = producer(join.inputs[0], "Neg")
    if len(join.inputs) != 2 or negative is None or not isinstance(size, int) or size % 2:
        return None, 0
    upper, lower = slice_of(negative.inputs[0]), slice_of(join.inputs[1])
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None, 0
    whole = (dims(upper[0]) or (None,))[-1]
    if whole != size or upper[1:] != (size // 2, size) or lower[1:] != (0, size // 2):
        return None, 0
    return upper[0], size


def slice_of(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """x, begin and end of x[..., begin:end]: a Slice, or a part of a Split, over the last of four axes."""
    node = producer(value, "Slice", "Split")
    source = node.inputs[0] if node is not None else None
    shape, own = dims(source), dims(value)
    if node is None or source is None or value is None or shape is None or not isinstance(shape[-1], int):
        return None
    size = shape[-1]
    if node.op_type == "Split":
        parts = [(dims(part) or (None,))[-1] for part in node.outputs]
        if attribute(node, "axis", 0) not in (-1, len(shape) - 1) or not all(isinstance(p, int) for p in parts):
            return None
        begin = sum(p for p in parts[: list(node.outputs).index(value)] if isinstance(p, int))
        return (source, begin, begin + int(own[-1])) if own is not None else None  # type: ignore[arg-type]
    if len(node.inputs) < 4:
        return None
    begins, ends, axes = (constant(node.inputs[i]) for i in (1, 2, 3))
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if any(a is None or a.size != 1 for a in (begins, ends, axes)) or (steps is not None and steps.tolist() != [1]):
        return None
    assert begins is not None
    assert ends is not None
    assert axes is not None
    if int(axes.item()) not in (-1, len(shape) - 1):
        return None
    begin, end, _ = slice(int(begins.item()), int(ends.item())).indices(size)
    return source, begin, end


def _finish(
    add: ir.Node, data: ir.Value, size: int, cosine: ir.Value | None, sine: ir.Value | None
) -> RotaryMatch | str:
    heads_first, tables = True, []
    for value in (cosine, sine):
        unsqueeze = producer(value, "Unsqueeze")
        axes = _axes(unsqueeze)
        if unsqueeze is None or axes not in ([1], [2]):
            return "its cosines are not [batch, length, size], spread over the heads"
        heads_first = axes == [1]
        tables.append(unsqueeze.inputs[0])
    cosine, sine = tables
    widths = [(dims(table) or ()) for table in tables]
    if any(len(w) != 3 or w[2] != size for w in widths) or widths[0] != widths[1]:
        return "its cosines have another size than what they rotate"
    if cosine is None or sine is None or not (_same_halves(cosine) and _same_halves(sine)):
        return "the two halves of its cosines are not known to be the same"
    if data.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return "its type is not known to be fp32, fp16 or bf16"
    whole = dims(data)
    if whole is None or not isinstance(whole[1 if heads_first else 2], int):
        return "the number of heads is not known"
    batch = whole[0]
    if widths[0][0] not in (1, batch):
        return "its cosines are not known to be for one or for all sequences"
    return _partial(add, data, size, cosine, sine, heads_first)


def _partial(
    add: ir.Node, data: ir.Value, size: int, cosine: ir.Value, sine: ir.Value, heads_first: bool
) -> RotaryMatch:
    """Where only the first features are rotated and the others put behind them again, that is part of the operator."""
    part, join = slice_of(data), only_consumer(add.outputs[0])
    if part is not None and part[1] == 0 and join is not None and is_op(join, "Concat"):
        rest = slice_of(join.inputs[1]) if len(join.inputs) == 2 else None
        total = (dims(part[0]) or (None,))[-1]
        aside = rest is not None and rest == (part[0], size, total) and join.inputs[0] is add.outputs[0]
        if aside and attribute(join, "axis", 0) in (-1, 3):
            return RotaryMatch(part[0], cosine, sine, size, heads_first, join)
    return RotaryMatch(data, cosine, sine, size, heads_first, add)


def _axes(node: ir.Node | None) -> list[int]:
    if node is None:
        return []
    stated = attribute(node, "axes", None)
    array = constant(node.inputs[1]) if stated is None and len(node.inputs) > 1 else stated
    return [] if array is None else [int(axis) for axis in array]


def _same_halves(value: ir.Value) -> bool:
    """Whether the first half of the last axis equals the second: it was made, element by element, of Concat(a, a)."""
    for _ in range(8):
        node = value.producer()
        if is_op(node, "Concat") and node is not None:
            one, *others = node.inputs
            return (
                len(others) == 1 and others[0] is one and attribute(node, "axis", 0) in (-1, len(dims(value) or ()) - 1)
            )
        if node is None or not is_op(node, *_ELEMENTWISE):
            return False
        moving = [v for v in node.inputs if v is not None and not _is_one_number(v)]
        if len(moving) != 1:
            return False
        value = moving[0]
    return False


def _is_one_number(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and array.size == 1


class Tables:
    """Cosines and sines as tables with one row a token, and the number of each token: once for all layers."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.made: dict[tuple[object, ...], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def tables_for(self, match: RotaryMatch) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Token numbers [batch, length] (or [1]: the first), cosines and sines [tokens, rotated / 2]."""
        key = match.cosine, match.sine, match.last.graph
        if key not in self.made:
            nodes: list[ir.Node] = []
            cosine, sine = (self._table(value, match.rotated // 2, nodes) for value in key[:2])
            places = self._places(match.cosine, nodes)
            graph = match.last.graph
            assert isinstance(graph, ir.Graph)
            graph.insert_before(match.last, nodes)
            self.made[key] = places, cosine, sine
        return self.made[key]

    def _table(self, value: ir.Value, half: int, nodes: list[ir.Node]) -> ir.Value:
        begin, end, axis = (int64_weight(self.model, [number]) for number in (0, half, -1))
        nodes.append(make_node("Slice", [value, begin, end, axis], [f"{value.name}_half"]))
        shape = int64_weight(self.model, [-1, half])
        nodes.append(make_node("Reshape", [nodes[-1].outputs[0], shape], [f"{value.name}_table"]))
        table = nodes[-1].outputs[0]
        table.type, table.shape = value.type, ir.Shape([None, half])
        return table

    def _places(self, cosine: ir.Value, nodes: list[ir.Node]) -> ir.Value:
        """0, 1, 2, ... in the shape [batch, length]; one 0, where all sequences have the same positions."""
        if (dims(cosine) or (None,))[0] == 1:
            return int64_weight(self.model, [0])
        name = f"{cosine.name}_token"
        shape = make_node("Shape", [cosine], [f"{name}_shape"], attributes={"start": 0, "end": 2})
        count = make_node("ReduceProd", [shape.outputs[0]], [f"{name}_count"], attributes={"keepdims": 0})
        zero, one = (int64_weight(self.model, number) for number in (0, 1))
        numbers = make_node("Range", [zero, count.outputs[0], one], [f"{name}_numbers"])
        places = make_node("Reshape", [numbers.outputs[0], shape.outputs[0]], [f"{name}_places"])
        places.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        places.outputs[0].shape = ir.Shape([*(cosine.shape or (None, None))][:2])
        nodes += [shape, count, numbers, places]
        return places.outputs[0]


def write_rotary(model: ir.Model, match: RotaryMatch, tables: Tables) -> None:
    """Rotate [batch, length, heads x size] where the graph has that, else [batch, heads, length, size]."""
    places, cosine, sine = tables.tables_for(match)
    name, sizes = str(match.last.outputs[0].name), dims(match.data)
    assert sizes is not None
    heads, size = sizes[1 if match.heads_first else 2], sizes[3]
    assert isinstance(heads, int)
    assert isinstance(size, int)
    # The default written out: OpenVINO 2026.4 refuses the operator without it
    attributes: dict[str, int | float] = {"interleaved": 0, "num_heads": heads}
    if match.rotated != size:
        attributes["rotary_embedding_dim"] = match.rotated
    new: list[ir.Node] = []
    data, back = _flat(model, match, heads, size, new)
    inputs = [data, places, cosine, sine]
    new.append(make_node("RotaryEmbedding", inputs, [f"{name}_rotary"], domain=MICROSOFT, attributes=attributes))
    rotated = new[-1].outputs[0]
    rotated.type, rotated.shape = data.type or match.data.type, data.shape
    if back:
        length = sizes[2 if match.heads_first else 1]
        shape = int64_weight(model, [0, 0, heads, size])
        new.append(make_node("Reshape", [rotated, shape], [f"{name}_by_head"]))
        new[-1].outputs[0].type, new[-1].outputs[0].shape = rotated.type, ir.Shape([sizes[0], length, heads, size])
    if back and match.heads_first:
        turn = {"perm": [0, 2, 1, 3]}
        new.append(make_node("Transpose", [new[-1].outputs[0]], [f"{name}_split"], attributes=turn))
    replace_node(match.last, new)
    model.opset_imports[MICROSOFT] = 1


def _flat(model: ir.Model, match: RotaryMatch, heads: int, size: int, new: list[ir.Node]) -> tuple[ir.Value, bool]:
    """What is rotated, and whether its heads have to be split (again) afterwards."""
    if match.heads_first:
        found = split_heads(match.data)
        if found is None or found.whole is None or found.past is not None:
            return match.data, False
        return flat_heads(model, found, new), True
    sizes = dims(match.data) or (None,) * 4
    shape = int64_weight(model, [0, 0, heads * size])
    new.append(make_node("Reshape", [match.data, shape], [f"{match.data.name}_flat"]))
    flat = new[-1].outputs[0]
    flat.type, flat.shape = match.data.type, ir.Shape([sizes[0], sizes[1], heads * size])
    return flat, True
