# SPDX-License-Identifier: Apache-2.0
"""`smooth`: SmoothQuant. Move the outliers of a linear layer's input into its weight, where they do less harm.

    y = x W  =  (x / s) (diag(s) W),   s_j = max |x_j|^alpha / max |W_j|^(1 - alpha)

One scale a tensor has to span an input's largest channel, and leaves few steps for the others; weights have a scale for
each output channel. All layers that read one input share one s, with the largest weight of them all. The division
costs nothing where it folds into what makes the input (`folding`): the normalization before it, the value projection
before an attention's output projection, the linear branch of a gate. Elsewhere it is a Mul at run time. BERT needs
those: its normalizations feed residual connections as well, and Gelu stands before the widest inputs. On a 6-layer
MiniLM in static int8 the scales that fold gain nothing, all of them 6 dB at the outputs, for 1 to 3 % of the time.

This pass rounds nothing: put it before `quantize_static`. Weight-only recipes gain nothing by it.

Reference: Xiao et al., "SmoothQuant: Accurate and efficient post-training quantization for large language models"
(arXiv 2211.10438), 4, equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..statistics import Calibration, Statistics, Wanted
from .base import Left, Pass, Plan, register
from .folding import Matrix, find_fold, fold_input_scale, matrix_of, scale_matrices
from .graph import is_op, label, nodes_of

_GRID = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
_SMALLEST = 1e-5


@register("smooth")
class Smooth(Pass):
    """Settings.

    Attributes:
        alpha: How much of the difficulty moves into the weights, 0 to 1; `search` tries 0.3 to 0.95 for each input and
            takes the one that rounds best.
        insert_mul: Write a Mul where the division cannot be folded; otherwise leave that input as it is.
        minimum_gain: Leave an input as it is when smoothing is predicted to win less, in dB.
        per_channel: Whether the quantizer that follows keeps one weight scale an output channel.
        activation_bits: To how many bits it will round activations; weights to 8.
        row_count: On how many sampled rows the rounding is tried.
        exclude: Patterns (`*`, `?`) of node or weight names whose layers are left out.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"
    insert_mul: bool = True
    minimum_gain: float = 0.5
    per_channel: bool = True
    activation_bits: int = Field(default=8, ge=4, le=16)
    row_count: int = Field(default=512, ge=1)
    exclude: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("channels", "rows")

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        assert calibration is not None
        plan = Plan()
        candidates = self._shared_inputs(model, plan)
        folds = {item: find_fold(item.value, item.nodes, item.channels) for item in candidates}
        names = [item.name for item in candidates if self.insert_mul or not isinstance(folds[item], str)]
        wanted = Wanted(channels=dict.fromkeys(names, -1), rows=names, row_count=self.row_count)
        statistics = calibration.collect(model, wanted)
        for item, fold in folds.items():
            if isinstance(fold, str) and not self.insert_mul:
                plan.left += item.left(f"the scale does not fold, and insert_mul is off: {fold}")
                continue
            choice = self._choose(item, statistics)
            if isinstance(choice, str):
                plan.left += item.left(choice)
                continue
            plan.arrays[item.name] = choice.pop("scale")
            record = {"value": item.name, "how": "mul", "reason": fold} if isinstance(fold, str) else fold
            layers = [label(node) for node in item.nodes]
            plan.actions.append({"value": item.name, "layers": layers, **choice, "fold": record})
        plan.details = _details(plan)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        found = {item.name: item for item in self._shared_inputs(model, Plan())}
        for action in plan.actions:
            item, scale = found[action["value"]], plan.arrays[action["value"]]
            fold_input_scale(model, item.value, scale, item.nodes, insert_mul=self.insert_mul)
            scale_matrices(model, item.nodes, scale)
        return model

    def _shared_inputs(self, model: ir.Model, plan: Plan) -> list[_SharedInput]:
        """The activations that linear layers read, each with its layers, in graph order; other layers are left."""
        found: dict[ir.Value, _SharedInput] = {}
        for node in nodes_of(model):
            value = node.inputs[0] if is_op(node, "MatMul", "Gemm") else None
            if value is None:
                continue
            plan.seen += 1
            matrix = matrix_of(node)
            reason = matrix if isinstance(matrix, str) else self._why_not(node, matrix)
            if value.graph is not model.graph:
                reason = "inside a subgraph: its values cannot be measured"
            if reason is not None or isinstance(matrix, str):
                plan.left.append(Left(label(node), str(reason)))
                continue
            item = found.setdefault(value, _SharedInput(value))
            item.nodes.append(node)
            item.matrices.append(matrix)
        return list(found.values())

    def _why_not(self, node: ir.Node, matrix: Matrix) -> str | None:
        tensor = matrix.stored.const_value
        assert tensor is not None
        if tensor.dtype != ir.DataType.FLOAT:
            return f"the weight is {tensor.dtype.name.lower()}, not fp32"
        names = (label(node), str(matrix.stored.name))
        if any(fnmatchcase(name, pattern) for pattern in self.exclude for name in names):
            return "excluded by name"
        other = _other_reader(matrix.stored, node)
        if other is not None:
            return f"the weight would have to be copied: it is also {other}"
        return None if np.isfinite(tensor.numpy()).all() else "the weight holds NaN or infinity"

    def _choose(self, item: _SharedInput, statistics: Statistics) -> dict[str, Any] | str:
        """The scale of one input with what it is predicted to win, or why there is none."""
        if item.name in statistics.missing:
            return f"'{item.name}' cannot be measured: {statistics.missing[item.name]}"
        peak, rows = statistics.channels[item.name].peak, statistics.rows[item.name]
        if not (len(rows) and np.isfinite(peak).all() and np.isfinite(rows).all()):
            return f"'{item.name}' is empty, NaN or infinite on the calibration data"
        weights = [matrix.by_input() for matrix in item.matrices]
        weight_peak = np.max([np.abs(w).max(axis=1, initial=0.0) for w in weights], axis=0)
        trial = _Trial(rows, weights, self.activation_bits, self.per_channel)
        before = trial.sqnr(np.ones(item.channels, np.float32))
        tried = []
        for alpha in _GRID if self.alpha == "search" else (self.alpha,):
            scale = smoothing_scale(peak, weight_peak, alpha)
            tried.append((trial.sqnr(scale), alpha, scale))
        after, alpha, scale = max(tried, key=lambda t: t[0])
        if after - before < self.minimum_gain:
            return f"smoothing is predicted to win {after - before:.1f} dB"
        return {"alpha": alpha, "scale": scale, "sqnr_before": round(before, 2), "sqnr_after": round(after, 2)}


