# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round a matrix column by column, and let the columns that are still to come make up for each error.

    H = 2 X^T X + damping mean(diag) I;  U = the upper Cholesky factor of H^-1, H^-1 = U^T U
    for each column i:  e = (w_i - q_i) / U_ii;  W_j -= e U_ij for all j > i

U_ij is read along the *row* i of the upper factor. Its column i below the diagonal is zero; reading that instead turns
GPTQ into plain rounding without a word. The integers and scales that were rounded with are what is returned: scales
that are derived again from the result would round everything a second time.

Reference: Frantar et al., "GPTQ" (arXiv 2210.17323), 3.3; act-order and static groups as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .blocks import Grid, Rounded, find_scales, nearest, restored

_CHUNK = 1 << 22
"""Elements of a matrix that are worked on at a time; output channels do not depend on each other."""

_MOST_DAMPING = 10.0


@dataclass(frozen=True)
class Feedback:
    """How the error of one input channel is passed on to later ones; the same for all matrices that read one input.

    Attributes:
        factor: float32 [K, K], the upper Cholesky factor of H^-1 with every row divided by its diagonal element.
        order: int [K]: in which order the channels are rounded.
        importance: float64 [K], the diagonal of the damped H, in the order of the matrix.
        damping: The share of the mean diagonal that was added.
        pivots: float64 [K], the diagonal of the factor before the division, in `order`, times some constant; infinite
            for a channel that is always zero.
    """

    factor: np.ndarray
    order: np.ndarray
    importance: np.ndarray
    damping: float
    pivots: np.ndarray


def feedback_of(gram: np.ndarray, *, damping: float = 0.01, act_order: bool = False) -> Feedback | None:
    """Factorize the Hessian of an input.

    Args:
        gram: X^T X, float64 [K, K].
        damping: Share of the mean diagonal that is added to the diagonal; ten times as much, again and again, where
            the matrix turns out not to be positive definite.
        act_order: Begin with the channels of largest activations.

    Returns:
        None where all activations are zero, or no reasonable damping helps: there is nothing to learn from them.
    """
    diagonal = np.diag(gram).astype(np.float64)
    mean = float(diagonal.mean())
    if not np.isfinite(mean) or mean <= 0:
        return None
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(gram))
    # H's factor 2 and the number of rows scale all of it, which changes nothing in U_ij / U_ii
    backwards, exact = order[::-1], diagonal[order[::-1]] / mean
    while damping <= _MOST_DAMPING:
        hessian = gram[np.ix_(backwards, backwards)]
        hessian /= mean
        # A channel that is always zero is rounded by itself: it neither makes up for others nor they for it
        np.fill_diagonal(hessian, np.where(exact == 0, 1.0, exact + damping))
        factor = _normalized_factor(hessian)
        if factor is not None:
            pivots = np.where(exact[::-1] == 0, np.inf, factor[1])
            return Feedback(factor[0], order, diagonal + damping * mean, damping, pivots)
        damping = max(10 * damping, 1e-4)
    return None


