# SPDX-License-Identifier: Apache-2.0
"""Write a recognized attention as com.microsoft's MultiHeadAttention, with the bias and the cache as it wants them.

Reference: MultiHeadAttention in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .attention import AttentionMatch, Heads, length
from .graph import MICROSOFT, add_weight, dims, make_node, replace_value


class Biases:
    """Masks in the form that MultiHeadAttention reads, each made once for all layers that share it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def bias_for(self, match: AttentionMatch) -> ir.Value | None:
        """The masks as one additive bias [batch or 1, heads or 1, query length, key length]."""
        if not match.masks:
            return None
        rows = length(match.query)
        # Layers share a bias when their query lengths are the same symbol; an unknown length shares nothing
        key = (*match.masks, match.last.graph, rows if rows is not None else match.query.split)
        if key not in self.made:
            self.made[key] = self._make(match)
        return self.made[key]

    def _make(self, match: AttentionMatch) -> ir.Value:
        graph, name = match.last.graph, f"{match.masks[0].name}_bias"
        assert isinstance(graph, ir.Graph)
        assert match.query.split is not None
        assert match.query.split.dtype is not None
        nodes: list[ir.Node] = []
        dtype = match.query.split.dtype.numpy()
        least = np.asarray(np.finfo(dtype).min, dtype)
        lowest = add_weight(self.model, self.model.graph, f"{name}_lowest", least)
        total = match.masks[0]
        for index, mask in enumerate(match.masks[1:]):
            nodes.append(make_node("Add", [total, mask], [f"{name}_sum_{index}"]))
            total = nodes[-1].outputs[0]
        if match.mask_is_boolean:
            zero = add_weight(self.model, self.model.graph, f"{name}_zero", np.zeros_like(least))
            nodes.append(make_node("Where", [total, zero, lowest], [f"{name}_where"]))
        else:
            # -inf over a whole row makes the runtime's softmax NaN; the lowest finite number masks just as well
            nodes.append(make_node("Max", [total, lowest], [f"{name}_finite"]))
        if not match.mask_has_all_rows:
            nodes += self._repeat_rows(match, nodes[-1].outputs[0], name)
        graph.insert_before(match.first, nodes)
        return nodes[-1].outputs[0]

    def _repeat_rows(self, match: AttentionMatch, bias: ir.Value, name: str) -> list[ir.Node]:
        """[b, h, 1 or queries, keys] -> [b, h, queries, keys]: the kernel does not broadcast the third axis."""
        one = add_weight(self.model, self.model.graph, f"{name}_one", np.ones(1, np.int64))
        two = add_weight(self.model, self.model.graph, f"{name}_two", np.full(1, 2, np.int64))
        sizes = make_node("Shape", [match.query.split], [f"{name}_sizes"])
        rows = make_node("Gather", [sizes.outputs[0], two], [f"{name}_length"], attributes={"axis": 0})
        shape = make_node("Concat", [one, one, rows.outputs[0], one], [f"{name}_shape"], attributes={"axis": 0})
        return [sizes, rows, shape, make_node("Expand", [bias, shape.outputs[0]], [f"{name}_rows"])]


def write_attention(model: ir.Model, match: AttentionMatch, biases: Biases) -> None:
    """Put one MultiHeadAttention in place of everything from the split heads to the merged ones."""
    graph, old = match.last.graph, match.output
    assert isinstance(graph, ir.Graph)
    nodes: list[ir.Node] = []
    query = flat_heads(model, match.query, nodes)
    cached = _cached(match)
    if cached or (not _needs_split(match.key) and not _needs_split(match.value)):
        key, value = flat_heads(model, match.key, nodes), flat_heads(model, match.value, nodes)
    else:
        key, value = _split(model, match.key, nodes), _split(model, match.value, nodes)
    inputs = [query, key, value, None, None, biases.bias_for(match)]
    names = [f"{old.name}_attention"]
    if cached:
        inputs += [match.key.past, match.value.past]
        names += [f"{old.name}_present_key", f"{old.name}_present_value"]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"num_heads": match.heads, "scale": match.scale}
    node = make_node("MultiHeadAttention", inputs, names, domain=MICROSOFT, attributes=attributes)
    graph.insert_before(match.last, [*nodes, node])
    for heads, present in zip((match.key, match.value), node.outputs[1:], strict=False):
        assert heads.split is not None
        present.shape, present.type = heads.split.shape, heads.split.type
        replace_value(heads.split, present)
    hand_over(match, node.outputs[0])
    model.opset_imports[MICROSOFT] = 1


