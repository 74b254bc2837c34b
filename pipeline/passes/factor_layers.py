# SPDX-License-Identifier: Apache-2.0
"""The layers that two thin factors can stand for: how each is found, seen as a matrix, measured and written again.

product   x W                   -> (x A) B, in the MatMul or Gemm that was there; its bias, alpha and beta stay
conv      convolution, k x k    -> k x k to `rank` channels, with the strides and pads of the old one, then 1 x 1: every
                                   output channel is a mixture of few filters (Denton et al., arXiv 1404.0736, 3.2,
                                   monochromatic; Zhang et al., arXiv 1505.06798, 3.1)
rows      rows of an embedding  -> rows of a thin table, then x B

The input of a convolution that its weight is multiplied by is a patch: C x k x k numbers for each output position.
A convolution with the identity for a weight makes those patches inside the graph, so that X^T X over them is measured
like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_ir as ir

from .base import Left, Plan
from .folding import matrix_of
from .graph import (
    add_weight,
    attribute,
    consumers,
    dims,
    initializers_of,
    is_op,
    is_weight,
    label,
    make_node,
    nodes_of,
    replace_node,
)
from .layer_inputs import rows_read
from .matrix_weights import drop_dead_transposes, why_unfit

Kind = Literal["product", "conv", "rows"]

WIDEST_PATCH = 4608
"""Beyond it, X^T X of the patches alone would take more than 170 MB, and hours to measure."""


@dataclass(eq=False)
class Layer:
    """A weight and all of its readers, which use it in the same way.

    Attributes:
        key: The weight's name in plans.
        weight: The initializer, float32.
        kind: See above.
        input_axis: Of a product: the axis of the weight that runs over input channels.
        nodes: The readers.
    """

    key: str
    weight: ir.Value
    kind: Kind
    input_axis: int = 0
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """What the weight is multiplied by; for an embedding, the indices."""
        index = 1 if self.kind == "rows" else 0
        return tuple(dict.fromkeys(v for node in self.nodes if (v := node.inputs[index]) is not None))

    @property
    def shape(self) -> tuple[int, int]:
        """Of `matrix`."""
        assert self.weight.const_value is not None
        sizes = [int(n) for n in self.weight.const_value.shape.numpy()]
        if self.kind == "conv":
            return int(np.prod(sizes[1:])), sizes[0]
        return (sizes[0], sizes[1]) if self.input_axis == 0 else (sizes[1], sizes[0])

    def matrix(self) -> np.ndarray:
        """float32 [in, out]: [C x k x k, M] of a convolution, [rows, columns] of an embedding; a view."""
        assert self.weight.const_value is not None
        array = self.weight.const_value.numpy()
        if self.kind == "conv":
            return array.reshape(len(array), -1).T
        return array if self.input_axis == 0 else array.T

    def stored_factors(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The factors [in, rank] and [rank, out] in the shapes that the new nodes read."""
        if self.kind != "conv":
            return left, right
        assert self.weight.const_value is not None
        _, *sizes = (int(n) for n in self.weight.const_value.shape.numpy())
        rank, ones = left.shape[1], [1] * (len(sizes) - 1)
        return left.T.reshape(rank, *sizes), right.T.reshape(-1, rank, *ones)


def find_layers(
    model: ir.Model, plan: Plan, *, operators: Collection[str], minimum_elements: int, exclude: Iterable[str]
) -> list[Layer]:
    """The layers with one fp32 weight, in graph order; `plan` learns what was seen, and what stays and why.

    Args:
        model: The graph.
        plan: Its `seen` and `left` are added to.
        operators: Which of MatMul, Gemm, Conv and Gather.
        minimum_elements: Smaller weights stay.
        exclude: Patterns of node or weight names.
    """
    keys = {weight: key for key, weight in initializers_of(model).items()}
    patterns, found, unfit = tuple(exclude), dict[ir.Value, Layer](), dict[ir.Value, str | None]()
    for node in nodes_of(model):
        if not is_op(node, "MatMul", "Gemm", "Conv", "Gather") or node.op_type not in operators:
            continue
        seen = _weight_of(node)
        if seen is None:  # a Gather that picks from an activation is no candidate
            continue
        plan.seen += 1
        if isinstance(seen, str):
            plan.left.append(Left(label(node), seen))
            continue
        weight, kind, axis = seen
        if any(fnmatchcase(name, pattern) for pattern in patterns for name in (label(node), str(weight.name))):
            plan.left.append(Left(label(node), "excluded by name"))
            continue
        if weight not in unfit:
            unfit[weight] = _other_reader(weight, kind, axis, operators) or why_unfit(weight, minimum_elements)
        if (reason := unfit[weight]) is not None:
            plan.left.append(Left(label(node), reason))
            continue
        found.setdefault(weight, Layer(keys[weight], weight, kind, axis)).nodes.append(node)
    return _whole(found.values(), plan)


def _whole(layers: Iterable[Layer], plan: Plan) -> list[Layer]:
    """Without those of which a reader was excluded: the weight would have to be stored in both forms."""
    kept = []
    for layer in layers:
        if len(layer.nodes) == len(_readers(layer.weight)):
            kept.append(layer)
            continue
        plan.left += [Left(label(node), "another reader of the weight is excluded") for node in layer.nodes]
    return kept


