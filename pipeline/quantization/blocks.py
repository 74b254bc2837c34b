# SPDX-License-Identifier: Apache-2.0
"""Rounding a matrix to blocks of small integers that share a scale, and choosing that scale.

Weights are [N, K] here: one row for each output channel, blocks along the input channels, the last one shorter where
the block length does not divide K. Without the clip search, the grid spans all values of a block, and a weight moves by
at most half a step. With it, a few narrower grids are tried for every block; each is fitted by least squares to the
codes that it led to, and the one of the smallest (weighted) squared error is kept.

References: symmetric and asymmetric grids as in Krishnamoorthi (arXiv 1806.08342), 2; ternary without search: the mean
of absolute values, BitNet b1.58 (Ma et al., arXiv 2402.17764), 2; sign: XNOR-Net (Rastegari et al., arXiv 1603.05279),
3.1. Weighting by the diagonal of X^T X as in AWQ's and NNCF's searches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from .codes import Width

_PIECE = 1 << 18
"""Elements that are rounded at a time: some arrays of that size stay in the processor's cache."""

_STRIP = 1 << 20
"""Elements that are copied at a time, so that their blocks follow each other."""

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
"""Parts of the full range that the search tries."""

_TERNARY_SHARES = (0.9, 1.2, 1.5, 1.8, 2.2, 2.8)
"""Scales that the search tries for three levels, as multiples of the mean absolute value."""


