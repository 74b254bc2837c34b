# SPDX-License-Identifier: Apache-2.0
"""`quantize_dynamic`: int8 weights, activations quantized as they come, in standard ONNX operators.

    MatMul(x, W)      -> q, s, z = DynamicQuantizeLinear(x);  Cast(MatMulInteger(q, W8, z)) * (s * s_W)
    Gemm(x, W, b)     -> the same, + b
    Gather(E, ids)    -> Cast(Gather(E8, ids)) * Gather(s_E, ids)

Activations are uint8 with one scale a tensor, weights int8, symmetric, with one scale an output channel (an embedding
has one a row). ONNX Runtime fuses the first two when it loads them, into DynamicQuantizeMatMul and
MatMulIntegerToFloat; every other runtime can still read the file. One DynamicQuantizeLinear serves all products that
read the same activation.

Reference: operators DynamicQuantizeLinear-11 and MatMulInteger-10 of the ONNX specification; symmetric per-channel
weights as in Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (arXiv 1806.08342), 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from .base import Left, Pass, Plan, register
from .graph import (
    add_weight,
    attribute,
    consumers,
    drop_unused_weights,
    initializers_of,
    is_op,
    is_weight,
    label,
    make_node,
    nodes_of,
    producer,
    replace_node,
)

Operator = Literal["MatMul", "Gemm", "Gather"]
_BLOCK = 1 << 20
"""Weights are quantized about so many elements at a time, which stay in the processor's cache."""


@register("quantize_dynamic")
class QuantizeDynamic(Pass):
    """Settings.

    Attributes:
        operators: Which operators are quantized.
        per_channel: One weight scale an output channel; otherwise one a tensor.
        reduce_range: 7 bit weights, for x86 processors without VNNI, whose int8 kernels add pairs of products in 16 bit
            and saturate.
        minimum_elements: Smaller weights stay fp32: a classifier's head costs accuracy and saves nothing.
        exclude: Patterns (`*`, `?`) of node or weight names that stay fp32.
    """

    operators: tuple[Operator, ...] = ("MatMul", "Gemm", "Gather")
    per_channel: bool = True
    reduce_range: bool = False
    minimum_elements: int = Field(default=4096, ge=0)
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model) -> Plan:
        plan = Plan()
        keys = {weight: key for key, weight in initializers_of(model).items()}
        for weight, uses in _weights_in_use(model).items():
            candidates = [use for use in uses if is_op(use.node, "MatMul", "Gemm", "Gather") and use.kind != "bias"]
            plan.seen += len(candidates)
            if not candidates:
                continue
            reason = self._why_not(weight, uses)
            if reason:
                plan.left += [Left(label(use.node), reason) for use in candidates]
                continue
            plan.actions.append(
                {
                    "weight": keys[weight],
                    "axis": uses[0].axis,
                    "uses": [{"kind": use.kind, "node": label(use.node)} for use in uses],
                }
            )
        for node in nodes_of(model):
            reason = _why_no_candidate(node) if is_op(node, "MatMul", "Gemm") else None
            if reason:
                plan.seen += 1
                plan.left.append(Left(label(node), reason))
        plan.details = _coverage(model, plan)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        uses, by_key = _weights_in_use(model), initializers_of(model)
        for action in plan.actions:
            weight = by_key[action["weight"]]
            self._rewrite(model, weight, uses[weight])
            _drop_dead_transposes(weight)
            # Let go of the fp32 copy now, not at the end: a large model is never held twice
            weight.const_value = None if not weight.uses() else weight.const_value
        model.graph.sort()  # a DynamicQuantizeLinear that was there already may stand behind its new readers
        drop_unused_weights(model)
        return model

    def _why_not(self, weight: ir.Value, uses: list[_Use]) -> str | None:
        """The reason why this weight stays as it is, or None when all of its readers can do with int8."""
        tensor = weight.const_value
        assert tensor is not None
        if tensor.dtype != ir.DataType.FLOAT:
            return f"the weight is {tensor.dtype.name.lower()}, not fp32"
        if not tensor.size:
            return "the weight is empty"
        if tensor.size < self.minimum_elements:
            return f"the weight has fewer than {self.minimum_elements} elements"
        for use in uses:
            if use.problem:
                return use.problem
            if use.node.op_type not in self.operators:
                return f"{use.node.op_type} is not among the operators to quantize"
            if any(fnmatchcase(n, pattern) for pattern in self.exclude for n in (label(use.node), str(weight.name))):
                return "excluded by name"
        if self.per_channel and len({use.axis for use in uses}) > 1:
            return "its readers need scales on different axes"
        if not np.isfinite(tensor.numpy()).all():
            return "the weight holds NaN or infinity"
        return None

    def _rewrite(self, model: ir.Model, weight: ir.Value, uses: list[_Use]) -> None:
        assert weight.const_value is not None
        # Stored as the products read it, [in, out]; as it was where an embedding reads it too
        turn = all(use.kind == "product_transposed" for use in uses)
        array = weight.const_value.numpy()
        integers, scale = quantize_symmetric(
            array, axis=uses[0].axis if self.per_channel else None, bits=7 if self.reduce_range else 8
        )
        if turn:
            integers = integers.T
        home = weight.graph if isinstance(weight.graph, ir.Graph) else model.graph
        stored = add_weight(model, home, f"{weight.name}_int8", integers)
        scales: dict[str, ir.Value] = {}
        for use in uses:
            form = "rows" if use.kind == "rows" and self.per_channel else "flat"
            if form not in scales:
                values = scale.reshape(-1, 1) if form == "rows" else scale
                scales[form] = add_weight(model, home, f"{weight.name}_scale", values)
            if use.kind == "rows":
                _write_gather(use.node, stored, scales[form], self.per_channel)
            else:
                matrix = stored if turn or use.kind == "product" else _transposed_once(home, stored)
                _write_product(use.node, matrix, scales[form])


