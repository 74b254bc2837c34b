# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens that a consumer's decode loop has to give: from ONNX Runtime in Python, with the same model.

golden/generation.txt has three lines, a word and token numbers each: `prompt`, `expected`, `end` (tokens that end a
text; may be none).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....contracts.decoding import INPUT_IDS, KEEP, MASK, Decoding
from ....runtime.opened import Bundle
from ....runtime.session import Session

GENERATION = "generation.txt"
_PROMPT, _COUNT = 8, 16


def decoding_of(bundle: Bundle) -> Decoding | None:
    """How the bundle's model is decoded, or None where it is no causal language model with a cache."""
    decoding = Decoding.of(bundle.signature)
    if decoding is None or "logits" not in {spec.name for spec in bundle.signature.outputs}:
        return None
    known = {INPUT_IDS, MASK, "position_ids", KEEP, *decoding.present}
    return decoding if set(decoding.inputs) <= known else None


def write_generation(bundle: Bundle, folder: Path) -> None:
    """Write generation.txt into `folder` for a model that `decoding_of` knows."""
    decoding = decoding_of(bundle)
    assert decoding is not None
    prompt, end = _prompt(bundle), _end(bundle)
    limit = _COUNT if bundle.max_length is None else max(1, min(_COUNT, bundle.max_length - len(prompt)))
    expected = greedy(bundle.session(threads=1), decoding, prompt, limit, end)
    lines = (("prompt", prompt), ("expected", expected), ("end", end))
    text = "".join(" ".join([word, *map(str, tokens)]) + "\n" for word, tokens in lines)
    (folder / GENERATION).write_text(text, "utf-8", newline="\n")


def greedy(session: Session, decoding: Decoding, prompt: list[int], count: int, end: list[int]) -> list[int]:
    """The most likely token, `count` times or up to one of `end`: the prompt in one call, then a token a call."""
    new, cache, answer = np.array([prompt], np.int64), None, list[int]()
    while len(answer) < count and (not answer or answer[-1] not in end):
        outputs = session.run(decoding.feeds(new, cache=cache, keep=1))
        cache = decoding.next_cache(outputs)
        answer.append(int(outputs["logits"][0, -1].argmax()))
        new = np.array([[answer[-1]]], np.int64)
    return answer


def _prompt(bundle: Bundle) -> list[int]:
    inputs = bundle.golden[0].inputs
    row, mask = inputs[INPUT_IDS][0], inputs.get(MASK)
    if mask is not None and mask.shape == inputs[INPUT_IDS].shape:
        row = row[mask[0] != 0]
    return [int(token) for token in row[:_PROMPT]]


def _end(bundle: Bundle) -> list[int]:
    found = bundle.generation_config.get("eos_token_id", bundle.config.get("eos_token_id"))
    tokens = found if isinstance(found, list) else [found]
    return [token for token in tokens if isinstance(token, int)]
