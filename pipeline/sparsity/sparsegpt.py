# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: prune a matrix column by column, and let the columns that are still to come make up for each weight.

    score = w_ij^2 / U_jj^2;  what goes, e = w_ij / U_jj, is passed on:  W_ik -= e U_jk for all k > j

U is the upper Cholesky factor of the inverse Hessian, as for GPTQ, whose steps these are (quantization/gptq.py). Which
weights go is decided for a block of columns at a time, when all before it have been passed on; for N:M group by group.

Reference: Frantar and Alistarh, "SparseGPT: Massive language models can be accurately pruned in one-shot"
(arXiv 2301.00774), 3.2 to 3.4 and algorithm 1.
"""

from __future__ import annotations

import numpy as np

from ..quantization.gptq import Feedback, feed_back
from .masks import Pattern, keep_largest, keep_pattern


def prune_sparsegpt(matrix: np.ndarray, feedback: Feedback, target: float | Pattern, *, block: int = 128) -> np.ndarray:
    """Prune `matrix` and update what stays.

    Args:
        matrix: float32 [N, K], finite.
        feedback: Of the matrix's input, the channels in their own order.
        target: The share of every block that goes, over all N outputs; or N:M, M a divisor of K.
        block: Columns that are decided on together.

    Returns:
        float32 [N, K]. Input channels that are always zero go first.
    """
    weights = np.array(matrix.T, np.float32, order="C")
    cost = (1 / np.square(feedback.pivots)).astype(np.float32)
    step = target.group if isinstance(target, Pattern) else block
    drop = np.empty(0, bool)

    def fix(i: int) -> np.ndarray:
        nonlocal drop
        if i % step == 0:
            part = slice(i, i + step)
            scores = (np.square(weights[part]) * cost[part, None]).T
            drop = ~_chosen(scores, target).T
        off = np.where(drop[i % step], weights[i], np.float32(0))
        weights[i] -= off
        return off

    # A group has to be up to date when it is decided on
    feed_back(weights, feedback, fix, -(-block // step) * step)
    return np.ascontiguousarray(weights.T)


def _chosen(scores: np.ndarray, target: float | Pattern) -> np.ndarray:
    if isinstance(target, Pattern):
        return keep_pattern(scores, target)
    return keep_largest(scores, round(target * scores.size))
