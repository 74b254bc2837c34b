# SPDX-License-Identifier: Apache-2.0
"""Find by measurement which nodes have to stay fp32 when a model is cast to fp16 or bf16.

Everything is measured on a simulation: the fp32 graph with each value, and each weight, rounded to the lower type and
back, by a pair of explicit casts. That is an operator that computes in fp32 and rounds its result, as GPUs do. Running
the cast graph itself on a CPU shows less than that: around fp16 operators that it has no kernel for, ONNX Runtime puts
casts of its own and then drops those that meet, so that whole chains are not rounded at all.

A value that is not to be rounded needs fp32 where it is made and wherever it is read. So it is values that are given
back, and the nodes at their ends that stay fp32:

1.  Constants that stand for infinity, such as a mask's -3.4e38, are brought in; they are those with which the outputs
    stay the same. The readers of other weights beyond the type's end stay fp32.
2.  Values that come closer to the end than `headroom` are given back.
3.  If an output misses its SQNR, the graph is run with only some of its values rounded, half of them, a quarter, down
    to single ones, and those that add most to the error are given back. Errors of different roundings are independent,
    so that their squares add up; the result is verified with all others rounded, and the budget narrowed if it fails.
    As a value takes others with it, the least of what was given back is then taken again, while the goal is met.
4.  Nodes between two that stay fp32 join them where that saves casts.

An error at a value says little about the error it does to the outputs: in (x + 4096) - 4096 the sum is right to 70 dB,
and the difference, which is exact, is lost. This is why step 3 looks at outputs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...contracts.errors import InputError
from ..statistics import Calibration, Wanted
from .graph import add_weight, is_op, is_weight, make_node, nodes_of
from .low_precision import (
    DATA_TYPES,
    FLOAT,
    Held,
    Precision,
    is_float,
    limits,
    low_uses,
    nodes_inside,
    peak,
    round_to,
    stays,
    subgraphs_of,
    with_kept,
)

Kept = dict[ir.Node, str]
"""The nodes that stay fp32, and why."""

Outputs = Mapping[str, np.ndarray]

_SEARCH_BATCHES = 4
_MOST_RUNS = 128
"""A search stops to look closer after so many sets of values; it then gives back whole sets."""

_MOST_CONSTANTS = 16
_ROUNDS = 8
_UNCHANGED = 1e-9
"""Noise over signal, 90 dB: where a softmax is as it was, and only fp32 rounds elsewhere."""

_GATES = "onnxpress_rounded"
_PRODUCTS = ("Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
"""Too much arithmetic to be done in fp32 for the sake of a cast."""


@dataclass(frozen=True)
class Goal:
    """What the search is for: see the settings of the pass."""

    to: Precision
    headroom: float
    minimum_sqnr_db: float

    @property
    def threshold(self) -> float:
        return limits(self.to)[0] / self.headroom

    @property
    def noise(self) -> float:
        """The largest ratio of noise to signal."""
        return float(10 ** (-self.minimum_sqnr_db / 10))


@dataclass
class Measured:
    """The answer.

    Attributes:
        kept: Nodes that stay fp32.
        brought_in: Names of the weights whose numbers beyond `Goal.threshold` stand for infinity.
        details: For the report. SQNR of the worst output in dB, None where it is not finite, at most 200.
    """

    kept: Kept
    brought_in: set[str] = field(default_factory=set)
    details: dict[str, float | None] = field(default_factory=dict)


def measure(model: ir.Model, by_kind: Held, kept: Kept, goal: Goal, calibration: Calibration) -> Measured:
    """Find the nodes that stay fp32.

    Args:
        model: Prepared for the cast: constants are initializers, types are known. Weights may be exchanged.
        by_kind: What keeps fp32 anyway.
        kept: What the user wants to keep, and why.
        goal: What is asked for.
        calibration: The data.

    Raises:
        InputError: The model returns no floating point number, a value is NaN on the data, or the goal is out of reach.
    """
    if not any(is_float(value) for value in model.graph.outputs):
        raise InputError(
            "cast cannot measure the error of a model that returns no floating point numbers",
            next_step="Set mixed: false, and name what has to stay fp32 in keep.",
        )
    search = _Search(model, by_kind, dict(kept), goal, calibration)
    for node in model.graph:
        if subgraphs_of(node):
            search.kept[node] = "what is inside its subgraphs cannot be measured"
    before = search.noise()
    search.bring_in_constants()
    search.keep_what_overflows()
    search.join()
    after = search.noise()
    if after > goal.noise:
        after = search.reach_goal(after)
    return Measured(
        search.kept,
        search.brought_in,
        {"worst_sqnr_db_before": _decibels(before), "worst_sqnr_db_after": _decibels(after)},
    )


def bring_in(array: np.ndarray, threshold: float) -> np.ndarray:
    """Put finite numbers beyond `threshold` to half of it: as good as infinite, and room is left to add to them."""
    beyond = np.isfinite(array) & (np.abs(array) > threshold)
    return np.where(beyond, np.copysign(np.float32(threshold / 2), array), array).astype(array.dtype)


def bring_in_weight(weight: ir.Value, threshold: float) -> None:
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(bring_in(weight.const_value.numpy(), threshold), name=weight.name)


def bridges(model: ir.Model, by_kind: Held, kept: Iterable[ir.Node]) -> list[ir.Node]:
    """Nodes that would stand between casts: all they read is fp32, and it flows on to a node that stays fp32.

    So do those that lead from such a node to an output of the graph. Products, and what reads a matrix of weights, are
    worth their casts.
    """
    held, anchors = with_kept(by_kind, kept), {inner for node in kept for inner in (node, *nodes_inside(node))}
    float32 = {value for value in model.graph.inputs if is_float(value)}
    float32 |= {value for node in model.graph for value in node.outputs if is_float(value) and stays(value, held)}
    candidates: dict[ir.Node, bool] = {}  # and whether something that they come from stays fp32
    for node in model.graph:
        reads = [value for value in node.inputs if value is not None and is_float(value) and not is_weight(value)]
        if node not in anchors and _joins(node) and float32.issuperset(reads):
            makers = [maker for value in reads if (maker := value.producer()) is not None]
            candidates[node] = any(maker in anchors or candidates.get(maker, False) for maker in makers)
            float32.update(filter(is_float, node.outputs))
    found: set[ir.Node] = set()
    for node in reversed(candidates):
        ends = candidates[node] and any(value.is_graph_output() for value in node.outputs)
        if ends or any(reader in anchors or reader in found for reader in node.successors()):
            found.add(node)
    joined = with_kept(by_kind, found)
    return [node for node in candidates if node in found and joined[node] != by_kind.get(node)]


def _joins(node: ir.Node) -> bool:
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    matrix = any(is_weight(v) and v.shape is not None and sum(n != 1 for n in v.shape) > 1 for v in values)
    plain = not node.domain and node.op_type not in _PRODUCTS and not subgraphs_of(node)
    known = all(isinstance(value.type, ir.TensorType) for value in values)
    return plain and known and not matrix and any(map(is_float, node.outputs))


def simulate(model: ir.Model, held: Held, to: Precision, points: Sequence[str], *, gated: bool = False) -> ir.Model:
    """Return a copy of `model`, in fp32, in which values are rounded to `to` and back.

    Args:
        model: Stays as it is.
        held: Where fp32 is kept: there the exact value is read.
        to: The type to round to.
        points: Names of the values, `rounding_points` or some of them.
        gated: Add an input `onnxpress_rounded`, bool [points], that says which of them are rounded.
    """
    copy = model.clone()
    held = {twin: held[node] for node, twin in zip(nodes_of(model), nodes_of(copy), strict=True) if node in held}
    values = _main_values(copy)
    rounding = [(values[name], low_uses(values[name], held)) for name in points]
    gates = None
    if gated:
        gates = ir.Value(name=_GATES, shape=ir.Shape([len(points)]), type=ir.TensorType(ir.DataType.BOOL))
        copy.graph.inputs.append(gates)
    for index, (value, uses) in enumerate(rounding):
        everywhere = not is_weight(value) and not stays(value, held)
        name, rounded = str(value.name), _rounded(copy, value, to)
        if gates is not None:
            place = add_weight(copy, copy.graph, f"{_GATES}_{index}", np.asarray(index, np.int64))
            gate = _append(copy, "Gather", [gates, place], f"{name}_gate")
            rounded = _append(copy, "Where", [gate, rounded, value], f"{name}_gated")
        for node, place_ in uses:
            node.replace_input_with(place_, rounded)
        if everywhere and value in copy.graph.outputs:
            value.name, rounded.name = f"{name}_exact", name
            rounded.shape, rounded.type = value.shape, value.type
            for position, output in enumerate(copy.graph.outputs):
                if output is value:
                    copy.graph.outputs[position] = rounded
    copy.graph.sort()
    return copy


def rounding_points(model: ir.Model, held: Held) -> list[str]:
    """Names of the values of the main graph that the cast rounds, weights included, in the order in which they come."""
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.graph is not model.graph or not is_float(value):
                continue
            if (is_weight(value) or value.is_graph_input()) and low_uses(value, held):
                found.setdefault(value)
        for value in node.outputs:
            if is_float(value) and (not stays(value, held) or low_uses(value, held)):
                found.setdefault(value)
    return [str(value.name) for value in found]


def _main_values(model: ir.Model) -> dict[str, ir.Value]:
    graph = model.graph
    made = [value for node in graph for value in node.outputs]
    return {str(value.name): value for value in (*graph.inputs, *graph.initializers.values(), *made)}


def _append(model: ir.Model, op: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
    node = make_node(op, inputs, [name], attributes=attributes)
    model.graph.append(node)
    return node.outputs[0]


def _rounded(model: ir.Model, value: ir.Value, to: Precision) -> ir.Value:
    if is_weight(value):
        assert value.const_value is not None
        array = value.const_value.numpy()
        array, _, _ = round_to(array, to, keep_nonzero=array.size == 1)
        return add_weight(model, model.graph, f"{value.name}_rounded", array.astype(np.float32))
    low = _append(model, "Cast", [value], f"{value.name}_low", to=int(DATA_TYPES[to]))
    return _append(model, "Cast", [low], f"{value.name}_rounded", to=int(FLOAT))


class _Noise:
    """Noise over signal of each output, summed over batches."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, reference: Outputs, other: Outputs) -> None:
        """Where the reference is no number, nothing is asked of the other."""
        for name, expected in reference.items():
            if expected.dtype.kind != "f":
                continue
            expected, got = expected.astype(np.float64), other[name].astype(np.float64)
            signal, noise = self._sums.get(name, (0.0, 0.0))
            if expected.shape != got.shape:  # a number of rows that depends on the values
                self._sums[name] = (signal, math.inf)
                continue
            finite = np.isfinite(expected)
            expected, got = expected[finite], got[finite]
            with np.errstate(invalid="ignore"):
                error = float(np.square(got - expected).sum())
            self._sums[name] = (
                signal + float(np.square(expected).sum()),
                noise + (error if math.isfinite(error) else math.inf),
            )

    @property
    def ratio(self) -> float:
        """Of the worst output; infinite where one is not a number."""
        return max((n / s if s else math.inf if n else 0.0 for s, n in self._sums.values()), default=0.0)


