# SPDX-License-Identifier: Apache-2.0
"""Which weights are matrices that products (or embeddings) read, by whom and how; and how one is rounded to int8."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from ...exporters.streamed_tensor import streamed
from .graph import attribute, consumers, is_op, is_weight, label, make_node, nodes_of, producer, replace_node

_BLOCK = 1 << 20
"""Weights are quantized about so many elements at a time, which stay in the processor's cache."""


@dataclass
class WeightUse:
    """One reader of a weight.

    Attributes:
        kind: `product` reads [in, out], `product_transposed` [out, in], `rows` picks rows by index, `bias` is added
            by a Gemm, `other` is anything else.
        axis: The axis of the weight that counts output channels (or rows).
        problem: Why this reader cannot do with int8, if so.
    """

    node: ir.Node
    kind: str
    axis: int = 0
    problem: str | None = field(default=None)


def weights_in_use(model: ir.Model) -> dict[ir.Value, list[WeightUse]]:
    """Every matrix-shaped weight with all of its readers, in graph order; a Transpose on the way is seen through."""
    found: dict[ir.Value, list[WeightUse]] = {}
    for node in nodes_of(model):
        for value in dict.fromkeys(node.inputs):
            if value is None or not is_weight(value) or value in found:
                continue
            assert value.const_value is not None
            if len(value.const_value.shape) == 2 and value.const_value.dtype.is_floating_point():
                found[value] = uses_of(value)
    return found


def uses_of(weight: ir.Value) -> list[WeightUse]:
    uses: list[WeightUse] = []
    if weight.is_graph_output():
        uses.append(WeightUse(consumers(weight)[0], "other", problem="the weight is an output of the graph"))
    for use in weight.uses():
        node = use.node
        if is_op(node, "Transpose") and list(attribute(node, "perm", [1, 0])) == [1, 0]:
            if node.outputs[0].is_graph_output():
                uses.append(WeightUse(node, "other", problem="the weight, transposed, is an output of the graph"))
            for reader in node.outputs[0].uses():
                uses.append(_product(reader.node, reader.idx, transposed=True))
        else:
            uses.append(_classify(node, use.idx))
    return uses


def _classify(node: ir.Node, index: int) -> WeightUse:
    if is_op(node, "Gather"):
        if index != 0 or attribute(node, "axis", 0) not in (0, -2):
            return WeightUse(node, "other", problem="Gather does not pick rows of the weight")
        return WeightUse(node, "rows", 0)
    return _product(node, index, transposed=False)


def _product(node: ir.Node, index: int, *, transposed: bool) -> WeightUse:
    if is_op(node, "MatMul"):
        if index != 1:
            return WeightUse(node, "other", problem="the weight is the left factor")
        return WeightUse(node, "product_transposed" if transposed else "product", 0 if transposed else 1)
    if is_op(node, "Gemm"):
        if index == 2:
            return WeightUse(node, "bias", problem="the weight is also a bias")
        if index != 1:
            return WeightUse(node, "other", problem="the weight is not the right factor")
        if attribute(node, "transA", 0) or attribute(node, "beta", 1.0) != 1.0 or attribute(node, "alpha", 1.0) != 1.0:
            return WeightUse(node, "other", problem="Gemm with transA, alpha or beta")
        turned = transposed != bool(attribute(node, "transB", 0))
        return WeightUse(node, "product_transposed" if turned else "product", 0 if turned else 1)
    return WeightUse(node, "other", problem=f"the weight is also read by {node.op_type} in fp32")


def why_no_matrix(node: ir.Node) -> str | None:
    """Why neither factor of this product is a matrix among the weights; None if one is."""
    reason = "both inputs are activations"
    for value in node.inputs[:2]:
        turned = producer(value, "Transpose")
        value = turned.inputs[0] if turned is not None else value
        if value is not None and is_weight(value) and value.const_value is not None:
            if len(value.const_value.shape) == 2 and value.const_value.dtype.is_floating_point():
                return None
            reason = "the weight is not a matrix of floating point numbers"
        elif value is not None and value.is_initializer() and value.is_graph_input():
            reason = "the weight is also an input of the graph; put the clean pass before"
        elif producer(value, "Constant") is not None:
            reason = "the weight is a Constant node; put the clean pass before"
    return reason


def why_unfit(weight: ir.Value, minimum_elements: int, *, read: bool = True) -> str | None:
    """Why the numbers themselves cannot be rounded; None if they can. Reads all of them, unless `read` is false."""
    tensor = weight.const_value
    assert tensor is not None
    if tensor.dtype != ir.DataType.FLOAT:
        return f"the weight is {tensor.dtype.name.lower()}, not fp32"
    if not tensor.size:
        return "the weight is empty"
    if tensor.size < minimum_elements:
        return f"the weight has fewer than {minimum_elements} elements"
    in_file = streamed(tensor)
    pieces = [] if not read else [tensor.numpy()] if in_file is None else in_file.pieces()
    return None if all(np.isfinite(piece).all() for piece in pieces) else "the weight holds NaN or infinity"


