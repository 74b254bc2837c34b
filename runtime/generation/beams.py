# SPDX-License-Identifier: Apache-2.0
"""Beam search: the most probable texts are followed side by side, and those that end are kept aside.

The rules are those of transformers 5 (`_beam_search`), so that its sequences come out: of the continuations of all
beams, (end tokens + 1) x beams are looked at; those among the first `beams` that end are candidates for the result, at
their log probability divided by their length to the power of `length_penalty`; the best `beams` that do not end go on.
A search is over when its beams cannot do better any more, by the measure of `early_stopping`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .processors import highest
from .sampling import Sampling

_NEVER = np.float32(-1e9)
"""The score of what cannot be chosen; finite, as transformers has it, since such beams are still followed."""


@dataclass(frozen=True)
class Finished:
    """A text that has ended: its new tokens, the end token included, and its score."""

    tokens: tuple[int, ...]
    score: float
    ended: bool


class Search:
    """The beams of one prompt.

    Args:
        sampling: `beams`, `eos`, `length_penalty` and `early_stopping` are read.
        limit: New tokens at most.

    Attributes:
        over: Whether the result stands.
        tokens: The last token of each beam, int64 [beams].
        parents: The beam that each beam continues, int64 [beams].
    """

    def __init__(self, sampling: Sampling, limit: int) -> None:
        self._sampling, self._limit = sampling, limit
        self._scores = np.full(sampling.beams, _NEVER, np.float32)
        self._scores[0] = 0  # all beams are the prompt: without this, each would find the same token
        self._texts: list[tuple[int, ...]] = [()] * sampling.beams
        self._finished: list[Finished] = []
        self._hopeful = True
        self.over = False
        self.tokens, self.parents = np.zeros(sampling.beams, np.int64), np.arange(sampling.beams)

    def advance(self, log_probabilities: np.ndarray) -> None:
        """Choose each beam's next token.

        Args:
            log_probabilities: float32 [beams, vocabulary].
        """
        asked, vocabulary = self._sampling, log_probabilities.shape[-1]
        total = (log_probabilities + self._scores[:, None]).ravel()
        best = _best(total, max(2, 1 + len(asked.eos)) * asked.beams)
        parents, tokens, scores = best // vocabulary, best % vocabulary, total[best]
        length = len(self._texts[0]) + 1
        ends = np.isin(tokens, asked.eos) if asked.eos else np.zeros(len(best), bool)
        stops = ends | (length >= self._limit)
        texts = [(*self._texts[parent], int(token)) for parent, token in zip(parents, tokens, strict=True)]
        if self._hopeful and not self._full():
            self._keep_aside(
                Finished(texts[place], self._per_length(float(scores[place]), length), bool(ends[place]))
                for place in np.flatnonzero(stops[: asked.beams])
            )
        running = _best(np.where(stops, scores + _NEVER, scores), asked.beams)
        self._texts = [texts[place] for place in running]
        self._scores = np.where(stops, scores + _NEVER, scores)[running]
        self.tokens, self.parents = tokens[running], parents[running]
        self._look_ahead(length)
        self.over = not self._hopeful or self._full() or bool(stops.all())

    def result(self) -> Finished:
        """The best text; the best of those that go on where none has ended."""
        if self._finished:
            return self._finished[0]
        return Finished(self._texts[0], float(self._scores[0]), False)

    def _keep_aside(self, ended: Iterable[Finished]) -> None:
        """Add texts that have ended, and keep the best."""
        every = sorted((*self._finished, *ended), key=lambda found: -found.score)
        self._finished = every[: self._sampling.beams]

    def _full(self) -> bool:
        """Whether there are texts enough for one who does not wait for better ones."""
        return self._sampling.early_stopping is True and len(self._finished) == self._sampling.beams

    def _look_ahead(self, length: int) -> None:
        """Whether a beam that goes on may yet be better than the worst text that has ended."""
        asked = self._sampling
        longest = self._limit if asked.early_stopping == "never" and asked.length_penalty > 0 else length
        if len(self._finished) == asked.beams:
            best = self._per_length(float(self._scores[0]), longest)
            self._hopeful = self._hopeful and best > self._finished[-1].score

    def _per_length(self, score: float, length: int) -> float:
        return float(np.float32(score) / np.float32(length**self._sampling.length_penalty))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Where the highest scores are, the highest first; int64 [count]."""
    some = highest(scores, count)
    chosen: np.ndarray = some[np.argsort(-scores[some], kind="stable")[:count]]
    return chosen
