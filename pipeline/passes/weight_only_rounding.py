# SPDX-License-Identifier: Apache-2.0
"""Rounds the weights that `quantize_weights` chose, by its method, on what calibration says about their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ..quantization.awq import search_input_scale
from ..quantization.blocks import Grid, Rounded, round_blocks
from ..quantization.codes import pack, unpack
from ..quantization.gptq import Feedback, feedback_of, output_error, round_gptq
from ..quantization.hqq import round_hqq
from ..statistics import Calibration
from .base import Plan
from .folding import find_fold
from .graph import label, producer
from .layer_inputs import LayerInputs, inputs_of
from .matrix_weights import WeightUse
from .weight_only_nodes import Form

Method = Literal["rtn", "hqq", "awq", "gptq"]

_ROWS = 1024
"""Output channels whose error is computed at a time."""


@dataclass
class Layer:
    """A weight on its way.

    Attributes:
        key: Its name in plans.
        weight: float32 [in, out] or [out, in].
        uses: All of its readers.
        grid: What it is rounded to.
        form: How it will be stored.
        outcome: For the report: the method that was used in the end, and its error.
        fallback: Why not the method that was asked for.
        scaled_by: The input that AWQ scales, if it does.
        late: It is rounded when it is written.
    """

    key: str
    weight: ir.Value
    uses: list[WeightUse]
    grid: Grid
    form: Form
    outcome: dict[str, Any] = field(default_factory=dict)
    fallback: str | None = None
    scaled_by: str | None = None
    late: bool = False

    @property
    def products(self) -> list[ir.Node]:
        return [use.node for use in self.uses if use.kind != "rows"]

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The activations that it is multiplied by."""
        return tuple(dict.fromkeys(v for node in self.products if (v := node.inputs[0]) is not None))

    def matrix(self) -> np.ndarray:
        """float32 [out, in], or [rows, columns] of an embedding; a view."""
        assert self.weight.const_value is not None
        array = self.weight.const_value.numpy()
        return array if self.uses[0].axis == 0 else array.T