def why_left(
    weight: ir.Value,
    uses: list[WeightUse],
    *,
    minimum_elements: int,
    operators: Collection[str],
    exclude: Iterable[str],
    one_axis: bool,
    read: bool = True,
) -> str | None:
    """Why a weight stays as it is; None when all of its readers can do with integers.

    Args:
        weight: A matrix.
        uses: All of its readers.
        minimum_elements: Smaller weights stay.
        operators: Readers of other types keep it.
        exclude: Patterns of node or weight names.
        one_axis: Whether all readers have to share the axis that keeps scales.
        read: Whether to look for NaN and infinity.
    """
    patterns = tuple(exclude)
    for use in uses:
        if use.problem:
            return use.problem
        if use.node.op_type not in operators:
            return f"{use.node.op_type} is not among the operators to quantize"
        if any(fnmatchcase(name, pattern) for pattern in patterns for name in (label(use.node), str(weight.name))):
            return "excluded by name"
    if one_axis and len({use.axis for use in uses}) > 1:
        return "its readers need scales on different axes"
    return why_unfit(weight, minimum_elements, read=read)


def quantize_symmetric(array: np.ndarray, *, axis: int | None, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Round a float32 matrix to signed integers with zero point 0.

    Args:
        array: float32 [rows, columns], finite.
        axis: The axis that keeps its own scales; None for one scale.
        bits: 8 gives -127..127, 7 gives -63..63 (the most negative code stays unused, so that the range is symmetric).

    Returns:
        int8 array of the same shape, and float32 scales ([n] or []); integers x scale is finite and within half a step
        of `array`. A channel of zeros gets scale 1.
    """
    top = (1 << (bits - 1)) - 1
    other = None if axis is None else 1 - axis
    peak = np.maximum(array.max(axis=other), -array.min(axis=other))
    # Rounded up, a scale at the end of float32 would dequantize to infinity
    peak = np.minimum(peak, np.nextafter(np.finfo(np.float32).max, np.float32(0)))
    scale = np.asarray(peak / np.float32(top), dtype=np.float32)
    # A subnormal scale would turn into zero on hardware that flushes them, and its reciprocal into infinity
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale).astype(np.float32)
    integers = np.empty(array.shape, np.int8)
    rows = max(1, _BLOCK // max(1, array.shape[1]))
    for start in range(0, array.shape[0], rows):
        block = slice(start, start + rows)
        divisor = scale if axis is None else scale[None, :] if axis == 1 else scale[block, None]
        step = array[block] / divisor
        np.rint(step, out=step)
        integers[block] = step
    return integers, scale


def write_gather(node: ir.Node, stored: ir.Value, scale: ir.Value, per_row: bool) -> None:
    """Let an embedding pick int8 rows and scale what it picked: Cast(Gather(stored, ids)) * Gather(scale, ids)."""
    graph, name, indices = node.graph, str(node.outputs[0].name), node.inputs[1]
    assert isinstance(graph, ir.Graph)
    rows = make_node("Gather", [stored, indices], [f"{name}_rows"], attributes={"axis": 0})
    cast = make_node("Cast", [rows.outputs[0]], [f"{name}_rows_float"], attributes={"to": int(ir.DataType.FLOAT)})
    new = [rows, cast]
    factor = scale
    if per_row:
        new.append(make_node("Gather", [scale, indices], [f"{name}_scales"], attributes={"axis": 0}))
        factor = new[-1].outputs[0]
    new.append(make_node("Mul", [cast.outputs[0], factor], [f"{name}_dequantized"]))
    replace_node(node, new)


def transposed_once(graph: ir.Graph, stored: ir.Value) -> ir.Value:
    """Transpose(stored), made once, where all products that read it can see it; the runtime folds it when it loads."""
    for reader in consumers(stored):
        if is_op(reader, "Transpose"):
            return reader.outputs[0]
    turned = make_node("Transpose", [stored], [f"{stored.name}.T"], attributes={"perm": [1, 0]})
    graph.insert_before(graph[0], turned)
    return turned.outputs[0]


def drop_dead_transposes(weight: ir.Value) -> None:
    """Remove the Transposes of a weight that nothing reads any more."""
    for node in consumers(weight):
        if is_op(node, "Transpose") and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            assert isinstance(node.graph, ir.Graph)
            node.graph.remove(node, safe=True)
