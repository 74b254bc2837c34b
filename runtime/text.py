# SPDX-License-Identifier: Apache-2.0
"""Text to a model's inputs from a bundle's tokenizer.json alone, by the `tokenizers` library, without transformers.

It gives what transformers' own tokenizer gives for the same folder: padded to the longest text, cut at the limit of
the model, on the sides that tokenizer_config.json names, or else the padding and truncation of tokenizer.json. The
golden token ids of a bundle (golden/tokens.json) hold it to that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import BundleError, InputError
from ..contracts.signature import Signature

_READ = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Tokens:
    """One text as the model reads it.

    Attributes:
        feeds: Input name to [1, tokens].
    """

    feeds: dict[str, np.ndarray]
    _encoding: Any

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return list(self._encoding.ids)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each token stands in its text: first character and the one behind the last."""
        return list(self._encoding.offsets)

    @property
    def parts(self) -> list[int | None]:
        """0 for tokens of the text, 1 for those of its pair, None for special ones."""
        return list(self._encoding.sequence_ids)


class TextEncoder:
    """A tokenizer.

    Args:
        folder: Where tokenizer.json and tokenizer_config.json lie.
        signature: Of the graph: which inputs are made, and with which dtype.
        limit: Longest sequence in tokens, or None.

    Attributes:
        inputs: The inputs that text becomes, in the graph's order.
        pad: The padding token's id, or None where texts of several lengths cannot be put into one batch.
        limit: Longest sequence in tokens, or None.
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
        # What tokenizer_config.json leaves open is up to the class in transformers; a bundle's tokenizer.json has it
        padding, self._truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
        self.left = self._setting("padding_side", padding.get("direction", "right")) == "left"
        self._pad_type = int(self._setting("pad_token_type_id", padding.get("pad_type_id", 0)))
        self.pad = self._token_id("pad_token")
        if self.pad is None:
            self.pad = padding.get("pad_id")
        self.end = self._token_id("eos_token")
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = self._config.get("split_special_tokens") is True
        self.set_limit(limit)

    def set_limit(self, limit: int | None) -> None:
        """Cut texts (the longer one of a pair first) to this many tokens from now on; None leaves them whole.

        Raises:
            InputError: No text fits beside the special tokens.
        """
        self.limit = limit
        self._tokenizer.no_truncation()
        if limit is None:
            return
        if limit < self._tokenizer.num_special_tokens_to_add(False):
            raise InputError(f"a limit of {limit} tokens has no room for a text", next_step="Raise it.")
        side = self._setting("truncation_side", self._truncation.get("direction", "right"))
        self._tokenizer.enable_truncation(limit, direction=side)

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
        fill = {"input_ids": self.pad or 0, "attention_mask": 0, "token_type_ids": self._pad_type}
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

    def tokens(self, text: str, pair: str | None = None) -> Tokens:
        """One text, or a pair, with the places of its tokens; cut at the limit like the others."""
        encoding = self._tokenizer.encode(text, pair)
        columns = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        return Tokens({name: np.array([columns[name]], dtype) for name, dtype in self._dtypes.items()}, encoding)

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

    def special_id(self, name: str) -> int | None:
        """The id of `mask_token`, `eos_token`, ... as tokenizer_config.json names it, or None."""
        return self._token_id(name)

    def _padded(self, row: list[int], length: int, value: int) -> list[int]:
        filling = [value] * (length - len(row))
        return filling + row if self.left else row + filling

    def _setting(self, name: str, otherwise: Any) -> Any:
        value = self._config.get(name)
        return otherwise if value is None else value

    def _token_id(self, name: str) -> int | None:
        """The id of a special token of tokenizer_config.json, which may be written as an object."""
        token = self._config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        return self.id_of(text) if isinstance(text, str) else None
