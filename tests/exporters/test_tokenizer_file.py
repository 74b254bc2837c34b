# SPDX-License-Identifier: Apache-2.0
"""The bundle's tokenizer.json alone reads every text as transformers does, for five families of tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FOLDERS
from tokenizers import Tokenizer

from onnxpress.exporters.tokenizer import load_tokenizer
from onnxpress.exporters.tokenizer_file import CONVERTED, REWRITTEN, SOURCE, tokenizer_file
from onnxpress.runtime.golden_inputs import COLUMNS, EVERYTHING
from onnxpress.runtime.text import TextEncoder

LIMIT = 24
TEXTS = [
    "the other cat sat on the mat",
    "naïve café 👍🏽",
    "",
    "  two  spaces\n\t他们 ",
    "[CLS] <s></s> <pad><|endoftext|> [MASK] ##s ▁",
    "a banana bandana and " * 20,
]
Pair = tuple[Any, TextEncoder]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """transformers' tokenizer over the source's files, and ours over the one file that is written."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            source, bundle = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("bundle")
            FOLDERS[name](source)
            theirs = load_tokenizer(source)
            written = tokenizer_file(theirs, source, LIMIT)
            assert written.text is not None
            (bundle / "tokenizer.json").write_text(written.text, "utf-8")
            made[name] = theirs, TextEncoder(bundle, EVERYTHING, LIMIT)  # without tokenizer_config.json: it says it all
        return made[name]

    return get


def theirs_of(tokenizer: Any, texts: list[str], pairs: list[str] | None = None) -> dict[str, list[list[int]]]:
    read = tokenizer(
        texts,
        pairs,
        padding="longest" if tokenizer.pad_token else False,
        truncation=True,
        max_length=LIMIT,
        return_attention_mask=True,
        return_token_type_ids=True,
    )
    return {name: read[name] for name in COLUMNS}


def ours_of(encoder: TextEncoder, texts: list[str], pairs: list[str] | None = None) -> dict[str, list[list[int]]]:
    return {name: array.tolist() for name, array in encoder(texts, pairs).items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_alone_in_pairs_and_in_batches(name: str, readers: Callable[[str], Pair]) -> None:
    tokenizer, encoder = readers(name)
    for text in TEXTS:
        assert ours_of(encoder, [text]) == theirs_of(tokenizer, [text]), text
        for other in (TEXTS[0], "", TEXTS[-1]):
            assert ours_of(encoder, [text], [other]) == theirs_of(tokenizer, [text], [other]), (text, other)
    if tokenizer.pad_token:
        assert encoder.left == (tokenizer.padding_side == "left")
        assert ours_of(encoder, TEXTS) == theirs_of(tokenizer, TEXTS)
        assert ours_of(encoder, TEXTS, TEXTS[::-1]) == theirs_of(tokenizer, TEXTS, TEXTS[::-1])


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "Llama", "T5"])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=3), paired=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_unicode(name: str, texts: list[str], paired: bool, readers: Callable[[str], Pair]) -> None:
    tokenizer, encoder = readers(name)
    pairs = texts[::-1] if paired else None
    assert ours_of(encoder, texts, pairs) == theirs_of(tokenizer, texts, pairs)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_file_alone_does_it_in_any_language(name: str, readers: Callable[[str], Pair], tmp_path: Path) -> None:
    """A bare Tokenizer pads and cuts as the model was pressed, without any code of ours."""
    tokenizer, _ = readers(name)
    written = tokenizer_file(tokenizer, tmp_path, LIMIT)
    assert written.text is not None
    bare = Tokenizer.from_str(written.text)
    texts = TEXTS if tokenizer.pad_token else TEXTS[-1:]
    assert [row.ids for row in bare.encode_batch(texts)] == theirs_of(tokenizer, texts)["input_ids"]


def test_the_source_s_own_file_is_kept_but_for_padding_and_truncation(tmp_path: Path) -> None:
    FOLDERS["T5"](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    data["padding"] = {
        "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ok").ids) == 128, "the trap"
    written = tokenizer_file(load_tokenizer(tmp_path), tmp_path, LIMIT)
    assert written.origin == SOURCE
    assert written.text is not None
    kept = json.loads(written.text)
    assert kept["truncation"]["max_length"] == LIMIT
    assert kept["padding"]["strategy"] == "BatchLongest"
    assert {k: v for k, v in kept.items() if k not in ("padding", "truncation")} == {
        k: v for k, v in data.items() if k not in ("padding", "truncation")
    }


def test_what_transformers_changes_is_written_and_named(tmp_path: Path) -> None:
    FOLDERS["T5"](tmp_path)
    bare = TextEncoder(tmp_path, EVERYTHING, LIMIT)
    tokenizer = load_tokenizer(tmp_path)
    assert ours_of(bare, [TEXTS[0]]) != theirs_of(tokenizer, [TEXTS[0]]), "without </s>: the trap"
    written = tokenizer_file(tokenizer, tmp_path, LIMIT)
    assert written.origin == REWRITTEN
    assert "post_processor" in written.reason


def test_files_of_another_kind_are_converted(tmp_path: Path) -> None:
    FOLDERS["BERT"](tmp_path)
    assert tokenizer_file(load_tokenizer(tmp_path), tmp_path, None).origin == CONVERTED


def test_a_tokenizer_in_python_has_no_file(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "A", "C", "<mask>"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')
    written = tokenizer_file(load_tokenizer(tmp_path), tmp_path, LIMIT)
    assert (written.text, written.origin) == (None, "")
    assert written.reason == "EsmTokenizer is written in Python; no tokenizer.json says the same"


def test_a_limit_without_room_is_refused(readers: Callable[[str], Pair], tmp_path: Path) -> None:
    from onnxpress.contracts.errors import InputError

    tokenizer, _ = readers("BERT")
    written = tokenizer_file(tokenizer, tmp_path, LIMIT)
    (tmp_path / "tokenizer.json").write_text(written.text or "", "utf-8")
    with pytest.raises(InputError, match="no room"):
        TextEncoder(tmp_path, EVERYTHING, 1)
    encoder = TextEncoder(tmp_path, EVERYTHING, 3)
    assert encoder(["the cat sat"])["input_ids"].shape == (1, 3)
    encoder.set_limit(None)
    assert encoder(["the cat sat"])["input_ids"].shape[1] > 3
    assert encoder([])["input_ids"].dtype == np.int64
