# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime GenAI's folder: its config, the graph without an input that GenAI cannot feed, and GenAI itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxpress.contracts.decoding import KEEP, Decoding
from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file
from onnxpress.pipeline.handoff import genai
from onnxpress.pipeline.handoff.base import PASSED, MissingTool
from onnxpress.pipeline.handoff.genai.config import config_of
from onnxpress.pipeline.handoff.handing import target_named
from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.session import Session

from ..samples import model_from

GROUPED = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
grouped (float[b, s, 8] q, float[b, s, 8] k, float[b, s, 8] v, float[b, 1, p, 8] past_key, float[b, 1, p, 8] past_value,
         int32[b] filled, int32[1] total)
    => (float[b, s, 8] logits, float[b, 1, t, 8] key, float[b, 1, t, 8] value)
{
    logits, key, value = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1>
        (q, k, v, past_key, past_value, filled, total)
}
"""


@pytest.fixture(scope="module")
def folder(decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai")
    target_named("genai").write(decoder_bundle, folder)
    return folder


def test_the_graph_has_no_input_that_genai_cannot_feed_and_answers_the_same(
    folder: Path, decoder_bundle: Bundle
) -> None:
    ours, theirs = decoder_bundle.session(), Session(folder / "model.onnx")
    before = {spec.name for spec in ours.signature.inputs}
    after = {spec.name for spec in theirs.signature.inputs}
    decoding = Decoding.of(decoder_bundle.signature)
    assert decoding is not None
    feeds = decoding.feeds(np.asarray([[5, 6, 7], [8, 9, 10]], np.int64))
    answers = theirs.run({name: value for name, value in feeds.items() if name in after})
    assert before - after == {KEEP}
    np.testing.assert_array_equal(answers["logits"], ours.run(feeds)["logits"])
    logits = next(spec for spec in theirs.signature.outputs if spec.name == "logits")
    assert logits.shape[:2] == next(spec for spec in theirs.signature.inputs if spec.name == "input_ids").shape


def test_weights_lie_where_genai_looks_for_them(folder: Path) -> None:
    model = graph_file.read(folder / "model.onnx")
    external = [v.const_value for v in model.graph.initializers.values() if hasattr(v.const_value, "location")]
    assert external
    assert {tensor.location for tensor in external} == {"model.onnx.data"}
    assert not (folder / "model.onnx_data").exists()


def test_the_config_says_what_the_graph_says(folder: Path, decoder_bundle: Bundle) -> None:
    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    decoder, inputs = (
        config["model"]["decoder"],
        {spec.name for spec in Session(folder / "model.onnx").signature.inputs},
    )
    named = [name for key, name in decoder["inputs"].items() if not key.startswith("past")]
    named += [decoder["inputs"][f"past_{kind}_names"] % 0 for kind in ("key", "value")]
    assert set(named) == inputs
    assert (folder / decoder["filename"]).is_file()
    sizes = "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_size", "hidden_size"
    assert [decoder[key] for key in sizes] == [4, 2, 1, 8, 32]
    model = config["model"]
    assert [model[key] for key in ("type", "bos_token_id", "eos_token_id", "pad_token_id")] == ["llama", 2, 3, 3]
    assert [model["vocab_size"], model["context_length"], config["search"]["max_length"]] == [290, 64, 64]
    assert config["search"]["past_present_share_buffer"] is False  # this cache is put together anew for each token


def test_a_cache_that_is_appended_to_in_place_is_one_buffer() -> None:
    model = model_from(GROUPED)
    for value, name in zip(model.graph.outputs[1:], ("present.0.key", "present.0.value"), strict=True):
        value.name = name
    assert genai.appends_in_place(model)


def test_greedy_tokens_are_those_of_the_bundle(folder: Path, decoder_bundle: Bundle) -> None:
    decoding, session = Decoding.of(decoder_bundle.signature), decoder_bundle.session()
    assert decoding is not None
    rows = json.loads((folder / "golden" / "greedy.json").read_text("utf-8"))
    assert rows
    for row in rows:  # without a cache: the whole text again for each token
        for count, token in enumerate(row["tokens"]):
            text = np.asarray([row["prompt"] + row["tokens"][:count]], np.int64)
            assert session.run(decoding.feeds(text))["logits"][0, -1].argmax() == token


def test_the_tokenizer_travels_along(folder: Path, decoder_bundle: Bundle) -> None:
    original = (decoder_bundle.folder / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == original
    assert "generate.py" in (folder / "README.md").read_text("utf-8")


def test_what_is_no_causal_language_model_is_refused(text_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="causal language models with a cache"):
        target_named("genai").write(text_bundle, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("past_key_values.0.key", "past_conv.0", "no name for the state"), (KEEP, "pixels", "does not feed 'pixels'")],
)
def test_inputs_that_genai_does_not_know_are_refused(decoder_bundle: Bundle, old: str, new: str, said: str) -> None:
    class Other:
        manifest: ClassVar[dict[str, Any]] = {}
        signature = replace(
            decoder_bundle.signature,
            inputs=tuple(replace(s, name=new) if s.name == old else s for s in decoder_bundle.signature.inputs),
            outputs=tuple(
                replace(s, name="present_conv.0") if s.name == "present.0.key" and new == "past_conv.0" else s
                for s in decoder_bundle.signature.outputs
            ),
        )

    with pytest.raises(InputError, match=said):
        genai.decoding_of(Other())  # type: ignore[arg-type]


def test_a_config_that_lacks_sizes_is_refused(decoder_bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(decoder_bundle.folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}), "utf-8")
    bundle = Bundle(copy, check=False)
    with pytest.raises(InputError, match="hidden_size"):
        config_of(bundle, genai.decoding_of(bundle), in_place=False)


def test_without_genai_the_check_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(genai.PYTHON, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="onnxruntime-genai is not installed"):
        genai.genai_python()


@pytest.mark.skipif(
    genai.PYTHON not in os.environ and importlib.util.find_spec("onnxruntime_genai") is None,
    reason=f"onnxruntime-genai is not installed, and {genai.PYTHON} names no Python that has it",
)
def test_genai_gives_the_golden_answers(folder: Path, decoder_bundle: Bundle, tmp_path: Path) -> None:
    check = target_named("genai").check(decoder_bundle, folder, tmp_path)
    assert check.status == PASSED, check.reason
    assert check.worst["logits"] <= decoder_bundle.tolerance("logits")
