# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's vocabulary, and what has to stay in a part of it for texts of kept tokens to be read as before.

For a text whose tokens all stay (and none of which is the unknown token), the tokenizer over the part gives the same
tokens as the whole one, by model:

WordPiece   takes the longest piece that fits, from left to right; the longest of all is the longest of the part too.
Unigram     takes the segmentation of the highest score; it can be written still, and others only fell away. A character
            that is in no piece costs the lowest score and a penalty, so the piece with the lowest score has to stay.
BPE         merges the pair of the lowest rank, again and again; the merges that make a token stay, and so do all tokens
            on the way to it. Every merge that the whole tokenizer made is then there, and still the first in rank.
WordLevel   knows a word or does not.

All other texts are still read, in smaller pieces: single characters, bytes and the unknown token always stay.

Reference: huggingface/tokenizers' documentation of the four models; Sennrich et al. (arXiv 1508.07909) for BPE, Kudo
(arXiv 1804.10959) for Unigram; Yang et al., "TextPruner" (arXiv 2203.15996) for cutting vocabularies at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..contracts.errors import InputError

TOKENIZER = "tokenizer.json"
Json = dict[str, Any]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MENTIONING = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
_SAVE_IT = "Save the tokenizer with transformers' save_pretrained, which writes tokenizer.json."


class Vocabulary:
    """What `tokenizer.json` says, and the ids that the `tokenizers` library gives its tokens.

    Attributes:
        data: The file as JSON.
        kind: `WordPiece`, `BPE`, `Unigram` or `WordLevel`.
        ids: Token to id, added tokens included.
        mentioned: Ids that the other files mention: `pad_token_id`, or that of `mask_token`.

    Raises:
        InputError: The file is no tokenizer, or of a model that cannot be cut.
    """

    def __init__(self, text: str, mentioned: Iterable[int | str] = ()) -> None:
        try:
            self.data: Json = json.loads(text)
            self.ids = token_ids(text)
        except Exception as error:  # tokenizers' Rust side raises bare Exception
            raise InputError(
                f"{TOKENIZER} cannot be read: {(str(error).splitlines() or [''])[0][:200]}",
                next_step="Copy the tokenizer files again.",
            ) from error
        self.model: Json = self.data["model"]
        self.kind = self.model.get("type") or _guessed_kind(self.model)
        self.mentioned = {self.ids.get(each, -1) if isinstance(each, str) else each for each in mentioned}
        if self.kind not in _KINDS:
            raise InputError(
                f"the tokenizer's model is {self.kind}, whose vocabulary cannot be cut",
                next_step="Leave prune_vocabulary out of the recipe.",
            )
        if len(set(self.ids.values())) < len(self.ids):
            raise InputError(
                f"{TOKENIZER} gives two tokens the same id", next_step="Leave prune_vocabulary out of the recipe."
            )
        if self.kind == "WordLevel" and self.unknown is None:
            raise InputError(
                "the tokenizer knows whole words only and has no unknown token: without a word it could read nothing",
                next_step="Leave prune_vocabulary out of the recipe.",
            )

    @cached_property
    def unknown(self) -> int | None:
        """The id of the unknown token, or None for a tokenizer that can do without."""
        if self.kind == "Unigram":
            number = self.model.get("unk_id")
            return None if number is None else int(number)
        return self.ids.get(self.model.get("unk_token") or "")

    def essential(self) -> set[int]:
        """Ids that no cut may remove: added tokens, ids that a file mentions, single characters, bytes, unknown."""
        kept = {self.ids[token["content"]] for token in self.data.get("added_tokens") or () if self._has(token)}
        kept |= {self.unknown} if self.unknown is not None else set()
        numbers = set(self.ids.values())
        kept |= {number for number in (*self.mentioned, *_processor_ids(self.data)) if number in numbers}
        kept |= {number for token, number in self.ids.items() if self._is_single(token)}
        if self.kind == "Unigram" and self.model["vocab"]:
            kept.add(min(range(len(self.model["vocab"])), key=lambda index: self.model["vocab"][index][1]))
        return kept

    def closed(self, ids: Iterable[int]) -> set[int]:
        """`ids`, what is essential, and every token on the way to one of them."""
        kept = {*ids, *self.essential()}
        if self.kind == "BPE":
            names = {number: token for token, number in self.ids.items()}
            for number in list(kept):
                kept |= {self.ids[token] for token in self._ancestors(names[number]) if token in self.ids}
        return kept

    def _has(self, token: Json) -> bool:
        return token["content"] in self.ids

    def _is_single(self, token: str) -> bool:
        """Whether a token is one character (or byte), at the beginning of a word, inside or at its end."""
        if self.kind == "WordLevel":
            return False
        return bool(_BYTE.fullmatch(token)) or len(self._bare(token)) == 1

    def _bare(self, token: str) -> str:
        prefix, suffix = self._affixes
        inner = token.removeprefix(prefix) or token
        return inner.removesuffix(suffix) or inner

    @cached_property
    def _affixes(self) -> tuple[str, str]:
        """What stands before a piece that continues a word (`##`), and behind one that ends it (`</w>`)."""
        return self.model.get("continuing_subword_prefix") or "", self.model.get("end_of_word_suffix") or ""

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(merge_pairs(self.model))}

    def _ancestors(self, token: str) -> list[str]:
        """The tokens that BPE makes on its way from characters to `token`; none for what merging does not reach.

        Merging treats a token within a word as it would alone: a pair across its border, had it come first, would have
        been merged, and the token would not be one of the result.
        """
        prefix, _ = self._affixes
        symbols, made = list(self._characters(token)), []
        while len(symbols) > 1:
            ranked = [
                (self._ranks[pair], i) for i in range(len(symbols) - 1) if (pair := _pair(symbols, i)) in self._ranks
            ]
            if not ranked:
                return []
            _, index = min(ranked)
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1].removeprefix(prefix)]
            made.append(symbols[index])
        return [*self._characters(token), *made] if symbols == [token] else []

    def _characters(self, token: str) -> Iterator[str]:
        """The symbols that merging starts from."""
        prefix, suffix = self._affixes
        inside = bool(prefix) and token.startswith(prefix) and token != prefix
        characters = self._bare(token)
        ends = bool(suffix) and token.endswith(suffix) and token != suffix
        for index, character in enumerate(characters):
            start = prefix if inside or index else ""
            yield f"{start}{character}{suffix if ends and index == len(characters) - 1 else ''}"


