# SPDX-License-Identifier: Apache-2.0
"""What may be chosen next: transformers' logits processors, in its definitions and its order.

Scores are float32 [rows, vocabulary] and are changed in place; -inf is never chosen. Reference: transformers,
generation/logits_process.py; for the methods themselves Keskar et al. 2019 (repetition penalty, arXiv:1909.05858),
Holtzman et al. 2020 (top-p, arXiv:1904.09751) and Nguyen et al. 2024 (min-p, arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Scores = np.ndarray
"""float32 [rows, vocabulary]."""


def penalize_repetition(scores: Scores, seen: np.ndarray, penalty: float) -> None:
    """Make tokens less likely (penalty above 1) that have occurred.

    Args:
        scores: Changed.
        seen: bool [rows, vocabulary]: what occurs in each row's text, prompt included.
        penalty: Divides positive scores and multiplies negative ones.
    """
    rows, tokens = np.nonzero(seen)
    found = scores[rows, tokens]
    scores[rows, tokens] = np.where(found < 0, found * np.float32(penalty), found / np.float32(penalty))


def forbid_repeated_ngrams(scores: np.ndarray, text: np.ndarray, size: int) -> None:
    """Forbid each token that would complete an n-gram a second time.

    Args:
        scores: Of one row, float32 [vocabulary]; changed.
        text: The row's tokens so far, prompt included, int64 [tokens].
        size: n, at least 1.
    """
    if len(text) < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(text, size)
    begun = text[len(text) - size + 1 :]
    scores[windows[(windows[:, : size - 1] == begun).all(axis=1), -1]] = -np.inf


def forbid(scores: Scores, tokens: Sequence[int]) -> None:
    """Never choose these tokens; ids beyond the vocabulary are passed over."""
    scores[..., [token for token in tokens if token < scores.shape[-1]]] = -np.inf


def force(scores: Scores, tokens: Sequence[int]) -> None:
    """Choose one of these tokens, all alike."""
    scores[...] = -np.inf
    scores[..., list(tokens)] = 0.0


def candidates(
    scores: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of one row among which one is drawn, with their probabilities.

    What top-k leaves is mostly a few dozen of a hundred thousand tokens, so what follows looks at these alone. Ties at
    the border of top-k all stay, as in transformers; the likeliest token always does.

    Args:
        scores: Logits of one row, float32 [vocabulary].
        temperature: Divides them; above 0.
        top_k: See `Sampling`, as the others.
        top_p: In (0, 1].
        min_p: In [0, 1].

    Returns:
        Token ids, int64 [tokens], and float32 probabilities [tokens], which sum to 1.
    """
    scores = scores / np.float32(temperature) if temperature != 1 else scores
    tokens = highest(scores, top_k) if 0 < top_k < len(scores) else np.flatnonzero(scores > -np.inf)
    if not len(tokens):  # everything is forbidden
        tokens = np.arange(len(scores))
    likely = softmax(scores[tokens])
    if top_p < 1:
        stays = _nucleus(likely, top_p)
        tokens, likely = tokens[stays], likely[stays] / likely[stays].sum()
    if min_p > 0:
        enough = likely >= np.float32(min_p) * likely.max()
        tokens, likely = tokens[enough], likely[enough] / likely[enough].sum()
    return tokens, likely


_BLOCK, _NUCLEUS = 256, 1024


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Where scores are at least as high as the `count` highest one, in order of place, int64 [count or more].

    The `count` highest of the maxima of blocks is a bound below: few of a hundred thousand scores reach it, and only
    these are sorted.
    """
    whole = len(scores) - len(scores) % _BLOCK
    if count < whole // _BLOCK:
        maxima = scores[:whole].reshape(-1, _BLOCK).max(axis=1)
        some = np.flatnonzero(scores >= np.partition(maxima, len(maxima) - count)[len(maxima) - count])
    else:
        some = np.arange(len(scores))
    found = scores[some]
    place = max(len(some) - count, 0)
    reached: np.ndarray = some[found >= np.partition(found, place)[place]] if len(some) else some
    return reached


def _nucleus(likely: np.ndarray, top_p: float) -> np.ndarray:
    """The likeliest that together have the probability `top_p`: those before which less than that has been found."""
    some = highest(likely, _NUCLEUS) if len(likely) > _NUCLEUS else np.arange(len(likely))
    if likely[some].sum() < top_p:
        some = np.arange(len(likely))
    order = some[np.argsort(-likely[some], kind="stable")]
    sorted_ = likely[order]
    chosen: np.ndarray = np.sort(order[np.cumsum(sorted_) - sorted_ < np.float32(top_p)])
    return chosen


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities of float32 scores [tokens], of which one at least is finite; otherwise all alike."""
    highest = scores.max()
    if highest == -np.inf:
        return np.full_like(scores, 1 / len(scores))
    powers: np.ndarray = np.exp(scores - highest)
    powers /= powers.sum()
    return powers


def log_softmax(scores: Scores) -> Scores:
    """Logarithms of probabilities, float32 [rows, vocabulary]."""
    shifted: np.ndarray = scores - scores.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float32))
    return shifted


def draw(tokens: np.ndarray, probabilities: np.ndarray, uniform: float) -> int:
    """The token whose share of [0, 1) holds `uniform`."""
    place = int(np.searchsorted(np.cumsum(probabilities, dtype=np.float64), uniform, side="right"))
    return int(tokens[min(place, len(tokens) - 1)])
