# SPDX-License-Identifier: Apache-2.0
"""Decide on units and repair what reads them: the work of `prune_structured`, on a copy of the graph.

First every group is taken down alone, on the untouched graph: that gives the order in which its units go and what it
costs. Then the budget says how many go from each. Then the cut is made front to back, each group anew on what the
already cut network computes, so that later layers make up for what earlier ones lost.

Until the end nothing gets smaller in the copy: units that go are zeros, and weights that were repaired are in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import onnx_ir as ir

from ..passes.linear_layers import add_to_bias
from ..progress import Progress
from ..statistics import Calibration
from .budget import Level
from .consumers import Consumer, consumers_of, measure
from .groups import Group, Structure, analyze, weight_of
from .masking import masked_weights
from .surgeon import Linear, Removal, Surgeon, refit, relative_error, static_costs

Importance = Literal["reconstruction", "activation", "magnitude"]
_PROBES = (0.25, 0.5, 0.75, 1.0)


@dataclass
class Way:
    """How a group is taken down.

    Attributes:
        order: Units in the order in which they go.
        errors: float64 [units that may go + 1], after so many.
        weights: Removed units to the consumers' repaired matrices then, by the weight's name.
    """

    order: np.ndarray
    errors: np.ndarray
    weights: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What was done to one group.

    Attributes:
        removed: Units.
        error: Relative squared error of the layers that read it, on the calibration data, as it is now.
        unrepaired: The same without the repair.
        refitted: Names of the weights that were.
    """

    group: Group
    removed: np.ndarray
    error: float | None
    unrepaired: float | None
    refitted: tuple[str, ...]


