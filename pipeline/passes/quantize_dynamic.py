# SPDX-License-Identifier: Apache-2.0
"""`quantize_dynamic`: int8 weights, activations quantized as they come, in standard ONNX operators.

    MatMul(x, W)      -> q, s, z = DynamicQuantizeLinear(x);  Cast(MatMulInteger(q, W8, z)) * (s * s_W)
    Gemm(x, W, b)     -> the same, + b
    Gather(E, ids)    -> Cast(Gather(E8, ids)) * Gather(s_E, ids)
    LSTM(x, W, R)     -> com.microsoft DynamicQuantizeLSTM(x, W8, R8)

Activations are uint8 with one scale a tensor, weights int8, symmetric, with one scale an output channel (an embedding
has one a row). ONNX Runtime fuses the first two when it loads them, into DynamicQuantizeMatMul and
MatMulIntegerToFloat; every other runtime can still read the file. One DynamicQuantizeLinear serves all products that
read the same activation.

Reference: operators DynamicQuantizeLinear-11 and MatMulInteger-10 of the ONNX specification; symmetric per-channel
weights as in Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (arXiv 1806.08342), 3.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import onnx_ir as ir
from pydantic import Field

from ...contracts.errors import InputError
from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .graph import (
    add_weight,
    consumers,
    drop_unused_weights,
    initializers_of,
    is_op,
    label,
    make_node,
    nodes_of,
    replace_node,
)
from .matrix_weights import (
    WeightUse,
    drop_dead_transposes,
    quantize_symmetric,
    transposed_once,
    weights_in_use,
    why_left,
    why_no_matrix,
    write_gather,
)
from .recurrent import why_not_recurrent, write_recurrent

Operator = Literal["MatMul", "Gemm", "Gather", "LSTM"]
_SLOWER = "int8 as it comes makes convolutions 3 to 17 times slower than fp32; quantize_static makes them faster"


@register("quantize_dynamic")
class QuantizeDynamic(Pass):
    """Settings.

    Attributes:
        operators: Which operators are quantized.
        per_channel: One weight scale an output channel; otherwise one a tensor.
        reduce_range: 7 bit weights, for x86 processors without VNNI, whose int8 kernels add pairs of products in 16 bit
            and saturate.
        minimum_elements: Smaller weights stay fp32: a classifier's head costs accuracy and saves nothing.
        minimum_share: The pass fails when it brings less than this percentage of all weights' elements to int8.
        exclude: Patterns (`*`, `?`) of node or weight names that stay fp32.
    """

    operators: tuple[Operator, ...] = ("MatMul", "Gemm", "Gather", "LSTM")
    per_channel: bool = True
    reduce_range: bool = False
    minimum_elements: int = Field(default=4096, ge=0)
    minimum_share: float = Field(default=0.0, ge=0, le=100)
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        keys = {weight: key for key, weight in initializers_of(model).items()}
        for weight, uses in weights_in_use(model).items():
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
            reason = self._plan_other(node, keys, plan)
            if reason:
                plan.seen += 1
                plan.left.append(Left(label(node), reason))
        plan.details = _coverage(model, plan)
        share = plan.details["elements_quantized_percent"]
        if plan.actions and share < self.minimum_share:
            reasons = "; ".join(dict.fromkeys(f"{left.node}: {left.reason}" for left in plan.left[:3]))
            raise InputError(
                f"quantize_dynamic would bring only {share:.1f} % of the weights to int8 ({reasons})",
                next_step=f"Lower minimum_share ({self.minimum_share:g}), or change what the reasons say.",
            )
        return plan

    def _plan_other(self, node: ir.Node, keys: dict[ir.Value, str], plan: Plan) -> str | None:
        """Plan what has no matrix-shaped weight; returns the reason where it stays as it is."""
        if is_op(node, "MatMul", "Gemm"):
            return why_no_matrix(node)
        if is_op(node, "Conv", "ConvTranspose"):
            return _SLOWER
        if not is_op(node, "LSTM", "GRU", "RNN"):
            return None
        reason = why_not_recurrent(node, self.minimum_elements)
        if reason is None and "LSTM" not in self.operators:
            reason = "LSTM is not among the operators to quantize"
        names = [label(node), *(str(value.name) for value in node.inputs[1:3] if value is not None)]
        if reason is None and any(fnmatchcase(name, pattern) for pattern in self.exclude for name in names):
            reason = "excluded by name"
        if reason is None:
            weights = [keys[value] for value in node.inputs[1:3] if value is not None]
            plan.seen += 1
            plan.actions.append({"weight": weights[0], "recurrence": weights[1], "node": label(node)})
        return reason

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        uses, by_key = weights_in_use(model), initializers_of(model)
        for action in plan.actions:
            weight = by_key[action["weight"]]
            if "recurrence" in action:
                write_recurrent(model, consumers(weight)[0], bits=7 if self.reduce_range else 8)
                continue
            self._rewrite(model, weight, uses[weight])
            drop_dead_transposes(weight)
            # Let go of the fp32 copy now, not at the end: a large model is never held twice
            weight.const_value = None if not weight.uses() else weight.const_value
        model.graph.sort()  # a DynamicQuantizeLinear that was there already may stand behind its new readers
        drop_unused_weights(model)
        return model

    def _why_not(self, weight: ir.Value, uses: list[WeightUse]) -> str | None:
        """The reason why this weight stays as it is, or None when all of its readers can do with int8."""
        return why_left(
            weight,
            uses,
            minimum_elements=self.minimum_elements,
            operators=self.operators,
            exclude=self.exclude,
            one_axis=self.per_channel,
        )

    def _rewrite(self, model: ir.Model, weight: ir.Value, uses: list[WeightUse]) -> None:
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
                write_gather(use.node, stored, scales[form], self.per_channel)
            else:
                matrix = stored if turn or use.kind == "product" else transposed_once(home, stored)
                _write_product(use.node, matrix, scales[form])


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


def _coverage(model: ir.Model, plan: Plan) -> dict[str, int | float]:
    """How much of the weights becomes int8: the figure that shows a quantizer which skipped most of the model."""
    tensors = {key: value.const_value for key, value in initializers_of(model).items()}
    sizes = {key: t.size for key, t in tensors.items() if t is not None and t.dtype.is_floating_point()}
    keys = [action[part] for action in plan.actions for part in ("weight", "recurrence") if part in action]
    total, covered = sum(sizes.values()), sum(sizes[key] for key in keys)
    return {
        "weights_quantized": len(keys),
        "weights_seen": len(weights_in_use(model)),
        "elements_quantized_percent": round(100 * covered / total, 2) if total else 0.0,
    }
