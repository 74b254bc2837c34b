# SPDX-License-Identifier: Apache-2.0
"""`quantize_weights`: weights of 8, 4, 3, 2 or fewer bits, activations as they are.

What counts is how a weight is rounded and how it is stored. Rounding is chosen by `method`:

rtn     to nearest, in blocks that share a scale; with `clip_search`, the scale of least squared error
hqq     the same, with an error that lets outliers be; no data needed (quantization/hqq.py)
awq     to nearest, after input channels with large activations have been enlarged (quantization/awq.py)
gptq    column by column, later columns making up for the error of earlier ones (quantization/gptq.py)

awq and gptq measure the Gram matrix X^T X of every input, one group after the other, so that memory does not grow with
the model. A result of gptq is kept only where it is better than rtn's on that input, output channel by output channel.
Storage is chosen by `format`; see `weight_only_nodes`. Weights that only a Gather reads are rounded to nearest (or by
hqq): which of their rows are read is no product.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from ...contracts.errors import InputError, did_you_mean
from ...exporters.streamed_tensor import streamed
from ..quantization.blocks import Grid, Rounded
from ..quantization.codes import WIDTHS, Bits
from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .folding import fold_input_scale, scale_matrices
from .graph import drop_unused_weights, initializers_of, is_op, label, nodes_of
from .matrix_weights import WeightUse, weights_in_use, why_left, why_no_matrix
from .weight_only_late import Latest, LateWeight
from .weight_only_nodes import fills_zero_bytes, form_for, write_weight
from .weight_only_rounding import Layer, Method, Rounding, kept

Operator = Literal["MatMul", "Gemm", "Gather"]


@register("quantize_weights")
class QuantizeWeights(Pass):
    """Settings.

    Attributes:
        bits: 8, 4, 3 or 2; `ternary` for -1, 0, 1; `sign` for -1, 1.
        group_size: How many weights of an output channel, along the inputs, share a scale; None: all of them.
        symmetric: No zero points. ternary and sign have none in any case.
        method: `rtn`, `hqq`, `awq` or `gptq`; the last two need calibration data.
        clip_search: Look for the scale of least squared error, weighted by the activations where they are measured.
        format: `auto`, `matmul_nbits`, `qdq` or `unpack`. `auto` is matmul_nbits where ONNX Runtime has kernels for the
            width, else unpack.
        accuracy_level: Of MatMulNBits: 4 lets it round activations to 8 bits, block by block; 0 and 1 keep fp32.
        operators: Readers whose weights are quantized.
        minimum_elements: Smaller weights stay as they are.
        exclude: Patterns (`*`, `?`) of node or weight names that stay as they are.
        mixed: Pattern of node or weight names to bits, for weights of another width; the first that matches counts.
        gather_bits: Width of weights that a Gather reads, unless `mixed` says otherwise; None: `bits`.
        damping: GPTQ's share of the mean diagonal of X^T X that is added to the diagonal.
        act_order: GPTQ takes input channels with large activations first, groups keep scales chosen beforehand.
        insert_mul: AWQ may divide activations by a Mul where the division cannot be folded into the graph.
    """

    bits: Bits = 4
    group_size: Literal[16, 32, 64, 128, 256] | None = 32
    symmetric: bool = False
    method: Method = "rtn"
    clip_search: bool = True
    format: Literal["auto", "matmul_nbits", "qdq", "unpack"] = "auto"
    accuracy_level: Literal[0, 1, 4] = 4
    operators: tuple[Operator, ...] = ("MatMul", "Gemm", "Gather")
    minimum_elements: int = Field(default=4096, ge=0)
    exclude: tuple[str, ...] = ()
    mixed: dict[str, Bits] = Field(default_factory=dict)
    gather_bits: Bits | None = None
    damping: float = Field(default=0.01, ge=0)
    act_order: bool = True
    insert_mul: bool = True

    @model_validator(mode="after")
    def _has_kernels(self) -> QuantizeWeights:
        if self.format == "matmul_nbits" and 3 in (self.bits, self.gather_bits, *self.mixed.values()):
            raise ValueError("MatMulNBits has no kernel for 3 bits; format auto unpacks them in the graph")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return {"gptq": ("grams",), "awq": ("grams", "channels")}.get(self.method, ())

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        layers = self._layers(model, plan, late=calibration is None)
        self._rounding().run(model, layers, plan, calibration)
        for layer in layers:
            action: dict[str, Any] = {
                "weight": layer.key,
                "bits": layer.grid.width.bits,
                "block": layer.grid.block,
                "symmetric": not layer.grid.has_zeros,
                "form": layer.form,
                "uses": [{"kind": use.kind, "node": label(use.node)} for use in layer.uses],
            }
            if layer.late:
                action["late"] = True
            if layer.scaled_by:
                action["scaled_by"] = layer.scaled_by
            plan.actions.append(action)
        plan.details = self._details(model, layers)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        folds = _scale_inputs(model, plan)
        uses, by_key = weights_in_use(model), initializers_of(model)
        computed: Counter[str] = Counter()
        latest = Latest()
        for action in plan.actions:
            weight = by_key[action["weight"]]
            rounded: Rounded | LateWeight
            if action.get("late"):
                rounded = self._later(action, weight, uses[weight], plan, latest)
            else:
                rounded = self._result(action, weight, uses[weight], plan)
            level = self.accuracy_level
            computed.update(write_weight(model, weight, uses[weight], rounded, action["form"], accuracy_level=level))
            # Let go of the fp32 copy now, not at the end: a large model is never held twice
            weight.const_value = None if not weight.uses() else weight.const_value
        drop_unused_weights(model)
        plan.details["computed_by"] = dict(computed)
        if folds:
            plan.details["input_scales"] = dict(folds)
        return model

    def _rounding(self) -> Rounding:
        return Rounding(self.method, self.clip_search, self.damping, self.act_order, self.insert_mul)

    def _layers(self, model: ir.Model, plan: Plan, *, late: bool) -> list[Layer]:
        """The weights to quantize, in graph order; what stays is listed in `plan.left`.

        With `late`, those that are streamed from a file are left unread until they are written.
        """
        layers: list[Layer] = []
        names: dict[str, None] = {}
        keys = {weight: key for key, weight in initializers_of(model).items()}
        opset = model.opset_imports.get("", 13)
        for weight, uses in weights_in_use(model).items():
            candidates = [use for use in uses if is_op(use.node, "MatMul", "Gemm", "Gather") and use.kind != "bias"]
            plan.seen += len(candidates)
            if not candidates:
                continue
            names.update(dict.fromkeys([str(weight.name), *(label(use.node) for use in uses)]))
            unread = late and streamed(weight.const_value) is not None
            reason = self._why_not(weight, uses, read=not unread)
            layer = None if reason else self._layer(keys[weight], weight, uses, opset)
            if layer is not None and unread:
                layer.late = layer.form == "matmul_nbits"
                reason = None if layer.late else self._why_not(weight, uses)
            if layer is None or reason:
                plan.left += [Left(label(use.node), str(reason)) for use in candidates]
            else:
                layers.append(layer)
        for node in nodes_of(model):
            reason = why_no_matrix(node) if is_op(node, "MatMul", "Gemm") else None
            if reason:
                plan.seen += 1
                plan.left.append(Left(label(node), reason))
        for pattern in self.mixed:
            if not any(fnmatchcase(name, pattern) for name in names):
                hint = did_you_mean(pattern.strip("*"), names)
                raise InputError(f"quantize_weights: mixed pattern '{pattern}' matches no weight", next_step=hint)
        return layers

    def _layer(self, key: str, weight: ir.Value, uses: list[WeightUse], opset: int) -> Layer:
        assert weight.const_value is not None
        kinds = {use.kind for use in uses}
        names = [str(weight.name), *(label(use.node) for use in uses)]
        bits = self.gather_bits if self.gather_bits is not None and "rows" in kinds else self.bits
        for pattern, other in self.mixed.items():
            if any(fnmatchcase(name, pattern) for name in names):
                bits = other
                break
        grid = Grid(WIDTHS[bits], self.group_size, self.symmetric)
        form = form_for(self.format, grid, kinds, opset)
        columns = weight.const_value.shape.numpy()[1 - uses[0].axis]
        if form == "matmul_nbits" and grid.has_zeros and not fills_zero_bytes(grid, columns, kinds):
            grid = replace(grid, symmetric=True)
        return Layer(key, weight, uses, grid, form)

    def _why_not(self, weight: ir.Value, uses: list[WeightUse], *, read: bool = True) -> str | None:
        """The reason why this weight stays as it is, or None."""
        return why_left(
            weight,
            uses,
            minimum_elements=self.minimum_elements,
            operators=self.operators,
            exclude=self.exclude,
            one_axis=True,
            read=read,
        )

    def _later(
        self, action: dict[str, Any], weight: ir.Value, uses: list[WeightUse], plan: Plan, latest: Latest
    ) -> LateWeight:
        """What rounds a streamed weight when it is written; the report is completed then."""
        grid, tensor = Grid(WIDTHS[action["bits"]], action["block"], action["symmetric"]), streamed(weight.const_value)
        assert tensor is not None
        tensor = tensor if uses[0].axis == 0 else tensor.transposed()
        rounding, outcome = self._rounding(), plan.details["layers"][action["weight"]]
        return LateWeight(tensor, lambda matrix: rounding.plain(matrix, grid, None), latest, outcome)

    def _result(self, action: dict[str, Any], weight: ir.Value, uses: list[WeightUse], plan: Plan) -> Rounded:
        """The rounded weight: the plan's, or rounded now where AWQ has just scaled it."""
        grid = Grid(WIDTHS[action["bits"]], action["block"], action["symmetric"])
        assert weight.const_value is not None
        array = weight.const_value.numpy()
        matrix = array if uses[0].axis == 0 else array.T
        rounded = kept(plan, action["weight"], grid, matrix.shape[1])
        if rounded is not None:
            return rounded
        return self._rounding().plain(matrix, grid, plan.arrays.pop(f"{action['weight']}|importance"))

    def _details(self, model: ir.Model, layers: list[Layer]) -> dict[str, Any]:
        """How much of the weights is quantized, how, and how well."""
        tensors = {key: value.const_value for key, value in initializers_of(model).items()}
        sizes = {key: t.size for key, t in tensors.items() if t is not None and t.dtype.is_floating_point()}
        total, covered = sum(sizes.values()), sum(sizes[layer.key] for layer in layers)
        details: dict[str, Any] = {
            "weights_quantized": len(layers),
            "weights_seen": len(weights_in_use(model)),
            "elements_quantized_percent": round(100 * covered / total, 2) if total else 0.0,
            "bits": dict(Counter(str(layer.grid.width.bits) for layer in layers)),
        }
        forms = {layer.form for layer in layers}
        if "matmul_nbits" in forms:
            details["accuracy_level"] = self.accuracy_level
        if any(layer.form == "matmul_nbits" and layer.grid.width.bits not in (8, 4) for layer in layers):
            details["needs"] = "an ONNX Runtime with 2 bit kernels: 1.31 has them, 1.23 has not"
        if "qdq" in forms:
            details["activations"] = "rounded as the runtime's session.qdq_matmulnbits_accuracy_level says"
        details["fell_back_to_rtn"] = {layer.key: layer.fallback for layer in layers if layer.fallback}
        details["layers"] = {layer.key: {"bits": layer.grid.width.bits, **layer.outcome} for layer in layers}
        return details


def _scale_inputs(model: ir.Model, plan: Plan) -> Counter[str]:
    """Carry out AWQ's scales; returns how many went where."""
    uses, by_key = weights_in_use(model), initializers_of(model)
    readers: dict[str, list[ir.Node]] = {}
    for action in plan.actions:
        if "scaled_by" in action:
            weight = by_key[action["weight"]]
            readers.setdefault(action["scaled_by"], []).extend(use.node for use in uses[weight])
    folds: Counter[str] = Counter()
    for name, nodes in readers.items():
        value, scale = nodes[0].inputs[0], plan.arrays.pop(f"{name}|input_scale")
        assert value is not None
        folds[fold_input_scale(model, value, scale, nodes)["how"]] += 1
        scale_matrices(model, nodes, scale)
    return folds
