# SPDX-License-Identifier: Apache-2.0
"""Dependency groups of a graph: what can be cut, as values to print, veto, save and apply.

    structure = analyze(model)
    print(structure.groups[0])            # neurons of layer.0.dense.weight, 1536 units: 3 tensors
    structure.cut({"layer.0.dense.weight:1": [3, 7]})

Made from the graph alone. Torch-Pruning (Fang et al., "DepGraph", arXiv 2301.12900) has groups for PyTorch modules;
ours tie single positions instead of layers, so concatenations, splits, heads and packed weights need no case of their
own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from ...contracts.errors import InputError, did_you_mean
from ..passes.graph import add_weight, constant, consumers, drop_unused_weights, is_op
from . import attention_rules, lookup_rules, recurrent_rules, rules, shape_rules
from .units import Ids
from .walk import RULES, Walk, walk_graph

KINDS = ("neurons", "heads", "channels", "recurrent", "hidden")
"""Feed-forward neurons; heads of attention with what shares their keys; channels of convolutions; hidden units of an
LSTM, GRU or RNN; features of a residual stream that norms average over."""

_RULES = (attention_rules, lookup_rules, recurrent_rules, rules, shape_rules)  # importing them fills the table


@dataclass(frozen=True)
class Cut:
    """What one tensor loses with each unit.

    Attributes:
        tensor: Name of the weight.
        axis: Along which.
        positions: int64 [units, positions of a unit].
    """

    tensor: str
    axis: int
    positions: np.ndarray


@dataclass(frozen=True)
class Group:
    """Units of one sort, each of which can be cut alone.

    Attributes:
        name: First weight and axis, `layer.weight:1`; unique in a graph.
        kind: One of KINDS.
        cuts: Every weight that gets smaller, in graph order.
    """

    name: str
    kind: str
    cuts: tuple[Cut, ...]

    @property
    def size(self) -> int:
        return len(self.cuts[0].positions)

    def __str__(self) -> str:
        tensors = ", ".join(f"{cut.tensor}[{cut.axis}]" for cut in self.cuts)
        return f"{self.kind} of {self.name}, {self.size} units: {tensors}"

    def to_json(self) -> dict[str, Any]:
        cuts = [{"tensor": c.tensor, "axis": c.axis, "positions_a_unit": c.positions.shape[1]} for c in self.cuts]
        return {"name": self.name, "kind": self.kind, "units": self.size, "cuts": cuts}


@dataclass(frozen=True)
class Stays:
    """Units with weights that cannot be cut.

    Attributes:
        name: First weight and axis.
        units: How many.
        node: Who says so.
        reason: In words.
    """

    name: str
    units: int
    node: str
    reason: str


@dataclass
class Structure:
    """The groups of one graph, bound to it.

    Attributes:
        model: What was analyzed, and what `cut` changes.
        groups: In graph order.
        stays: What cannot be cut, with the reason.
        unruled: Operators without a rule that closed something, with how often they occur.
    """

    model: ir.Model
    groups: list[Group]
    stays: list[Stays]
    unruled: dict[str, int]
    walk: Walk = field(repr=False)
    labels: np.ndarray = field(repr=False)

    @property
    def surprises(self) -> list[Stays]:
        """What stays, without the kernels' own axes: nobody expects these to be cut."""
        return [stays for stays in self.stays if stays.reason != "it is an axis of space"]

    def group(self, name: str) -> Group:
        """By name, or InputError with a suggestion."""
        for group in self.groups:
            if group.name == name:
                return group
        raise InputError(f"no group '{name}'", next_step=did_you_mean(name, [g.name for g in self.groups]))

    def kept(self, removed: Mapping[str, Sequence[int]]) -> Callable[[Ids], np.ndarray]:
        """Which units stay when some units of some groups (name -> numbers) go.

        Raises:
            InputError: Unknown group or unit, or none would be left of a group.
        """
        gone = np.zeros(self.walk.units.count, bool)
        for name, numbers in removed.items():
            group = self.group(name)
            chosen = np.unique(np.asarray(numbers, np.int64).reshape(-1))
            if chosen.size and (chosen[0] < 0 or chosen[-1] >= group.size):
                raise InputError(
                    f"group '{name}' has units 0 to {group.size - 1}", next_step="Name units of the group."
                )
            if chosen.size >= group.size:
                raise InputError(f"nothing would be left of group '{name}'", next_step="Keep at least one unit.")
            first = group.cuts[0]
            units = self._units_of(first)
            gone[self.labels[units[first.positions[chosen].reshape(-1)]]] = True
        return lambda units: ~gone[self.labels[units]]

    def _units_of(self, cut: Cut) -> Ids:
        for value in self.walk.constants:
            if value.name == cut.tensor:
                units = (self.walk.axes[value] or [])[cut.axis]
                assert units is not None
                return units
        raise AssertionError(cut.tensor)

    def cut(self, removed: Mapping[str, Sequence[int]]) -> None:
        """Cut units out of the graph: weights get smaller, and what states sizes is rewritten.

        The structure is used up by it: analyze the graph again before cutting more.
        """
        kept = self.kept(removed)
        if not any(len(numbers) for numbers in removed.values()):
            return
        for _, rewrite in self.walk.fixes:
            rewrite(kept)
        for value, array in self.walk.constants.items():
            _slice_constant(self.model, value, array, self.walk.axes[value] or [], kept)
        for value, axes in self.walk.axes.items():
            if axes is not None and value.shape is not None and len(value.shape) == len(axes):
                _slice_shape(value, axes, kept)
        drop_unused_weights(self.model)
        NameFixPass()(self.model)


