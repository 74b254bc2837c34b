# SPDX-License-Identifier: Apache-2.0
"""`factorize`: a layer as two thin ones, where its weight is nearly of low rank and two are faster than one.

    x W  ~  (x A) B,   A [m, r], B [r, n],   r < mn / (m + n)

With `whiten`, the factors are those that keep the layer's *output* on the calibration data best, not the weight
(`structure/low_rank.py`): of a convolution too, whose patches are measured for it. What the output loses at every rank
then follows from the spectrum exactly, and is in the report, layer by layer. The mean of every output is kept by its
bias (`keep_mean`), which leaves the rank to what varies: with half the parameters of its products, a 6-layer MiniLM
loses 3.2 points on SST-2 in place of 4.7 (`benchmarks/low_rank.py`). The rank is chosen

energy   for each layer: as many terms as keep `energy` of the output's (or weight's) squared norm
ratio    for each layer: `ratio` of the elements that it has
budget   over all layers: what saves `budget` of the elements, or multiply-adds, at the least sum of squared errors

and rounded to a multiple of 8. A layer stays where the rank would save nothing, where its error is too large, and, with
`measure`, where the two factors were not faster on the provider. Embeddings (`operators` has to name Gather) become a
thin table and a product: fewer bytes, more work, so nothing is timed there.

Weights that were quantized, stand in several places in different ways, or are convolutions in groups stay. Errors of
layers add up, and no layer is refitted to what the ones before it now do: let the gates judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..cost import multiply_adds, values_to_measure
from ..statistics import Calibration
from ..structure.low_rank import Decomposition, Option, allocate, break_even, decompose
from .base import Left, Pass, Plan, register
from .factor_layers import WIDEST_PATCH, Layer, find_layers, patches_of, write_factors
from .factor_speed import Stopwatch
from .graph import dims, drop_unused_weights, label
from .layer_inputs import LayerInputs, inputs_of
from .linear_layers import add_to_bias
from .linear_layers import find_layers as linear_layers

Operator = Literal["MatMul", "Gemm", "Conv", "Gather"]

_WORTH_AN_ADD = 0.02
"""A product without a bias gets one where its output's mean is more than this of its squared norm."""


