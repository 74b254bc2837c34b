# SPDX-License-Identifier: Apache-2.0
"""Text to a model's inputs from a bundle's tokenizer.json alone, by the `tokenizers` library, without transformers.

It gives what transformers' own tokenizer gives for the same folder: padded to the longest text, cut at the limit of
the model, on the sides that tokenizer_config.json names. The bundle's golden samples hold it to that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import BundleError, InputError
from ..contracts.signature import Signature

_READ = ("input_ids", "attention_mask", "token_type_ids")


class TextEncoder:
    """A tokenizer.

    Args:
        folder: Where tokenizer.json and tokenizer_config.json lie.
        signature: Of the graph: which inputs are made, and with which dtype.
        limit: Longest sequence in tokens, or None.

    Attributes:
        inputs: The inputs that text becomes, in the graph's order.
        pad: The padding token's id, or None where texts of several lengths cannot be put into one batch.
        left: Whether padding stands on the left.

    Raises:
        BundleError: A tokenizer file cannot be read.
    """

    def __init__(self, folder: Path, signature: Signature, limit: int | None = None) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            file = folder / "tokenizer_config.json"
            self._config: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        except Exception as error:  # tokenizers' Rust side raises bare Exception
            raise BundleError("the tokenizer's files cannot be read", next_step="Fetch the bundle again.") from error
        self._dtypes = {spec.name: spec.dtype for spec in signature.inputs if spec.name in _READ}
        self.inputs = tuple(self._dtypes)
        self.limit = limit
        self.left = self._config.get("padding_side") == "left"
        self.pad = self._token_id("pad_token")
        self.end = self._token_id("eos_token")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if limit is not None:
            self._tokenizer.enable_truncation(limit, direction=self._config.get("truncation_side", "right"))

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Tokenize, truncate to the limit, pad to the longest: input name to [texts, tokens].

        Raises:
            InputError: The texts have several lengths and the tokenizer has no padding token.
        """
        rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self._tokenizer.encode_batch(rows)
        longest = max((len(row.ids) for row in encoded), default=0)
        if self.pad is None and any(len(row.ids) != longest for row in encoded):
            raise InputError(
                "the tokenizer has no padding token, so texts cannot be put into one batch",
                next_step="Set pad_token in tokenizer_config.json.",
            )
        fill = {"input_ids": self.pad or 0, "attention_mask": 0, "token_type_ids": self._pad_type()}
        columns = {
            "input_ids": [row.ids for row in encoded],
            "attention_mask": [row.attention_mask for row in encoded],
            "token_type_ids": [row.type_ids for row in encoded],
        }
        return {
            name: np.asarray([self._padded(row, longest, fill[name]) for row in columns[name]], dtype).reshape(
                len(encoded), longest
            )
            for name, dtype in self._dtypes.items()
        }

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """The token ids of one text, with the special tokens that the tokenizer adds."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def vocabulary_size(self) -> int:
        """Tokens with those that were added."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def id_of(self, token: str) -> int | None:
        """A token's id, or None."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def _padded(self, row: list[int], length: int, value: int) -> list[int]:
        filling = [value] * (length - len(row))
        return filling + row if self.left else row + filling

    def _pad_type(self) -> int:
        return int(self._config.get("pad_token_type_id", 0))

    def _token_id(self, name: str) -> int | None:
        """The id of a special token of tokenizer_config.json, which may be written as an object."""
        token = self._config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        return self.id_of(text) if isinstance(text, str) else None