class _Search:
    """The nodes that stay fp32, so far."""

    def __init__(self, model: ir.Model, by_kind: Held, kept: Kept, goal: Goal, calibration: Calibration) -> None:
        self.model, self.by_kind, self.kept, self.goal, self.calibration = model, by_kind, kept, goal, calibration
        self.brought_in: set[str] = set()
        self._original = model.clone()
        self._values = _main_values(model)

    @property
    def held(self) -> Held:
        return with_kept(self.by_kind, self.kept)

    def noise(self, model: ir.Model | None = None) -> float:
        """Of `model`, or of the model as it would be cast now, against the model as it was."""
        if model is None:
            held = self.held
            model = simulate(self.model, held, self.goal.to, rounding_points(self.model, held))
        noise, references = _Noise(), self.calibration.run(self._original)
        for reference, other in zip(references, self.calibration.run(model), strict=True):
            noise.add(reference, other)
        return noise.ratio

    def give_back(self, name: str, why: str) -> None:
        """Keep fp32 where a value is made and where it is read."""
        value, held = self._values[name], self.held
        maker = None if is_weight(value) or stays(value, held) else value.producer()
        if maker is not None:
            self._keep(maker, f"writes {why}")
        for reader, _ in low_uses(value, held):
            self._keep(reader, f"reads {why}")

    def _keep(self, node: ir.Node, reason: str) -> None:
        values = (*node.inputs, *node.outputs)
        # A sequence has one type over all of the graph: the search goes on without such a node
        if all(value is None or isinstance(value.type, ir.TensorType | None) for value in values):
            self.kept.setdefault(node, reason)

    def join(self) -> None:
        for node in bridges(self.model, self.by_kind, self.kept):
            self.kept[node] = "saves casts between nodes that stay fp32"

    def bring_in_constants(self) -> None:
        """Exchange the constants that stand for infinity, and keep the readers of other weights beyond the end."""
        held, largest = self.held, limits(self.goal.to)[0]
        beyond: dict[str, float] = {}
        for name in rounding_points(self.model, held):
            value = self._values[name]
            # The ends of a range may well be at the type's own
            bound = all(is_op(reader, "Clip", "Max", "Min") for reader, _ in low_uses(value, held))
            if is_weight(value) and not bound and (size := peak(value)) > self.goal.threshold:
                beyond[name] = size
        alone = [{name} for name in beyond] if len(beyond) <= _MOST_CONSTANTS else []
        for names in ([set(beyond)] if beyond else []) + alone:
            if names <= self.brought_in or self.noise(self._with_brought_in(names)) > _UNCHANGED:
                continue
            self.brought_in |= names
        for name in self.brought_in:
            bring_in_weight(self._values[name], self.goal.threshold)
        for name, size in beyond.items():
            if name not in self.brought_in and size > largest:
                self.give_back(name, f"the weight '{name}', which reaches {size:.4g} ({self._end()})")

    def _with_brought_in(self, names: set[str]) -> ir.Model:
        copy = self.model.clone()
        for name in names:
            bring_in_weight(copy.graph.initializers[name], self.goal.threshold)
        return copy

    def keep_what_overflows(self) -> None:
        points = rounding_points(self.model, self.held)
        names = [name for name in points if not is_weight(self._values[name])]
        for name, span in self.calibration.collect(self.model, Wanted(ranges=names)).ranges.items():
            size = max(abs(span.low), abs(span.high))
            if size > self.goal.threshold:
                self.give_back(name, f"'{name}', which reaches {size:.4g} ({self._end()})")

    def _end(self) -> str:
        return f"{self.goal.to} ends at {limits(self.goal.to)[0]:.6g}, headroom {self.goal.headroom:g}"

    def reach_goal(self, noise: float) -> float:
        """Give values back until the goal is met; returns the noise that is left.

        Raises:
            InputError: It is not met.
        """
        bisection = _Bisection(self.model, self.held, self.goal.to, self.calibration)
        before, budget = dict(self.kept), self.goal.noise
        for _ in range(_ROUNDS):
            sets = sorted(bisection.worst(budget), key=lambda one: -bisection.noise[one])
            noise = self._noise_without(sets, bisection, before)
            if noise <= self.goal.noise:
                break
            budget *= max(0.1, 0.9 * self.goal.noise / noise)  # what was left was more than its parts
        else:
            raise InputError(
                f"cast to {self.goal.to} leaves an output at {_decibels(noise)} dB, and minimum_sqnr_db is "
                f"{self.goal.minimum_sqnr_db:g}, with {len(self.kept)} nodes in fp32",
                next_step="Lower minimum_sqnr_db, or set storage_only: true instead of mixed.",
            )
        # A value takes others with it: its maker's inputs, its readers' outputs. Often fewer sets will do
        fails, meets = 0, len(sets)
        while meets - fails > 1:
            middle = (fails + meets) // 2
            enough = self._noise_without(sets[:middle], bisection, before) <= self.goal.noise
            fails, meets = (fails, middle) if enough else (middle, meets)
        return self._noise_without(sets[:meets], bisection, before)

    def _noise_without(self, sets: list[tuple[int, int]], bisection: _Bisection, kept: Kept) -> float:
        """Give back `sets` on top of `kept`, and measure."""
        self.kept = dict(kept)
        for first, last in sets:
            self._give_back_set(bisection, first, last)
        self.join()
        return self.noise()

    def _give_back_set(self, bisection: _Bisection, first: int, last: int) -> None:
        names = bisection.points[first:last]
        several = f"the {len(names)} values from '{names[0]}' to '{names[-1]}'"
        what = f"'{names[0]}'" if len(names) == 1 else several
        found = _decibels(bisection.noise[first, last])
        effect = "makes an output infinite or NaN" if found is None else f"leaves an output at {found} dB"
        for name in names:
            self.give_back(name, f"'{name}': rounding {what} alone {effect}")


