# SPDX-License-Identifier: Apache-2.0
"""Move a positive scale per input channel out of linear layers, into whatever makes their input.

    y = x W  =  (x / s) (diag(s) W)

`scale_matrices` writes diag(s) W; `fold_input_scale` sees to x / s without a node at run time where it can: into gamma
and beta of a normalization, a constant factor, or the columns of the linear layer in front, also through operators that
a positive scale commutes with (Relu, a gate, reshaping, the weighted average of attention). Where it cannot, because
something else reads the activation too or a nonlinear function makes it, one Mul is written for all layers.

Only shapes that the graph states are believed: put the clean pass, which infers them, before.

References: SmoothQuant (Xiao et al., arXiv 2211.10438), 4; AWQ (Lin et al., arXiv 2306.00978), 3.2; operators of the
ONNX specification, and SkipLayerNormalization, MultiHeadAttention in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...contracts.errors import OnnxpressError
from .graph import MICROSOFT, add_weight, attribute, constant, dims, is_op, is_weight, label, make_node, producer


@dataclass(frozen=True)
class Matrix:
    """The constant right factor of a MatMul or Gemm.

    Attributes:
        stored: The initializer.
        input_axis: The axis of `stored`, 0 or 1, that runs over the input channels.
    """

    stored: ir.Value
    input_axis: int

    def by_input(self) -> np.ndarray:
        """The weight as [input channels, output channels], in its own type; a view where it can be one."""
        assert self.stored.const_value is not None
        array = self.stored.const_value.numpy()
        return array if self.input_axis == 0 else array.T


def matrix_of(node: ir.Node) -> Matrix | str:
    """The weight of a linear layer whose input is `node.inputs[0]`, or why the node is none."""
    if not is_op(node, "MatMul", "Gemm"):
        return f"{node.op_type} is no MatMul or Gemm"
    turned = producer(node.inputs[1], "Transpose")
    stored, axis = node.inputs[1], 0
    if turned is not None:
        stored, axis = turned.inputs[0], 1
    if stored is None or not is_weight(stored) or stored.const_value is None:
        return (
            "the right factor is no constant" if constant(node.inputs[1]) is None else "the weight is a Constant node"
        )
    if len(stored.const_value.shape) != 2 or not stored.const_value.dtype.is_floating_point():
        return "the weight is not a matrix of floating point numbers"
    if turned is not None and list(attribute(turned, "perm", [1, 0])) != [1, 0]:
        return "the weight's Transpose does not transpose"
    if is_op(node, "Gemm"):
        if attribute(node, "transA", 0):
            return "Gemm with transA"
        axis ^= int(bool(attribute(node, "transB", 0)))
    return Matrix(stored, axis)


def find_fold(value: ir.Value, consumers: Sequence[ir.Node], channels: int) -> dict[str, Any] | str:
    """Where a scale of `value` would go, as `fold_input_scale` records it; or why only a Mul can hold it.

    Args:
        value: What the layers read, [..., channels].
        consumers: The linear layers (they read `value` as their first input) whose weights will be scaled.
        channels: Size of the last axis.
    """
    path = _find(value, consumers, np.ones(channels))
    return path if isinstance(path, str) else path.to_json(value)


def fold_input_scale(
    model: ir.Model, value: ir.Value, scale: np.ndarray, consumers: Sequence[ir.Node], *, insert_mul: bool = True
) -> dict[str, Any]:
    """Let `consumers` read value / scale, and change nothing else; their weights are `scale_matrices`' business.

    Weights that others read too are copied first, so that those others keep theirs. Values that are scaled from now on
    get a new name, `..._scaled`: a pass that compares two graphs by the names of their values must not find them.

    Args:
        model: Changed in place.
        value: The input that all of `consumers` read first, [..., C].
        scale: float [C], finite and greater than zero.
        consumers: The linear layers whose weights are multiplied by `scale` along their input axis.
        insert_mul: Write an explicit Mul, one for all consumers, where folding is not possible.

    Returns:
        JSON: `value`; `how`: `norm`, `constant`, `linear` or `mul`; `node` that absorbed it; names of the changed
        `weights`; the nodes it went `through`; for `mul` the `reason` why it could not be folded.

    Raises:
        OnnxpressError: Folding is not possible and `insert_mul` is false, or the scale is not positive and finite, or
            the type of the activation cannot hold 1 / scale. The model is as it was.
    """
    scale = np.asarray(scale, np.float64)
    if scale.ndim != 1 or not np.all(np.isfinite(scale) & (scale > 0)):
        raise OnnxpressError(f"the scale of '{value.name}' is not a vector of positive, finite numbers")
    path = _find(value, consumers, 1 / scale)
    if isinstance(path, _Path) and (problem := path.problem()):
        path = problem
    if isinstance(path, _Path):
        record = path.to_json(value)
        record["weights"] = [edit_constant(model, [(e.node, e.index)], e.applied) for e in path.edits]
        for changed in (value, *path.values):
            changed.name = f"{changed.name}_scaled"
        return record
    if not insert_mul:
        raise OnnxpressError(f"the scale of '{value.name}' cannot be folded: {path}")
    node = _insert_mul(model, value, 1 / scale, consumers)
    weights = [str(node.inputs[1].name)] if node.inputs[1] is not None else []
    record = {"value": value.name, "how": "mul", "node": label(node), "weights": weights, "through": []}
    return {**record, "reason": path}


def scale_matrices(model: ir.Model, consumers: Iterable[ir.Node], scale: np.ndarray) -> list[str]:
    """Multiply the weights of linear layers by `scale` along their input axis, once where layers share a weight.

    Args:
        model: Changed in place.
        consumers: Nodes for which `matrix_of` finds a weight.
        scale: float [C].

    Returns:
        The names of the changed (or, where others read the old one, new) weights.
    """
    groups: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    for node in dict.fromkeys(consumers):
        matrix = matrix_of(node)
        if isinstance(matrix, str):
            raise OnnxpressError(f"{label(node)} has no weight to scale: {matrix}")
        assert node.inputs[1] is not None
        # Two readers of one weight may see it in two orientations; each is edited as it is read
        axis = int(bool(attribute(node, "transB", 0))) if is_op(node, "Gemm") else 0
        groups.setdefault((node.inputs[1], axis), []).append(node)
    names = []
    for (_, axis), nodes in groups.items():
        factor = np.asarray(scale, np.float64).reshape(-1, 1) if axis == 0 else np.asarray(scale, np.float64)
        names.append(edit_constant(model, [(n, 1) for n in nodes], lambda a, f=factor: a * f))  # type: ignore[misc]
    return names


def edit_constant(
    model: ir.Model, readers: Sequence[tuple[ir.Node, int]], edit: Callable[[np.ndarray], np.ndarray]
) -> str:
    """Replace the constant that `readers` have in common by `edit` of it, for these readers alone.

    Args:
        model: Changed in place.
        readers: (node, index of the input), all reading the same value: an initializer, a transposed initializer, or
            a Constant node's output.
        edit: From the array as the readers see it, float64, to the new one; the type is kept.

    Returns:
        The name of the initializer that holds the result: the old one if nothing else reads it.
    """
    value = readers[0][0].inputs[readers[0][1]]
    assert value is not None
    turned = producer(value, "Transpose")
    stored = turned.inputs[0] if turned is not None else value
    array = constant(stored)
    assert stored is not None
    assert array is not None
    permutation = list(attribute(turned, "perm", range(array.ndim)[::-1])) if turned is not None else None
    seen = array if permutation is None else array.transpose(permutation)
    with np.errstate(over="ignore", under="ignore"):  # `_Path.problem` has looked
        new = np.asarray(edit(seen.astype(np.float64))).astype(array.dtype)
    mine = {(n, i) for n, i in readers}
    alone = _read_only_by(value, mine) and (turned is None or _read_only_by(stored, {(turned, 0)}))
    if is_weight(stored) and alone:
        back = new if permutation is None else new.transpose(np.argsort(permutation))
        stored.const_value = ir.Tensor(np.asarray(back, order="C"), name=stored.name)
        stored.shape = ir.Shape(back.shape)
        if turned is not None:
            value.shape = ir.Shape(new.shape)
        return str(stored.name)
    graph = readers[0][0].graph
    assert isinstance(graph, ir.Graph)
    home = stored.graph if isinstance(stored.graph, ir.Graph) else graph
    added = add_weight(model, home, f"{stored.name}_scaled", new)
    for node, index in readers:
        node.replace_input_with(index, added)
    for dead in (turned, producer(stored, "Constant")):
        if dead is not None and not dead.outputs[0].uses() and not dead.outputs[0].is_graph_output():
            assert isinstance(dead.graph, ir.Graph)
            dead.graph.remove(dead, safe=True)
    return str(added.name)


def _read_only_by(value: ir.Value, readers: set[tuple[ir.Node, int]]) -> bool:
    return not value.is_graph_output() and {(use.node, use.idx) for use in value.uses()} == readers


@dataclass(frozen=True)
class _Edit:
    """Multiply the constant at one input of a node; `factor` is float64, broadcastable."""

    node: ir.Node
    index: int
    factor: np.ndarray

    def applied(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array * self.factor)


@dataclass
class _Path:
    """A way for a factor from a value up to constants.

    Attributes:
        how: Kind of the node that absorbs it: `norm`, `constant`, `linear`.
        node: That node.
        edits: What to multiply.
        through: The nodes on the way, from the value upwards.
        values: What these nodes read on the way, and will be scaled as well.
    """

    how: str
    node: ir.Node
    edits: list[_Edit]
    through: list[ir.Node] = field(default_factory=list)
    values: list[ir.Value] = field(default_factory=list)

    def to_json(self, value: ir.Value) -> dict[str, Any]:
        return {
            "value": value.name,
            "how": self.how,
            "node": label(self.node),
            "weights": [_name(edit) for edit in self.edits],
            "through": [label(node) for node in self.through],
        }

    def problem(self) -> str | None:
        """Which weight the factor would carry out of the range of its type, if any."""
        for edit in self.edits:
            old = _array(edit.node, edit.index)
            assert old is not None
            with np.errstate(over="ignore", under="ignore"):
                new = edit.applied(old.astype(np.float64)).astype(old.dtype)
            if np.isfinite(old).all() and not np.isfinite(new).all():
                return f"the scale carries '{_name(edit)}' out of the range of {old.dtype}"
        return None


def _name(edit: _Edit) -> str:
    value = edit.node.inputs[edit.index]
    return str(value.name if value is not None else None)


def _find(value: ir.Value, consumers: Sequence[ir.Node], factor: np.ndarray) -> _Path | str:
    """The path for `factor`, [C], on the last axis of `value`."""
    compensated = set(consumers)
    if value.is_graph_output():
        return "the activation is an output of the graph"
    for use in value.uses():
        if use.node not in compensated or use.idx != 0:
            return f"the activation is also read by {label(use.node)} ({use.node.op_type})"
    return _push(value, factor)


def _insert_mul(model: ir.Model, value: ir.Value, factor: np.ndarray, consumers: Sequence[ir.Node]) -> ir.Node:
    """Mul(value, factor) where `value` comes into being, read by `consumers` in its place."""
    graph, dtype, maker = value.graph, value.dtype or ir.DataType.FLOAT, value.producer()
    assert isinstance(graph, ir.Graph)
    with np.errstate(over="ignore", under="ignore"):
        stored = factor.astype(dtype.numpy())
    if not np.isfinite(stored).all():
        raise OnnxpressError(f"1 / scale of '{value.name}' is out of the range of {stored.dtype}")
    weight = add_weight(model, graph, f"{value.name}_inverse_scale", stored)
    node = make_node("Mul", [value, weight], [f"{value.name}_scaled"])
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    if maker is not None:
        graph.insert_after(maker, node)
    else:
        graph.insert_before(graph[0], node)
    for consumer in dict.fromkeys(consumers):
        consumer.replace_input_with(0, node.outputs[0])
    return node


def _push(value: ir.Value, factor: np.ndarray) -> _Path | str:
    """The path for a factor, broadcastable to `value`, from `value` upwards."""
    factor = _without_leading_ones(factor)
    node = value.producer()
    if node is None:
        return "the activation is an input of the graph"
    if is_op(node, "Split"):
        return _split(node, factor, value)
    rule = _RULES.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
    if rule is None or node.outputs[0] is not value:
        return f"a scale does not pass {node.op_type} ({label(node)})"
    return rule(node, factor)


def _push_input(node: ir.Node, index: int, factor: np.ndarray) -> _Path | str:
    """Go on above `node`, whose input there must have no other reader and all the channels of the factor."""
    value = node.inputs[index]
    if value is None:
        return f"{label(node)} lacks an input"
    if value.is_graph_output() or len(value.uses()) != 1:
        return f"'{value.name}', on the way, is read by others too"
    factor = _without_leading_ones(factor)
    shape = dims(value)
    if shape is None or len(shape) < factor.ndim:
        return f"the shape of '{value.name}' is not known"
    for size, wanted in zip(shape[::-1], factor.shape[::-1], strict=False):
        if wanted != 1 and size != wanted:
            return f"'{value.name}' has not the channels of the layer"
    path = _push(value, factor)
    if isinstance(path, _Path):
        path.through.insert(0, node)
        path.values.insert(0, value)
    return path


def _without_leading_ones(factor: np.ndarray) -> np.ndarray:
    while factor.ndim > 1 and factor.shape[0] == 1:
        factor = factor[0]
    return factor


def _array(node: ir.Node, index: int) -> np.ndarray | None:
    """The constant at an input of `node`, as the node sees it, which may be behind a Transpose."""
    value = node.inputs[index] if index < len(node.inputs) else None
    turned = producer(value, "Transpose")
    if turned is None:
        return constant(value)
    array = constant(turned.inputs[0])
    return None if array is None else np.asarray(np.transpose(array, attribute(turned, "perm", None)))


def _norm(*constants: int) -> _Rule:
    """A normalization: everything that it multiplies by or adds, at the inputs of these numbers, is scaled."""

    def rule(node: ir.Node, factor: np.ndarray) -> _Path | str:
        present = [i for i in constants if i < len(node.inputs) and node.inputs[i] is not None]
        if not present or present[0] != constants[0] or any(_array(node, i) is None for i in present):
            return f"gamma or beta of {label(node)} is no constant"
        if factor.ndim > 1:
            return f"the scale is not along the last axis at {label(node)}"
        return _Path("norm", node, [_Edit(node, i, factor) for i in present])

    return rule


def _multiplied(node: ir.Node, factor: np.ndarray) -> _Path | str:
    """Mul: into a constant vector; else through one of the branches, of which a gate has one that is linear.

    A constant scalar is passed: made a vector, it would hide Gelu from the runtime's fusions.
    """
    for index in (0, 1):
        array = _array(node, index)
        if array is not None:
            if array.shape[-1:] == factor.shape[-1:]:
                return _Path("constant", node, [_Edit(node, index, factor)])
            return _push_input(node, 1 - index, factor)
    path = _push_input(node, 1, factor)
    return path if isinstance(path, _Path) else _push_input(node, 0, factor)


def _divided(node: ir.Node, factor: np.ndarray) -> _Path | str:
    array = _array(node, 1)
    if array is not None and array.shape[-1:] == factor.shape[-1:]:
        return _Path("constant", node, [_Edit(node, 1, 1 / factor)])
    return _push_input(node, 0, factor)


def _added(node: ir.Node, factor: np.ndarray) -> _Path | str:
    """Add or Sub of a constant: it is scaled with what it is added to."""
    for index in (0, 1):
        if _array(node, index) is not None:
            path = _push_input(node, 1 - index, factor)
            if isinstance(path, _Path):
                path.edits.append(_Edit(node, index, factor))
            return path
    return f"a scale does not pass the sum of two activations ({label(node)})"


def _matrix_product(node: ir.Node, factor: np.ndarray) -> _Path | str:
    """MatMul: into the columns of a constant right factor; else on to it, as to the values of an attention."""
    weight = _array(node, 1)
    if weight is not None:
        if weight.ndim < 2 or factor.ndim > 1 or weight.shape[-1] != factor.shape[-1]:
            return f"the columns of {label(node)} are not the channels"
        return _Path("linear", node, [_Edit(node, 1, factor)])
    ranks = [len(dims(value) or ()) for value in node.inputs[:2]]
    if min(ranks) < 2 or (factor.ndim > 1 and factor.shape[-2] != 1):
        return f"the scale differs along the rows of {label(node)}, or its shapes are not known"
    return _push_input(node, 1, factor)


def _gemm(node: ir.Node, factor: np.ndarray) -> _Path | str:
    bias = 2 if len(node.inputs) > 2 and node.inputs[2] is not None else None
    weight, turned = _array(node, 1), bool(attribute(node, "transB", 0))
    if weight is None or (bias is not None and _array(node, bias) is None):
        return f"weight or bias of {label(node)} is no constant"
    if factor.ndim > 1 or weight.shape[0 if turned else 1] != factor.shape[0]:
        return f"the columns of {label(node)} are not the channels"
    edits = [_Edit(node, 1, factor.reshape(-1, 1) if turned else factor)]
    if bias is not None:
        edits.append(_Edit(node, bias, factor))
    return _Path("linear", node, edits)


def _passed(node: ir.Node, factor: np.ndarray) -> _Path | str:
    """f(x / s) = f(x) / s for a positive s."""
    return _push_input(node, 0, factor)


def _transposed(node: ir.Node, factor: np.ndarray) -> _Path | str:
    permutation = attribute(node, "perm", None)
    shape = dims(node.inputs[0])
    if permutation is None and shape is None:
        return f"the shape before {label(node)} is not known"
    permutation = list(permutation if permutation is not None else range(len(shape or ()))[::-1])
    padded = factor.reshape((1,) * (len(permutation) - factor.ndim) + factor.shape)
    return _push_input(node, 0, padded.transpose(np.argsort(permutation)))


def _reshaped(node: ir.Node, factor: np.ndarray) -> _Path | str:
    """Row-major order stays: last axes of the same product hold the same elements, whatever comes before them."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    block = _last_axes(after, count=factor.ndim)
    if before is None or block is None:
        return f"the shape around {label(node)} is not known"
    elements = int(np.prod(block))
    for count in range(1, len(before) + 1):
        axes = _last_axes(before, count=count)
        if axes is not None and int(np.prod(axes)) == elements:
            return _push_input(node, 0, np.broadcast_to(factor, block).reshape(axes))
    return f"{label(node)} cuts the channels differently"