def _weight_of(node: ir.Node) -> tuple[ir.Value, Kind, int] | str | None:
    """The weight that `node` reads and how; a reason why it cannot be factorized; None if it is not about weights."""
    if is_op(node, "Gather"):
        table = node.inputs[0]
        if table is None or not is_weight(table) or table.const_value is None or len(table.const_value.shape) != 2:
            return None
        if not table.const_value.dtype.is_floating_point():
            return None
        return (table, "rows", 0) if attribute(node, "axis", 0) in (0, -2) else "Gather does not pick rows"
    if is_op(node, "Conv"):
        weight = node.inputs[1]
        if weight is None or not is_weight(weight):
            return "the weight is no initializer"
        if attribute(node, "group", 1) != 1:
            return f"a convolution in {attribute(node, 'group', 1)} groups: each is a small matrix of its own"
        return (weight, "conv", 0)
    matrix = matrix_of(node)
    return matrix if isinstance(matrix, str) else (matrix.stored, "product", matrix.input_axis)


def _readers(weight: ir.Value) -> list[tuple[ir.Node, int]]:
    """Every node that reads the weight, and at which input; a Transpose on the way is seen through."""
    found = []
    for use in weight.uses():
        turned = is_op(use.node, "Transpose")
        found += [(u.node, u.idx) for u in (use.node.outputs[0].uses() if turned else (use,))]
    return found


def _other_reader(weight: ir.Value, kind: Kind, axis: int, operators: Collection[str]) -> str | None:
    """What reads the weight in another way than (kind, axis), so that both forms would have to be stored."""
    turned = [node.outputs[0] for node in consumers(weight) if is_op(node, "Transpose")]
    if weight.is_graph_output() or any(value.is_graph_output() for value in turned):
        return "the weight is an output of the graph"
    for node, index in _readers(weight):
        same = node.op_type in operators and _weight_of(node) == (weight, kind, axis)
        if not same or index != (0 if kind == "rows" else 1):
            return f"the weight is also read by {label(node)} ({node.op_type})"
    return None


@dataclass(eq=False)
class Patches:
    """A convolution and the value, in a copy of the graph, that holds what its weight is multiplied by."""

    layer: Layer
    inputs: tuple[ir.Value, ...]


def patches_of(model: ir.Model, layers: Iterable[Layer]) -> tuple[ir.Model, list[Patches]]:
    """A copy of the graph that also makes the patches which convolutions multiply with, [..., C x k x k].

    Args:
        model: Stays as it is.
        layers: Convolutions, each with one reader.

    Returns:
        The copy and the patches; too wide ones, and those of values inside subgraphs, are left out.
    """
    copy, made = model.clone(), list[Patches]()
    values = {value.name: value for value in _values(copy)}
    for number, layer in enumerate(layers):
        assert layer.weight.const_value is not None
        width, window = layer.shape[0], [int(n) for n in layer.weight.const_value.shape.numpy()[1:]]
        source, name = values.get(layer.inputs[0].name), f"onnxpress_patches_{number}"
        if width > WIDEST_PATCH or source is None:
            continue
        identity = np.eye(width, dtype=np.float32).reshape(-1, *window)
        rows = rows_read(copy, layer.nodes[0], source, name, identity)
        made.append(Patches(layer, (rows,)))
    return copy, made


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]


def write_factors(model: ir.Model, layer: Layer, left: np.ndarray, right: np.ndarray) -> list[ir.Node]:
    """Let all readers of the layer's weight read two factors in its place.

    Args:
        model: Changed in place; the old weight stays behind without readers.
        layer: As `find_layers` found it.
        left: float32 [in, rank].
        right: float32 [rank, out].

    Returns:
        The nodes that now make what the layer's nodes made.
    """
    home = layer.weight.graph if isinstance(layer.weight.graph, ir.Graph) else model.graph
    arrays = zip(("left", "right"), layer.stored_factors(left, right), strict=True)
    factors = [add_weight(model, home, f"{layer.weight.name}_{side}", array) for side, array in arrays]
    write = {"product": _write_product, "conv": _write_conv, "rows": _write_rows}[layer.kind]
    written = [write(node, *factors) for node in layer.nodes]
    drop_dead_transposes(layer.weight)
    return written


def _write_product(node: ir.Node, left: ir.Value, right: ir.Value) -> ir.Node:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    first = make_node("MatMul", [node.inputs[0], left], [f"{node.outputs[0].name}_thin"])
    first.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    shape = dims(node.outputs[0])
    first.outputs[0].shape = None if shape is None else ir.Shape([*shape[:-1], _size(left)[1]])
    graph.insert_before(node, first)
    node.replace_input_with(0, first.outputs[0])
    node.replace_input_with(1, right)
    if is_op(node, "Gemm"):
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    return node


def _write_conv(node: ir.Node, left: ir.Value, right: ir.Value) -> ir.Node:
    kept = {name: attr for name, attr in node.attributes.items() if name != "kernel_shape"}
    window = {"kernel_shape": list(_size(left)[2:])}
    first = make_node("Conv", [node.inputs[0], left], [f"{node.outputs[0].name}_thin"], attributes={**kept, **window})
    bias = [value for value in node.inputs[2:] if value is not None]
    ones = {"kernel_shape": list(_size(right)[2:])}
    mixed = make_node("Conv", [first.outputs[0], right, *bias], [f"{node.outputs[0].name}_mixed"], attributes=ones)
    mixed.name = node.name
    replace_node(node, [first, mixed])
    return mixed


def _write_rows(node: ir.Node, left: ir.Value, right: ir.Value) -> ir.Node:
    rows = make_node("Gather", [left, node.inputs[1]], [f"{node.outputs[0].name}_thin"], attributes={"axis": 0})
    wide = make_node("MatMul", [rows.outputs[0], right], [f"{node.outputs[0].name}_wide"])
    replace_node(node, [rows, wide])
    return wide


def _size(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(n) for n in value.const_value.shape.numpy())
