# SPDX-License-Identifier: Apache-2.0
"""What lies beside a model in a transformers folder: config.json, the tokenizer, and the other processor files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import InputError, MissingDependency

PROCESSOR_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", *SENTENCEPIECE_FILES)
"""A folder with one of these has a tokenizer."""
INPUT_ORDER = ("input_ids", "attention_mask", "token_type_ids")

# RoBERTa's descendants number positions from the padding id + 1 on, which costs that many of the table's rows
_OFFSET_POSITIONS = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, or raise InputError when it is missing or broken."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder.name} has no config.json: not a transformers folder",
            next_step="Point at the folder that save_pretrained wrote.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder.name}/config.json is not JSON: {error}", next_step="Copy it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder.name}/config.json is not an object", next_step="Copy it again.")
    return config


def class_names(config: Mapping[str, Any]) -> dict[int, str] | None:
    """`id2label` of a config, or None where it has none."""
    labels = config.get("id2label") or {}
    try:
        return {int(number): str(name) for number, name in labels.items()} or None
    except (ValueError, AttributeError) as error:
        raise InputError("id2label in config.json does not map numbers to names", next_step="Correct it.") from error


def processor_files(folder: Path) -> dict[str, Path]:
    """Name to path of the files that a consumer needs beside the model."""
    return {name: folder / name for name in PROCESSOR_FILES if (folder / name).is_file()}


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or None when it has no tokenizer files; its code is not run unless it is trusted.

    Raises:
        InputError: transformers cannot load it.
        MissingDependency: It is a SentencePiece model alone, and `sentencepiece` is not installed.
    """
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        return None
    if found[0] in SENTENCEPIECE_FILES and find_spec("sentencepiece") is None:
        raise MissingDependency(
            f"reading {folder.name}/{found[0]} needs sentencepiece, which is not installed",
            next_step="pip install 'onnxpress[sentencepiece]', or save the tokenizer with a tokenizer.json.",
        )
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizers' Rust side raises bare Exception
        raise InputError(
            f"cannot load the tokenizer of {folder.name}: {(str(error).splitlines() or [''])[0][:200]}",
            next_step="Copy the tokenizer files again.",
        ) from error


def sentence_limit(folder: Path) -> int | None:
    """The length at which sentence-transformers cuts texts for this model (256 for all-MiniLM-L6-v2), or None."""
    try:
        found = json.loads((folder / "sentence_bert_config.json").read_text("utf-8"))["max_seq_length"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def longest_sequence(config: Mapping[str, Any], tokenizer: Any, folder: Path | None = None) -> int | None:
    """Tokens that positions, tokenizer and sentence-transformers' settings allow, or None without a limit."""
    limits = [getattr(tokenizer, "model_max_length", None)] if tokenizer is not None else []
    limits.append(sentence_limit(folder) if folder is not None else None)
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and positions > 0:
        offset = 0
        if config.get("model_type") in _OFFSET_POSITIONS:
            # MPNet's is always 1, whatever its config says
            padding = 1 if config["model_type"] == "mpnet" else config.get("pad_token_id", 1)
            offset = int(padding or 0) + 1
        limits.append(positions - offset)
    known = [int(n) for n in limits if n is not None and 0 < n < 10**6]
    return min(known) if known else None


class TextInputs:
    """Text to the model's inputs, as the folder's own tokenizer has it.

    Args:
        tokenizer: A transformers tokenizer.
        dtypes: Input name to numpy dtype, in the graph's order.
        limit: Longest sequence in tokens, or None.
    """

    def __init__(self, tokenizer: Any, dtypes: Mapping[str, str], limit: int | None) -> None:
        self.tokenizer, self.dtypes, self.limit = tokenizer, dict(dtypes), limit

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Tokenize; pad to the longest, or to exactly `max_length` tokens when it is given; truncate to the limit."""
        length = min((n for n in (max_length, self.limit) if n is not None), default=None)
        batch = self._tokenize(
            list(texts),
            None if pairs is None else list(pairs),
            padding="longest" if max_length is None else "max_length",
            max_length=length,
            rows=len(texts),
        )
        return self._arrays(batch)

    def words(self, sentences: Sequence[Sequence[str]]) -> tuple[dict[str, np.ndarray], list[list[int | None]]]:
        """Tokenize sentences that are split into words already.

        Returns:
            The inputs, and for each sentence the position of each word's first token (None where it was cut off).
        """
        space = " " if self._space_belongs_to_words() else ""
        rows = [[space + word if i else word for i, word in enumerate(sentence)] for sentence in sentences]
        batch = self._tokenize(
            rows, None, padding="longest", max_length=self.limit, rows=len(rows), is_split_into_words=True
        )
        firsts: list[list[int | None]] = []
        for row, sentence in enumerate(sentences):
            found: list[int | None] = [None] * len(sentence)
            for position, word in enumerate(batch.word_ids(row)):
                if word is not None and found[word] is None:
                    found[word] = position
            firsts.append(found)
        return self._arrays(batch), firsts

    def _space_belongs_to_words(self) -> bool:
        """Whether `the cat` is `the` and ` cat` to the tokenizer, as for RoBERTa: split words then lack their space."""
        split = self.tokenizer([["a", "a"]], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        return bool(split != self.tokenizer(["a a"], add_special_tokens=False)["input_ids"])

    def _tokenize(self, texts: Any, pairs: Any, *, padding: str, max_length: int | None, rows: int, **more: Any) -> Any:
        can_pad = self.tokenizer.pad_token is not None
        if not can_pad and (rows > 1 or padding == "max_length"):
            raise InputError(
                "the tokenizer has no padding token, so texts cannot be put into one batch",
                next_step="Set pad_token in tokenizer_config.json.",
            )
        return self.tokenizer(
            texts,
            pairs,
            padding=padding if can_pad else False,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=True,
            return_token_type_ids="token_type_ids" in self.dtypes,
            return_tensors="np",
            **more,
        )

    def _arrays(self, batch: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(batch[name], dtype=dtype) for name, dtype in self.dtypes.items()}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' load reports, hints and progress bars away from the user."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
