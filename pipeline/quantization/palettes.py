# SPDX-License-Identifier: Apache-2.0
"""Palettes: every weight becomes one of 2^b values, and the values are chosen to be near the weights.

    minimize  sum_i  h_i (w_i - p[c_i])^2      over palettes p and codes c

In one dimension this k-means problem has an exact answer: the best clusters are intervals, so that dynamic programming
over the sorted values finds the optimum (Wang and Song, "Ckmeans.1d.dp", 2011). Here it runs over at most some hundred
bins, and Lloyd's iterations then move the borders between the weights themselves, which can only make the sum smaller.
Palettes of more than 5 bits begin with the halves of the clusters of one bit less: 0.2 dB short of the optimum at 8
bits, in a twentieth of the time. Lloyd's iterations from an even grid are run as well, and the better end is taken: no
uniform quantizer of as many levels over the whole range is ever better. Nothing is random.

References: Han et al., "Deep compression" (arXiv 1510.00149), 3, for palettes of weights; Lloyd, "Least squares
quantization in PCM", 1982; h from second moments of inputs, where SqueezeLLM (Kim et al., arXiv 2306.07629), 4.1, takes
Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_EXACT = 1 << 16
_KEY_BITS = 20
"""Up to `_EXACT` weights every distinct value counts by itself. Beyond, those that agree in their first 20 bits (to
0.05 %) are summed and moved together, so that memory does not grow with the weight."""

_BINS = 384
_MOST_EXACT = 32
"""More clusters than these come from splitting: dynamic programming takes a matrix of bins for each of them."""

_ROUNDS = 100
_PIECE = 1 << 20
_LEAST_IMPORTANCE = 1e-6
"""Of the mean: a weight whose input was always zero still gets a value that is near it."""


@dataclass(frozen=True)
class Palette:
    """The values, and which weight takes which.

    Attributes:
        values: float32 [levels], ascending; fewer where the weights have fewer distinct values.
        codes: uint8, in the shape of the weights.
    """

    values: np.ndarray
    codes: np.ndarray

    def restored(self) -> np.ndarray:
        """The weights that the codes stand for, float32."""
        return np.asarray(self.values[self.codes], np.float32)


@dataclass(frozen=True)
class _Sums:
    """Weights in ascending order, gathered in cells: how important each is, and its first two moments.

    Attributes:
        centre: What `mean` is counted from, so that the moments keep their digits.
        mass: float64 [cells].
        mean: float64 [cells], relative to `centre`.
        spread: float64 [cells], the squared error of the cell around its own mean.
    """

    centre: float
    mass: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    def clusters(self, borders: np.ndarray) -> _Sums:
        """Cells gathered anew; cluster i begins with the cell `borders[i]`, the first with 0. None is empty."""
        mass = np.add.reduceat(self.mass, borders)
        mean = np.add.reduceat(self.mass * self.mean, borders) / mass
        sizes = np.diff(np.append(borders, len(self.mass)))
        off = self.mass * np.square(self.mean - np.repeat(mean, sizes))
        return _Sums(self.centre, mass, mean, np.add.reduceat(self.spread + off, borders))


def find_palette(weights: np.ndarray, bits: int, importance: np.ndarray | None = None) -> Palette:
    """The palette of least (weighted) squared error.

    Args:
        weights: float32 of any shape, finite, not empty.
        bits: 1 to 8.
        importance: What a squared error counts, not negative, broadcastable to `weights`; None counts all alike.

    Returns:
        At most 2^bits values, and the codes.
    """
    sums = _sums(weights, importance)
    levels = min(1 << bits, len(sums.mass))
    ends = [lloyd(sums, start)[-1] for start in (_best_start(sums, levels), _even(sums, levels))]
    best = min((sums.clusters(borders) for borders in ends), key=lambda c: float(c.spread.sum()))
    with np.errstate(over="ignore"):
        values = np.unique((best.mean + best.centre).astype(np.float32))
    return Palette(values, nearest_codes(weights, values))


def nearest_codes(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the ascending `values` is nearest to each weight: uint8, in the shape of the weights."""
    borders = (values[1:].astype(np.float64) + values[:-1]) / 2
    codes = np.empty(weights.size, np.uint8)
    for part, some in _pieces(weights):
        codes[part] = np.searchsorted(borders, some.astype(np.float64))
    return codes.reshape(weights.shape)


def squared_error(weights: np.ndarray, restored: np.ndarray, importance: np.ndarray | None = None) -> float:
    """sum h (w - p)^2."""
    off = np.square(weights.astype(np.float64) - restored)
    return float(off.sum() if importance is None else (off * importance).sum())


def lloyd(sums: _Sums, borders: np.ndarray) -> list[np.ndarray]:
    """Lloyd's iterations from clusters that begin at `borders`, until none moves: every stage, the last one the best.

    A border goes to the first cell that is nearer to the upper of the two means. A cluster that would become empty
    goes, and stays away: the values then are fewer.
    """
    mass, first = (np.append(0.0, np.cumsum(terms)) for terms in (sums.mass, sums.mass * sums.mean))
    stages = [borders]
    for _ in range(_ROUNDS):
        ends = np.append(borders, len(sums.mass))
        mean = np.diff(first[ends]) / np.diff(mass[ends])
        moved = np.searchsorted(sums.mean, (mean[1:] + mean[:-1]) / 2)
        moved = np.unique(np.concatenate([[0], moved[moved < len(sums.mass)]]))
        if np.array_equal(moved, borders):
            break
        borders = moved
        stages.append(borders)
    return stages


