# SPDX-License-Identifier: Apache-2.0
"""Golden token ids: what transformers gives, that tokenizer.json alone gives the same, and what is said where not."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onnxpress.contracts.errors import GateFailed, MissingDependency
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.tokenizer import load_tokenizer, processor_files
from onnxpress.pipeline import golden_tokens
from onnxpress.pipeline.golden_tokens import TEXTS, tokenizer_warnings, write_tokens
from onnxpress.runtime.golden_inputs import check_tokens

from ..exporters.tiny_tokenizers import FOLDERS
from .samples import TEXT_INPUTS, exported

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets"))


def source(folder: Path, *, limit: int | None = 64, task: str = "text-classification") -> ExportedModel:
    found = exported(TEXT_INPUTS, task=task, max_length=limit)
    found.processor_files = processor_files(folder)
    return found


def written(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    model = source(folder, **more)
    out.mkdir()
    for name, file in model.processor_files.items():
        shutil.copyfile(file, out / name)
    facts = write_tokens(out, model)
    assert facts is not None
    return facts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_is_read_alike_and_verified(name: str, folder: Path, tmp_path: Path) -> None:
    FOLDERS[name](folder)
    facts = written(folder, tmp_path / "out")
    assert (facts["json"], facts["differs"]) == (True, {})
    samples = json.loads((tmp_path / "out" / "golden" / "tokens.json").read_text("utf-8"))["samples"]
    assert facts["samples"] == len(samples)
    names = [sample["name"] for sample in samples]
    assert {*TEXTS, "longer than the limit", "cut short", "pair", "pair, cut short"} <= set(names)
    assert ("batch of several lengths" in names) == (name != "GPT-2")
    longest = {sample["name"]: max(map(len, sample["input_ids"])) for sample in samples}
    assert (longest["longer than the limit"], longest["cut short"], longest["pair, cut short"]) == (64, 12, 12)
    assert check_tokens(tmp_path / "out", {"tokenizer": facts}) == len(samples)
    assert tokenizer_warnings(facts) == []


def test_a_tokenizer_that_was_exchanged_is_found(folder: Path, tmp_path: Path) -> None:
    FOLDERS["BERT"](folder)
    facts = written(folder, tmp_path / "out")
    file = tmp_path / "out" / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    data["normalizer"]["strip_accents"] = False
    file.write_text(json.dumps(data), "utf-8")
    with pytest.raises(GateFailed, match="reads the golden text 'accents' differently"):
        check_tokens(tmp_path / "out", {"tokenizer": facts})


def test_a_text_that_is_read_differently_is_named_in_the_manifest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer with code of its own: what its file says is not all that it does."""
    FOLDERS["BERT"](folder)
    tokenizer = load_tokenizer(folder)

    class Own(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: list[str], pairs: Any = None, **options: Any) -> Any:
            return super().__call__([text.replace("service", "the cat") for text in texts], pairs, **options)

    tokenizer.__class__ = Own
    monkeypatch.setattr(golden_tokens, "load_tokenizer", lambda place: tokenizer)
    facts = written(folder, tmp_path / "out")
    assert list(facts["differs"]) == ["emoji"]
    assert tokenizer_warnings(facts) == [
        "tokenizer.json alone reads some golden texts otherwise than transformers: emoji."
    ]
    assert check_tokens(tmp_path / "out", {"tokenizer": facts}) == facts["samples"] - 1


def test_a_tokenizer_in_python_is_stated(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "A", "C", "<mask>"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')
    facts = written(folder, tmp_path / "out")
    assert facts == {"json": False, "reason": "EsmTokenizer is written in Python; no tokenizer.json says the same"}
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "Read texts with transformers." in tokenizer_warnings(facts)[0]


def test_pairs_are_for_tasks_that_take_them(folder: Path, tmp_path: Path) -> None:
    FOLDERS["GPT-2"](folder)
    written(folder, tmp_path / "out", task="text-generation", limit=None)
    text = (tmp_path / "out" / "golden" / "tokens.json").read_text("utf-8")
    assert "pair" not in [sample["name"] for sample in json.loads(text)["samples"]]
    assert max(map(len, text.splitlines())) < 5000
    assert "naïve" in text, "readable, not escaped"


def test_no_tokenizer_is_nothing_to_say(tmp_path: Path) -> None:
    assert write_tokens(tmp_path, exported(TEXT_INPUTS)) is None
    assert tokenizer_warnings(None) == []


def test_files_that_cannot_be_loaded_are_said_to_be_unread(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    facts = written(folder, tmp_path / "out")
    assert facts["json"] is True
    assert "cannot load the tokenizer" in facts["reason"]
    assert tokenizer_warnings(facts)[0].startswith("tokenizer.json was not checked: ")
    assert check_tokens(tmp_path / "out", {"tokenizer": facts}) == 0


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_sentencepiece_model_alone_needs_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(MissingDependency) as caught:
        load_tokenizer(folder)
    assert "onnxpress[sentencepiece]" in caught.value.next_step


@pytest.mark.skipif(find_spec("sentencepiece") is None, reason="needs sentencepiece (extra `sentencepiece`)")
@pytest.mark.skipif(not (ASSETS / "stories260K").is_dir(), reason="no stories260K here")
def test_a_sentencepiece_model_is_converted_and_compared_with_itself(folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(ASSETS / "stories260K" / "tok512.model", folder / "tokenizer.model")
    shutil.copyfile(ASSETS / "stories260K" / "derived" / "hf" / "config.json", folder / "config.json")
    bare = written(folder, tmp_path / "bare", task="text-generation")
    assert (bare["origin"], bare["differs"]) == ("converted", {})
    assert {"accents", "emoji"} <= set(bare["sentencepiece_differs"]), "no space before the first word"
    assert "Check that the source has its tokenizer_config.json" in tokenizer_warnings(bare)[0]
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    named = written(folder, tmp_path / "named", task="text-generation")
    assert named["differs"] == {}
    assert "accents" not in named.get("sentencepiece_differs", ())