def _normalized_factor(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """U with H^-1 = U^T U, upper, its rows divided by its diagonal, and that; None where H is not positive definite.

    H^-1 is never formed: with the channels in reverse, H = L L^T, and U is L^-1 turned around again.

    Args:
        hessian: Of the channels in reverse; overwritten.
    """
    try:
        _invert_cholesky(hessian)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diag(hessian).copy()
    hessian /= pivots[:, None]
    factor = np.ascontiguousarray(hessian[::-1, ::-1], np.float32)
    return (factor, pivots[::-1]) if np.isfinite(factor).all() else None


def _invert_cholesky(matrix: np.ndarray) -> None:
    """Replace a positive definite matrix by L^-1, matrix = L L^T, by halves: almost all of it is matrix products.

    LAPACK as numpy comes with it takes several times as long for a Cholesky factor alone.
    """
    size = len(matrix)
    if size <= 128:
        matrix[:] = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return
    first, second = slice(0, size // 2), slice(size // 2, size)
    _invert_cholesky(matrix[first, first])
    below = matrix[second, first] @ matrix[first, first].T
    matrix[second, second] -= below @ below.T
    _invert_cholesky(matrix[second, second])
    matrix[second, first] = -matrix[second, second] @ (below @ matrix[first, first])
    matrix[first, second] = 0


def round_gptq(
    matrix: np.ndarray, grid: Grid, feedback: Feedback, plain: Rounded, *, clip_search: bool = False, block: int = 128
) -> Rounded:
    """Round `matrix` with error feedback.

    Args:
        matrix: float32 [N, K], finite.
        grid: The integers to round to. Where channels are taken in their own order, a group's scale is chosen when its
            first column is reached; otherwise all are those of `plain` (static groups).
        feedback: Of the matrix's input.
        plain: The matrix without feedback, as `round_blocks` gives it.
        clip_search: See `round_blocks`; errors are weighted by the diagonal of H.
        block: Columns after which the rest of the matrix is updated, in one product (lazy batch updates).
    """
    rows, columns = matrix.shape
    choose = grid.block is not None and np.array_equal(feedback.order, np.arange(columns))
    zeros = None if plain.zeros is None else np.empty_like(plain.zeros)
    result = Rounded(np.empty_like(plain.codes), np.empty_like(plain.scales), zeros, grid)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        piece = _Piece(matrix[part], plain.part(part), feedback)
        piece.run(clip_search=clip_search, choose=choose, block=block)
        result.codes[part] = piece.codes.T
        result.scales[part] = piece.scales.T
        if result.zeros is not None:
            result.zeros[part] = piece.zeros.T
    return result


class _Piece:
    """Some output channels on their way: everything is [K, N] here, so that an input channel lies in one piece."""

    def __init__(self, matrix: np.ndarray, plain: Rounded, feedback: Feedback) -> None:
        self.grid, self.feedback = (grid := plain.grid), feedback
        self.length = grid.length(matrix.shape[1])
        self.weights = np.ascontiguousarray(matrix.T[feedback.order], np.float32)
        self.codes = np.empty(matrix.T.shape, np.uint8)
        self.scales = plain.scales.T.copy()
        middle = np.full(self.scales.shape, grid.width.zero, np.float32)
        self.zeros = middle if plain.zeros is None else plain.zeros.T.astype(np.float32)

    def run(self, *, clip_search: bool, choose: bool, block: int) -> None:
        """Round all channels; `choose`: take the scale of a group from what its weights have become."""

        def fix(i: int) -> np.ndarray:
            if choose and i % self.length == 0:
                self._choose(i, clip_search)
            return self._round(i)

        # A group's weights have to be up to date when its scale is chosen: no group may go beyond its block
        feed_back(self.weights, self.feedback, fix, -(-block // self.length) * self.length if choose else block)

    def _round(self, i: int) -> np.ndarray:
        """Fix the i-th channel in order; returns by how much it is off, [N]."""
        channel = self.feedback.order[i]
        scale, zero = self.scales[channel // self.length], self.zeros[channel // self.length]
        codes = nearest(self.weights[i], scale, zero, self.grid.width)
        self.codes[channel] = codes
        off: np.ndarray = self.weights[i] - restored(codes, scale, zero, self.grid.width)
        return off

    def _choose(self, i: int, clip_search: bool) -> None:
        part = slice(i, i + self.length)
        importance = self.feedback.importance[None, part].astype(np.float32)
        group = np.ascontiguousarray(self.weights[part].T)
        scale, zero = find_scales(group, self.grid, clip_search=clip_search, importance=importance)
        self.scales[i // self.length], self.zeros[i // self.length] = scale[:, 0], zero[:, 0]


def feed_back(weights: np.ndarray, feedback: Feedback, fix: Callable[[int], np.ndarray], block: int) -> None:
    """Fix input channel by input channel, and pass on to those that are still to come by how much each is off.

    Args:
        weights: float32 [K, N], the channels in the order of `feedback`; changed in place.
        feedback: Of their input.
        fix: Decides the i-th channel, and returns what it was minus what it is now, [N].
        block: Channels after which all that come later are updated, in one product (lazy batch updates).
    """
    factor, size = feedback.factor, len(weights)
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = np.empty((end - start, weights.shape[1]), np.float32)
        for i in range(start, end):
            errors[i - start] = fix(i)
            weights[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - start]
        weights[end:] -= factor[start:end, end:].T @ errors


def output_error(difference: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """|| X d ||^2 of each output channel: float64 [N], for a difference of weights [N, K] and X^T X [K, K]."""
    found = np.empty(len(difference))
    step = max(1, _CHUNK // difference.shape[1])
    for start in range(0, len(difference), step):
        part = difference[start : start + step]
        found[start : start + step] = np.einsum("ij,ij->i", part @ gram.astype(part.dtype), part, dtype=np.float64)
    return np.maximum(found, 0)
