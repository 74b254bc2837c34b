# SPDX-License-Identifier: Apache-2.0
"""Have a model's outputs changed? Two-sample statistics whose distribution under no change is known.

A window of rows is compared with a reference of rows. Each statistic comes with the value that it has on average when
both are drawn from the same source, and with the threshold that it then passes once in `1 / false_alarms` windows. That
is why these were chosen, and not the population stability index with its rule of thumb: the index depends on the size
of the window and is infinite where a bin is empty.

    classes     weighted Jensen-Shannon divergence of the two histograms, in nats. 2 N times it is the G statistic of
                homogeneity, chi-squared with (bins - 1) degrees of freedom (Wilks 1938; Lin 1991 for the divergence).
    numbers     Kolmogorov-Smirnov's largest distance between the two distribution functions (Smirnov 1948).
    directions  squared distance between the mean unit vectors. Under no change its mean and variance follow from the
                traces of the covariance; the threshold is the scaled chi-squared of these moments (Box 1954; the
                unbiased trace of the square as in Chen and Qin 2010).

The rows are taken as independent. Live traffic comes in bursts of alike requests, so every statistic also has a floor
below which a change is not worth waking anybody for, however certain it is: an alarm needs both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LEAST_EXPECTED = 5.0
"""Bins that are expected to hold fewer rows are joined: below, chi-squared is no good approximation (Cochran 1954)."""

KOLMOGOROV_MEAN = math.sqrt(math.pi / 2) * math.log(2)
"""Mean of Kolmogorov's distribution."""


@dataclass(frozen=True)
class Drift:
    """One statistic of one window.

    Attributes:
        statistic: Its value.
        expected: Its mean under no change.
        threshold: What it passes with the wanted rate of false alarms, or the floor where that is higher.
    """

    statistic: float
    expected: float
    threshold: float

    @property
    def alarm(self) -> bool:
        """Whether the outputs have changed, and by enough to matter."""
        return self.statistic > self.threshold


def class_drift(reference: np.ndarray, window: np.ndarray, false_alarms: float, floor: float = 0.01) -> Drift:
    """Compare two histograms.

    Args:
        reference: Rows in each class, [classes].
        window: The same of the window.
        false_alarms: Rate of windows that pass the threshold though nothing changed.
        floor: Least divergence that matters, nats; 0.0125 is a population stability index of about 0.1.
    """
    counts = _joined(np.stack([reference, window]).astype(np.float64))
    total, bins = counts.sum(), counts.shape[1]
    if bins < 2:
        return Drift(0.0, 0.0, floor)
    independent = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / total
    seen = counts > 0
    g = 2.0 * float((counts[seen] * np.log(counts[seen] / independent[seen])).sum())
    nats = 2.0 * total
    return Drift(max(g, 0.0) / nats, (bins - 1) / nats, max(floor, chi_square_point(false_alarms, bins - 1) / nats))


def _joined(counts: np.ndarray) -> np.ndarray:
    """Join the rarest classes until each bin is expected to hold enough of either sample; [2, classes]."""
    pooled = counts.sum(0)
    share = counts.sum(1).min() / max(counts.sum(), 1.0)
    order = np.argsort(-pooled, kind="stable")
    kept = int((pooled * share >= LEAST_EXPECTED).sum())
    rest = counts[:, order[kept:]].sum(1, keepdims=True)
    if kept and rest.sum() * share < LEAST_EXPECTED:  # what is left over is rare too: into the smallest kept bin
        kept -= 1
        rest = counts[:, order[kept:]].sum(1, keepdims=True)
    return np.concatenate([counts[:, order[:kept]], rest], axis=1)


def number_drift(reference: np.ndarray, window: np.ndarray, false_alarms: float, floor: float = 0.1) -> Drift:
    """Compare two samples of a number, [rows] each; `floor` is the least distance of the distribution functions.

    With ties the true rate of false alarms is lower than asked for.
    """
    first, second = np.sort(reference), np.sort(window)
    points = np.concatenate([first, second])
    distance = np.abs(
        np.searchsorted(first, points, "right") / len(first) - np.searchsorted(second, points, "right") / len(second)
    ).max()
    scale = math.sqrt(1 / len(first) + 1 / len(second))
    return Drift(float(distance), KOLMOGOROV_MEAN * scale, max(floor, kolmogorov_point(false_alarms) * scale))


