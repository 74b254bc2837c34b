# SPDX-License-Identifier: Apache-2.0
"""An encoder-decoder, from the folder to a bundle: two graphs, each pressed, proven and hashed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from onnxpress.exporters import graph_file
from onnxpress.pipeline import exporting
from onnxpress.runtime.bundle import verify
from onnxpress.runtime.session import Session

from .conftest import Run
from .samples import exported, model_from

T5 = {
    "vocab_size": 100,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "t5"
    transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).save_pretrained(path)
    return path


def test_press(folder: Path, onnxpress: Run, tmp_path: Path) -> None:
    """Through the command line: both graphs lose bytes, generate what PyTorch generates, and stand in the manifest."""
    out = tmp_path / "out"
    result = onnxpress("press", folder, "--recipe", "int8-dynamic", "--set", "benchmark.rounds=5", "-o", out)
    assert result.code == 0, result.error
    assert sorted(p.name for p in (out / "onnx").iterdir()) == [
        "decoder_model_quantized.onnx",
        "encoder_model_quantized.onnx",
    ]
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    [encoder] = manifest["companions"]
    assert encoder["path"] == "onnx/encoder_model_quantized.onnx"
    for size in (manifest["size"], encoder["size"]):
        assert size["candidate_bytes"] < 0.5 * size["reference_bytes"]
    assert set(encoder["parity"]) == {"last_hidden_state", "present.0.encoder.key", "present.0.encoder.value"}
    assert all(errors["cosine"] > 0.99 for errors in encoder["parity"].values())
    assert {encoder["path"], "onnx/decoder_model_quantized.onnx"} <= set(manifest["files"])
    assert verify(out).files_checked > 4
    # The encoder keeps the decoder's keys and values of its output, and nothing else of the decoder
    names = {str(name) for name in graph_file.read(out / encoder["path"]).graph.initializers}
    assert not any("decoder.final_layer_norm" in name or "lm_head" in name for name in names)
    assert _generated(out / "onnx") == _by_transformers(folder)


def _generated(graphs: Path) -> list[list[int]]:
    encoder, decoder = (Session(graphs / f"{part}_model_quantized.onnx") for part in ("encoder", "decoder"))
    ids = np.array([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    read = encoder.run({"input_ids": ids, "attention_mask": mask})
    fixed = {n.replace("present", "past_key_values"): a for n, a in read.items() if n.startswith("present")}
    shapes = {spec.name: spec.shape for spec in decoder.signature.inputs}
    own = {n: np.zeros((2, 4, 0, 16), np.float32) for n in shapes if ".decoder." in n}
    tokens, text = np.zeros((2, 1), np.int64), []
    for _ in range(4):
        out = decoder.run({"input_ids": tokens, "encoder_attention_mask": mask, **fixed, **own})
        own = {n: out[n.replace("past_key_values", "present")] for n in own}
        tokens = out["logits"][:, -1:].argmax(-1)
        text.append(tokens[:, 0].tolist())
    return [list(row) for row in zip(*text, strict=True)]


def _by_transformers(folder: Path) -> list[list[int]]:
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    found = model.generate(
        input_ids=torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    return [[int(i) for i in row] for row in found[:, 1:]]


IDENTITY = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[batch, 2] x) => (float[batch, 2] y) { y = Identity (x) }
"""


@pytest.fixture
def two_graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `export` find a model of two graphs that are what they say, without tracing one."""

    class Same:
        name = "original"

        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            return {"y": np.asarray(feeds["x"])}

    def part(name: str, **more: Any) -> Any:
        it = exported({"x": ("float32", ("batch", 2))}, name=name, reference=Same(), **more)
        it.model = model_from(IDENTITY)
        return it

    main = part("decoder_model", companions=(part("encoder_model"),))

    def load_proven(source: str, task: Any, settings: Any, check: Any, **_: Any) -> Any:
        check(main)
        return main

    monkeypatch.setattr(exporting, "load_proven", load_proven)


@pytest.mark.usefixtures("two_graphs")
class TestExport:
    def test_a_file_cannot_hold_two_graphs(self, onnxpress: Run, tmp_path: Path) -> None:
        result = onnxpress("export", "m", "-o", tmp_path / "m.onnx")
        assert result.code == 2
        assert "becomes 2 graphs: decoder_model.onnx, encoder_model.onnx. Name a folder for them" in result.error
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_can(self, onnxpress: Run, tmp_path: Path) -> None:
        result = onnxpress("export", "m", "-o", tmp_path / "m", "--json")
        assert result.code == 0, result.error
        assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["decoder_model.onnx", "encoder_model.onnx"]
        said = json.loads(result.out)
        assert [Path(part["file"]).name for part in (said, *said["companions"])] == [
            "decoder_model.onnx",
            "encoder_model.onnx",
        ]
        assert [p.name for p in tmp_path.iterdir()] == ["m"]

    def test_what_exists_is_kept(self, onnxpress: Run, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "encoder_model.onnx").write_bytes(b"old")
        result = onnxpress("export", "m", "-o", tmp_path / "m")
        assert result.code == 2
        assert "encoder_model.onnx exists. Add --force" in result.error
        assert (tmp_path / "m" / "encoder_model.onnx").read_bytes() == b"old"
        assert onnxpress("export", "m", "-o", tmp_path / "m", "--force").code == 0
        assert (tmp_path / "m" / "encoder_model.onnx").read_bytes() != b"old"
