# SPDX-License-Identifier: Apache-2.0
"""A checkpoint pressed without ever being loaded: the bundle, the proof in it, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from onnxpress.contracts.errors import ExportError, InputError
from onnxpress.exporters.families.decoder import trace_decoder
from onnxpress.exporters.streamed import StreamedExport, export_streamed
from onnxpress.pipeline import streaming
from onnxpress.pipeline.data import Dataset
from onnxpress.pipeline.exporting import export_file
from onnxpress.pipeline.pressing import press
from onnxpress.pipeline.progress import Progress
from onnxpress.pipeline.recipe import Recipe, load_recipe
from onnxpress.pipeline.streaming import press_streamed
from onnxpress.runtime.bundle import verify
from onnxpress.runtime.session import Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16, in shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4000,
    )
    path = tmp_path_factory.mktemp("source") / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="600KB")
    return path


@pytest.fixture(scope="module")
def exported(folder: Path) -> StreamedExport:
    return export_streamed(folder, "AutoModelForCausalLM", trace_decoder, opset=20)


@pytest.fixture(autouse=True)
def once(exported: StreamedExport, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace serves all tests."""

    def again(*_: object, **__: object) -> StreamedExport:
        return replace(exported, graph=exported.graph.clone(), details=dict(exported.details))

    monkeypatch.setattr(streaming, "export_streamed", again)


def recipe(name: str, **settings: object) -> Recipe:
    return load_recipe(name, [f"{key}={value}" for key, value in settings.items()], [])


def test_fp16(folder: Path, tmp_path: Path) -> None:
    manifest, bundle = press_streamed(folder, "llama", recipe("fp16"), tmp_path / "out")
    assert bundle == tmp_path / "out"
    assert manifest["status"] == "accepted"
    assert manifest["weights"]["identical"] > 5
    assert manifest["weights"]["rounded"] == 0
    assert manifest["size"]["ratio"] > 1.8
    assert {row["case"] for row in manifest["parity_cases"]} == {"1 x 12 tokens", "1 x 1 after 12"}
    assert json.loads((bundle / "manifest.json").read_text())["weights"] == manifest["weights"]
    assert sorted(path.name for path in (bundle / "onnx").iterdir()) == ["model_fp16.onnx", "model_fp16.onnx_data"]
    assert verify(bundle).samples_run == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_int4(folder: Path, tmp_path: Path) -> None:
    settings = {"passes.quantize_weights.minimum_elements": 0, "passes.quantize_weights.clip_search": "false"}
    manifest, bundle = press_streamed(folder, "llama", recipe("int4", **settings), tmp_path / "out")
    assert bundle is not None
    assert manifest["weights"]["rounded"] == 9
    assert manifest["weights"]["worst_step"] <= 0.51
    layers = manifest["passes"][-1]["details"]["layers"]
    assert all(layer["weight_sqnr_db"] > 15 for layer in layers.values())
    assert verify(bundle).samples_run == 2
    assert manifest["export_parity"]["logits"]["cosine"] > 0.999
    assert manifest["parity"]["logits"]["cosine"] < manifest["export_parity"]["logits"]["cosine"]


def test_products_that_were_joined_are_still_compared_weight_by_weight(folder: Path, tmp_path: Path) -> None:
    settings = {"passes.quantize_weights.minimum_elements": 0, "passes.quantize_weights.clip_search": "false"}
    manifest, bundle = press_streamed(folder, "llama", recipe("int4-decoder", **settings), tmp_path / "out")
    assert bundle is not None
    assert manifest["passes"][-1]["details"]["products"] > manifest["passes"][-1]["details"]["into"] > 0
    assert manifest["weights"]["rounded"] == 9
    assert manifest["weights"]["worst_step"] <= 0.51
    assert manifest["export_parity"]["logits"]["cosine"] > 0.999
    assert manifest["parity"]["logits"]["cosine"] < manifest["export_parity"]["logits"]["cosine"]


def test_press_and_export_come_here_when_asked(folder: Path, tmp_path: Path) -> None:
    asked = recipe("fp16", **{"export.weights": "streamed"})
    outcome = press(str(folder), asked, tmp_path / "out")
    assert outcome.accepted
    assert outcome.manifest["export"]["weights"] == "streamed"
    result = export_file(str(folder), tmp_path / "m.onnx", None, asked, force=False, progress=Progress())
    assert result["weights"] == outcome.manifest["weights"]
    assert result["relative_error"] < 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx_data", "out"]
    with pytest.raises(InputError, match="is not evaluated"):
        press(str(folder), asked, tmp_path / "other", evaluation=Dataset("d", "0", {}, []))


def test_a_gate_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    strict = load_recipe("fp16", [], ["cosine >= 0.99999999999"])
    manifest, bundle = press_streamed(folder, "llama", strict, tmp_path / "out")
    assert bundle is None
    assert manifest["status"] == "refused"
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_not_the_original_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session.run

    def wrong(self: Session, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array[..., ::-1] for name, array in run(self, feeds).items()}

    monkeypatch.setattr(Session, "run", wrong)
    with pytest.raises(ExportError, match="differs from PyTorch on the same weights"):
        press_streamed(folder, "llama", recipe("fp16"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("int8-static", "text-generation", "measures activations"),
        ("fp16", "fill-mask", "models for fill-mask are not streamed"),
    ],
)
def test_what_is_not_streamed(folder: Path, tmp_path: Path, name: str, task: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        press_streamed(folder, "llama", recipe(name), tmp_path / "out", task=task)
    assert caught.value.next_step
    assert not list(tmp_path.iterdir())
