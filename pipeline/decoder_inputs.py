# SPDX-License-Identifier: Apache-2.0
"""Inputs to compare and to time a decoder with: prefill and steps after it, padding on either side, few logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..contracts.decoding import INPUT_IDS, MASK, Decoding, cache_shape
from ..exporters.exported import ExportedModel

Feeds = dict[str, np.ndarray]

_ROWS = 3
_TOKENS = 12


def decoding_of(exported: ExportedModel) -> Decoding | None:
    """How to feed the graph step by step, where it is a decoder that can be started with tokens alone."""
    decoding = Decoding.of(exported.signature)
    if decoding is None or MASK not in decoding.inputs:
        return None  # the decoder of an encoder-decoder also reads what the encoder left
    return decoding


def decoder_feeds(exported: ExportedModel, decoding: Decoding, texts: tuple[str, ...]) -> list[tuple[str, Feeds]]:
    """(name, feeds) of calls that a decoder meets: the first one and later ones, in batches of different lengths.

    Args:
        exported: Its tokenizer, where it has one, makes the tokens; its reference, where it has one, the cache.
        decoding: Of its graph.
        texts: What to tokenize.
    """
    ids = _tokens(exported, texts)
    length = ids.shape[1]
    whole = np.ones_like(ids)
    left, right = whole.copy(), whole.copy()
    left[1, : length // 2] = 0
    right[1, length - length // 3 :] = 0
    calls = [
        (f"{_ROWS} x {length} tokens", decoding.feeds(ids, whole)),
        (f"{_ROWS} x {length} tokens, padded right", decoding.feeds(ids, right)),
        (f"{_ROWS} x {length} tokens, padded left", decoding.feeds(ids, left)),
        ("1 x 1 token", decoding.feeds(ids[:1, :1])),
    ]
    cache = _cache_after(exported, decoding, decoding.feeds(ids, left))
    for new, keep in ((1, 0), (3, 1)):
        mask = np.concatenate([left, np.ones((_ROWS, new), np.int64)], axis=1)
        feeds = decoding.feeds(ids[:, :new], mask, cache, keep=keep)
        last = ", last logit only" if keep and "num_logits_to_keep" in feeds else ""
        calls.append((f"{_ROWS} x {new} tokens after {length}, padded left{last}", feeds))
    return calls


def step_after(exported: ExportedModel, decoding: Decoding, past: int, *, batch: int = 1) -> Feeds:
    """One new token after `past` others, as most calls of a decoder are."""
    ids = np.resize(_tokens(exported, ()), (batch, 1))
    return decoding.feeds(ids, None, _random_cache(decoding, batch, past), keep=1)


def _tokens(exported: ExportedModel, texts: tuple[str, ...]) -> np.ndarray:
    """Token ids [3, length], the texts' own where there is a tokenizer; int64."""
    limit = min(_TOKENS, (exported.max_length or 1000) // 2)
    if exported.tokenize is not None and texts:
        found = np.concatenate([exported.tokenize([text])[INPUT_IDS][0] for text in texts if text])
        return np.resize(found, (_ROWS, limit)).astype(np.int64)
    rng = np.random.default_rng(0)
    vocabulary = exported.signature.outputs[0].shape[-1] if exported.signature.outputs[0].shape else None
    return rng.integers(0, vocabulary if isinstance(vocabulary, int) else 100, (_ROWS, limit))


def _cache_after(exported: ExportedModel, decoding: Decoding, feeds: Feeds) -> Mapping[str, np.ndarray]:
    """What the original keeps after a call; random numbers of that shape where the graph is its own original."""
    if exported.reference is not None:
        return decoding.next_cache(exported.reference.run(feeds))
    batch, length = feeds[INPUT_IDS].shape
    return _random_cache(decoding, batch, length)


def _random_cache(decoding: Decoding, batch: int, past: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        spec.name: rng.standard_normal(cache_shape(spec, batch, past)).astype(spec.dtype) for spec in decoding.caches
    }


def mask_of_output(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Where an output of a decoder counts.

    Args:
        mask: bool [batch, past + sequence].
        shape: Of the output: logits [batch, kept, vocabulary] belong to the last tokens, keys and values
            [batch, heads, past + sequence, size] to all.

    Returns:
        A boolean mask over the leading axes, or None for an output without tokens.
    """
    if len(shape) == 3 and shape[0] == mask.shape[0] and 0 < shape[1] <= mask.shape[1]:
        return mask[:, mask.shape[1] - shape[1] :]
    if len(shape) == 4 and (shape[0], shape[2]) == mask.shape:
        return np.broadcast_to(mask[:, None, :], (shape[0], shape[1], shape[2]))
    return None