def _last_axes(shape: tuple[int | str | None, ...] | None, *, count: int) -> tuple[int, ...] | None:
    if shape is None or len(shape) < count:
        return None
    axes = tuple(size for size in shape[len(shape) - count :] if isinstance(size, int))
    return axes if len(axes) == count else None


def _gathered(node: ir.Node, factor: np.ndarray) -> _Path | str:
    """Picking positions, as a classifier picks the first token."""
    shape, axis = dims(node.inputs[0]), attribute(node, "axis", 0)
    if shape is None or factor.ndim > 1 or axis in (-1, len(shape) - 1):
        return f"{label(node)} may pick among the channels"
    return _push_input(node, 0, factor)


def _split(node: ir.Node, factor: np.ndarray, part: ir.Value) -> _Path | str:
    """One of the parts along the last axis, as queries, keys and values come from one product; the others keep 1."""
    shape = dims(node.inputs[0])
    widths = [_last_axes(dims(output), count=1) for output in node.outputs]
    if shape is None or attribute(node, "axis", 0) not in (-1, len(shape) - 1) or factor.ndim > 1:
        return f"{label(node)} does not split the channels"
    if any(width is None for width in widths):
        return f"the shapes behind {label(node)} are not known"
    whole = [factor if o is part else np.ones(w) for o, w in zip(node.outputs, widths, strict=True)]  # type: ignore[arg-type]
    return _push_input(node, 0, np.concatenate(whole))


