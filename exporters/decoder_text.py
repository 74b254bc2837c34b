# SPDX-License-Identifier: Apache-2.0
"""Text to everything that a decoder's graph reads in its first call: tokens, positions, an empty cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..contracts.decoding import INPUT_IDS, MASK, Decoding
from ..contracts.errors import InputError
from ..contracts.signature import Signature
from .tokenizer import TextInputs


class DecoderText:
    """The folder's tokenizer, for a graph with a cache.

    Args:
        tokenizer: A transformers tokenizer; without a padding token it pads with the end of the text, which the
            attention mask hides.
        signature: Of the graph.
        limit: Longest sequence in tokens, or None.

    Raises:
        InputError: The graph keeps no cache.
    """

    def __init__(self, tokenizer: Any, signature: Signature, limit: int | None) -> None:
        decoding = Decoding.of(signature)
        if decoding is None:
            raise InputError("the graph has no cache", next_step="Export it for text-generation.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
        self.decoding = decoding
        self.tokens = TextInputs(tokenizer, {INPUT_IDS: "int64", MASK: "int64"}, limit)

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Tokenize; see `TextInputs`. All logits are asked for."""
        batch = self.tokens(texts, pairs, max_length=max_length)
        return self.decoding.feeds(batch[INPUT_IDS], batch[MASK])

    def words(self, sentences: Sequence[Sequence[str]]) -> tuple[dict[str, np.ndarray], list[list[int | None]]]:
        """Tokenize sentences that are split into words; see `TextInputs`."""
        batch, firsts = self.tokens.words(sentences)
        return self.decoding.feeds(batch[INPUT_IDS], batch[MASK]), firsts