def hand_over(match: AttentionMatch, attended: ir.Value) -> None:
    """Let the readers of the merged heads read `attended` [batch, length, width]."""
    old = match.output
    sizes = dims(match.query.split)
    assert sizes is not None
    attended.shape = ir.Shape([sizes[0], sizes[2], match.value.heads * match.value.size])
    attended.type = old.type
    if len(dims(old) or ()) == 2:
        # Merged to [batch x length, width] at once: the same Reshape does it from three axes as from four
        match.last.replace_input_with(0, attended)
    else:
        attended.shape = old.shape
        replace_value(old, attended)


def _needs_split(heads: Heads) -> bool:
    """Whether keys or values can be handed over only with their heads in front: from a cache, or made so."""
    return heads.past is not None or heads.whole is None


def _cached(match: AttentionMatch) -> bool:
    """Whether the operator itself can put the cache in front of the fresh keys and values.

    Not where a mask is computed from the two together (from their length, say): it would be needed before they are.
    """
    q, k, v = match.query, match.key, match.value
    if k.past is None or v.past is None or k.whole is None or v.whole is None or not q.size == k.size == v.size:
        return False
    inputs = [q.whole or q.split, k.whole, v.whole, k.past, v.past, *match.masks]
    return k.split is not v.split and not _depend(inputs, {k.split, v.split})


def _depend(values: Sequence[ir.Value | None], on: set[ir.Value | None]) -> bool:
    """Whether any of `values` is computed from one of `on`."""
    seen, waiting = set(values), [value for value in values if value is not None]
    while waiting:
        value = waiting.pop()
        if value in on:
            return True
        node = value.producer()
        for before in node.inputs if node is not None else ():
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return False


def flat_heads(model: ir.Model, heads: Heads, nodes: list[ir.Node]) -> ir.Value:
    """[batch, length, heads x size]; new nodes for it are appended to `nodes`."""
    source = heads.whole
    if source is not None and len(dims(source) or ()) == 3:
        return source
    if source is None:
        assert heads.split is not None
        turn = make_node("Transpose", [heads.split], [f"{heads.split.name}_by_length"],
                         attributes={"perm": [0, 2, 1, 3]})  # fmt: skip
        nodes.append(turn)
        source = turn.outputs[0]
    shape = int64_weight(model, [0, 0, heads.heads * heads.size])
    nodes.append(make_node("Reshape", [source, shape], [f"{source.name}_flat"]))
    flat, sizes = nodes[-1].outputs[0], dims(heads.split) or (None,) * 4
    flat.type = (heads.split or source).type
    flat.shape = ir.Shape([sizes[0], sizes[2], heads.heads * heads.size])
    return flat


def _split(model: ir.Model, heads: Heads, nodes: list[ir.Node]) -> ir.Value:
    """[batch, heads, length, size]; new nodes for it are appended to `nodes`."""
    if heads.split is not None:
        return heads.split
    assert heads.whole is not None
    shape = int64_weight(model, [0, 0, heads.heads, heads.size])
    nodes.append(make_node("Reshape", [heads.whole, shape], [f"{heads.whole.name}_by_head"]))
    turn = {"perm": [0, 2, 1, 3]}
    nodes.append(make_node("Transpose", [nodes[-1].outputs[0]], [f"{heads.whole.name}_split"], attributes=turn))
    return nodes[-1].outputs[0]


def int64_weight(model: ir.Model, numbers: list[int] | int) -> ir.Value:
    """A small integer constant (a list has one axis, a number none), the same one wherever it is asked for."""
    array = np.asarray(numbers, np.int64)
    name = "int64_" + ("scalar_" if not array.ndim else "") + "_".join(str(n) for n in array.reshape(-1))
    found = model.graph.initializers.get(name)
    if found is not None and found.const_value is not None and np.array_equal(found.const_value.numpy(), array):
        return found
    return add_weight(model, model.graph, name, array)
