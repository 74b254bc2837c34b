# SPDX-License-Identifier: Apache-2.0
"""The verb `generate`, on a model that spells a text and ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Run

TEXT = "once 🎉!"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _spelling().spelling_bundle(tmp_path_factory.mktemp("spelling") / "speller", TEXT)


def _spelling() -> Any:
    """The tests of the runtime have a bundle that is written by hand."""
    import importlib.util

    file = Path(__file__).parents[1] / "runtime" / "generation" / "writing_bundles.py"
    spec = importlib.util.spec_from_file_location("writing_bundles_of_generation", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_text_goes_to_standard_output(onnxpress: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = onnxpress("generate", bundle, "o", "--threads", 1)
    assert (result.code, result.out, result.err) == (0, TEXT[1:] + "\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("onc"))
    assert onnxpress("generate", bundle, "-").out == TEXT[3:] + "\n"
    assert onnxpress("generate", bundle, "o", "--stop", "🎉", "--stop", "xx").out == "nce \n"
    assert onnxpress("generate", bundle, "o", "--max-new-tokens", 2).out == "nc\n"
    assert onnxpress("generate", bundle, "o", "--beams", 2).out == TEXT[1:] + "\n"
    drawn = onnxpress("generate", bundle, "o", "--temperature", "0.1", "--top-k", 1, "--seed", 3)
    assert drawn.out == TEXT[1:] + "\n"


def test_json_says_what_was_written_and_how_fast(onnxpress: Run, bundle: Path) -> None:
    result = onnxpress("generate", bundle, "on", "--json", "--stop", "!")
    told = json.loads(result.out)
    assert (told["text"], told["finish"], told["prompt_tokens"]) == ("ce 🎉", "stop", 2)
    assert len(told["tokens"]) == len("ce 🎉!".encode())
    assert told["prefill_tokens_per_second"] > 0
    assert told["decode_tokens_per_second"] > 0
    assert 0 < told["decode_share_in_graph"] < 1
    assert len(told["bundle"]) == 64


def test_tokens_go_in_and_out(onnxpress: Run, bundle: Path, tmp_path: Path) -> None:
    ids = json.loads(onnxpress("generate", bundle, "o", "--json").out)["tokens"]
    result = onnxpress("generate", bundle, f"{ids[0]}, {ids[1]}", "--tokens")
    assert [int(word) for word in result.out.split()] == ids[2:]
    bare = _spelling().spelling_bundle(tmp_path / "bare", TEXT, tokenizer=False)
    assert onnxpress("generate", bare, f"{ids[0]} {ids[1]}", "--tokens").out == result.out
    told = json.loads(onnxpress("generate", bare, ids[0], "--tokens", "--json").out)
    assert (told["text"], told["tokens"]) == (None, ids[1:])


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["o", "--temperature", "-1"], "temperature has to be at least 0, not -1.0"),
        (["o", "--top-p", "0"], "top_p has to be above 0 and at most 1"),
        (["o", "--top-p", "1.5"], "top_p has to be above 0 and at most 1"),
        (["o", "--beams", "2", "--temperature", "1"], "beam search draws nothing"),
        ([""], "the prompt is empty, and the model has no token that a text begins with"),
        ([], "the prompt is empty"),
        (["o" * 70], "the prompt has 70 tokens, and the model takes 49"),
        (["o", "--tokens"], "--tokens takes whole numbers"),
        (["99999", "--tokens"], "there is no token 99999"),
        (["o", "--provider", "cpuu"], "unknown provider 'cpuu'"),
    ],
)
def test_bad_input(onnxpress: Run, bundle: Path, words: list[str], what: str) -> None:
    result = onnxpress("generate", bundle, *words)
    assert result.code == 2
    assert what in result.error
    assert result.out == ""


def test_bundles_that_write_nothing(onnxpress: Run, finished: Path, tmp_path: Path) -> None:
    assert "not a language model that writes" in onnxpress("generate", finished, "a").error
    assert "there is no bundle folder" in onnxpress("generate", tmp_path / "none", "a").error
    bare = _spelling().spelling_bundle(tmp_path / "bare", TEXT, tokenizer=False)
    error = onnxpress("generate", bare, "a").error
    assert "has no tokenizer.json, so that it reads no text. Give token ids instead (--tokens)." in error
    (bare / "onnx" / "model.onnx").write_bytes(b"changed")
    assert onnxpress("generate", bare, "1", "--tokens").code == 2
