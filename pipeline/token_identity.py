# SPDX-License-Identifier: Apache-2.0
"""Proof that a cut tokenizer reads texts of kept tokens as the whole one did, and how it reads all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import InputError, OnnxpressError
from ..exporters.exported import ExportedModel, Tokenize
from ..exporters.tokenizer import TextInputs, load_tokenizer, processor_files
from ..exporters.vocabulary import TOKENIZER, read_vocabulary
from ..runtime.bundle import MANIFEST, read_manifest
from .data import Dataset
from .inputs import HARD_TEXTS, dataset_texts
from .renumbering import TOKEN_IDS, Renumbering


@dataclass(frozen=True)
class CutVocabulary:
    """A model whose vocabulary was cut.

    Attributes:
        pressed: The model with the cut tokenizer, as the candidate's consumers read it.
        renumbering: From its ids to those of the source.
    """

    pressed: ExportedModel
    renumbering: Renumbering


@dataclass
class Reading:
    """How many of some texts are read as before, and in how many tokens all of them."""

    texts: int = 0
    as_before: int = 0
    tokens_before: int = 0
    tokens_after: int = 0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def vocabulary_facts(exported: ExportedModel, cut: CutVocabulary, data: Mapping[str, Dataset | None]) -> dict[str, Any]:
    """What a cut vocabulary comes to, for the manifest: its size, and how the texts of `data` are read.

    Raises:
        OnnxpressError: A text whose tokens are all kept is read in others.
        InputError: The model reads no texts.
    """
    whole, part = exported.tokenize, cut.pressed.tokenize
    if whole is None or part is None or whole is part:
        raise InputError(
            f"{exported.source.name} does not read texts of any length through a tokenizer, which could be cut",
            next_step="Leave prune_vocabulary out of the recipe.",
        )
    vocabulary = read_vocabulary(exported.processor_files)
    judge = _Judge(whole, part, cut.renumbering, vocabulary.unknown, exported.max_length)
    readings = {"built-in hard texts": judge.read(HARD_TEXTS, None)}
    readings |= {name: judge.read(*dataset_texts(dataset)) for name, dataset in data.items() if dataset is not None}
    return {
        "tokens_before": len(vocabulary.ids),
        "tokens_after": len(cut.renumbering.kept),
        "readings": {name: reading.to_json() for name, reading in readings.items()},
    }


def vocabulary_warning(facts: dict[str, Any] | None) -> list[str]:
    """One line on texts that the pressed model reads differently; none where all are read as before."""
    if facts is None:
        return []
    changed = [
        f"{reading['texts'] - reading['as_before']} of {reading['texts']} ({name})"
        for name, reading in facts["readings"].items()
        if reading["as_before"] < reading["texts"]
    ]
    if not changed:
        return []
    return [
        f"The vocabulary was cut from {facts['tokens_before']} to {facts['tokens_after']} tokens. Texts with other "
        f"tokens are read in smaller pieces or as unknown: {', '.join(changed)}. Parity compares both on the same "
        "tokens; only the metrics of an evaluation count what this costs."
    ]


def cut_of_bundle(exported: ExportedModel, candidate: Path) -> CutVocabulary | None:
    """The cut vocabulary of a bundle (or of a model in one) that was pressed from the source; None if it has none."""
    folder = next((f for f in (candidate, candidate.parent.parent) if (f / MANIFEST).is_file()), None)
    tokenize = exported.tokenize
    if folder is None or not isinstance(tokenize, TextInputs) or TOKENIZER not in exported.processor_files:
        return None
    manifest, files = read_manifest(folder), processor_files(folder)
    if "vocabulary" not in manifest or TOKENIZER not in files:
        return None
    whole, part = read_vocabulary(exported.processor_files).ids, read_vocabulary(files).ids
    if not part.keys() <= whole.keys():
        raise InputError(f"{folder.name} has tokens that {exported.source.name} lacks", next_step="Check the source.")
    kept = np.array([whole[token] for token in sorted(part, key=part.__getitem__)], np.int64)
    cut = {(o["name"], o["shape"][-1]) for o in manifest["signature"]["outputs"] if o["shape"]}
    outputs = tuple(
        o.name
        for o in exported.signature.outputs
        if o.shape and o.shape[-1] != len(kept) and (o.name, len(kept)) in cut
    )
    inputs = TextInputs(load_tokenizer(folder), tokenize.dtypes, tokenize.limit)
    return CutVocabulary(replace(exported, tokenize=inputs, processor_files=files), Renumbering(kept, outputs))


@dataclass(frozen=True)
class _Judge:
    whole: Tokenize
    part: Tokenize
    renumbering: Renumbering
    unknown: int | None
    limit: int | None

    def read(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Reading:
        reading = Reading()
        for index, text in enumerate(texts):
            pair = None if pairs is None else [pairs[index]]
            before = self.whole([text], pair)[TOKEN_IDS][0]
            after = self.renumbering.kept[self.part([text], pair)[TOKEN_IDS][0].astype(np.int64)]
            same = np.array_equal(before, after)
            if not same and self._must_agree(before):
                raise OnnxpressError(
                    f"the cut tokenizer reads {text[:60]!r} differently, although all of its tokens were kept",
                    next_step="Leave prune_vocabulary out of the recipe and report it.",
                )
            reading.texts, reading.as_before = reading.texts + 1, reading.as_before + same
            reading.tokens_before, reading.tokens_after = (
                reading.tokens_before + before.size,
                reading.tokens_after + after.size,
            )
        return reading

    def _must_agree(self, before: np.ndarray) -> bool:
        """Whether all tokens of a text were kept and none is unknown, and it was not cut off at the limit."""
        whole = self.limit is None or before.size < self.limit
        return whole and bool(np.isin(before, self.renumbering.kept).all()) and self.unknown not in before.tolist()