@dataclass(frozen=True)
class Grid:
    """The integers that a matrix is rounded to.

    Attributes:
        width: Number format.
        block: How many weights of a row share a scale; None: all of them.
        symmetric: The zero point is the middle one; otherwise each block has its own, an integer.
    """

    width: Width
    block: int | None
    symmetric: bool = False

    @property
    def has_zeros(self) -> bool:
        return self.width.uniform and not self.symmetric

    def length(self, columns: int) -> int:
        """Weights in a block of a matrix of so many columns."""
        return columns if self.block is None else min(self.block, columns)

    def blocks(self, columns: int) -> int:
        return -(-columns // self.length(columns))


@dataclass
class Rounded:
    """A quantized matrix.

    Attributes:
        codes: uint8 [N, K].
        scales: float32 [N, blocks]; a negative one turns its block's grid around.
        zeros: uint8 [N, blocks]; None where the grid is symmetric.
        grid: What the codes mean.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    grid: Grid

    def dequantized(self) -> np.ndarray:
        """The weights that the codes stand for: float32 [N, K]."""
        rows, columns = self.codes.shape
        length = self.grid.length(columns)
        result = np.empty((rows, columns), np.float32)
        for part, blocks, size in _alike(columns, length):
            shape = (rows, -1, size)
            zero = self.grid.width.zero if self.zeros is None else self.zeros[:, blocks, None].astype(np.float32)
            values: np.ndarray = np.multiply(
                self.codes[:, part].reshape(shape), self.grid.width.stride, dtype=np.float32
            )
            values -= zero
            values *= self.scales[:, blocks, None]
            if part.stop - part.start == columns:
                return values.reshape(rows, columns)
            result[:, part] = values.reshape(rows, -1)
        return result

    def part(self, rows: slice) -> Rounded:
        """Some of the output channels, as views."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Rounded(self.codes[rows], self.scales[rows], zeros, self.grid)

    def put(self, rows: np.ndarray, other: Rounded) -> None:
        """Take over output channels, bool [N], from `other`."""
        self.codes[rows], self.scales[rows] = other.codes[rows], other.scales[rows]
        if self.zeros is not None and other.zeros is not None:
            self.zeros[rows] = other.zeros[rows]


Scales = Callable[[np.ndarray, Grid], tuple[np.ndarray, np.ndarray]]
"""Another way to choose scales and zero points, [R, 1] each, for blocks [R, block]."""


def round_blocks(
    matrix: np.ndarray,
    grid: Grid,
    *,
    clip_search: bool = False,
    importance: np.ndarray | None = None,
    scales: Scales | None = None,
) -> Rounded:
    """Round to nearest.

    Args:
        matrix: float32 [N, K], finite.
        grid: The integers to round to.
        clip_search: Whether scales may cut off outliers where that makes the squared error smaller.
        importance: Weight of each column's squared error in the search, [K], not negative: the diagonal of X^T X, for
            one.
        scales: Chooses the scales in place of the search.

    Returns:
        The codes and the scales they were rounded with.
    """
    rows, columns = matrix.shape
    length, blocks = grid.length(columns), grid.blocks(columns)
    codes = np.empty((rows, columns), np.uint8)
    steps = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8) if grid.has_zeros else None
    choose, plain = scales or partial(find_scales, clip_search=clip_search), not scales and not clip_search
    plain = plain and grid.width.uniform
    # In a transposed matrix one block's columns lie beside each other already, and numpy works along them
    turned = matrix.strides[0] < matrix.strides[1]
    for part, some_blocks, size in _each(columns, length) if turned else _alike(columns, length):
        weight = None if importance is None else importance[part].astype(np.float32).reshape(-1, size)
        step = max(1, _STRIP // (part.stop - part.start))
        for start in range(0, rows, step):
            some = slice(start, min(start + step, rows))
            # One block a row, behind each other: some columns of a matrix would be read all over the memory
            strip = np.asarray(matrix[some, part], np.float32, order="K" if turned else "C").reshape(-1, size)
            found = _round_strip(strip, grid, choose, weight, plain=plain)
            codes[some, part] = found[0].reshape(some.stop - start, -1)
            steps[some, some_blocks] = found[1].reshape(some.stop - start, -1)
            if zeros is not None:
                zeros[some, some_blocks] = found[2].reshape(some.stop - start, -1)
    return Rounded(codes, steps, zeros, grid)


def _round_strip(
    strip: np.ndarray,
    grid: Grid,
    scales: Callable[..., tuple[np.ndarray, np.ndarray]],
    weight: np.ndarray | None,
    *,
    plain: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [B, block], scales and zero points [B] of blocks that follow each other, row by row.

    Args:
        strip: float32 [B, block].
        grid: The integers to round to.
        scales: Chooses scale and zero point.
        weight: Of the squared errors in the blocks of a row, [blocks of a row, block]; None: all the same.
        plain: Whether scales follow from smallest and largest value alone.
    """
    count, size = strip.shape
    codes, steps, zeros = np.empty(strip.shape, np.uint8), np.empty(count, np.float32), np.empty(count, np.uint8)
    step = max(1, _PIECE // size)
    for start in range(0, count, step):
        some = slice(start, min(start + step, count))
        # Sums depend on their order, and numpy's order on how an array lies in memory: that of the matrix may not count
        values = strip[some] if plain else np.asfortranarray(strip[some])
        if weight is None:
            scale, zero = scales(values, grid)
        else:
            scale, zero = scales(values, grid, importance=weight[np.arange(start, some.stop) % len(weight)])
        codes[some] = nearest(values, scale, zero, grid.width)
        steps[some], zeros[some] = scale[:, 0], zero[:, 0]
    return codes, steps, zeros


def _each(columns: int, length: int) -> Iterator[tuple[slice, slice, int]]:
    """As `_alike`, one block at a time."""
    for block, start in enumerate(range(0, columns, length)):
        stop = min(start + length, columns)
        yield slice(start, stop), slice(block, block + 1), stop - start


def _alike(columns: int, length: int) -> Iterator[tuple[slice, slice, int]]:
    """Columns that are whole blocks, and the shorter block that may be left: columns, blocks, size of each block."""
    whole = columns // length
    if whole:
        yield slice(0, whole * length), slice(0, whole), length
    if whole * length < columns:
        yield slice(whole * length, columns), slice(whole, whole + 1), columns - whole * length


def find_scales(
    values: np.ndarray, grid: Grid, *, clip_search: bool, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row of `values`.

    Args:
        values: float32 [R, block].
        grid: The integers to round to.
        clip_search: See `round_blocks`.
        importance: [1, block] or [R, block].

    Returns:
        float32 [R, 1] each; zero points are whole numbers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if grid.width.uniform:
            scale, zero = _full_range(values, grid)
        else:
            scale, zero = _mean(np.abs(values), importance if clip_search else None), _middle(values, grid)
        scale = usable(scale, zero, grid.width)
        if not clip_search or grid.width.bits == "sign":  # for two levels the mean is the best scale there is
            return scale, zero
        least = _error(values, scale, zero, grid.width, importance)
        for start, other in _narrower(values, grid):
            fitted = _fitted(values, usable(start, other, grid.width), other, grid.width, importance)
            error = _error(values, fitted, other, grid.width, importance)
            better = error < least
            least = np.where(better, error, least)
            scale, zero = np.where(better, fitted, scale), np.where(better, other, zero)
    return scale, zero


def nearest(values: np.ndarray, scale: np.ndarray, zero: np.ndarray, width: Width) -> np.ndarray:
    """The codes nearest to `values`, float32 whole numbers; scale and zero are broadcast."""
    safe = np.where(scale == 0, np.float32(1), scale)
    codes = values / safe
    codes += zero
    if width.stride != 1:
        codes /= np.float32(width.stride)
    np.rint(codes, out=codes)
    return np.clip(codes, 0, width.levels - 1, out=codes)


def restored(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, width: Width) -> np.ndarray:
    """What `codes`, float32, stand for."""
    values = codes * np.float32(width.stride)
    values -= zero
    values *= scale
    return values


def _full_range(values: np.ndarray, grid: Grid, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The grid that reaches over `share` of the range of each row, zero included."""
    width = grid.width
    low = np.minimum(values.min(axis=1, keepdims=True), 0) * np.float32(share)
    high = np.maximum(values.max(axis=1, keepdims=True), 0) * np.float32(share)
    if grid.symmetric:
        return np.maximum(-low, high) / np.float32(width.levels - 1 - width.zero), _middle(values, grid)
    # Halves first: the distance of two float32 may be infinite
    scale = (high / 2 - low / 2) / np.float32((width.levels - 1) / 2)
    zero = np.clip(np.rint(-low / np.where(scale == 0, np.float32(1), scale)), 0, width.levels - 1)
    return scale, zero


def _narrower(values: np.ndarray, grid: Grid) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    middle = _middle(values, grid)
    if grid.width.bits == "ternary":
        mean = np.abs(values).mean(axis=1, keepdims=True)
        for share in _TERNARY_SHARES:
            yield mean * np.float32(share), middle
        return
    for share in _SHARES:
        yield _full_range(values, grid, share)
    if grid.symmetric:
        scale = turned_scale(values, grid)
        for share in _SHARES:
            yield scale * np.float32(share), middle


def turned_scale(values: np.ndarray, grid: Grid) -> np.ndarray:
    """The scale, maybe negative, that gives the largest weight the one code more that a symmetric grid has below zero.

    [R, 1]; the other end is cut off where it is nearly as large.
    """
    place = np.abs(values).argmax(axis=1)[:, None]
    scale: np.ndarray = np.take_along_axis(values, place, axis=1) / np.float32(-grid.width.zero)
    return scale


def _middle(values: np.ndarray, grid: Grid) -> np.ndarray:
    return np.full((len(values), 1), grid.width.zero, np.float32)


def _mean(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    if importance is None or not importance.any():
        plain: np.ndarray = values.mean(axis=1, keepdims=True)
        return plain
    weights = np.broadcast_to(importance, values.shape)
    mean: np.ndarray = (values * weights).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    return mean


def usable(scale: np.ndarray, zero: np.ndarray, width: Width) -> np.ndarray:
    """No scale is subnormal, which hardware may take for zero, nor so large that a code would stand for infinity.

    A block of zeros gets 1, or 0 where no code is zero.
    """
    limits = np.finfo(np.float32)
    largest = limits.max / np.maximum(zero, width.stride * (width.levels - 1) - zero)
    usable = np.where(np.abs(scale) < limits.tiny, np.float32(0 if width.bits == "sign" else 1), scale)
    return np.clip(usable, -largest, largest).astype(np.float32)


def _fitted(
    values: np.ndarray, scale: np.ndarray, zero: np.ndarray, width: Width, importance: np.ndarray | None
) -> np.ndarray:
    """The scale of least squared error for the codes that `scale` leads to."""
    steps = nearest(values, scale, zero, width)
    if width.stride != 1:
        steps *= np.float32(width.stride)
    steps -= zero
    weighted = steps if importance is None else steps * importance
    over = np.einsum("ij,ij->i", weighted, values)[:, None]
    under = np.einsum("ij,ij->i", weighted, steps)[:, None]
    fit = np.divide(over, under, out=scale.copy(), where=under > 0)
    return usable(np.where(np.isfinite(fit), fit, scale), zero, width)


def _error(
    values: np.ndarray, scale: np.ndarray, zero: np.ndarray, width: Width, importance: np.ndarray | None
) -> np.ndarray:
    """Squared error of each row, [R, 1]."""
    off = restored(nearest(values, scale, zero, width), scale, zero, width)
    off -= values
    weighted = off if importance is None else off * importance
    error: np.ndarray = np.einsum("ij,ij->i", weighted, off)[:, None]
    return error
