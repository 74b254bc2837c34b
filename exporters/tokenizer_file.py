# SPDX-License-Identifier: Apache-2.0
"""One tokenizer.json that alone says what transformers does with a folder's tokenizer.

transformers 5 changes a tokenizer after reading tokenizer.json: special tokens that tokenizer_config.json names and the
file lacks are added, and some classes (LlamaTokenizer, T5Tokenizer) build normalizer, pre-tokenizer and post-processor
anew. For files of another kind the flags `add_bos_token` and `add_eos_token` make the post-processor. It also sets
padding and truncation at each call, whatever the file says of them (all-MiniLM's pads every text to 128 tokens). What
is written here is the tokenizer that transformers has in memory, with the padding and truncation that the model was
pressed with. The source's own text is kept where both are the same but for these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .vocabulary import TOKENIZER

SOURCE, REWRITTEN, CONVERTED = "source", "rewritten", "converted"

_CALL_SETTINGS = ("padding", "truncation")


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json to be written, or why there is none.

    Attributes:
        text: The file; None where there can be none.
        origin: `source` (the source's own, but for padding and truncation), `rewritten` (transformers changes parts of
            the source's when it loads it), or `converted` (the source had only files of another kind).
        reason: Which parts were changed, or why there is no file.
    """

    text: str | None
    origin: str = ""
    reason: str = ""


def tokenizer_file(tokenizer: Any, folder: Path, limit: int | None) -> TokenizerFile:
    """The tokenizer.json of a loaded transformers tokenizer.

    Args:
        tokenizer: As transformers loaded it from `folder`.
        folder: Where the source's tokenizer.json lies, if it has one.
        limit: Longest sequence in tokens, or None.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        return TokenizerFile(None, reason=f"{name} is written in Python; no tokenizer.json says the same")
    try:
        loaded = _without_call_settings(json.loads(backend.to_str()))
    except Exception as error:  # noqa: BLE001 - parts in Python cannot be saved, and Rust raises bare Exception
        return TokenizerFile(None, reason=f"{name} has parts that cannot be saved: {str(error)[:120]}")
    source = folder / TOKENIZER
    if not source.is_file():
        return TokenizerFile(_dump(loaded, tokenizer, limit), CONVERTED)
    changed = _changed_parts(source, loaded)
    if changed:
        return TokenizerFile(_dump(loaded, tokenizer, limit), REWRITTEN, f"transformers changes {', '.join(changed)}")
    return TokenizerFile(_dump(json.loads(source.read_text("utf-8")), tokenizer, limit), SOURCE)


def _changed_parts(source: Path, loaded: Mapping[str, Any]) -> list[str]:
    """Which parts of a tokenizer.json transformers replaced; both are compared in the form that Rust gives them."""
    from tokenizers import Tokenizer

    own = _without_call_settings(json.loads(Tokenizer.from_file(str(source)).to_str()))
    return sorted(key for key in own.keys() | loaded.keys() if _rounded(own.get(key)) != _rounded(loaded.get(key)))


def _rounded(value: Any) -> Any:
    """Scores without their last digits, which Rust's and Python's reading of a number do not agree on."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def _without_call_settings(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in _CALL_SETTINGS}


def _dump(data: dict[str, Any], tokenizer: Any, limit: int | None) -> str:
    settings = {"truncation": _truncation(tokenizer, limit), "padding": _padding(tokenizer)}
    ordered = {"version": data.get("version", "1.0"), **settings, **_without_call_settings(data)}
    return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"


def _truncation(tokenizer: Any, limit: int | None) -> dict[str, Any] | None:
    if limit is None:
        return None
    side = str(getattr(tokenizer, "truncation_side", "right")).capitalize()
    return {"direction": side, "max_length": limit, "strategy": "LongestFirst", "stride": 0}


def _padding(tokenizer: Any) -> dict[str, Any] | None:
    if tokenizer.pad_token is None:
        return None
    return {
        "strategy": "BatchLongest",
        "direction": str(tokenizer.padding_side).capitalize(),
        "pad_to_multiple_of": None,
        "pad_id": int(tokenizer.pad_token_id),
        "pad_type_id": int(tokenizer.pad_token_type_id),
        "pad_token": str(tokenizer.pad_token),
    }
