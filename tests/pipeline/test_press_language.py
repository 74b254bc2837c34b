# SPDX-License-Identifier: Apache-2.0
"""A causal language model, from the folder to a bundle: perplexity, a step timed, samples to check with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from onnxpress.contracts.decoding import Decoding
from onnxpress.contracts.signature import Signature
from onnxpress.runtime.bundle import verify
from onnxpress.runtime.session import Session

from .conftest import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "exporters"))

import tiny_models

GPT2 = {
    "vocab_size": tiny_models.VOCABULARY,
    "n_embd": 64,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onnxpress.pipeline import load_recipe, press
    from onnxpress.pipeline.data import load_dataset

    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.OWN_NAMES, "gpt2", GPT2)
        tiny_models.build(folder / "gpt2", "gpt2", "AutoModelForCausalLM")
    (folder / "text.txt").write_text("the cat sat on the mat .\na dog was good .\n" * 3, "utf-8")
    recipe = load_recipe("int8-dynamic", ["benchmark.rounds=5"])
    outcome = press(str(folder / "gpt2"), recipe, folder / "out", evaluation=load_dataset(str(folder / "text.txt")))
    assert outcome.folder is not None, outcome.manifest["gates"]
    return outcome.folder


def test_the_manifest_speaks_of_a_language_model(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    assert manifest["task"] == "text-generation"
    perplexity = manifest["metrics"]["perplexity"]
    assert perplexity["reference"] > 1
    assert perplexity["drop"] == pytest.approx(100 * (perplexity["candidate"] / perplexity["reference"] - 1), abs=1e-3)
    assert {row["shape"] for row in manifest["benchmarks"]} == {"1 token after 39", "8 x 39 tokens"}
    assert manifest["size"]["ratio"] > 2
    assert any("padded left" in row["case"] for row in manifest["parity_cases"])


def test_the_pressed_graph_is_the_standard_decoder(bundle: Path, onnxpress: Run) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    decoding = Decoding.of(Signature.from_json(manifest["signature"]))
    assert decoding is not None
    assert [spec.shape[1::2] for spec in decoding.caches] == [(4, 16), (4, 16)]
    session = Session(bundle / "onnx" / "model_quantized.onnx")
    assert [spec.name for spec in session.signature.inputs][:4] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "num_logits_to_keep",
    ]
    assert verify(bundle).samples_run > 3
    assert onnxpress("verify", bundle).code == 0