@register("factorize")
class Factorize(Pass):
    """Settings.

    Attributes:
        rank: `energy`, `ratio` or `budget`; see above.
        energy: Share of the squared norm that stays.
        ratio: Share of a layer's elements that its factors have.
        budget: Share of all candidates' elements, or multiply-adds, that is saved.
        budget_of: What the budget counts; multiply-adds leave embeddings out, and need calibration data for the shapes.
        whiten: Keep outputs rather than weights; needs calibration data.
        keep_mean: With `whiten`, let a bias keep the mean of every output, so that the rank serves what varies; errors
            then are relative to that. A layer without a bias gets one where the mean is worth it.
        damping: Share of the mean diagonal of X^T X that is added to it, for directions that the data does not have.
        multiple: Ranks are multiples of it: up for `energy`, down for the others.
        maximum_error: A layer stays as it is when its output (or weight) would be off by more, relative to its norm.
        measure: Time every layer against its factors, on the provider, and keep what is not faster.
        minimum_gain: How many times as fast the factors have to be.
        rows: How many rows a product is timed with; None: as the largest calibration batch has, or 128 without data.
        operators: Which layers.
        minimum_elements: Smaller weights stay as they are.
        exclude: Patterns (`*`, `?`) of node or weight names that stay as they are.
    """

    rank: Literal["energy", "ratio", "budget"] = "energy"
    energy: float = Field(default=0.99, gt=0, le=1)
    ratio: float = Field(default=0.5, gt=0, lt=1)
    budget: float = Field(default=0.3, gt=0, lt=1)
    budget_of: Literal["parameters", "multiply_adds"] = "parameters"
    whiten: bool = True
    keep_mean: bool = True
    damping: float = Field(default=1e-4, ge=0, le=1)
    multiple: int = Field(default=8, ge=1)
    maximum_error: float = Field(default=0.3, gt=0)
    measure: bool = True
    minimum_gain: float = Field(default=1.05, gt=0)
    rows: int | None = Field(default=None, ge=1)
    operators: tuple[Operator, ...] = ("MatMul", "Gemm", "Conv")
    minimum_elements: int = Field(default=4096, ge=0)
    exclude: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        counted = ("shapes",) if self.rank == "budget" and self.budget_of == "multiply_adds" else ()
        return (*(("grams",) if self.whiten else ()), *counted)

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        layers = find_layers(
            model,
            plan,
            operators=self.operators,
            minimum_elements=self.minimum_elements,
            exclude=self.exclude,
        )
        shapes, costs = _shapes_and_costs(model, calibration)
        found = self._decomposed(model, layers, plan, calibration if self.whiten else None, costs)
        place = {layer.key: number for number, layer in enumerate(layers)}
        candidates = sorted(found, key=lambda item: place[item.layer.key])
        chosen = self._chosen(candidates, plan)
        if self.measure:
            chosen = self._faster(chosen, plan, shapes, calibration)
        for item in chosen:
            key = item.layer.key
            plan.arrays[f"{key}|left"], plan.arrays[f"{key}|right"] = item.parts.factors(item.rank)
            if item.mean is not None:
                plan.arrays[f"{key}|shift"] = item.shift()
            nodes = [label(node) for node in item.layer.nodes]
            plan.actions.append({"weight": key, "kind": item.layer.kind, "rank": item.rank, "nodes": nodes})
        plan.details = self._details(chosen, candidates, costs)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        layers = find_layers(
            model,
            Plan(),
            operators=self.operators,
            minimum_elements=self.minimum_elements,
            exclude=self.exclude,
        )
        by_key = {layer.key: layer for layer in layers}
        shifts: dict[ir.Node, np.ndarray] = {}
        for action in plan.actions:
            key = action["weight"]
            left, right = (plan.arrays.pop(f"{key}|{side}") for side in ("left", "right"))
            written = write_factors(model, by_key[key], left, right)
            if f"{key}|shift" in plan.arrays:
                shifts |= dict.fromkeys(written, plan.arrays.pop(f"{key}|shift"))
        for linear in list(linear_layers(model)):
            if linear.node in shifts:
                add_to_bias(model, linear, shifts[linear.node])
        drop_unused_weights(model)
        return model

    # ------------------------------------------------------------------------------------------------- decomposing

    def _decomposed(
        self,
        model: ir.Model,
        layers: list[Layer],
        plan: Plan,
        calibration: Calibration | None,
        costs: dict[ir.Node, int],
    ) -> Iterator[_Candidate]:
        """Every layer with its terms, in the order in which inputs are measured."""
        possible = []
        for layer in layers:
            if break_even(*layer.shape) < self.multiple:
                plan.left += _left(layer, f"two factors save nothing from rank {break_even(*layer.shape) + 1} on")
            else:
                possible.append(layer)
        biased = {linear.node: linear.bias != "none" for linear in linear_layers(model) if linear.problem is None}
        for layer, inputs, fallback in _with_statistics(model, possible, calibration, means=self.keep_mean):
            gram, mean = (None, None) if inputs is None else (inputs.gram, inputs.mean)
            if gram is not None and mean is not None and inputs is not None:
                constant = inputs.rows * np.outer(mean, mean)
                free = all(biased.get(node, False) for node in layer.nodes)
                if biased.keys() >= set(layer.nodes) and (free or _share(layer, constant, gram) > _WORTH_AN_ADD):
                    gram = gram - constant
                else:
                    mean = None
            parts = decompose(layer.matrix(), gram, damping=self.damping, keep=break_even(*layer.shape))
            if parts is None:
                plan.left += _left(layer, "its input does not vary on the calibration data")
                continue
            work = sum(costs.get(node, 0) for node in layer.nodes)
            yield _Candidate(layer, parts, work, None if calibration is None else fallback, mean=mean)

    # ------------------------------------------------------------------------------------------------ choosing ranks

    def _chosen(self, candidates: list[_Candidate], plan: Plan) -> list[_Candidate]:
        """Those that are factorized, with their ranks; the others are left, and why."""
        if self.rank == "budget":
            self._share_out(candidates)
        chosen = []
        for item in candidates:
            if self.rank != "budget":
                item.rank = self._own_rank(item)
            reason = self._why_not(item)
            if reason is None:
                chosen.append(item)
            else:
                plan.left += _left(item.layer, reason)
        return chosen

    def _own_rank(self, item: _Candidate) -> int:
        rows, columns = item.layer.shape
        if self.rank == "energy":
            return -(-max(1, item.parts.rank_for(self.energy)) // self.multiple) * self.multiple
        return int(self.ratio * rows * columns / (rows + columns)) // self.multiple * self.multiple

    def _share_out(self, candidates: list[_Candidate]) -> None:
        counted = [item for item in candidates if self._size(item)]
        options = []
        for item in counted:
            errors, rows, columns = item.parts.errors() ** 2, *item.layer.shape
            ranks = range(self.multiple, break_even(rows, columns) + 1, self.multiple)
            share = {rank: 1 - rank * (rows + columns) / (rows * columns) for rank in ranks}
            possible = [r for r in ranks if errors[r] <= self.maximum_error**2]
            whole = [Option(0, 0.0, 0.0)]
            options.append(whole + [Option(r, self._size(item) * share[r], float(errors[r])) for r in possible])
        target = self.budget * sum(self._size(item) for item in counted)
        for item, option in zip(counted, allocate(options, target), strict=True):
            item.rank = option.rank

    def _size(self, item: _Candidate) -> int:
        return int(np.prod(item.layer.shape)) if self.budget_of == "parameters" else item.work

    def _why_not(self, item: _Candidate) -> str | None:
        rows, columns = item.layer.shape
        if self.rank == "budget" and item.rank == 0:
            return "the budget is met with less error elsewhere, or not at all within maximum_error"
        if item.rank == 0:
            return f"a ratio of {self.ratio} is a rank below {self.multiple}"
        if item.rank > break_even(rows, columns):
            return f"it needs rank {item.rank}; two factors save nothing from rank {break_even(rows, columns) + 1} on"
        if item.error > self.maximum_error:
            return f"at rank {item.rank} its {item.parts.metric} would be off by {item.error:.2f}"
        return None

    # ----------------------------------------------------------------------------------------------------- measuring

    def _faster(
        self,
        chosen: list[_Candidate],
        plan: Plan,
        shapes: dict[str, tuple[int, ...]],
        calibration: Calibration | None,
    ) -> list[_Candidate]:
        """Those that are faster as two, and embeddings."""
        watch = Stopwatch() if calibration is None else Stopwatch(calibration.provider, calibration.threads)
        kept = []
        for item in chosen:
            if item.layer.kind == "rows":
                kept.append(item)
                continue
            shape = self._shape(item.layer, shapes)
            if shape is None:
                plan.left += _left(item.layer, "the shape of its input is not known: give calibration data")
                continue
            item.speed = watch.ratio(item.layer, item.rank, shape)
            if item.speed >= self.minimum_gain:
                kept.append(item)
            else:
                plan.left += _left(item.layer, f"as factors of rank {item.rank} it was {item.speed:.2f} x as fast")
        return kept

    def _shape(self, layer: Layer, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """With which input the layer is timed."""
        seen = [shapes[str(value.name)] for value in layer.inputs if str(value.name) in shapes]
        largest = max(seen, key=lambda shape: int(np.prod(shape)), default=None)
        if layer.kind == "product":
            rows = int(np.prod(largest[:-1])) if largest is not None else 128
            return (self.rows or max(1, rows), layer.shape[0])
        if largest is None:
            stated = dims(layer.inputs[0])
            known = stated is not None and all(isinstance(n, int) for n in stated[1:])
            batch = stated[0] if stated is not None and isinstance(stated[0], int) else 1
            return (batch, *(n for n in stated[1:] if isinstance(n, int))) if stated is not None and known else None
        return largest

    def _details(
        self, chosen: list[_Candidate], candidates: list[_Candidate], costs: dict[ir.Node, int]
    ) -> dict[str, Any]:
        before = sum(int(np.prod(item.layer.shape)) for item in candidates)
        saved = sum(item.saved for item in chosen)
        details: dict[str, Any] = {
            "layers_factorized": len(chosen),
            "parameters_saved": saved,
            "parameters_saved_percent": round(100 * saved / before, 2) if before else 0.0,
        }
        products = [item for item in chosen if item.layer.kind != "rows"]
        if all(item.work for item in products) and costs:
            work = sum(item.work * item.saved / int(np.prod(item.layer.shape)) for item in products)
            details["multiply_adds_saved_percent"] = round(100 * work / max(1, sum(costs.values())), 2)
        details["chosen_by_weight_alone"] = {i.layer.key: i.fallback for i in chosen if i.fallback}
        details["layers"] = {item.layer.key: item.to_json() for item in chosen}
        return details


@dataclass
class _Candidate:
    """A layer, its terms, and what was decided about it.

    Attributes:
        layer: The layer.
        parts: Its terms, as many as can be of use.
        work: Multiply-adds on the largest calibration batch; 0 where they are not known, and of embeddings.
        fallback: Why the weight was decomposed and not the output, where that was asked for.
        rank: 0: stays.
        speed: How many times as fast the factors were; None where it was not measured.
        mean: Of the input's channels, where a bias will make up for what the factors do to it.
    """

    layer: Layer
    parts: Decomposition
    work: int = 0
    fallback: str | None = None
    rank: int = 0
    speed: float | None = None
    mean: np.ndarray | None = None

    def shift(self) -> np.ndarray:
        """What the factors take from the mean of the output, float64 [out]."""
        assert self.mean is not None
        left, right = self.parts.factors(self.rank)
        return np.asarray(self.mean @ self.layer.matrix() - (self.mean @ left) @ right)

    @property
    def error(self) -> float:
        return float(self.parts.errors()[self.rank])

    @property
    def saved(self) -> int:
        rows, columns = self.layer.shape
        return rows * columns - self.rank * (rows + columns)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "rank": self.rank,
            "of": min(self.layer.shape),
            f"{self.parts.metric}_error": round(self.error, 4),
            "elements_left_percent": round(100 - 100 * self.saved / int(np.prod(self.layer.shape)), 1),
        }
        return found if self.speed is None else {**found, "times_as_fast": round(self.speed, 2)}


def _share(layer: Layer, part: np.ndarray, gram: np.ndarray) -> float:
    """How much of the output's squared norm comes from a part of X^T X."""
    weight = layer.matrix()
    some, whole = (float(np.einsum("ij,ij->", weight, matrix @ weight)) for matrix in (part, gram))
    return some / whole if whole > 0 else 0.0


def _left(layer: Layer, reason: str) -> list[Left]:
    return [Left(label(node), reason) for node in layer.nodes]


def _shapes_and_costs(
    model: ir.Model, calibration: Calibration | None
) -> tuple[dict[str, tuple[int, ...]], dict[ir.Node, int]]:
    """Of the largest calibration batch; empty without data."""
    if calibration is None:
        return {}, {}
    shapes = calibration.shapes(model, values_to_measure(model))
    return shapes, multiply_adds(model, shapes)


def _with_statistics(
    model: ir.Model, layers: Iterable[Layer], calibration: Calibration | None, *, means: bool
) -> Iterator[tuple[Layer, LayerInputs[Any] | None, str | None]]:
    """Every layer with what is known of its inputs, or why nothing is; as many are measured at a time as fit."""
    measured: list[Layer] = []
    for layer in layers:
        reason = _why_not_measured(layer) if calibration is not None else "no calibration data"
        if reason is None:
            measured.append(layer)
        else:
            yield layer, None, reason
    if calibration is None:
        return
    products = [layer for layer in measured if layer.kind == "product"]
    for inputs in inputs_of(model, products, calibration, channels=means):
        yield from ((layer, inputs, inputs.missing) for layer in inputs.layers)
    convolutions = [layer for layer in measured if layer.kind == "conv"]
    if convolutions:
        copy, patches = patches_of(model, convolutions)
        for found in inputs_of(copy, patches, calibration, channels=means):
            yield from ((one.layer, found, found.missing) for one in found.layers)
        known = {one.layer for one in patches}
        yield from ((layer, None, "its patches cannot be measured") for layer in convolutions if layer not in known)


def _why_not_measured(layer: Layer) -> str | None:
    if layer.kind == "rows":
        return "an embedding: which rows are read is no product"
    if layer.kind == "conv" and len(layer.nodes) > 1:
        return "the weight is read by several convolutions"
    if layer.kind == "conv" and layer.shape[0] > WIDEST_PATCH:
        return f"its patches of {layer.shape[0]} numbers are too wide to measure"
    return None