class Pruner:
    """Args:
    model: A copy of the graph to prune; changed in place.
    calibration: Data, or None for `magnitude` without repair.
    importance: What a unit is judged by.
    repair: Whether to refit what reads a group.
    damping: Of the ridge regression.
    widest: Layers with more inputs are neither judged by reconstruction nor refitted.
    progress: Told what is measured.
    """

    def __init__(
        self,
        model: ir.Model,
        calibration: Calibration | None,
        *,
        importance: Importance,
        repair: bool,
        damping: float = 0.01,
        widest: int = 4096,
        progress: Progress | None = None,
        open_caches: bool = False,
    ) -> None:
        self.model, self.calibration = model, calibration
        self.importance, self.repair, self.damping, self.widest = importance, repair, damping, widest
        self.structure: Structure = analyze(model, open_caches=open_caches)
        self.open_caches = open_caches
        # Weights that the walk has not met, such as those that only a subgraph reads
        self._unmet = set(model.graph.initializers.values()) - set(self.structure.walk.constants)
        self._say = progress or Progress()

    # Each group alone

    def ways(self, groups: Sequence[Group], sizes_of: Callable[[Group], list[int]]) -> dict[str, Way]:
        """How each group would go, on the graph as it is."""
        many = {group.name: consumers_of(self.model, group) for group in groups}
        everyone = list({c.name: c for consumers in many.values() for c in consumers}.values())
        linear = self._measure(everyone)
        found = {}
        for group in groups:
            self._say("prune", f"{group.kind} of {group.name}")
            sizes = sizes_of(group)
            probes = [min(sizes, key=lambda n, share=share: abs(n - share * sizes[-1])) for share in _PROBES]  # type: ignore[misc]
            found[group.name] = self._way(group, self._layers(many[group.name], linear), sizes[-1], probes)
        return found

    def _measure(self, consumers: Sequence[Consumer]) -> dict[str, Linear]:
        if self.calibration is None or not consumers:
            return {}
        return measure(self.model, consumers, self.calibration, self.widest)

    def _layers(self, consumers: Sequence[Consumer], linear: dict[str, Linear]) -> dict[str, Linear]:
        """What is known of each consumer, with the rows that belong to this group's units."""
        found = {}
        for consumer in consumers:
            if consumer.name in linear:
                known = linear[consumer.name]
                found[consumer.name] = Linear(known.gram, known.weight, consumer.rows(), known.fixed)
        return found

    def _way(self, group: Group, layers: dict[str, Linear], most: int, probes: Sequence[int]) -> Way:
        if not layers or self.importance == "magnitude":
            return self._static(group, layers, most, probes)
        if self.importance == "activation":
            costs = static_costs(list(layers.values()), "activation")
            return self._ordered(np.argsort(costs, kind="stable")[:most], layers, probes)
        removal: Removal = Surgeon(list(layers.values()), self.damping).remove(most, probes)
        weights = {n: dict(zip(layers, m, strict=True)) for n, m in removal.snapshots.items()}
        if not self.repair:
            return self._ordered(removal.order, layers, probes)
        return Way(removal.order, removal.errors, weights)

    def _ordered(self, order: np.ndarray, layers: dict[str, Linear], probes: Sequence[int]) -> Way:
        """Errors of a given order, at the probes and between them."""
        points, weights = [(0, 0.0)], {}
        for count in sorted({n for n in probes if n}):
            matrices = {name: self._without(layer, order[:count]) for name, layer in layers.items()}
            points.append((count, float(np.mean([relative_error(layers[n], w) for n, w in matrices.items()]))))
            weights[count] = matrices
        counts, lost = np.asarray([n for n, _ in points]), np.asarray([e for _, e in points])
        errors = np.interp(np.arange(len(order) + 1), counts, lost)
        return Way(order, errors, weights)

    def _without(self, layer: Linear, removed: np.ndarray) -> np.ndarray:
        return refit(layer, removed, self.damping) if self.repair else _zeroed(layer, removed)

    def _static(self, group: Group, layers: dict[str, Linear], most: int, probes: Sequence[int]) -> Way:
        """By the size of all weights that would go; where activations are known, the error is measured all the same."""
        costs = np.zeros(group.size)
        for cut in group.cuts:
            array = np.moveaxis(weight_of(self.model, cut.tensor).astype(np.float64), cut.axis, 0)
            if array.ndim < 2:
                continue
            squares = np.square(array).reshape(len(array), -1).sum(axis=1)
            costs += squares[cut.positions].sum(axis=1) / max(float(squares.sum()), 1e-30)
        order = np.argsort(costs, kind="stable")[:most]
        if layers:
            return self._ordered(order, layers, probes)
        share = np.concatenate([[0.0], np.cumsum(costs[order])]) / max(float(costs.sum()), 1e-30)
        return Way(order, share)

    # What it costs at the outputs

    def levels(
        self,
        ways: dict[str, Way],
        saving: dict[str, float],
        sizes_of: Callable[[Group], list[int]],
        *,
        at_outputs: bool,
    ) -> dict[str, list[Level]]:
        """Each group's levels; errors are those of the model's outputs where these are measured."""
        found = {}
        data = self.calibration.sample(12) if at_outputs and self.calibration is not None else None
        exact = [_flat(outputs) for outputs in data.run(self.model)] if data is not None else []
        for name, way in ways.items():
            group = self.structure.group(name)
            errors = way.errors if data is None else self._output_errors(group, way, data, exact)
            sizes = sizes_of(group)
            # Never below what a smaller cut costs
            rising = np.maximum.accumulate(errors)
            found[name] = [Level(n, float(rising[n]), n * saving[name]) for n in sizes if n < len(rising)]
        return found

    def _output_errors(self, group: Group, way: Way, data: Calibration, exact: Sequence[np.ndarray]) -> np.ndarray:
        """Relative squared error of the outputs, measured at the probes; between them it follows the layers' own."""
        size = max(sum(float(np.square(y).sum()) for y in exact), 1e-30)
        points = [(0, 0.0)]
        self._say("prune", f"what {group.name} costs at the outputs")
        for count in sorted(way.weights) or _default_probes(way):
            if not count:
                continue
            copy = self.model.clone()
            self._carry_out(copy, group, way.order[:count], way.weights.get(count, {}))
            lost = sum(float(np.square(_flat(y) - e).sum()) for y, e in zip(data.run(copy), exact, strict=True))
            points.append((count, lost / size))
        return _between(way.errors, points)

    def _carry_out(
        self, model: ir.Model, group: Group, removed: np.ndarray, matrices: dict[str, np.ndarray]
    ) -> list[str]:
        """Zeros for the units that go, and repaired weights, in the graph or in a copy of it."""
        for name, array in masked_weights(self.structure, {group.name: removed.tolist()}).items():
            _store(model, name, array)
        refitted = []
        for consumer in consumers_of(model, group):
            matrix = matrices.get(consumer.name)
            if matrix is None:
                continue
            rows = len(consumer.matrix())
            before = consumer.bias()
            consumer.weight.const_value = ir.Tensor(consumer.from_matrix(matrix[:rows]), name=consumer.name)
            if len(matrix) > rows and before is not None and consumer.layer is not None:
                shift = matrix[rows] - before
                if np.any(shift):
                    add_to_bias(model, consumer.layer, shift)
            refitted.append(consumer.name)
        return refitted

    # Front to back

    def prune(self, counts: dict[str, int]) -> list[Done]:
        """Take so many units from each group, in graph order, each on what the cut network computes by then."""
        found = []
        for group in self.structure.groups:
            count = counts.get(group.name, 0)
            if not count:
                continue
            self._say("prune", f"{count} of {group.size} {group.kind} of {group.name}")
            consumers = consumers_of(self.model, group)
            wants_data = self.repair or self.importance != "magnitude"
            layers = self._layers(consumers, self._measure(consumers) if wants_data else {})
            way = self._way(group, layers, count, [count])
            removed = np.sort(way.order[:count])
            matrices = way.weights.get(count, {}) if self.repair else {}
            errors = [relative_error(layers[n], w) for n, w in way.weights.get(count, {}).items()]
            plain = [relative_error(layer, _zeroed(layer, removed)) for layer in layers.values()]
            refitted = self._carry_out(self.model, group, removed, matrices)
            self._look_again()
            found.append(Done(group, removed, _mean(errors), _mean(plain), tuple(refitted)))
        return found

    def _look_again(self) -> None:
        """Follow the graph: weights have other values now, and a layer may have been given a bias."""
        known = self.structure.walk.constants
        weights = {v for v in self.model.graph.initializers.values() if v.const_value is not None and v.uses()}
        if weights - set(known) - self._unmet:
            self.structure = analyze(self.model, open_caches=self.open_caches)
            return
        for value in known:
            if value.const_value is not None:
                known[value] = value.const_value.numpy()


