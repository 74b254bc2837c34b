# SPDX-License-Identifier: Apache-2.0
"""`quantize_static`: int8 weights and activations with ranges from calibration data, as pairs of Q and DQ operators.

    MatMul(x, W)     -> MatMul(DQ(Q(x)), DQ(W8))           W8 with one scale an output channel
    Gemm(x, W, b)    -> Gemm(DQ(Q(x)), DQ(W8), DQ(b32))    on the CPU provider; the same for MatMul and Add of rank 2
    Conv(x, W, b)    -> Conv(DQ(Q(x)), DQ(W8), DQ(b32))    on the CPU provider; then Q and DQ behind it as well
    MatMul(x, y)     -> MatMul(DQ(Q(x)), DQ(Q(y)))         attention, where the target has an integer kernel for it
    Gather(E, ids)   -> Cast(Gather(E8, ids)) * Gather(s_E, ids)

The pairs are standard ONNX: any runtime computes them, and the target's compiler turns them into integer kernels. Where
they stand follows from the target; see `placement`.

Reference: operators QuantizeLinear and DequantizeLinear of the ONNX specification; Jacob et al., "Quantization and
training of neural networks for efficient integer-arithmetic-only inference" (arXiv 1712.05877), 2.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from pydantic import Field

from ...contracts.errors import InputError
from ...exporters import graph_file
from ..cost import multiply_adds, values_to_measure
from ..statistics import Calibration, Statistics, Wanted
from ..statistics.ranges import (
    HISTOGRAM_METHODS,
    IntegerType,
    RangeMethod,
    activation_range,
    quantized_range,
)
from .base import Pass, Plan, register
from .graph import drop_unused_weights, initializers_of, is_op, is_weight, label, nodes_of, producer
from .matrix_weights import WeightUse, why_unfit
from .placement import Attention, Placement, Target, place
from .qdq import write

Operator = Literal["MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"]

_ATTENTION: dict[Target, Attention] = {"cpu": "none", "openvino": "scores", "tensorrt": "all"}


@register("quantize_static")
class QuantizeStatic(Pass):
    """Settings.

    Attributes:
        target: For whose kernels the pairs are placed: `cpu` (ONNX Runtime), `openvino` (mobile NPUs as well), or
            `tensorrt` (CUDA through TensorRT: everything symmetric).
        activations: Integer type of activations; None is the target's: uint8, for tensorrt int8. ONNX Runtime on x86
            fuses int8 only partly, and 16 bits on no processor: those are for accuracy, and for other runtimes.
        symmetric: Whether the activations' zero is in the middle of their type; None is the target's choice.
        ranges: How a range follows from what was measured; see `statistics.ranges`.
        percentile: For that method, in percent.
        operators: Which operators become integers.
        attention: Which products of two activations do: `none`, the `scores` (query times key), or `all`; None is the
            target's choice: none for cpu, scores for openvino, all for tensorrt.
        per_channel: One weight scale an output channel; otherwise one a tensor.
        reduce_range: 7 bit weights, for x86 processors without VNNI, whose int8 kernels saturate.
        minimum_elements: Smaller matrices stay fp32: a classifier's head costs accuracy and saves nothing.
        minimum_share: The pass fails when less than this percentage of all multiply-adds would run in integers.
        exclude: Patterns (`*`, `?`) of node or weight names that stay fp32.
    """

    target: Target = "cpu"
    activations: IntegerType | None = None
    symmetric: bool | None = None
    ranges: RangeMethod = "minmax"
    percentile: float = Field(default=99.999, gt=50, le=100)
    operators: tuple[Operator, ...] = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
    attention: Attention | None = None
    per_channel: bool = True
    reduce_range: bool = False
    minimum_elements: int = Field(default=4096, ge=0)
    minimum_share: float = Field(default=50.0, ge=0, le=100)
    exclude: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("histograms",) if self.ranges in HISTOGRAM_METHODS else ("ranges",)

    @property
    def integers(self) -> IntegerType:
        return self.activations or ("int8" if self.target == "tensorrt" else "uint8")

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        assert calibration is not None
        _require_float(model)
        costs = multiply_adds(model, calibration.shapes(model, values_to_measure(model)))
        placement, statistics = self._place(model), Statistics()
        while placement.products:
            self._check_share(costs, placement)  # before anything is measured, as it takes long
            names = [name for value in placement.measured if not _known(name := str(value.name), statistics)]
            if not names:
                break
            wanted = Wanted(histograms=names) if self.needs == ("histograms",) else Wanted(ranges=names)
            statistics.update(calibration.collect(model, wanted))
            placement = self._place(model, unmeasured=statistics.missing)
        plan = Plan(seen=placement.seen, left=placement.left)
        if not placement.products:
            return plan
        keys = {value: key for key, value in initializers_of(model).items()}
        for value in placement.measured:
            plan.actions.append(self._quantize(value, statistics, symmetric=value in placement.symmetric))
        for product in placement.products:
            weight = {"weight": keys[product.weight]} if product.weight is not None else {}
            plan.actions.append({"node": label(product.node), **weight})
        operators = [product.node.op_type for product in placement.products]
        plan.details = {
            "multiply_adds_percent": round(_share(costs, placement), 2),
            "values_quantized": len(placement.measured),
            "flowing": len(placement.flowing),
            **{op: operators.count(op) for op in sorted(set(operators))},
        }
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        model = graph_file.at_least(model, 21 if "16" in self.integers else 13, "the graph")
        # Placed again on the graph as it is: what the plan left, or somebody struck from it, stays in floating point
        chosen = {action["node"] for action in plan.actions if "node" in action}
        ranges = {action["value"]: action for action in plan.actions if "value" in action}
        absent: dict[str, str] = {}
        while True:
            placement = self._place(model, chosen=chosen, unmeasured=absent)
            more = [str(value.name) for value in placement.measured if value.name not in ranges]
            if not more:
                break
            absent |= dict.fromkeys(more, "not in the plan")
        write(
            model,
            placement,
            {name: (a["scale"], np.asarray(a["zero_point"], a["type"])) for name, a in ranges.items()},
            per_channel=self.per_channel,
            bits=7 if self.reduce_range else 8,
            integer_bias=self.target != "tensorrt",
        )
        model.graph.sort()
        RemoveUnusedNodesPass()(model)
        drop_unused_weights(model)
        return model

    def _place(
        self, model: ir.Model, *, chosen: Container[str] | None = None, unmeasured: Mapping[str, str] | None = None
    ) -> Placement:
        """Decide; of the products whose labels are `chosen`, if given."""

        def excluded(node: ir.Node) -> str | None:
            return (
                "not in the plan" if chosen is not None and label(node) not in chosen else self._excluded(model, node)
            )

        return place(
            model,
            self.target,
            attention=self.attention or _ATTENTION[self.target],
            symmetric=self._symmetric,
            weight_problem=self._weight_problem,
            excluded=excluded,
            unmeasured=unmeasured or {},
        )

    @property
    def _symmetric(self) -> bool:
        return self.target == "tensorrt" if self.symmetric is None else self.symmetric

    def _excluded(self, model: ir.Model, node: ir.Node) -> str | None:
        if node.graph is not model.graph and node.op_type != "Gather":
            return "inside a subgraph: its values cannot be measured"
        if node.op_type not in self.operators:
            return f"{node.op_type} is not among the operators to quantize"
        names = [label(node), *(str(weight.name) for weight in _weights_of(node))]
        if any(fnmatchcase(name, pattern) for pattern in self.exclude for name in names):
            return "excluded by name"
        return None

    def _weight_problem(self, weight: ir.Value, uses: list[WeightUse]) -> str | None:
        problem = next((use.problem or f"the weight is also a {use.kind}" for use in uses if _blocks(use)), None)
        if problem is None and self.per_channel and len({use.axis for use in uses}) > 1:
            problem = "its readers need scales on different axes"
        return problem or why_unfit(weight, 0 if uses[0].kind == "conv" else self.minimum_elements)

    def _quantize(self, value: ir.Value, statistics: Statistics, *, symmetric: bool) -> dict[str, object]:
        integers: IntegerType = "int8" if symmetric else self.integers
        limits, symmetric = np.iinfo(integers), symmetric or self._symmetric
        low, high = activation_range(
            statistics,
            str(value.name),
            self.ranges,
            percentile=self.percentile,
            levels=int(limits.max) - int(limits.min) + 1,
            symmetric=symmetric,
        )
        found = quantized_range(low, high, integers, symmetric=symmetric)
        return {
            "value": str(value.name),
            "low": found.low,
            "high": found.high,
            "scale": found.scale,
            "zero_point": found.zero_point,
            "type": integers,
        }

    def _check_share(self, costs: Mapping[ir.Node, int], placement: Placement) -> None:
        """Raise InputError if too few multiply-adds would run in integers, naming the largest products that stay."""
        share = _share(costs, placement)
        if share >= self.minimum_share:
            return
        inside = {product.node for product in placement.products}
        reasons = {left.node: left.reason for left in placement.left}
        largest = sorted((node for node in costs if node not in inside), key=lambda node: -costs[node])[:3]
        named = "; ".join(f"{label(node)}: {reasons.get(label(node), 'not looked at')}" for node in largest)
        raise InputError(
            f"quantize_static would bring only {share:.1f} % of the multiply-adds to integers ({named})",
            next_step=f"Lower minimum_share ({self.minimum_share:g}), or change what the reasons say.",
        )


def _share(costs: Mapping[ir.Node, int], placement: Placement) -> float:
    """Percentage of the multiply-adds that the placement's products do."""
    total = sum(costs.values())
    return 100 * sum(costs.get(product.node, 0) for product in placement.products) / total if total else 100.0


def _known(name: str, statistics: Statistics) -> bool:
    return any(name in answers for answers in (statistics.ranges, statistics.histograms, statistics.missing))


def _require_float(model: ir.Model) -> None:
    done = next((n for n in nodes_of(model) if is_op(n, "QuantizeLinear", "DynamicQuantizeLinear")), None)
    if done is not None:
        raise InputError(
            f"the model is already quantized ({label(done)})",
            next_step="Start from the fp32 model, or leave quantize_static out.",
        )


def _blocks(use: WeightUse) -> bool:
    return bool(use.problem) or use.kind in ("bias", "other")


def _weights_of(node: ir.Node) -> list[ir.Value]:
    """The weights that a node reads, also through a Transpose."""
    found = []
    for value in node.inputs:
        turned = producer(value, "Transpose")
        value = turned.inputs[0] if turned is not None else value
        if value is not None and is_weight(value):
            found.append(value)
    return found