@dataclass
class _Use:
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


def _weights_in_use(model: ir.Model) -> dict[ir.Value, list[_Use]]:
    """Every matrix-shaped weight with all of its readers, in graph order; a Transpose on the way is seen through."""
    found: dict[ir.Value, list[_Use]] = {}
    for node in nodes_of(model):
        for value in dict.fromkeys(node.inputs):
            if value is None or not is_weight(value) or value in found:
                continue
            assert value.const_value is not None
            if len(value.const_value.shape) == 2 and value.const_value.dtype.is_floating_point():
                found[value] = _uses(value)
    return found


def _uses(weight: ir.Value) -> list[_Use]:
    uses: list[_Use] = []
    if weight.is_graph_output():
        uses.append(_Use(consumers(weight)[0], "other", problem="the weight is an output of the graph"))
    for use in weight.uses():
        node = use.node
        if is_op(node, "Transpose") and list(attribute(node, "perm", [1, 0])) == [1, 0]:
            if node.outputs[0].is_graph_output():
                uses.append(_Use(node, "other", problem="the weight, transposed, is an output of the graph"))
            for reader in node.outputs[0].uses():
                uses.append(_product(reader.node, reader.idx, transposed=True))
        else:
            uses.append(_classify(node, use.idx))
    return uses


def _classify(node: ir.Node, index: int) -> _Use:
    if is_op(node, "Gather"):
        if index != 0 or attribute(node, "axis", 0) not in (0, -2):
            return _Use(node, "other", problem="Gather does not pick rows of the weight")
        return _Use(node, "rows", 0)
    return _product(node, index, transposed=False)


