# SPDX-License-Identifier: Apache-2.0
"""A model's outputs for one input, in the words of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..opened import Bundle
from ..text import Tokens
from .refusal import Refusal

Outputs = Mapping[str, np.ndarray]

_LONGEST_ANSWER = 30
"""Tokens of an extracted answer, as transformers' pipeline has it by default (max_answer_len is 15 there)."""


@dataclass(frozen=True)
class Asked:
    """What was asked.

    Attributes:
        bundle: Of the model.
        tokens: The text as it was read; None for a picture.
        text: The text whose places an answer names: the context of a question.
        top: How many choices are wanted; None for what is usual.
    """

    bundle: Bundle
    tokens: Tokens | None = None
    text: str = ""
    top: int | None = None
    feeds: Mapping[str, np.ndarray] = field(default_factory=dict)


def classes(outputs: Outputs, asked: Asked) -> dict[str, Any]:
    """Labels with scores, the likeliest first: softmax, or sigmoid where several labels may hold (or there is one)."""
    logits = _logits(outputs)[0].astype(np.float64).reshape(-1)
    kind = asked.bundle.config.get("problem_type")
    if kind == "regression":
        scores = logits
    elif kind == "multi_label_classification" or len(logits) == 1:
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = softmax(logits)
    order = np.argsort(-scores, kind="stable")[: asked.top or len(scores)]
    found = [{"label": _label(asked.bundle, int(i)), "score": _number(scores[i])} for i in order]
    return {**found[0], "scores": found}


def embedding(outputs: Outputs, asked: Asked) -> dict[str, Any]:
    """One vector: the graph's own where it pools, else the mean over the tokens that count."""
    return {"embedding": pooled(outputs, asked.feeds).astype(np.float32)}


def pooled(outputs: Outputs, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """[size], of the first row."""
    array = next((array for array in outputs.values() if array.ndim == 2), None)
    if array is not None:
        row: np.ndarray = array[0]
        return row
    tokens = next((array for array in outputs.values() if array.ndim == 3), None)
    if tokens is None:
        raise Refusal(400, "the model has no output that is a vector: POST its tensors to /v2/models/NAME/infer")
    mask = feeds.get("attention_mask")
    weights = np.ones(tokens.shape[1]) if mask is None or mask.shape[1] != tokens.shape[1] else mask[0]
    mean: np.ndarray = (tokens[0] * weights[:, None]).sum(0) / max(weights.sum(), 1)
    return mean


def labelled_tokens(outputs: Outputs, asked: Asked) -> dict[str, Any]:
    """Every token of the text with its likeliest label."""
    tokens = _tokens(asked)
    chances = softmax(_logits(outputs)[0].astype(np.float64))
    best = chances.argmax(-1)
    rows = zip(tokens.parts, tokens.spans, best, chances.max(-1), strict=True)
    return {
        "tokens": [
            {
                "token": asked.text[start:end],
                "start": start,
                "end": end,
                "label": _label(asked.bundle, int(label)),
                "score": _number(score),
            }
            for part, (start, end), label, score in rows
            if part is not None
        ]
    }


def extracted(outputs: Outputs, asked: Asked) -> dict[str, Any]:
    """The likeliest piece of the context, by the product of the chances of its start and its end."""
    tokens = _tokens(asked)
    inside = np.array([part == 1 for part in tokens.parts])
    if not inside.any():
        raise Refusal(400, "the question leaves no room for the context")
    starts, ends = (
        softmax(np.where(inside, outputs[name][0].astype(np.float64), -np.inf))
        for name in ("start_logits", "end_logits")
    )
    chances = np.triu(np.outer(starts, ends)) - np.triu(np.outer(starts, ends), _LONGEST_ANSWER)
    first, last = divmod(int(chances.argmax()), len(ends))
    start, end = tokens.spans[first][0], tokens.spans[last][1]
    return {"answer": asked.text[start:end], "score": _number(chances[first, last]), "start": start, "end": end}


def filled(outputs: Outputs, asked: Asked) -> dict[str, Any]:
    """The likeliest tokens at every mask."""
    tokens, encoder = _tokens(asked), asked.bundle.encoder
    mask = encoder.special_id("mask_token") if encoder is not None else None
    places = [i for i, token in enumerate(tokens.ids) if token == mask and mask is not None]
    if encoder is None or not places:
        raise Refusal(400, "the text has no mask token")
    found = []
    for place in places[:64]:
        chances = softmax(_logits(outputs)[0, place].astype(np.float64))
        order = np.argsort(-chances, kind="stable")[: asked.top or 5]
        found.append([{"token": encoder.decode([int(i)]).strip(), "score": _number(chances[i])} for i in order])
    return {"masks": found}


ANSWERS: dict[str, Callable[[Outputs, Asked], dict[str, Any]]] = {
    "text-classification": classes,
    "image-classification": classes,
    "feature-extraction": embedding,
    "token-classification": labelled_tokens,
    "question-answering": extracted,
    "fill-mask": filled,
}
"""Task to what its outputs become."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    chances: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return chances


def _logits(outputs: Outputs) -> np.ndarray:
    return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))


def _label(bundle: Bundle, number: int) -> str:
    return bundle.labels.get(number, f"LABEL_{number}")


def _number(score: Any) -> float:
    return round(float(score), 6)


def _tokens(asked: Asked) -> Tokens:
    if asked.tokens is None:
        raise Refusal(400, "the model reads text")
    return asked.tokens