@dataclass(frozen=True)
class Rounding:
    """How layers are rounded; see the settings of `quantize_weights`."""

    method: Method
    clip_search: bool
    damping: float
    act_order: bool
    insert_mul: bool

    def run(self, model: ir.Model, layers: Sequence[Layer], plan: Plan, calibration: Calibration | None) -> None:
        """Round all layers, into `plan.arrays`; AWQ's are left to `apply`, when the graph has been scaled."""
        measured = [layer for layer in layers if calibration is not None and self._is_measured(layer)]
        for layer in layers:
            if layer.late:
                layer.outcome = {"method": self._plain_method}
            elif layer not in measured:
                self._round_plain(layer, plan, None)
        if calibration is None:
            return
        for inputs in inputs_of(model, measured, calibration, channels=self.method == "awq"):
            if inputs.gram is None:
                for layer in inputs.layers:
                    layer.fallback = inputs.missing
                    self._round_plain(layer, plan, None)
            elif self.method == "gptq":
                self._round_gptq(inputs, plan)
            elif self.method == "awq":
                self._scale(model, inputs, plan)
            else:
                for layer in inputs.layers:
                    self._round_plain(layer, plan, np.diag(inputs.gram))

    @property
    def _plain_method(self) -> str:
        return "hqq" if self.method == "hqq" else "rtn"

    def plain(self, matrix: np.ndarray, grid: Grid, importance: np.ndarray | None) -> Rounded:
        """Round to nearest, or by HQQ."""
        if self.method == "hqq":
            return round_hqq(matrix, grid)
        return round_blocks(matrix, grid, clip_search=self.clip_search, importance=importance)

    def _is_measured(self, layer: Layer) -> bool:
        """Whether this layer is to be rounded on data."""
        if not layer.inputs or self.method == "hqq" or (self.method == "rtn" and not self.clip_search):
            return False
        if self.method == "awq":
            layer.fallback = _why_not_scaled(layer)
        return layer.fallback is None

    def _round_plain(self, layer: Layer, plan: Plan, importance: np.ndarray | None) -> None:
        matrix = layer.matrix()
        rounded = self.plain(matrix, layer.grid, importance)
        layer.outcome = {"method": self._plain_method}
        off = sum(float(np.square(part).sum()) for part in _differences(rounded, matrix))
        layer.outcome["weight_sqnr_db"] = _db(float(np.square(matrix, dtype=np.float64).sum()), off)
        keep(plan, layer.key, rounded)

    def _round_gptq(self, inputs: LayerInputs[Layer], plan: Plan) -> None:
        assert inputs.gram is not None
        feedback = feedback_of(inputs.gram, damping=self.damping, act_order=self.act_order)
        gram = inputs.gram.astype(np.float32)
        inputs.gram = None  # twice as large, and no longer needed
        for layer in inputs.layers:
            if feedback is None:
                layer.fallback = "its input is zero on all calibration data"
                self._round_plain(layer, plan, None)
                continue
            rounded, layer.outcome = self._better(layer, feedback, gram)
            if feedback.damping > self.damping:
                layer.outcome["damping"] = feedback.damping
            if inputs.rows < len(gram):
                layer.outcome["rows"] = f"{inputs.rows}, fewer than the {len(gram)} channels: more data would help"
            keep(plan, layer.key, rounded)

    def _better(self, layer: Layer, feedback: Feedback, gram: np.ndarray) -> tuple[Rounded, dict[str, Any]]:
        """GPTQ's result, with those output channels of plain rounding that are nearer to the original."""
        matrix = layer.matrix()
        plain = self.plain(matrix, layer.grid, feedback.importance)
        rounded = round_gptq(matrix, layer.grid, feedback, plain, clip_search=self.clip_search)
        off_plain, off = _output_error(plain, matrix, gram), _output_error(rounded, matrix, gram)
        worse = ~(off < off_plain)
        rounded.put(worse, plain)
        signal = float(output_error(matrix, gram).sum())
        return rounded, {
            "method": "rtn" if worse.all() else "gptq",
            "output_sqnr_db": _db(signal, float(np.where(worse, off_plain, off).sum())),
            "rtn_output_sqnr_db": _db(signal, float(off_plain.sum())),
            "channels_kept_rtn": int(worse.sum()),
        }

    def _scale(self, model: ir.Model, inputs: LayerInputs[Layer], plan: Plan) -> None:
        """AWQ's scale for one input, and what its layers need to be rounded later."""
        assert inputs.gram is not None
        assert inputs.mean_abs is not None
        value, nodes = inputs.values[0], [node for layer in inputs.layers for node in layer.products]
        importance = np.diag(inputs.gram).copy()
        problem = self._why_not_folded(model, value, nodes, len(importance))
        found = None
        if problem is None:
            grids, matrices = [layer.grid for layer in inputs.layers], [layer.matrix() for layer in inputs.layers]
            found = search_input_scale(matrices, grids, inputs.gram, inputs.mean_abs, clip_search=self.clip_search)
        for layer in inputs.layers:
            layer.fallback = problem
            if found is None or found.alpha == 0:
                self._round_plain(layer, plan, importance)
                continue
            layer.scaled_by = str(value.name)
            plan.arrays[f"{value.name}|input_scale"] = found.scale
            plan.arrays[f"{layer.key}|importance"] = importance / found.scale.astype(np.float64) ** 2
            layer.outcome = {"method": "awq", "alpha": found.alpha, "output_gain_db": _db(1.0, found.error)}

    def _why_not_folded(self, model: ir.Model, value: ir.Value, nodes: Sequence[ir.Node], channels: int) -> str | None:
        fold = find_fold(value, nodes, channels)
        if isinstance(fold, str):
            return None if self.insert_mul else f"the scale does not fold ({fold}), and insert_mul is off"
        for node in model.graph if fold["how"] == "linear" else ():
            if label(node) == fold["node"] and len(_stored(node.inputs[1]).uses()) > 1:
                return f"the scale would go into '{_stored(node.inputs[1]).name}', which others read too"
        return None


def keep(plan: Plan, key: str, rounded: Rounded) -> None:
    """Put a result into the plan, packed."""
    plan.arrays[f"{key}|codes"] = pack(rounded.codes, rounded.grid.width)
    plan.arrays[f"{key}|scales"] = rounded.scales
    if rounded.zeros is not None:
        plan.arrays[f"{key}|zeros"] = rounded.zeros


def kept(plan: Plan, key: str, grid: Grid, columns: int) -> Rounded | None:
    """Take what `keep` put there out of the plan."""
    packed = plan.arrays.pop(f"{key}|codes", None)
    if packed is None:
        return None
    codes = unpack(packed, grid.width, columns)
    return Rounded(codes, plan.arrays.pop(f"{key}|scales"), plan.arrays.pop(f"{key}|zeros", None), grid)


def _why_not_scaled(layer: Layer) -> str | None:
    if len(layer.inputs) > 1:
        return "the weight is multiplied by several inputs"
    if any(use.kind == "rows" for use in layer.uses):
        return "an embedding reads the weight too"
    if any(node.graph is not layer.inputs[0].graph for node in layer.products):
        return "the product is inside a subgraph"
    return None


def _output_error(rounded: Rounded, matrix: np.ndarray, gram: np.ndarray) -> np.ndarray:
    return np.concatenate([output_error(part, gram) for part in _differences(rounded, matrix)])


def _differences(rounded: Rounded, matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Rounded minus original, some output channels at a time."""
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rounded.part(rows).dequantized() - matrix[rows]


def _stored(weight: ir.Value | None) -> ir.Value:
    """The initializer behind a factor that may be transposed."""
    turned = producer(weight, "Transpose")
    found = turned.inputs[0] if turned is not None else weight
    assert found is not None
    return found


def _db(signal: float, noise: float) -> float | None:
    """Signal to noise ratio; None where there is no noise, or nothing else."""
    return round(10 * float(np.log10(signal / noise)), 2) if signal > 0 and noise > 0 else None
