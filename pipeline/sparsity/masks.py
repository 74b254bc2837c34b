# SPDX-License-Identifier: Apache-2.0
"""Masks of the weights that stay, from scores: the smallest go.

Magnitude scores a weight by |W_ij|, Wanda by |W_ij| ||X_j||_2 with X_j the j-th input over all calibration rows, each
output's weights compared with each other alone. N:M keeps the N largest of every M neighbours along the inputs.

References: Han et al., "Learning both weights and connections" (arXiv 1506.02626); Sun et al., "A simple and effective
pruning approach for large language models" (arXiv 2306.11695), 3; Mishra et al., "Accelerating sparse deep neural
networks" (arXiv 2104.08378).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pattern:
    """At most `kept` weights that are not zero in every group of `group` along the inputs, written `2:4`."""

    kept: int
    group: int

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Read `N:M`.

        Raises:
            ValueError: It is not of that form, or N is not between 1 and M - 1.
        """
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        found = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 0 < found.kept < found.group:
            raise ValueError(f"'{text}' is no pattern N:M with 0 < N < M, such as 2:4")
        return found


def keep_largest(scores: np.ndarray, remove: int) -> np.ndarray:
    """All but the `remove` smallest of any array; of equal ones the first go. bool, the shape of `scores`."""
    return keep_largest_of_all([scores], remove)[0]


def keep_largest_of_all(scores: Sequence[np.ndarray], remove: int) -> list[np.ndarray]:
    """The same over several arrays: as many as `remove` go in all, from wherever the smallest are."""
    if remove <= 0:
        return [np.ones(part.shape, bool) for part in scores]
    together = np.concatenate([part.reshape(-1) for part in scores])
    together.partition(remove - 1)
    limit = together[remove - 1]
    equals = remove - int(np.count_nonzero(together[:remove] < limit))
    masks = []
    for part in scores:
        keep = part > limit
        ties = np.flatnonzero(part.reshape(-1) == limit)
        keep.reshape(-1)[ties[equals:]] = True
        equals -= min(equals, len(ties))
        masks.append(keep)
    return masks


def keep_largest_in_rows(scores: np.ndarray, remove: int) -> np.ndarray:
    """All but the `remove` smallest of every row: bool [N, K]."""
    keep = np.ones(scores.shape, bool)
    if remove > 0:
        smallest = np.argpartition(scores, remove - 1, axis=1)[:, :remove]
        np.put_along_axis(keep, smallest, False, axis=1)
    return keep


def keep_pattern(scores: np.ndarray, pattern: Pattern) -> np.ndarray:
    """The largest N of every M neighbours in a row: bool [N, K], K a multiple of M."""
    groups = scores.reshape(len(scores), -1, pattern.group)
    order = np.argsort(groups, axis=2, kind="stable")
    keep = np.ones(groups.shape, bool)
    np.put_along_axis(keep, order[:, :, : pattern.group - pattern.kept], False, axis=2)
    return keep.reshape(scores.shape)