def _mean(numbers: Sequence[float]) -> float | None:
    return float(np.mean(numbers)) if numbers else None


def _default_probes(way: Way) -> list[int]:
    most = len(way.order)
    return sorted({round(share * most) for share in _PROBES} - {0})


def _zeroed(layer: Linear, removed: np.ndarray) -> np.ndarray:
    weight = layer.weight.copy()
    weight[layer.rows[removed].reshape(-1)] = 0
    return weight


def _flat(outputs: dict[str, np.ndarray]) -> np.ndarray:
    parts = [np.asarray(a, np.float64).reshape(-1) for a in outputs.values() if np.issubdtype(a.dtype, np.floating)]
    return np.concatenate(parts) if parts else np.zeros(1)


def _between(errors: np.ndarray, points: Sequence[tuple[int, float]]) -> np.ndarray:
    """A curve through measured points that has the shape of another curve between them."""
    found = np.zeros_like(errors)
    for (left, low), (right, high) in pairwise(points):
        span = errors[right] - errors[left]
        part = (errors[left : right + 1] - errors[left]) / span if span > 0 else np.linspace(0, 1, right - left + 1)
        found[left : right + 1] = low + part * (high - low)
    last = points[-1][0]
    found[last:] = points[-1][1] + np.maximum(errors[last:] - errors[last], 0)
    return found


def _store(model: ir.Model, name: str, array: np.ndarray) -> None:
    value = model.graph.initializers.get(name)
    if value is None:  # a Constant node
        value = next(v for node in model.graph for v in node.outputs if v.name == name)
        node = value.producer()
        assert node is not None
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(array))
        return
    value.const_value = ir.Tensor(array, name=name)