def _attention(node: ir.Node, factor: np.ndarray) -> _Path | str:
    """The values of an attention whose heads each have keys and values of their own: an average keeps a scale."""
    inputs = list(node.inputs) + [None] * (10 - len(node.inputs))
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return f"{label(node)} returns more than its result"
    standard = node.domain != MICROSOFT
    bias = None if standard else inputs[3]
    if any(v is not None for v in (inputs[4:6] if standard else inputs[6:])):
        return f"{label(node)} keeps a cache"
    shape, heads = dims(inputs[2]), attribute(node, "q_num_heads" if standard else "num_heads", 1)
    if shape is None or (len(shape) != 3 and not standard) or len(shape) not in (3, 4):
        return f"the values of {label(node)} are not [batch, length, width]"
    if standard and len(shape) == 3 and attribute(node, "kv_num_heads", heads) != heads:
        return f"the heads of {label(node)} share keys and values"
    if factor.ndim > 1 and (len(shape) == 3 or factor.shape[-2] != 1):
        return f"the scale differs along the rows of {label(node)}"
    array = None if bias is None else _array(node, 3)
    if bias is not None and array is None:
        return f"the bias of {label(node)} is no constant"
    path = _push_input(node, 2, factor)
    if isinstance(path, _Path) and array is not None:  # of queries, keys and values behind each other
        path.edits.append(_Edit(node, 3, np.concatenate([np.ones(array.size - factor.size), factor])))
    return path


