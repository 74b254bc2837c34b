# SPDX-License-Identifier: Apache-2.0
"""The next token of each row, out of the graph's logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...contracts.errors import OnnxpressError
from .processors import candidates, draw, forbid, forbid_repeated_ngrams, force, penalize_repetition
from .sampling import Sampling

_ROOM = 256
"""Tokens by which the record of the texts grows, at least."""


class History:
    """The texts so far, for what looks back at them; each row begins at column 0, without padding.

    Args:
        prompts: Token ids of each row.
        vocabulary: Scores a row; what is asked about tokens is remembered, not searched for in the text.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self._lengths = np.asarray([len(prompt) for prompt in prompts])
        self._ids = np.zeros((len(prompts), int(self._lengths.max(initial=0)) + _ROOM), np.int64)
        self.seen = np.zeros((len(prompts), vocabulary), bool)
        """Which tokens occur in each row, bool [rows, vocabulary]."""
        for row, prompt in enumerate(prompts):
            self._ids[row, : len(prompt)] = prompt
            self.seen[row, [token for token in prompt if token < vocabulary]] = True

    def append(self, tokens: np.ndarray) -> None:
        """Add one token to each row."""
        if int(self._lengths.max()) == self._ids.shape[1]:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)], axis=1)
        rows = np.arange(len(tokens))
        self._ids[rows, self._lengths] = tokens
        self._lengths = self._lengths + 1
        self.seen[rows, tokens] = True

    def text(self, row: int) -> np.ndarray:
        """A row's tokens, int64 [tokens]."""
        return self._ids[row, : self._lengths[row]]

    def follow(self, rows: np.ndarray) -> None:
        """Let row i go on from what row `rows[i]` was."""
        self._ids, self._lengths, self.seen = self._ids[rows], self._lengths[rows], self.seen[rows]


class Rules:
    """The part of a `Sampling` that forbids, forces and penalizes, before anything is chosen.

    Args:
        sampling: How.
        prompts: Token ids of each row; what an encoder-decoder begins with.
        vocabulary: Scores a row.
        limits: New tokens that each row may have at most.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocabulary: int, limits: Sequence[int]
    ) -> None:
        self._sampling, self._limits, self._step = sampling, np.asarray(limits), 0
        looks_back = sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size > 0
        self._history = History(prompts, vocabulary) if looks_back else None

    def __call__(self, scores: np.ndarray) -> None:
        """Change the scores, float32 [rows, vocabulary]; those of the token that comes next."""
        asked, step = self._sampling, self._step
        if self._history is not None:
            if asked.repetition_penalty != 1:
                penalize_repetition(scores, self._history.seen, asked.repetition_penalty)
            if asked.no_repeat_ngram_size:
                for row in range(len(scores)):
                    forbid_repeated_ngrams(scores[row], self._history.text(row), asked.no_repeat_ngram_size)
        if asked.eos and step < asked.min_new_tokens:
            forbid(scores, asked.eos)
        if asked.forced_bos is not None and step == 0:
            force(scores, (asked.forced_bos,))
        if asked.forced_eos:
            for row in np.flatnonzero(self._limits == step + 1).tolist():
                force(scores[row], asked.forced_eos)
        if asked.suppress:
            forbid(scores, asked.suppress)
        if asked.begin_suppress and step == (0 if asked.forced_bos is None else 1):
            forbid(scores, asked.begin_suppress)

    def chose(self, tokens: np.ndarray) -> None:
        """Say which token each row got."""
        self._step += 1
        if self._history is not None:
            self._history.append(tokens)

    def follow(self, rows: np.ndarray) -> None:
        """Let row i go on from what row `rows[i]` was."""
        self._limits = self._limits[rows]
        if self._history is not None:
            self._history.follow(rows)


class Chooser:
    """Picks one token for each row: the likeliest, or one drawn with the row's own random numbers.

    Args:
        sampling: How.
        prompts: See `Rules`.
        vocabulary: Likewise.
        limits: Likewise.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocabulary: int, limits: Sequence[int]
    ) -> None:
        self._sampling = sampling
        self._rules = Rules(sampling, prompts, vocabulary, limits)
        seeds: np.random.SeedSequence = np.random.SeedSequence(sampling.seed)
        self._random = [np.random.default_rng(seed) for seed in seeds.spawn(len(prompts))]

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """The tokens, int64 [rows]; the scores, float32 [rows, vocabulary], are changed.

        Raises:
            OnnxpressError: The scores are no numbers.
        """
        asked = self._sampling
        self._rules(scores)
        if asked.greedy:
            tokens: np.ndarray = scores.argmax(axis=-1)  # which finds the first NaN, if there is one
            if np.isnan(scores[np.arange(len(tokens)), tokens]).any():
                raise _no_numbers()
        else:
            tokens = np.asarray([self._drawn(row, scores[row]) for row in range(len(scores))], np.int64)
        self._rules.chose(tokens)
        return tokens

    def _drawn(self, row: int, scores: np.ndarray) -> int:
        asked = self._sampling
        if np.isnan(scores.max()):
            raise _no_numbers()
        tokens, probabilities = candidates(
            scores, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p
        )
        return draw(tokens, probabilities, self._random[row].random())


def _no_numbers() -> OnnxpressError:
    return OnnxpressError(
        "the model's logits are NaN", next_step="Compare the bundle with its original: onnxpress validate."
    )
