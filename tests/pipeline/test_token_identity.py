# SPDX-License-Identifier: Apache-2.0
"""The same tokens under other ids: the original follows, the proof holds, and metrics read each side's own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError, OnnxpressError
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.tokenizer import TextInputs, load_tokenizer
from onnxpress.exporters.vocabulary import read_vocabulary
from onnxpress.exporters.vocabulary_cut import cut_exported
from onnxpress.pipeline.data import Dataset
from onnxpress.pipeline.data_files import Example
from onnxpress.pipeline.evaluate import evaluate
from onnxpress.pipeline.renumbering import Renumbering
from onnxpress.pipeline.token_identity import CutVocabulary, cut_of_bundle, vocabulary_facts, vocabulary_warning

from ..exporters.tiny_tokenizers import text_of
from .samples import TEXT_INPUTS, exported

KEPT = np.array([0, 2, 5, 7])


def test_the_original_reads_new_ids_and_answers_about_kept_tokens() -> None:
    def original(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = feeds["input_ids"]
        return {"logits": ids[..., None] * 10 + np.arange(8), "pooled": ids + feeds["attention_mask"]}

    renumbering = Renumbering(KEPT, ("logits",))
    feeds = {"input_ids": np.array([[3, 0, 1]], np.int32), "attention_mask": np.ones((1, 3), np.int32)}
    answer = renumbering.reading_new_ids(renumbering.with_cut_outputs(original))(feeds)
    assert answer["logits"].tolist() == [[[70, 72, 75, 77], [0, 2, 5, 7], [20, 22, 25, 27]]]
    assert answer["pooled"].tolist() == [[8, 1, 3]]
    assert answer["pooled"].dtype == np.int32
    assert feeds["input_ids"].tolist() == [[3, 0, 1]]


def test_one_cut_after_another() -> None:
    both = Renumbering(KEPT, ("logits",)).then(Renumbering(np.array([1, 3]), ("logits", "scores")))
    assert both.kept.tolist() == [2, 7]
    assert both.outputs == ("logits", "scores")


def model(folder: Path, **fields: Any) -> ExportedModel:
    """One that reads text through a tiny WordPiece tokenizer, with at most 12 tokens."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text_of("WordPiece"), "utf-8")
    special = '"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"'
    (folder / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "PreTrainedTokenizerFast", {special}}}')
    files = {name: folder / name for name in ("tokenizer.json", "tokenizer_config.json")}
    tokenize = TextInputs(load_tokenizer(folder), dict.fromkeys(TEXT_INPUTS, "int64"), 12)
    settings: dict[str, Any] = {"task": "text-classification", "max_length": 12, **fields}
    return exported(TEXT_INPUTS, tokenize=tokenize, processor_files=files, **settings)


@pytest.fixture(name="whole")
def _whole(tmp_path: Path) -> ExportedModel:
    return model(tmp_path / "whole")


def cut(whole: ExportedModel, folder: Path, *words: str) -> CutVocabulary:
    vocabulary = read_vocabulary(whole.processor_files)
    kept = sorted(vocabulary.closed(vocabulary.ids[word] for word in words))
    return CutVocabulary(cut_exported(whole, kept, folder), Renumbering(np.array(kept)))


def texts(*rows: str, kind: Any = "text") -> Dataset:
    return Dataset(tuple(Example(text=row) for row in rows), kind, "dev", "0" * 64)


def test_facts_count_texts_and_tokens(whole: ExportedModel, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "cut", "the", "cat")
    facts = vocabulary_facts(whole, part, {"calibration": texts("the cat", "the other"), "evaluation": None})
    assert facts["tokens_after"] == len(part.renumbering.kept) < facts["tokens_before"]
    assert set(facts["readings"]) == {"built-in hard texts", "calibration"}
    reading = facts["readings"]["calibration"]
    assert (reading["texts"], reading["as_before"], reading["tokens_before"]) == (2, 1, 8)
    assert reading["tokens_after"] > 8
    (line,) = vocabulary_warning(facts)
    assert "1 of 2 (calibration)" in line
    facts["readings"] = {"calibration": {**reading, "as_before": 2}}
    assert vocabulary_warning(facts) == vocabulary_warning(None) == []


def test_a_cut_tokenizer_that_reads_kept_tokens_differently_is_an_error(whole: ExportedModel, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "cut", "the", "cat")

    class Wrong:
        def __call__(self, texts: Any, pairs: Any = None, **options: Any) -> dict[str, np.ndarray]:
            assert part.pressed.tokenize is not None
            return part.pressed.tokenize([text.replace("cat", "the") for text in texts], pairs)

    wrong = CutVocabulary(replace(part.pressed, tokenize=Wrong()), part.renumbering)  # type: ignore[arg-type]
    with pytest.raises(OnnxpressError, match="reads 'the cat' differently, although all of its tokens were kept"):
        vocabulary_facts(whole, wrong, {"calibration": texts("the", "the cat")})
    # Where a text is cut off at the limit, or holds a removed or an unknown token, the two may differ
    vocabulary_facts(whole, wrong, {"calibration": texts("the cat " * 9, "the cat 🦓", "other cat")})


def test_a_model_without_a_tokenizer_of_ours_is_refused(whole: ExportedModel, tmp_path: Path) -> None:
    part = cut(whole, tmp_path / "cut", "the")
    with pytest.raises(InputError, match="does not read texts of any length"):
        vocabulary_facts(replace(whole, tokenize=None), part, {})


def names(one: ExportedModel) -> dict[int, str]:
    return {number: token for token, number in read_vocabulary(one.processor_files).ids.items()}


def by_token(one: ExportedModel, answer: Any) -> Any:
    """A model that answers for each token by its name."""
    known = names(one)

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [[answer(known[int(number)]) for number in row] for row in feeds["input_ids"]]
        return {"logits": np.array(rows, np.float32)}

    return run


def test_entities_are_read_in_each_sides_own_tokens(tmp_path: Path) -> None:
    whole = model(tmp_path / "whole", task="token-classification", id2label={0: "O", 1: "B-X"})
    part = cut(whole, tmp_path / "cut", "the")
    data = Dataset((Example(words=("the", "other", "cat"), tags=("O", "B-X", "O")),), "words", "dev", "0" * 64)
    is_other = {True: [0.0, 1.0], False: [1.0, 0.0]}
    reference = by_token(whole, lambda token: is_other[token == "other"])
    candidate = by_token(part.pressed, lambda token: is_other[token == "o"])
    result = evaluate(whole, data, reference, candidate, 2, part)
    assert result["f1"] == {"reference": 100.0, "candidate": 100.0, "drop": 0.0}
    assert result["top1_agreement_with_reference"]["candidate"] == 100.0


def test_answers_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    """Positions: `cat` is the third token for the whole vocabulary, and a later one in pieces."""
    whole = model(tmp_path / "whole", task="question-answering")
    part = cut(whole, tmp_path / "cut", "cat")
    reference, candidate = (by_token(one, lambda token: float(token == "cat")) for one in (whole, part.pressed))
    result = evaluate(whole, texts("other cat"), reference, candidate, 1, part)
    assert result["top1_agreement_with_reference"]["candidate"] == 100.0


def test_only_a_bundle_with_a_cut_vocabulary_has_one(whole: ExportedModel, tmp_path: Path) -> None:
    assert cut_of_bundle(whole, tmp_path / "model.onnx") is None
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "name": "x"}', "utf-8")
    assert cut_of_bundle(whole, tmp_path) is None
    assert cut_of_bundle(whole, tmp_path / "onnx" / "model.onnx") is None