def _best_start(sums: _Sums, levels: int) -> np.ndarray:
    """The best clusters among bins where they are few; where they are many, the halves of what half as many led to."""
    if levels >= len(sums.mass):
        return np.arange(len(sums.mass))
    if levels <= _MOST_EXACT:
        return _best_of_bins(sums, levels)
    borders = lloyd(sums, _best_start(sums, -(-levels // 2)))[-1]
    middles = np.searchsorted(sums.mean, sums.clusters(borders).mean)
    return np.unique(np.concatenate([borders, middles[: levels - len(borders)]]))


def _best_of_bins(sums: _Sums, levels: int) -> np.ndarray:
    """The best clusters whose borders are those of bins: dynamic programming over the last cluster's beginning."""
    edges = _bin_edges(sums, _BINS)
    bins = sums.clusters(edges)
    count = len(edges)
    levels = min(levels, count)
    cost = _interval_costs(bins)
    best, begins = cost[0].copy(), np.zeros((levels, count), np.int64)
    for level in range(1, levels):
        # Total with the last cluster from bin i to bin j: what is best up to i - 1, and the cluster itself
        total = np.full((count, count), np.inf)
        total[1:] = best[:-1, None] + cost[1:]
        begins[level] = total.argmin(axis=0)
        best = np.minimum(best, total[begins[level], np.arange(count)])
        begins[level] = np.where(np.arange(count) < level, 0, begins[level])
    borders, end = [], count - 1
    for level in range(levels - 1, 0, -1):
        begin = int(begins[level, end])
        if begin == 0:
            continue
        borders.append(begin)
        end = begin - 1
    return np.asarray(edges[[0, *reversed(borders)]])


def _interval_costs(bins: _Sums) -> np.ndarray:
    """The squared error of one cluster from bin i to bin j, float64 [bins, bins]; infinite where j < i."""
    mass, first = np.cumsum(bins.mass), np.cumsum(bins.mass * bins.mean)
    second = np.cumsum(bins.spread + bins.mass * np.square(bins.mean))
    before = [np.append(0.0, sums[:-1])[:, None] for sums in (mass, first, second)]
    weight = mass[None] - before[0]
    upper = np.triu(np.ones_like(weight, dtype=bool))
    squares = np.square(first[None] - before[1])
    cost = (second[None] - before[2]) - np.divide(squares, weight, out=np.zeros_like(weight), where=upper)
    return np.where(upper, np.maximum(cost, 0.0), np.inf)


def _bin_edges(sums: _Sums, count: int) -> np.ndarray:
    """The cells at which bins begin: half of them evenly over the range, half evenly over the mass; all if few."""
    if len(sums.mass) <= count:
        return np.arange(len(sums.mass))
    even = np.linspace(sums.mean[0], sums.mean[-1], count // 2, endpoint=False)
    mass = np.cumsum(sums.mass)
    cells = [np.searchsorted(sums.mean, even), np.searchsorted(mass, np.linspace(0, mass[-1], count // 2, False))]
    found = np.unique(np.concatenate([[0], *cells]))
    return found[found < len(sums.mass)]


def _even(sums: _Sums, levels: int) -> np.ndarray:
    """Clusters around an even grid over the whole range."""
    low, high = sums.mean[0], sums.mean[-1]
    step = (high - low) / max(1, levels - 1)
    borders = np.searchsorted(sums.mean, low + step * (np.arange(1, levels) - 0.5))
    return np.unique(np.concatenate([[0], borders[borders < len(sums.mass)]]))


def _sums(weights: np.ndarray, importance: np.ndarray | None) -> _Sums:
    """Gather the weights in cells: of equal values, or of equal first bits where they are many."""
    centre = float(weights.mean(dtype=np.float64))
    counted = _counted(weights, importance)
    if weights.size <= _EXACT:
        cells, index = np.unique(weights.reshape(-1), return_inverse=True)
        mass = np.bincount(index, counted, minlength=len(cells)).astype(np.float64)
        return _Sums(centre, mass, cells.astype(np.float64) - centre, np.zeros(len(cells)))
    moments = np.zeros((3, 1 << _KEY_BITS))
    for part, some in _pieces(weights):
        key, off = _key(some), some.astype(np.float64) - centre
        weight = np.ones_like(off) if counted is None else counted[part]
        for total, terms in zip(moments, (weight, weight * off, weight * off * off), strict=True):
            total += np.bincount(key, terms, minlength=len(total))
    mass, first, second = moments[:, moments[0] > 0]
    mean = first / mass
    return _Sums(centre, mass, mean, np.maximum(second - mass * mean * mean, 0.0))


def _counted(weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray | None:
    """The importance of each weight, flat; None where all count alike."""
    if importance is None or not importance.any():
        return None
    scaled = importance / float(importance.mean(dtype=np.float64))
    return np.broadcast_to(np.maximum(scaled, _LEAST_IMPORTANCE), weights.shape).reshape(-1)


def _key(values: np.ndarray) -> np.ndarray:
    """The first bits of float32 numbers, as integers in the same order."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    ordered = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    return (ordered >> np.uint32(32 - _KEY_BITS)).astype(np.int64)


def _pieces(weights: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    flat = weights.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        part = slice(start, start + _PIECE)
        yield part, flat[part]