def direction_drift(reference: np.ndarray, window: np.ndarray, false_alarms: float, floor: float = 0.02) -> Drift:
    """Compare the mean directions of two samples of vectors, [rows, size] each.

    Args:
        reference: Vectors; their lengths do not matter.
        window: The same of the window.
        false_alarms: Rate of windows that pass the threshold though nothing changed.
        floor: Least squared distance that matters, as a share of the spread of single vectors around their mean.
    """
    first, second = _unit(reference), _unit(window)
    moved = first.mean(0) - second.mean(0)
    rest = np.concatenate([first - first.mean(0), second - second.mean(0)])
    freedom = len(rest) - 2
    gram = rest @ rest.T if len(rest) < rest.shape[1] else rest.T @ rest
    trace = float(np.einsum("ij,ij->", rest, rest)) / freedom
    square = float(np.einsum("ij,ij->", gram, gram)) / freedom**2 - trace**2 / freedom
    scale = 1 / len(first) + 1 / len(second)
    if trace <= 1e-12:  # every vector has the same direction: any move is a change
        return Drift(float(moved @ moved), 0.0, 1e-9)
    square = min(max(square, trace**2 / rest.shape[1]), trace**2)  # where a covariance's traces can be
    degrees = trace**2 / square
    threshold = chi_square_point(false_alarms, degrees) * scale * square / trace
    return Drift(float(moved @ moved), trace * scale, max(threshold, floor * trace))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30))


def chi_square_tail(value: float, degrees: float) -> float:
    """P(X > value) of the chi-squared distribution: the upper incomplete gamma function (DLMF 8.11.4 and 8.9.2)."""
    a, x = degrees / 2, value / 2
    if x <= 0:
        return 1.0
    front: float = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        step = a
        while term > total * 1e-16:
            step += 1
            term *= x / step
            total += term
        return max(1.0 - front * total, 0.0)
    b, c = x + 1 - a, 1e300  # the continued fraction, by Lentz's method
    d = h = 1 / b
    for i in range(1, 10_000):
        factor = -i * (i - a)
        b += 2
        d = 1 / (factor * d + b)
        c = b + factor / c
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * h


def kolmogorov_tail(value: float) -> float:
    """P(K > value) of Kolmogorov's distribution."""
    if value < 0.2:
        return 1.0
    return min(1.0, 2.0 * math.fsum((-1) ** (k - 1) * math.exp(-2 * (k * value) ** 2) for k in range(1, 101)))


@lru_cache(1024)
def chi_square_point(tail: float, degrees: float) -> float:
    """The value that chi-squared passes with probability `tail`."""
    return _solve(lambda value: chi_square_tail(value, degrees), tail)


@lru_cache(1024)
def kolmogorov_point(tail: float) -> float:
    """The value that Kolmogorov's statistic passes with probability `tail`."""
    return _solve(kolmogorov_tail, tail)


def _solve(tail_of: Callable[[float], float], tail: float) -> float:
    """Where a falling function reaches `tail`, by halving."""
    low, high = 0.0, 1.0
    while tail_of(high) > tail:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail_of(middle) > tail else (low, middle)
    return high


def below(hits: int, trials: int, wanted: float, false_alarms: float) -> bool:
    """Whether a share of hits is below the wanted one, and not by chance: Hoeffding-Chernoff's bound.

    P(hits / trials <= s) <= exp(-trials * KL(s, wanted)) for any s below the true share (Chernoff 1952), so a true
    share of `wanted` or more raises a false alarm in at most this rate of windows, however small the window.
    """
    share = hits / trials if trials else 1.0
    if share >= wanted:
        return False
    apart = (share * math.log(share / wanted) if share else 0.0) + (1 - share) * math.log(
        (1 - share) / max(1 - wanted, 1e-12)
    )
    return trials * apart > -math.log(false_alarms)
