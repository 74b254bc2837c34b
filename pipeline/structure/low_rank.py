# SPDX-License-Identifier: Apache-2.0
"""A matrix as the product of two thin ones: the best such pair, what it loses, and how to share out a budget.

Without data the best approximation of rank r is the truncated singular value decomposition (Eckart and Young, 1936):
no other matrix of that rank is nearer to W. What a layer's output loses is another matter: it depends on the inputs X.
With X^T X = L L^T,

    ||X (W - W_r)||_F = ||L^T (W - W_r)||_F,

so the best W_r for these inputs is L^-T times the truncated decomposition of L^T W: whitening, SVD-LLM (Wang et al.,
arXiv 2403.07378), 3.1. In both cases W is a sum of rank-one terms a_i b_i^T whose errors add up: the rows b_i are
orthogonal, so that what the output loses at rank r is the sum over i > r of (a_i^T X^T X a_i) |b_i|^2, to the digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

Metric = Literal["output", "weight"]
"""What an error is relative to: the layer's output on the calibration data, or the weight itself."""

_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Decomposition:
    """W [m, n] = left @ right, terms in the order of what they contribute.

    Attributes:
        left: float32 [m, k]; its column i is as long as row i of `right`, so that neither is hard to round later.
        right: float32 [k, n]. k may be less than min(m, n): the terms that nobody will ask for are not kept.
        energies: float64 [min(m, n)], what each term contributes to ||X W||_F^2 (or ||W||_F^2), all of them.
        metric: Whether the energies are those of outputs or of weights.
    """

    left: np.ndarray
    right: np.ndarray
    energies: np.ndarray
    metric: Metric

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """[m, rank] and [rank, n], contiguous."""
        return np.ascontiguousarray(self.left[:, :rank]), np.ascontiguousarray(self.right[:rank])

    def errors(self) -> np.ndarray:
        """||X (W - W_r)||_F / ||X W||_F for r = 0 to min(m, n): float64 [min(m, n) + 1]; zeros where X W is zero."""
        tails = np.append(np.cumsum(self.energies[::-1])[::-1], 0.0)
        return np.sqrt(tails / tails[0]) if tails[0] > 0 else np.zeros_like(tails)

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps a share of the energy."""
        return int(np.argmax(self.errors() ** 2 <= (1 - energy) * (1 + 1e-12)))


def decompose(
    weight: np.ndarray, gram: np.ndarray | None = None, *, damping: float = 0.0, keep: int | None = None
) -> Decomposition | None:
    """Decompose a weight.

    Args:
        weight: [m, n], finite.
        gram: X^T X of the inputs, float64 [m, m]; None decomposes the weight as it is.
        damping: Share of the gram's mean diagonal that is added to its diagonal, so that directions which the data
            does not have are not given up altogether; ten times as much, again and again, where the matrix is not
            positive definite.
        keep: How many terms to keep; None keeps all.

    Returns:
        None where all inputs are zero: there is nothing to learn from them.
    """
    exact = weight.astype(np.float64)
    if gram is None:
        left, values, right = np.linalg.svd(exact, full_matrices=False)
        left *= values
        energies = values**2
    else:
        upper = _whitening(gram, damping)
        if upper is None:
            return None
        left, values, right = np.linalg.svd(upper @ exact, full_matrices=False)
        left = np.linalg.solve(upper, left * values)
        # Of the inputs as they are: damping decides about directions, it is no part of the answer
        energies = np.maximum(np.einsum("ij,ij->j", left, gram @ left), 0.0)
    left, right = left[:, :keep], right[:keep]
    lengths = np.linalg.norm(left, axis=0)
    balance = np.sqrt(np.where(lengths > 0, lengths, 1.0))
    return Decomposition(
        (left / balance).astype(np.float32),
        (right * balance[:, None]).astype(np.float32),
        energies,
        "weight" if gram is None else "output",
    )


def _whitening(gram: np.ndarray, damping: float) -> np.ndarray | None:
    """L^T, upper triangular, with L L^T = gram + damping x mean diagonal; None where the gram is zero."""
    mean = float(np.diag(gram).mean())
    if not np.isfinite(mean) or mean <= 0:
        return None
    while damping <= _MOST_DAMPING:
        damped = gram.astype(np.float64)
        damped[np.diag_indices_from(damped)] += damping * mean
        try:
            return np.ascontiguousarray(np.linalg.cholesky(damped).T)
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-8)
    return None


def break_even(rows: int, columns: int) -> int:
    """The largest rank at which two factors have fewer elements than [rows, columns]: r < mn / (m + n)."""
    return max(0, (rows * columns - 1) // (rows + columns))


@dataclass(frozen=True)
class Option:
    """What one layer could be: a rank (0: as it is), what that saves, and its squared relative error."""

    rank: int
    saved: float
    error: float


def allocate(layers: Sequence[Sequence[Option]], target: float) -> list[Option]:
    """Choose one option for each layer, such that `target` is saved at the least sum of squared errors.

    Greedy on the lower convex hull of every layer's options: always the step that costs the least error for what it
    saves. That is the optimum among all choices that save as much as it does (Shoham and Gersho, "Efficient bit
    allocation for an arbitrary set of quantizers", 1988); it may save more than was asked for, by less than one step.

    Args:
        layers: The options of each layer, among them one that saves nothing.
        target: In the unit of `saved`; where the options do not reach it, they are all exhausted.
    """
    hulls = [_hull(options) for options in layers]
    steps = [
        ((after.error - before.error) / (after.saved - before.saved), layer, place)
        for layer, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull), start=1)
    ]
    chosen = [0] * len(hulls)
    saved = sum(hull[0].saved for hull in hulls)
    for _, layer, place in sorted(steps):
        if saved >= target:
            break
        saved += hulls[layer][place].saved - hulls[layer][place - 1].saved
        chosen[layer] = place
    return [hull[place] for hull, place in zip(hulls, chosen, strict=True)]


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of error over saving, from the least error on: slopes rise along it."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.saved, o.error)):
        if hull and option.saved == hull[-1].saved:
            continue
        while hull and option.error <= hull[-1].error:  # saves more and costs no more
            hull.pop()
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(one: Option, other: Option) -> float:
    return (other.error - one.error) / (other.saved - one.saved)
