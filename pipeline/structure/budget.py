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
from ..passes.graph import consumers
from ..statistics import Calibration
from .groups import Group

_GRID = 2000
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
        multiple: What is left shall be a multiple of it (or, of small groups, of an eighth of the size).
        minimum: Share of the units that stays in any case.
    """
    step = min(multiple, max(1, size // 8))
    least = max(1, int(np.ceil(minimum * size)))
    left = [n for n in range(step * (size // step), 0, -step) if least <= n < size]
    if len(left) > _MOST_LEVELS:
        left = [left[i] for i in np.linspace(0, len(left) - 1, _MOST_LEVELS).astype(int)]
    return [0, *(size - n for n in left)]


def choose(levels: Mapping[str, Sequence[Level]], wanted: float) -> dict[str, int] | None:
    """Units to remove from each group so that savings reach `wanted` at the least sum of errors; None if they cannot."""
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
            for cell in (_GRID,):
                reach = target == cell
                low = cost[reach].min(initial=np.inf)
                if low < new[cell]:
                    new[cell], which[cell] = low, number
            inside = target < _GRID
            cells = target[inside]
            better = cost[inside] < new[cells]
            new[cells[better]], which[cells[better]] = cost[inside][better], number
        taken.append((best, which))
        best = new
    if not np.isfinite(best[_GRID]):
        return None
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


def savings(model: ir.Model, groups: Sequence[Group], unit: str, calibration: Calibration | None) -> dict[str, float]:
    """What one unit of each group saves, as a share of the whole model.

    Args:
        model: The graph.
        groups: Of it.
        unit: `multiply_adds` of the products (on the largest calibration batch; without data every weight counts once)
            or `bytes` of the weights.
        calibration: Data.
    """
    weights = {
        str(value.name): value for value in model.graph.initializers.values() if value.const_value is not None
    }
    worth: dict[str, float] = {}
    if unit == "bytes":
        worth = {name: float(value.const_value.nbytes) for name, value in weights.items() if value.const_value}
    elif calibration is not None:
        macs = multiply_adds(model, calibration.shapes(model, values_to_measure(model)))
        for name, value in weights.items():
            worth[name] = float(sum(macs.get(node, 0) for node in consumers(value)))
        total = float(sum(macs.values()))
    else:
        worth = {n: float(v.const_value.size) for n, v in weights.items() if v.const_value and v.const_value.size > 1}
    if unit == "bytes" or calibration is None:
        total = sum(worth.values())
    found = {}
    for group in groups:
        amount = 0.0
        for cut in group.cuts:
            value = weights.get(cut.tensor)
            if value is not None and value.const_value is not None:
                size = int(value.const_value.shape.numpy()[cut.axis])
                amount += worth.get(cut.tensor, 0.0) * cut.positions.shape[1] / size
        found[group.name] = amount / max(total, 1.0)
    return found
