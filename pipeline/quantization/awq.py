# SPDX-License-Identifier: Apache-2.0
"""AWQ: enlarge the input channels that see large activations before rounding, and divide the activations by as much.

    y = (x / s) (diag(s) W);   s_j = mean|x_j|^alpha, scaled so that max(s) min(s) = 1

alpha is searched for all matrices that read one input together. What counts is the error of their outputs, from the
Gram matrix alone: || X d ||^2 = d^T (X^T X) d. alpha = 0 is plain rounding, so that the result is never worse on it.

Reference: Lin et al., "AWQ" (arXiv 2306.00978), 3.2, with the authors' normalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .blocks import Grid, round_blocks
from .gptq import output_error

_ALPHAS = tuple(step / 10 for step in range(11))
_SMALLEST = 1e-4
_SAMPLED = 256
"""Output channels of a matrix that take part in the search, drawn evenly: the error is a mean over them."""


@dataclass(frozen=True)
class InputScale:
    """What the search found.

    Attributes:
        scale: float32 [K]: the weights are multiplied by it along their input axis, the activations divided.
        alpha: 0 where plain rounding is best.
        error: Squared error of the outputs, relative to that of alpha = 0.
    """

    scale: np.ndarray
    alpha: float
    error: float


def search_input_scale(
    matrices: Sequence[np.ndarray],
    grids: Sequence[Grid],
    gram: np.ndarray,
    mean_abs: np.ndarray,
    *,
    clip_search: bool = False,
) -> InputScale:
    """Find alpha.

    Args:
        matrices: float32 [N, K], all that read the input.
        grids: What each is rounded to.
        gram: X^T X, float64 [K, K].
        mean_abs: mean|x| of each input channel, [K].
        clip_search: Whether scales are searched for when rounding, weighted by the diagonal of the Gram matrix.
    """
    chosen = [m[:: -(-len(m) // _SAMPLED)] for m in matrices]
    small = gram.astype(np.float32)
    best, first = InputScale(np.ones(len(gram), np.float32), 0.0, 1.0), 0.0
    for alpha in _ALPHAS:
        scale = input_scale(mean_abs, alpha)
        error = 0.0
        for matrix, grid in zip(chosen, grids, strict=True):
            importance = np.diag(gram) / scale.astype(np.float64) ** 2
            rounded = round_blocks(matrix * scale, grid, clip_search=clip_search, importance=importance)
            error += float(output_error(rounded.dequantized() / scale - matrix, small).sum())
        if alpha == 0:
            first = error
        elif error < best.error * first:
            best = InputScale(scale, alpha, error / first)
    return best


def input_scale(mean_abs: np.ndarray, alpha: float) -> np.ndarray:
    """mean|x|^alpha, normalized: float32 [K]. Channels that are always zero are taken as very small ones."""
    top = float(np.max(mean_abs))
    if top <= 0 or not np.isfinite(top):
        return np.ones(len(mean_abs), np.float32)
    scale = np.maximum(mean_abs / top, _SMALLEST) ** alpha
    scale /= np.sqrt(scale.max() * scale.min())
    return scale.astype(np.float32)
