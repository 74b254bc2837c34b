# SPDX-License-Identifier: Apache-2.0
"""How much each group loses: least error for a saving that is asked for, exactly, by a dynamic programme.

Every group offers levels (so many units gone, so much error, so much saved), and one of each is taken: the multiple
choice knapsack problem, solved over a grid of savings as in ZipLM (arXiv 2302.04089, 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..cost import multiply_adds, values_to_measure
from ..statistics import Calibration
from .groups import Group

_GRID = 10_000
_MOST_LEVELS = 48


@dataclass(frozen=True)
class Level:
    """One of the sizes that a group could have.

    Attributes:
        removed: Units gone.
        error: What it costs in accuracy, in any unit that adds up over groups.
        saving: What it saves, in the unit of the budget.
    """

    removed: int
    error: float
    saving: float


def level_sizes(size: int, multiple: int, minimum: float) -> list[int]:
    """Numbers of removed units to choose from, 0 first.

    Args:
        size: Units of the group.
        multiple: What is left shall be a multiple of it; a group that is no larger can be halved.
        minimum: Share of the units that stays in any case.
    """
    step = multiple if size > multiple else max(1, size // 2)
    least = max(1, int(np.ceil(minimum * size)))
    left = [n for n in range(step * (size // step), 0, -step) if least <= n < size]
    if len(left) > _MOST_LEVELS:
        left = [left[i] for i in np.linspace(0, len(left) - 1, _MOST_LEVELS).astype(int)]
    return [0, *(size - n for n in left)]


def choose(levels: Mapping[str, Sequence[Level]], wanted: float) -> dict[str, int] | None:
    """Units to remove from each group: savings reach `wanted` at the least sum of errors; None if they cannot."""
    most = sum(max(level.saving for level in many) for many in levels.values())
    if wanted > most * (1 + 1e-9):
        return None
    unit = max(wanted, 1e-30) / _GRID
    best = np.full(_GRID + 1, np.inf)
    best[0] = 0.0
    taken = []
    for many in levels.values():
        new, which = np.full(_GRID + 1, np.inf), np.zeros(_GRID + 1, np.int64)
        for number, level in enumerate(many):
            # Rounded down: what is promised is reached. The last cell holds everything above
            shift = int(level.saving / unit + 1e-6)
            target = np.minimum(np.arange(_GRID + 1) + shift, _GRID)
            cost = best + level.error
            top = cost[target == _GRID].min(initial=np.inf)
            if top < new[_GRID]:
                new[_GRID], which[_GRID] = top, number
            inside = target < _GRID
            cells = target[inside]
            better = cost[inside] < new[cells]
            new[cells[better]], which[cells[better]] = cost[inside][better], number
        taken.append((best, which))
        best = new
    if not np.isfinite(best[_GRID]):  # everything is wanted, and rounding down stands in the way
        return {name: max(many, key=lambda level: level.saving).removed for name, many in levels.items()}
    return _backtrack(list(levels.items()), taken, unit)


def _backtrack(
    groups: Sequence[tuple[str, Sequence[Level]]], taken: Sequence[tuple[np.ndarray, np.ndarray]], unit: float
) -> dict[str, int]:
    cell, found = _GRID, {}
    for (name, many), (before, which) in zip(reversed(groups), reversed(taken), strict=True):
        level = many[int(which[cell])]
        shift = int(level.saving / unit + 1e-6)
        found[name] = level.removed
        if cell < _GRID:
            cell -= shift
        else:
            low = max(0, _GRID - shift)
            cell = low + int(np.argmin(before[low:]))
    return {name: found[name] for name, _ in groups}


@dataclass(frozen=True)
class Work:
    """What the weights of a graph cost, and what is saved when groups lose units.

    Attributes:
        worth: Of each weight: multiply-adds of the products that read it, or its bytes.
        sizes: Lengths of each weight's axes.
        groups: By name.
    """

    worth: dict[str, float]
    sizes: dict[str, tuple[int, ...]]
    groups: dict[str, Group]

    def saved(self, removed: Mapping[str, int]) -> float:
        """Share of the whole that is saved, exactly: a weight that loses rows and columns loses less than both."""
        left: dict[str, dict[int, float]] = {}
        for name, count in removed.items():
            for cut in self.groups[name].cuts:
                if cut.tensor in self.worth:
                    axes = left.setdefault(cut.tensor, {})
                    lost = count * cut.positions.shape[1] / self.sizes[cut.tensor][cut.axis]
                    axes[cut.axis] = axes.get(cut.axis, 1.0) - lost
        total = sum(self.worth.values())
        now = sum(value * float(np.prod(list(left.get(n, {}).values()))) for n, value in self.worth.items())
        return 1 - now / max(total, 1e-30)

    def of_a_unit(self, group: Group) -> float:
        """What the first unit of a group saves."""
        return self.saved({group.name: 1})

    def choose(self, levels: Mapping[str, Sequence[Level]], wanted: float) -> dict[str, int] | None:
        """`choose`, asked for more until what is really saved reaches `wanted`; None if it cannot."""
        most = {name: max(many, key=lambda level: level.saving).removed for name, many in levels.items()}
        if self.saved(most) < wanted:
            return None
        low, high = wanted, sum(max(level.saving for level in many) for many in levels.values())
        found = choose(levels, min(low, high))
        if found is not None and self.saved(found) >= wanted:
            return found
        best = most
        for _ in range(12):
            middle = (low + high) / 2
            found = choose(levels, middle)
            if found is not None and self.saved(found) >= wanted:
                best, high = found, middle
            else:
                low = middle
        return best


def work_of(model: ir.Model, groups: Sequence[Group], unit: str, calibration: Calibration | None) -> Work:
    """What there is to save.

    Args:
        model: The graph.
        groups: Of it.
        unit: `multiply_adds` of the products (on the largest calibration batch; without data every weight counts once)
            or `bytes` of the weights.
        calibration: Data.
    """
    tensors = {str(v.name): v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    sizes = {name: tuple(int(n) for n in tensor.shape.numpy()) for name, tensor in tensors.items()}
    worth: dict[str, float] = {}
    if unit == "bytes":
        worth = {name: float(tensor.nbytes) for name, tensor in tensors.items()}
    elif calibration is None:
        worth = {name: float(tensor.size) for name, tensor in tensors.items() if len(sizes[name]) > 1}
    else:
        for node, count in multiply_adds(model, calibration.shapes(model, values_to_measure(model))).items():
            names = [str(factor.name) for factor in node.inputs[:2] if factor is not None]
            # Products of two activations are part of the whole, under a name that no group cuts
            weight = next((name for name in names if name in tensors), f"{names[0]} x {names[-1]}")
            worth[weight] = worth.get(weight, 0.0) + count
    return Work(worth, sizes, {group.name: group for group in groups})
