# SPDX-License-Identifier: Apache-2.0
"""Texts of several lengths in one batch: the tokens, masks and positions that a decoder's graph reads in each step.

Padding stands on the left, so that each row's next token stands in the same column; for graphs that append to a buffer
(GroupQueryAttention) on the right, where it is overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...contracts.decoding import INPUT_IDS, KEEP, MASK, POSITIONS, positions
from ...contracts.signature import TensorSpec
from ..session import Array

_ROOM = 4096
"""Columns of the mask that are made at once; as many again whenever they are used up."""


class Padded:
    """A batch, from its prompts on.

    Args:
        prompts: Token ids of each row, one at least in each.
        room: Tokens that may follow.
        inputs: The graph's inputs by name; only those among them are made.
        pad: The token that padding consists of.
        left: Where it stands.
        longest: Positions that the model has, or None; rows that have ended go on beside the others, but not beyond.
        whole_mask: Whether the mask is over all tokens or, for a model that keeps states only, over the new ones.

    Attributes:
        rows: Rows.
        width: Tokens of the longest prompt.
        capacity: Tokens of the longest row when there is no room left.
        kept: Logits a row that the first step computes, counted from the end.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        room: int,
        inputs: Mapping[str, TensorSpec],
        *,
        pad: int = 0,
        left: bool = True,
        longest: int | None = None,
        whole_mask: bool = True,
    ) -> None:
        self._lengths = np.asarray([len(prompt) for prompt in prompts])
        self.rows, self.width = len(prompts), int(self._lengths.max())
        self.capacity = self.width + room
        self._left, self._whole_mask = left, whole_mask
        self._last = None if longest is None else longest - 1
        self._dtypes = {
            name: np.dtype(inputs[name].dtype) for name in (INPUT_IDS, MASK, POSITIONS, KEEP) if name in inputs
        }
        self._ids = np.full((self.rows, self.width), pad, np.int64)
        columns = self.width + min(room, _ROOM)
        self._mask = np.ones((self.rows, columns), self._dtypes.get(MASK, np.dtype(np.int64)))
        for row, prompt in enumerate(prompts):
            start = self.width - len(prompt) if left else 0
            self._ids[row, start : start + len(prompt)] = prompt
            if left:
                self._mask[row, :start] = 0
            else:
                self._mask[row, len(prompt) :] = 0
        self.kept = 1 if left else self.width - int(self._lengths.min()) + 1
        self._taken = 0

    def first(self) -> dict[str, Array]:
        """Everything but the cache that the first step reads."""
        mask = np.ascontiguousarray(self._mask[:, : self.width])
        return self._cast(
            {INPUT_IDS: self._ids, MASK: mask, POSITIONS: positions(mask), KEEP: np.asarray(self.kept)},
        )

    def last_logits(self, logits: Array) -> Array:
        """Of the first step's logits, [rows, some, vocabulary], those behind each row's last token, float32."""
        found = logits[:, -1] if self._left else logits[np.arange(self.rows), self._lengths - self.width - 1]
        return np.asarray(found, np.float32)

    def next(self, tokens: Array) -> dict[str, Array]:
        """Everything but the cache that the step reads that takes one more token in each row, int64 [rows]."""
        places = self._lengths + self._taken
        self._taken += 1
        if self._whole_mask and self.width + self._taken > self._mask.shape[1]:
            self._mask = np.concatenate([self._mask, np.full_like(self._mask, 1 if self._left else 0)], axis=1)
        if not self._left:
            self._mask[np.arange(self.rows), places] = 1
        if self._last is not None:
            places = np.minimum(places, self._last)
        return self._cast(
            {INPUT_IDS: tokens[:, None], MASK: self._mask_so_far(), POSITIONS: places[:, None], KEEP: np.asarray(1)}
        )

    def follow(self, rows: Array) -> None:
        """Let row i go on from what row `rows[i]` was."""
        self._lengths, self._mask = self._lengths[rows], self._mask[rows]

    def _mask_so_far(self) -> Array:
        if not self._whole_mask:
            return np.ones((self.rows, 1), self._mask.dtype)
        return np.ascontiguousarray(self._mask[:, : self.width + self._taken])  # a view, where there is one row

    def _cast(self, values: Mapping[str, Array]) -> dict[str, Array]:
        return {name: np.asarray(values[name], dtype, order="C") for name, dtype in self._dtypes.items()}
