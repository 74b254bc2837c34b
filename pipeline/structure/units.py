# SPDX-License-Identifier: Apache-2.0
"""Units: the smallest things that can be cut, and which of them have to be cut together.

Every axis of every tensor that could be made shorter is a row of units, one for each position. Operators tie units:
the i-th column of a weight is the i-th feature of its product, and an addition ties the features of both its terms.
What is tied, directly or through others, is a class: it stays or goes as a whole, all over the graph. A class that
reaches something that may not change (an output of the graph, a softmax, an operator without a rule) is closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Ids = np.ndarray
"""int64 [size]: the units along one axis, one for each position; several positions may share one."""


@dataclass(frozen=True)
class Closed:
    """Why units have to stay.

    Attributes:
        node: Name of the node that says so, or of the graph's input or output.
        reason: In words.
        units: int64, which.
    """

    node: str
    reason: str
    units: Ids


class Units:
    """A growing set of units and ties between them."""

    def __init__(self) -> None:
        self.count = 0
        self.closed: list[Closed] = []
        self._ties: list[tuple[Ids, Ids]] = []

    def fresh(self, size: int) -> Ids:
        """`size` new units."""
        first, self.count = self.count, self.count + size
        return np.arange(first, self.count)

    def tie(self, one: Ids, other: Ids) -> None:
        """Tie units pairwise; both of the same shape, or one broadcast to the other."""
        if one is not other:
            a, b = np.broadcast_arrays(one, other)
            self._ties.append((a.reshape(-1), b.reshape(-1)))

    def close(self, units: Ids | None, node: str, reason: str) -> None:
        if units is not None:
            self.closed.append(Closed(node, reason, np.unique(units)))

    def classes(self) -> np.ndarray:
        """int64 [count]: the smallest unit of each unit's class, by label propagation with pointer jumping."""
        labels = np.arange(self.count)
        if not self._ties:
            return labels
        one = np.concatenate([a for a, _ in self._ties])
        other = np.concatenate([b for _, b in self._ties])
        while True:
            a, b = labels[one], labels[other]
            low = np.minimum(a, b)
            lower = labels.copy()
            np.minimum.at(lower, a, low)
            np.minimum.at(lower, b, low)
            while not np.array_equal(jumped := lower[lower], lower):
                lower = jumped
            if np.array_equal(lower, labels):
                return labels
            labels = lower
