# SPDX-License-Identifier: Apache-2.0
"""Write a bundle's tokenizer.json with golden token ids, and find out whether `tokenizers` alone gives the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import OnnxpressError
from ..exporters.exported import ExportedModel
from ..exporters.tokenizer import TOKENIZER_FILES, load_tokenizer, quiet_transformers
from ..exporters.tokenizer_file import tokenizer_file
from ..exporters.vocabulary import TOKENIZER
from ..runtime.golden_inputs import COLUMNS, GOLDEN_TOKENS, differing
from .sentencepiece_reading import read_otherwise

TEXTS = {
    "accents": "Der Bär läuft über die große Straße – naïve café, señor, Ωmega, ﬁne, e\u0301.",
    "emoji": "Great 👍🏽 service 👩‍💻 🏳️‍🌈 😀!",
    "scripts": "模型压缩之后还能用吗? 今日は良い天気ですね。 안녕하세요 세계 مرحبا नमस्ते",
    "empty": "",
    "spaces": "  two  spaces,\ttab,\r\n\nnew lines \u00a0 no-break\u200bzero ",
    "look-alikes": "[CLS] [MASK] <s> </s> <pad> <unk> <|endoftext|> <mask> [UNUSED] ##ing ▁",
    "capitals and numbers": "ONNX 1.23e-4, DON'T 12,345.67 it's http://example.org/?q=a&b=c \\n",
    "control": "a\x00b\x07c\ufffd\ufeffd",
}
"""Texts that break tokenizers, by the name under which a difference is told."""

SENTENCE = "The quick brown fox jumps over the lazy dog, and naïve cafés serve 12 crêpes. "
_SHORT, _LONGEST = 12, 4096
_PAIR_TASKS = {"text-classification", "feature-extraction", "question-answering", "multiple-choice"}


def write_tokens(folder: Path, exported: ExportedModel) -> dict[str, Any] | None:
    """Write tokenizer.json and golden/tokens.json into a bundle.

    Args:
        folder: The bundle, with the source's processor files in it.
        exported: What is pressed, with the tokenizer that the candidate's consumers read with.

    Returns:
        What the manifest says of it; None for a source without any tokenizer.
    """
    place = next((file.parent for name, file in exported.processor_files.items() if name in TOKENIZER_FILES), None)
    if place is None:
        return None
    try:
        tokenizer = _tokenizer_of(exported, place)
    except OnnxpressError as error:  # a graph that is pressed as it is may lie beside anything
        return {"json": (folder / TOKENIZER).is_file(), "reason": f"{error.message}; it was copied unread"}
    written = tokenizer_file(tokenizer, place, exported.max_length)
    if written.text is None:
        return {"json": False, "reason": written.reason}
    (folder / TOKENIZER).write_text(written.text, "utf-8")
    samples = golden_tokens(tokenizer, exported.max_length, pairs=exported.task in _PAIR_TASKS)
    (folder / GOLDEN_TOKENS).parent.mkdir(exist_ok=True)
    (folder / GOLDEN_TOKENS).write_text(_dump(type(tokenizer).__name__, samples), "utf-8")
    facts: dict[str, Any] = {
        "json": True,
        "origin": written.origin,
        **({"reason": written.reason} if written.reason else {}),
        "golden": GOLDEN_TOKENS,
        "samples": len(samples),
        "differs": differing(folder, samples),
    }
    otherwise = read_otherwise(tokenizer, place, TEXTS)
    return facts | ({"sentencepiece_differs": otherwise} if otherwise else {})


def tokenizer_warnings(facts: Mapping[str, Any] | None) -> list[str]:
    """One line for everything about the tokenizer that a user has to know."""
    if facts is None:
        return []
    if not facts["json"]:
        return [f"There is no tokenizer.json: {facts['reason']}. Read texts with transformers."]
    if not facts.get("golden"):
        return [f"tokenizer.json was not checked: {facts['reason']}."]
    warnings = []
    if facts["differs"]:
        named = ", ".join(facts["differs"])
        warnings.append(f"tokenizer.json alone reads some golden texts otherwise than transformers: {named}.")
    if facts.get("sentencepiece_differs"):
        named = ", ".join(facts["sentencepiece_differs"])
        warnings.append(
            f"transformers reads some texts otherwise than the SentencePiece model itself: {named}. "
            "Check that the source has its tokenizer_config.json."
        )
    return warnings


def golden_tokens(tokenizer: Any, limit: int | None, *, pairs: bool) -> list[dict[str, Any]]:
    """What transformers makes of the texts, alone, cut short, in pairs and in a padded batch."""
    long = SENTENCE * 2
    with quiet_transformers():  # it warns of texts that are too long
        while limit is not None and limit <= _LONGEST and len(tokenizer.tokenize(long)) <= limit + _SHORT:
            long *= 2
    short = _SHORT if limit is None else min(_SHORT, limit)
    batches: list[tuple[str, list[str], list[str] | None, int | None]] = [
        *((name, [text], None, limit) for name, text in TEXTS.items()),
        ("longer than the limit", [long], None, limit),
        ("cut short", [SENTENCE], None, short),
    ]
    if pairs:
        batches += [
            ("pair", ["Is it naïve?"], ["No, 模型 it is not 👍🏽."], limit),
            ("pair, cut short", [SENTENCE], ["A short answer."], short),
            ("pair with nothing", ["Is it?"], [""], limit),
        ]
    if tokenizer.pad_token is not None:
        batches.append(("batch of several lengths", [TEXTS["accents"], "ok", "", SENTENCE], None, limit))
    return [_sample(tokenizer, *batch) for batch in batches]


def _sample(tokenizer: Any, name: str, texts: list[str], pairs: list[str] | None, limit: int | None) -> dict[str, Any]:
    with quiet_transformers():
        read = tokenizer(
            texts,
            pairs,
            padding="longest" if tokenizer.pad_token is not None else False,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=True,
            return_token_type_ids=True,
        )
    rows = {column: np.asarray(read[column], np.int64).reshape(len(texts), -1).tolist() for column in COLUMNS}
    return {"name": name, "texts": texts, "pairs": pairs, "limit": limit, **rows}


def _dump(name: str, samples: list[dict[str, Any]]) -> str:
    """JSON with one line a field, so that numbers do not fill a line each."""
    rows = [
        ",\n".join(f"      {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in sample.items())
        for sample in samples
    ]
    body = ",\n".join(f"    {{\n{row}\n    }}" for row in rows)
    return f'{{\n  "tokenizer": {json.dumps(name)},\n  "samples": [\n{body}\n  ]\n}}\n'


def _tokenizer_of(exported: ExportedModel, place: Path) -> Any:
    """The tokenizer that the model was compared with, or the one beside the model."""
    tokenize = exported.tokenize
    loaded = getattr(tokenize, "tokenizer", None) or getattr(getattr(tokenize, "tokens", None), "tokenizer", None)
    return loaded or load_tokenizer(place)