def _slice_constant(
    model: ir.Model, value: ir.Value, array: np.ndarray, axes: Sequence[Ids | None], kept: Callable[[Ids], np.ndarray]
) -> None:
    smaller = array
    for axis, units in enumerate(axes):
        if units is not None and not (stay := kept(units)).all():
            smaller = np.compress(stay, smaller, axis=axis)
    if smaller is array:
        return
    if value.const_value is not None:
        value.const_value = ir.Tensor(np.ascontiguousarray(smaller), name=value.name)
        value.shape = ir.Shape(smaller.shape)
        return
    node = value.producer()
    assert node is not None
    assert isinstance(node.graph, ir.Graph)
    new = add_weight(model, node.graph, str(value.name), np.ascontiguousarray(smaller))
    value.replace_all_uses_with(new)


def _slice_shape(value: ir.Value, axes: Sequence[Ids | None], kept: Callable[[Ids], np.ndarray]) -> None:
    if value.const_value is not None:
        return
    sizes = list(value.shape or ())
    for axis, units in enumerate(axes):
        if units is not None and isinstance(sizes[axis], int) and not (stay := kept(units)).all():
            sizes[axis] = int(stay.sum())
    value.shape = ir.Shape(sizes)


def analyze(model: ir.Model, *, open_caches: bool = False) -> Structure:
    """Find the groups of a graph.

    Args:
        model: Cleaned: constants folded, shapes inferred, in topological order. It stays as it is.
        open_caches: Let the caches of attention, which are inputs and outputs of the graph, lose heads.
    """
    walk = walk_graph(model, open_inputs=lambda name: open_caches and _is_cache(name))
    labels = walk.units.classes()
    closed: dict[int, tuple[str, str]] = {}
    for entry in walk.units.closed:
        for label in np.unique(labels[entry.units]):
            closed.setdefault(int(label), (entry.node, entry.reason))
    averaged = {int(n) for units in walk.normalized for n in np.unique(labels[units])}
    members = _members(walk, labels)
    indices = {str(value.name) for value, array in walk.constants.items() if array.dtype == np.int64}
    for label, places in members.items():
        if indices.issuperset(name for name, _ in places):
            closed.setdefault(label, ("", "it is of positions or sizes, not of weights"))
    groups, stays = _sorted_out(model, members, closed, averaged)
    return Structure(model, groups, stays, _unruled(model), walk, labels)


def _is_cache(name: str) -> bool:
    return name.startswith(("past", "present"))


_Place = tuple[str, int]


def _members(walk: Walk, labels: np.ndarray) -> dict[int, dict[_Place, list[int]]]:
    """Class to the positions that it has in every weight and axis, in graph order."""
    found: dict[int, dict[_Place, list[int]]] = {}
    for value in walk.constants:
        for axis, units in enumerate(walk.axes[value] or ()):
            if units is not None:
                for position, label in enumerate(labels[units].tolist()):
                    found.setdefault(label, {}).setdefault((str(value.name), axis), []).append(position)
    return found


def _sorted_out(
    model: ir.Model,
    members: Mapping[int, dict[_Place, list[int]]],
    closed: Mapping[int, tuple[str, str]],
    averaged: set[int],
) -> tuple[list[Group], list[Stays]]:
    """Classes that touch the same weights in the same way are units of one group."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    stay: dict[tuple[_Place, str, str], int] = {}
    for label, places in members.items():
        if label in closed:
            key = (next(iter(places)), *closed[label])
            stay[key] = stay.get(key, 0) + 1
        else:
            signature = tuple((place, len(positions)) for place, positions in places.items())
            alike.setdefault((signature, label in averaged), []).append(label)
    groups, names = [], Counter[str]()
    for (signature, mean), units in alike.items():
        first = f"{signature[0][0][0]}:{signature[0][0][1]}"
        if len(units) < 2:
            stay[signature[0][0], "", "a single unit"] = len(units)
            continue
        names[first] += 1
        cuts = tuple(
            Cut(place[0], place[1], np.asarray([members[u][place] for u in units], np.int64)) for place, _ in signature
        )
        name = first if names[first] == 1 else f"{first}#{names[first]}"
        groups.append(Group(name, _kind(model, cuts, mean), cuts))
    stays = [Stays(f"{place[0]}:{place[1]}", count, node, reason) for (place, node, reason), count in stay.items()]
    return groups, stays


def _kind(model: ir.Model, cuts: Iterable[Cut], mean: bool) -> str:
    if mean:
        return "hidden"
    blocks = False
    for cut in cuts:
        value = model.graph.initializers.get(cut.tensor)
        readers = consumers(value) if value is not None else []
        if any(is_op(node, "Conv", "ConvTranspose") for node in readers):
            return "channels"
        if any(is_op(node, "LSTM", "GRU", "RNN") for node in readers):
            return "recurrent"
        blocks = blocks or bool((np.diff(cut.positions[0]) == 1).any())  # neighbours go together
    return "heads" if blocks else "neurons"


def _unruled(model: ir.Model) -> dict[str, int]:
    counts = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in model.graph
        if ("" if node.domain == "ai.onnx" else node.domain, node.op_type) not in RULES
    )
    return dict(sorted(counts.items()))


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    """The array of a weight by name, a Constant node's included."""
    value = model.graph.initializers.get(name)
    if value is None:
        value = next(v for node in model.graph for v in node.outputs if v.name == name)
    array = constant(value)
    assert array is not None
    return array
