# SPDX-License-Identifier: Apache-2.0
"""Whether transformers reads texts as the SentencePiece model in the folder does, where `sentencepiece` is installed.

It need not: transformers 5 takes a folder with tokenizer.model but without tokenizer_config.json for a tokenizer that
puts no space before the first word, in silence. What the bundle has to agree with is transformers, whatever it does;
this is said beside it, since the model was trained with the one or the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..exporters.tokenizer import SENTENCEPIECE_FILES
from ..exporters.vocabulary import TOKENIZER

_MARKERS = ("look-alikes", "empty", "control")
"""Texts in which special tokens are found or not, and which are nothing: no difference of pieces."""


def read_otherwise(tokenizer: Any, folder: Path, texts: Mapping[str, str]) -> list[str]:
    """The names of the texts of which transformers and SentencePiece make other pieces; empty if it cannot be said."""
    files = [folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()]
    if not files or (folder / TOKENIZER).is_file():
        return []
    try:
        processor = import_module("sentencepiece").SentencePieceProcessor(model_file=str(files[0]))
    except (ImportError, OSError, RuntimeError):  # not installed, or no SentencePiece model
        return []
    found = []
    for name, text in texts.items():
        # Pieces, not ids: some classes of transformers number them anew
        ours = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        if name not in _MARKERS and ours != processor.encode(text, out_type=str):
            found.append(name)
    return found