def read_vocabulary(files: Mapping[str, Path]) -> Vocabulary:
    """The vocabulary of the tokenizer among a model's processor files.

    Raises:
        InputError: There is no tokenizer.json, or it cannot be cut.
    """
    if TOKENIZER not in files:
        binary = next((name for name in files if name.endswith(".model")), None)
        what = f"only {binary} lies" if binary else "no tokenizer.json lies"
        raise InputError(f"{what} beside the model, so its vocabulary cannot be cut", next_step=_SAVE_IT)
    others = [read_json(files[name]) for name in _MENTIONING if name in files]
    return Vocabulary(files[TOKENIZER].read_text("utf-8"), (each for other in others for each in _mentioned(other)))


def read_json(path: Path) -> Json:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON: {error}", next_step="Copy it again.") from error
    return data if isinstance(data, dict) else {}


def token_ids(text: str) -> dict[str, int]:
    """Token to id of a tokenizer.json, as the library that reads it numbers them."""
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_str(text).get_vocab(with_added_tokens=True))


def _mentioned(data: Json) -> Iterator[int | str]:
    """Every id under `..._token_id` and every token under `..._token` of a configuration, at any depth."""
    for key, value in data.items():
        values = value if isinstance(value, list) else [value]
        if key.endswith("_token_id"):
            yield from (number for number in values if isinstance(number, int))
        elif key.endswith(("_token", "special_tokens")):
            named = (each.get("content") if isinstance(each, dict) else each for each in values)
            yield from (token for token in named if isinstance(token, str))
        elif isinstance(value, dict):
            yield from _mentioned(value)


def merge_pairs(model: Json) -> list[tuple[str, str]]:
    """The merges of a BPE model in order, which older files write as `left right`."""
    return [_parts(merge) for merge in model.get("merges") or ()]


def processors_of(processor: Json | None) -> Iterator[Json]:
    """A post-processor and, for a sequence of them, each one."""
    if processor:
        yield processor
        for inner in processor.get("processors") or ():
            yield from processors_of(inner)


def _processor_ids(data: Json) -> Iterator[int]:
    for processor in processors_of(data.get("post_processor")):
        for special in (processor.get("special_tokens") or {}).values():
            yield from special["ids"]
        yield from (processor[side][1] for side in ("sep", "cls") if side in processor)
    if data.get("padding"):
        yield data["padding"]["pad_id"]


def _parts(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _pair(symbols: list[str], index: int) -> tuple[str, str]:
    return symbols[index], symbols[index + 1]


def _guessed_kind(model: Json) -> str:
    """The kind of a model that does not say it, as old files do not."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"
