# SPDX-License-Identifier: Apache-2.0
"""Half-quadratic quantization: choose grids without data, by an error that lets outliers be.

    minimize |W - Q(W)|^p, p < 1, split with an extra matrix E that takes up the outliers:
    E <- shrink(W - Q(W));  grid <- least squares on W - E;  the penalty that ties E to the error grows each time

HQQ proper moves a real-valued zero point and keeps the scale. Zero points are integers here, as kernels have them, so
the zero point is moved first and rounded, and the scale then follows by the same rule; a symmetric grid has only its
scale. It needs groups: a grid for a whole row has too much to reach over, and no data to say what matters.

Reference: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023.
"""

from __future__ import annotations

import numpy as np

from .blocks import Grid, Rounded, find_scales, nearest, restored, round_blocks, turned_scale, usable
from .codes import Width

NORM = 0.7
"""p: how little outliers count."""

_PENALTY, _GROWTH, _ITERATIONS = 2.0, 1.1, 20
"""beta in units of a step, kappa, and how often; the reference has beta = 10 in units of the weights."""


def round_hqq(matrix: np.ndarray, grid: Grid) -> Rounded:
    """Round `matrix`, float32 [N, K], finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return round_blocks(matrix, grid, scales=half_quadratic)


def half_quadratic(values: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row of `values`, float32 [R, block]; both float32 [R, 1]."""
    scale, zero = find_scales(values, grid, clip_search=False)
    if grid.width.bits == "sign":
        return scale, zero
    least = _norm(values, scale, zero, grid.width)
    best = _improved(values, grid, scale, zero, scale, zero, least)
    if grid.symmetric and grid.width.uniform:  # the side with one code more may be the better one for the largest
        scale = usable(turned_scale(values, grid), zero, grid.width)
        best = _improved(values, grid, scale, zero, *best)
    return best[0], best[1]


def _improved(
    values: np.ndarray,
    grid: Grid,
    scale: np.ndarray,
    zero: np.ndarray,
    best_scale: np.ndarray,
    best_zero: np.ndarray,
    least: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Iterate from a scale and zero point; returns the best grid met so far and its error."""
    penalty = _PENALTY
    for iteration in range(_ITERATIONS):
        move_zero = grid.has_zeros and iteration < _ITERATIONS // 2
        codes = nearest(values, scale, zero, grid.width)
        steps = (values - restored(codes, scale, zero, grid.width)) / scale
        wanted = values / scale - _shrunk(steps, penalty)
        penalty *= _GROWTH
        if move_zero:
            zero = np.clip((codes - wanted).mean(axis=1, keepdims=True), 0, grid.width.levels - 1)
            rounded = np.rint(zero)
        else:
            rounded = zero = np.rint(zero)
            offset = codes * np.float32(grid.width.stride) - zero
            over = np.einsum("ij,ij->i", offset, wanted)[:, None]
            under = np.einsum("ij,ij->i", offset, offset)[:, None]
            factor = np.divide(over, under, out=np.ones_like(scale), where=under > 0)
            scale = usable(scale * np.where(factor > 0.1, factor, 1), zero, grid.width)
        error = _norm(values, scale, rounded, grid.width)
        better = error < least
        least = np.where(better, error, least)
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, rounded, best_zero)
    return best_scale, best_zero, least


def _shrunk(steps: np.ndarray, penalty: float) -> np.ndarray:
    """Generalized soft thresholding: what of an error, in steps, is left to the outliers."""
    size = np.abs(steps)
    taken = np.power(size, NORM - 1, out=np.zeros_like(size), where=size > 0) / np.float32(penalty)
    shrunk: np.ndarray = np.sign(steps) * np.maximum(size - taken, 0)
    return shrunk


def _norm(values: np.ndarray, scale: np.ndarray, zero: np.ndarray, width: Width) -> np.ndarray:
    off = np.abs(values - restored(nearest(values, scale, zero, width), scale, zero, width))
    norm: np.ndarray = np.power(off, np.float32(NORM)).sum(axis=1, keepdims=True)
    return norm