class _Bisection:
    """Which of a model's values, rounded, add most to the error of its outputs.

    Attributes:
        points: Names of the values, in graph order.
        noise: What has been measured: noise over signal when the values from the first up to before the last alone are
            rounded.
    """

    def __init__(self, model: ir.Model, held: Held, to: Precision, calibration: Calibration) -> None:
        self.points = rounding_points(model, held)
        self.noise: dict[tuple[int, int], float] = {}
        self._model = simulate(model, held, to, self.points, gated=True)
        self._calibration = calibration
        batches = calibration.batches
        self._batches = [
            batches[i] for i in sorted({round(i) for i in np.linspace(0, len(batches) - 1, _SEARCH_BATCHES)})
        ]

    def worst(self, budget: float) -> list[tuple[int, int]]:
        """The sets to give back so that the noise of all others adds up to no more than `budget`."""
        sets = [(0, len(self.points))]
        while True:
            self._measure(sets)
            total, given = 0.0, []
            for one in sorted(sets, key=lambda s: self.noise[s]):
                total += self.noise[one]
                if total > budget:
                    given.append(one)
            wide = [(first, last) for first, last in given if last - first > 1]
            if not wide or len(self.noise) > _MOST_RUNS:
                return sorted(given)
            halves = [half for a, b in wide for half in ((a, (a + b) // 2), ((a + b) // 2, b))]
            sets = [one for one in sets if one not in set(wide)] + halves

    def _measure(self, sets: list[tuple[int, int]]) -> None:
        sets = [one for one in sets if one not in self.noise]
        if not sets:
            return
        found = {one: _Noise() for one in sets}
        feeds = [{**batch, _GATES: gates} for batch in self._batches for gates in self._gates(sets)]
        calibration = Calibration(feeds, provider=self._calibration.provider, threads=self._calibration.threads)
        outputs = iter(calibration.run(self._model))
        for _ in self._batches:
            reference = next(outputs)
            for one in sets:
                found[one].add(reference, next(outputs))
        self.noise.update({one: noise.ratio for one, noise in found.items()})

    def _gates(self, sets: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        """None of the values, then those of each set."""
        for first, last in ((0, 0), *sets):
            gates = np.zeros(len(self.points), np.bool_)
            gates[first:last] = True
            yield gates


def _decibels(noise: float) -> float | None:
    """SQNR in dB; None where it is not finite, 200 where nothing is wrong."""
    if not math.isfinite(noise):
        return None
    return round(min(200.0, -10 * math.log10(max(noise, 1e-20))), 1) + 0.0  # no -0.0