_Rule = Callable[[ir.Node, np.ndarray], _Path | str]
_RULES: dict[tuple[str, str], _Rule] = {
    ("", "LayerNormalization"): _norm(1, 2),
    ("", "RMSNormalization"): _norm(1),
    ("", "SimplifiedLayerNormalization"): _norm(1),  # ONNX Runtime's own, though in the standard domain
    (MICROSOFT, "SimplifiedLayerNormalization"): _norm(1),
    (MICROSOFT, "SkipLayerNormalization"): _norm(2, 3),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _norm(2),
    (MICROSOFT, "EmbedLayerNormalization"): _norm(5, 6),
    ("", "Mul"): _multiplied,
    ("", "Div"): _divided,
    ("", "Add"): _added,
    ("", "Sub"): _added,
    ("", "MatMul"): _matrix_product,
    ("", "Gemm"): _gemm,
    ("", "Relu"): _passed,
    ("", "LeakyRelu"): _passed,
    ("", "Neg"): _passed,
    ("", "Abs"): _passed,
    ("", "Identity"): _passed,
    ("", "Transpose"): _transposed,
    ("", "Reshape"): _reshaped,
    ("", "Squeeze"): _reshaped,
    ("", "Unsqueeze"): _reshaped,
    ("", "Flatten"): _reshaped,
    ("", "Gather"): _gathered,
    ("", "Attention"): _attention,
    (MICROSOFT, "MultiHeadAttention"): _attention,
}