def _product(node: ir.Node, index: int, *, transposed: bool) -> _Use:
    if is_op(node, "MatMul"):
        if index != 1:
            return _Use(node, "other", problem="the weight is the left factor")
        return _Use(node, "product_transposed" if transposed else "product", 0 if transposed else 1)
    if is_op(node, "Gemm"):
        if index == 2:
            return _Use(node, "bias", problem="the weight is also a bias")
        if index != 1:
            return _Use(node, "other", problem="the weight is not the right factor")
        if attribute(node, "transA", 0) or attribute(node, "beta", 1.0) != 1.0 or attribute(node, "alpha", 1.0) != 1.0:
            return _Use(node, "other", problem="Gemm with transA, alpha or beta")
        turned = transposed != bool(attribute(node, "transB", 0))
        return _Use(node, "product_transposed" if turned else "product", 0 if turned else 1)
    return _Use(node, "other", problem=f"the weight is also read by {node.op_type} in fp32")


def _why_no_candidate(node: ir.Node) -> str | None:
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


def _write_gather(node: ir.Node, stored: ir.Value, scale: ir.Value, per_row: bool) -> None:
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


def _quantized_once(source: ir.Value, graph: ir.Graph) -> ir.Node:
    """DynamicQuantizeLinear(source), made once for all products of `graph` that read it."""
    for reader in consumers(source):
        if is_op(reader, "DynamicQuantizeLinear") and reader.graph is graph:
            return reader
    quantized = make_node(
        "DynamicQuantizeLinear", [source], [f"{source.name}_{part}" for part in ("uint8", "scale", "zero_point")]
    )
    # Nodes are visited weight by weight, so the first reader met is not always the first in the graph
    place = source.producer()
    if place is not None and place.graph is graph:
        graph.insert_after(place, quantized)
    else:
        graph.insert_before(graph[0], quantized)
    return quantized


def _write_product(node: ir.Node, matrix: ir.Value, scale: ir.Value) -> None:
    graph, name, source = node.graph, str(node.outputs[0].name), node.inputs[0]
    assert isinstance(graph, ir.Graph)
    assert source is not None
    codes, step, zero = _quantized_once(source, graph).outputs
    product = make_node("MatMulInteger", [codes, matrix, zero], [f"{name}_int32"])
    # A profile then says `encoder.layer.0.intermediate.dense.weight`, not `node_MatMulInteger_140`
    product.name = str(matrix.name).replace(".T", "").removesuffix("_int8")
    cast = make_node("Cast", [product.outputs[0]], [f"{name}_float"], attributes={"to": int(ir.DataType.FLOAT)})
    factor = make_node("Mul", [step, scale], [f"{name}_scale"])
    new = [product, cast, factor, make_node("Mul", [cast.outputs[0], factor.outputs[0]], [f"{name}_dequantized"])]
    if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
        new.append(make_node("Add", [new[-1].outputs[0], node.inputs[2]], [f"{name}_biased"]))
    replace_node(node, new)


def _transposed_once(graph: ir.Graph, stored: ir.Value) -> ir.Value:
    """Transpose(stored), made once, where all products that read it can see it; the runtime folds it when it loads."""
    for reader in consumers(stored):
        if is_op(reader, "Transpose"):
            return reader.outputs[0]
    turned = make_node("Transpose", [stored], [f"{stored.name}.T"], attributes={"perm": [1, 0]})
    graph.insert_before(graph[0], turned)
    return turned.outputs[0]


def _drop_dead_transposes(weight: ir.Value) -> None:
    for node in consumers(weight):
        if is_op(node, "Transpose") and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            assert isinstance(node.graph, ir.Graph)
            node.graph.remove(node, safe=True)


def _coverage(model: ir.Model, plan: Plan) -> dict[str, int | float]:
    """How much of the weights becomes int8: the figure that shows a quantizer which skipped most of the model."""
    tensors = {key: value.const_value for key, value in initializers_of(model).items()}
    sizes = {key: t.size for key, t in tensors.items() if t is not None and t.dtype.is_floating_point()}
    total, covered = sum(sizes.values()), sum(sizes[action["weight"]] for action in plan.actions)
    return {
        "weights_quantized": len(plan.actions),
        "weights_seen": len(_weights_in_use(model)),
        "elements_quantized_percent": round(100 * covered / total, 2) if total else 0.0,
    }