@dataclass(eq=False)
class _SharedInput:
    """An activation and the linear layers that read it, with their weights."""

    value: ir.Value
    nodes: list[ir.Node] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.value.name)

    @property
    def channels(self) -> int:
        return len(self.matrices[0].by_input())

    def left(self, reason: str) -> list[Left]:
        return [Left(label(node), reason) for node in self.nodes]


def _other_reader(weight: ir.Value, node: ir.Node) -> str | None:
    """What reads the weight beside layers with the same input as `node`, of which all are scaled together."""
    if weight.is_graph_output():
        return "an output of the graph"
    for use in weight.uses():
        turned = use.node.outputs[0] if is_op(use.node, "Transpose") else None
        for reader in turned.uses() if turned is not None else (use,):
            layer = is_op(reader.node, "MatMul", "Gemm") and reader.idx == 1
            if not layer or reader.node.inputs[0] is not node.inputs[0]:
                return f"read by {label(reader.node)} ({reader.node.op_type})"
    return None


def smoothing_scale(peak: np.ndarray, weight_peak: np.ndarray, alpha: float) -> np.ndarray:
    """By which each input channel is divided.

    Args:
        peak: Largest absolute activation, [K].
        weight_peak: Largest absolute weight of all layers that read it, [K].
        alpha: 0 to 1.

    Returns:
        float32 [K], at least 1e-5; 1 for a channel that is always zero.
    """
    scale = np.asarray(peak, np.float64) ** alpha / np.maximum(weight_peak, _SMALLEST) ** (1 - alpha)
    return np.where(peak == 0, 1, np.clip(scale, _SMALLEST, 1 / _SMALLEST)).astype(np.float32)


class _Trial:
    """What rounding does to the outputs of layers, tried on sampled rows of their input."""

    def __init__(self, rows: np.ndarray, weights: list[np.ndarray], bits: int, per_channel: bool) -> None:
        self.rows, self.weights, self.top, self.per_channel = rows, weights, 2**bits - 1, per_channel
        self.exact = [rows @ weight for weight in weights]

    def sqnr(self, scale: np.ndarray) -> float:
        """Signal to noise of the outputs in dB, with the noise of each layer relative to its signal."""
        rows = _rounded_rows(self.rows / scale, self.top)
        ratios = []
        for weight, exact in zip(self.weights, self.exact, strict=True):
            noise = rows @ _rounded_weight(weight * scale[:, None], self.per_channel) - exact
            signal = np.square(exact, dtype=np.float64).sum()
            ratios.append(np.square(noise, dtype=np.float64).sum() / signal if signal else 0.0)
        return float(-10 * np.log10(max(np.mean(ratios), 1e-20)))


def _rounded_rows(rows: np.ndarray, top: int) -> np.ndarray:
    """One scale and zero point for the tensor, zero among the steps."""
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    step = np.float32((high - low) / top or 1.0)
    zero = np.rint(-low / step)
    return np.asarray((np.clip(np.rint(rows / step) + zero, 0, top) - zero) * step, np.float32)


def _rounded_weight(weight: np.ndarray, per_channel: bool) -> np.ndarray:
    """int8, symmetric, one scale a column or one in all."""
    step = np.abs(weight).max(axis=0 if per_channel else None) / np.float32(127)
    step = np.where(step == 0, np.float32(1), step)
    return np.asarray(np.rint(weight / step) * step, np.float32)


def _details(plan: Plan) -> dict[str, Any]:
    inputs = {}
    for action in plan.actions:
        where = "a Mul" if action["fold"]["how"] == "mul" else f"{action['fold']['how']} {action['fold']['node']}"
        gain = f"{action['sqnr_before']} -> {action['sqnr_after']} dB"
        inputs[action["value"]] = f"alpha {action['alpha']}, into {where}, predicted {gain}"
    return {
        "inputs_smoothed": len(plan.actions),
        "layers_smoothed": sum(len(action["layers"]) for action in plan.actions),
        "multiplications_inserted": sum(action["fold"]["how"] == "mul" for action in plan.actions),
        "inputs": inputs,
    }
