# SPDX-License-Identifier: Apache-2.0
"""The one way through, from every kind of source to a bundle that holds what the design says."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import yaml
from pydantic import BaseModel, ConfigDict

from onnxpress.contracts.errors import ExportError, GateFailed, InputError
from onnxpress.exporters import graph_file, sources
from onnxpress.pipeline.data import load_dataset
from onnxpress.pipeline.inputs import HARD_TEXTS
from onnxpress.pipeline.pressing import Outcome, press
from onnxpress.pipeline.progress import Progress
from onnxpress.runtime.bundle import verify
from onnxpress.runtime.session import Session

from ..exporters import tiny_models
from . import factories
from .conftest import snapshot, strip_probes
from .samples import HERE, NET, quick_recipe, write_net

# --- the manifest, as the issue lists it -----------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Source(_Strict):
    kind: str
    name: str
    sha256: str | None
    architecture: str | None
    parameters: int | None


class _Recipe(_Strict):
    name: str
    sha256: str
    passes: list[dict[str, Any]]


class _Tensor(_Strict):
    name: str
    dtype: str
    shape: list[int | str | None]


class _Signature(_Strict):
    inputs: list[_Tensor]
    outputs: list[_Tensor]


class _File(_Strict):
    sha256: str
    size: int


class _Metric(_Strict):
    reference: float | None
    candidate: float | None
    drop: float | None


class _Errors(_Strict):
    max_abs_error: float | None
    mean_abs_error: float | None
    relative_error: float | None
    sqnr_db: float | None
    cosine: float | None
    top1_agreement: float | None


class _Latency(_Strict):
    p50: float
    p95: float
    min: float


class _Ratio(_Strict):
    median: float
    low: float
    high: float


class _Benchmark(_Strict):
    provider: str
    variant: str
    threads: int
    setting: str
    batch: int
    shape: str
    latency_ms: _Latency
    ratio_to_reference: _Ratio
    throughput_per_s: float
    load_ms: float | None
    peak_rss_mb: float | None


class _Size(_Strict):
    reference_bytes: int
    candidate_bytes: int
    ratio: float


class _Gate(_Strict):
    expression: str
    value: float | None
    passed: bool


class Manifest(_Strict):
    schema_version: int
    source: _Source
    recipe: _Recipe
    versions: dict[str, str]
    signature: _Signature
    opsets: dict[str, int]
    operators: dict[str, int]
    files: dict[str, _File]
    metrics: dict[str, _Metric]
    parity: dict[str, _Errors]
    benchmarks: list[_Benchmark]
    size: _Size
    gates: list[_Gate]


def _checked(folder: Path) -> Manifest:
    """The manifest of a bundle, after everything that holds for every bundle."""
    text = (folder / "manifest.json").read_text("utf-8")
    raw = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    manifest = Manifest.model_validate(raw)
    files = snapshot(folder)
    assert set(manifest.files) == set(files) - {"manifest.json", "SHA256SUMS"}
    assert all(manifest.files[name].size == len(files[name]) for name in manifest.files)
    assert all(gate.passed for gate in manifest.gates)
    assert raw["status"] == "accepted"
    assert raw["name"] == folder.name
    assert {"python", "onnxpress", "torch", "onnx", "onnxruntime", "numpy"} <= set(manifest.versions)
    model = raw["variants"][raw["variant"]]["path"]
    assert graph_file.signature_of(graph_file.read(folder / model)).to_json() == raw["signature"]
    assert manifest.size.candidate_bytes == manifest.files[model].size
    assert manifest.size.ratio == pytest.approx(manifest.size.reference_bytes / manifest.size.candidate_bytes, abs=1e-4)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    assert recipe["passes"] == raw["recipe"]["passes"]
    for row in manifest.benchmarks:
        assert row.latency_ms.min <= row.latency_ms.p50 <= row.latency_ms.p95
        assert row.ratio_to_reference.low <= row.ratio_to_reference.median <= row.ratio_to_reference.high
    assert {row.setting for row in manifest.benchmarks} == {"latency", "throughput"}
    assert len({row.shape for row in manifest.benchmarks}) == 2
    result = verify(folder)
    assert result.files_checked == len(files) - 1
    _nothing_private(folder)
    return manifest


def _nothing_private(folder: Path) -> None:
    """No path, user or host of this machine; too short or too usual words would be found by chance."""
    words = {str(folder.parent), str(HERE), str(Path.home()), socket.gethostname(), getpass.getuser()}
    words |= {str(path) for path in (folder.parent.parent, Path.cwd()) if len(path.parts) > 2}
    for name, content in snapshot(folder).items():
        for word in words:
            if len(word) > 4 and word not in ("root", "localhost", "runner"):
                assert word.encode() not in content, f"{name} holds {word}"


# --- an .onnx file ----------------------------------------------------------------------------------------------------


def test_an_onnx_file_with_arrays_and_accuracy(finished: Path, net: Path) -> None:
    manifest = _checked(finished)
    assert (manifest.source.kind, manifest.source.name) == ("onnx", "net.onnx")
    assert manifest.source.parameters == 64 * 128 + 128 + 128 * 8 + 8
    assert manifest.size.reference_bytes == net.stat().st_size
    assert 2 < manifest.size.ratio < 4
    assert manifest.metrics["accuracy"].reference == 75.0
    assert manifest.metrics["accuracy"].drop is not None
    assert abs(manifest.metrics["accuracy"].drop) <= 7
    assert [(row.variant, row.setting, row.batch, row.shape) for row in manifest.benchmarks] == [
        ("onnx-original", "latency", 1, "1x64"), ("int8-dynamic", "latency", 1, "1x64"),
        ("onnx-original", "throughput", 8, "8x64"), ("int8-dynamic", "throughput", 8, "8x64"),
    ]  # fmt: skip
    for row in manifest.benchmarks:
        assert row.load_ms is not None
        assert row.peak_rss_mb is not None
        assert row.load_ms > 0
        assert row.peak_rss_mb > 10
    assert manifest.operators["MatMulInteger"] == 1
    assert manifest.signature.outputs[0].shape == ["batch", 8]


def test_the_manifest_tells_how_it_was_made(finished: Path, arrays: Path) -> None:
    raw = json.loads((finished / "manifest.json").read_text("utf-8"))
    assert raw["data"]["evaluation"] == {
        "name": "dev.npz",
        "sha256": load_dataset(str(arrays)).sha256,
        "examples": 32,
    }
    assert [entry["pass"] for entry in raw["passes"]] == ["clean", "fuse", "quantize_dynamic"]
    quantized = raw["passes"][-1]
    assert (quantized["seen"], quantized["changed"]) == (2, 1)
    assert "fewer than 4096 elements" in quantized["left"][0]["reason"]
    assert raw["export_parity"]["logits"]["max_abs_error"] == 0.0
    assert [case["case"] for case in raw["parity_cases"]] == ["data, batch 1", "data, batch 4"]
    assert raw["nodes"][0]["share"] >= raw["nodes"][-1]["share"]


def _model_bytes(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in snapshot(folder).items() if name.endswith((".onnx", ".safetensors"))}


@pytest.mark.usefixtures("unprobed")
def test_the_same_source_gives_the_same_bytes(finished: Path, net: Path, arrays: Path, tmp_path: Path) -> None:
    data = load_dataset(str(arrays))
    press(str(net), quick_recipe(), tmp_path / "again", evaluation=data)
    assert _model_bytes(tmp_path / "again") == _model_bytes(finished)
    assert (tmp_path / "again" / "recipe.yaml").read_bytes() == (finished / "recipe.yaml").read_bytes()


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize(("recipe", "file", "ratio"), [("fp32", "model.onnx", 1.0), ("fp16", "model_fp16.onnx", 2.0)])
def test_the_other_built_in_recipes(recipe: str, file: str, ratio: float, net: Path, tmp_path: Path) -> None:
    outcome = press(str(net), quick_recipe(recipe), tmp_path / "out")
    assert outcome.accepted
    outcome.require_accepted()
    manifest = _checked(tmp_path / "out")
    assert f"onnx/{file}" in manifest.files
    assert manifest.size.ratio == pytest.approx(ratio, rel=0.1)
    assert manifest.metrics == {}
    assert {(s.dtype) for s in (*manifest.signature.inputs, *manifest.signature.outputs)} == {"float32"}
    raw = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert raw["warnings"][-1].startswith("No evaluation data was given")
    if recipe == "fp32":
        assert manifest.parity["logits"].max_abs_error == pytest.approx(0, abs=1e-5)


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("batch", ["4", "N", "?"])
def test_graphs_from_elsewhere_fixed_or_named_otherwise(batch: str, tmp_path: Path) -> None:
    source = write_net(tmp_path / "net.onnx", NET.replace("batch", batch))
    outcome = press(str(source), quick_recipe(), tmp_path / "out")
    assert outcome.accepted
    verify(tmp_path / "out")
    shapes = [(row["batch"], row["shape"]) for row in outcome.manifest["benchmarks"][::2]]
    assert shapes == ([(4, "4x64")] if batch == "4" else [(1, "1x64"), (8, "8x64")])


@pytest.mark.usefixtures("unprobed")
def test_external_data_is_read_and_the_bundle_stands_alone(tmp_path: Path) -> None:
    model = write_net(tmp_path / "plain.onnx")
    ir.save(ir.load(model), tmp_path / "net.onnx", external_data="net.bin")  # noqa: TID251 - as other tools write it
    assert (tmp_path / "net.bin").stat().st_size > 30_000
    outcome = press(str(tmp_path / "net.onnx"), quick_recipe("fp32"), tmp_path / "out")
    assert outcome.manifest["size"]["reference_bytes"] > 30_000
    (tmp_path / "net.bin").unlink()
    verify(tmp_path / "out")


@pytest.mark.usefixtures("unprobed")
def test_a_bundle_can_be_pressed_onto_itself(bundle: Path) -> None:
    source = bundle / "onnx" / "model_quantized.onnx"
    outcome = press(str(source), quick_recipe("fp32"), bundle, force=True)
    assert outcome.accepted
    assert not source.exists()
    verify(bundle)


# --- any nn.Module ----------------------------------------------------------------------------------------------------


@pytest.fixture(name="factories")
def _factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.mark.usefixtures("factories")
def test_a_factory_is_compared_with_pytorch(tmp_path: Path) -> None:
    outcome = press("factories:mlp", quick_recipe(gates=["cosine >= 0.99"]), tmp_path / "out")
    manifest = _checked(tmp_path / "out")
    assert (manifest.source.kind, manifest.source.name) == ("factory", "factories:mlp")
    assert manifest.source.architecture == "Sequential"
    variants = [row.variant for row in manifest.benchmarks if row.setting == "latency"]
    assert [variants[0], *variants[-2:]] == ["pytorch-fp32", "onnx-fp32", "int8-dynamic"]
    assert all(row.load_ms is not None for row in manifest.benchmarks), "the probe finds the factory too"
    assert outcome.manifest["export"]["backend"] == "dynamo"
    model = graph_file.read(tmp_path / "out" / "onnx" / "model_quantized.onnx")
    assert {"0.bias", "2.weight", "2.bias"} <= set(model.graph.initializers), "parameters keep their names"


@pytest.mark.usefixtures("factories", "unprobed")
def test_a_convolutional_module(tmp_path: Path) -> None:
    outcome = press("factories:cnn", quick_recipe(), tmp_path / "out")
    verify(tmp_path / "out")
    assert outcome.manifest["signature"]["outputs"][0]["shape"] == ["batch", 40]


@pytest.mark.usefixtures("factories", "unprobed")
def test_a_recurrent_module_with_a_free_length(tmp_path: Path) -> None:
    outcome = press("factories:lstm", quick_recipe(), tmp_path / "out")
    verify(tmp_path / "out")
    assert outcome.manifest["signature"]["inputs"][0]["shape"] == ["batch", "time", 16]
    session = Session(tmp_path / "out" / "onnx" / "model_quantized.onnx")
    module, _, _ = factories.lstm()
    for length in (1, 3, 9):
        frames = np.random.default_rng(length).standard_normal((2, length, 16)).astype(np.float32)
        with torch.no_grad():
            wanted = module.eval()(torch.from_numpy(frames)).numpy()
        assert np.abs(session.run({"frames": frames})["output"] - wanted).max() < 0.05


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    names = {"id2label": {0: "bad", 1: "good", 2: "mixed"}, "label2id": {"bad": 0, "good": 1, "mixed": 2}}
    return tiny_models.build(folder, "bert", "AutoModelForSequenceClassification", hidden_size=64, **names)


@pytest.fixture(scope="module")
def pressed(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The one press of a transformers model."""
    folder = tmp_path_factory.mktemp("pressed")
    data = folder / "dev.tsv"
    rows = [
        (text, ("bad", "good", "2")[i % 3])
        for i, text in enumerate(["the cat", "a dog sat on the mat", "naïve 👍"] * 4)
    ]
    data.write_text("".join(f"{text}\t{label}\n" for text, label in rows), "utf-8")
    lines: list[str] = []

    class Recorder(Progress):
        def __call__(self, stage: str, detail: str = "") -> None:
            lines.append(stage)

    recipe = quick_recipe(gates=["accuracy_drop <= 50", "size_ratio > 1"], **{"passes.2.minimum_elements": 512})
    with pytest.MonkeyPatch.context() as patched:
        strip_probes(patched)
        outcome = press(
            str(classifier), recipe, folder / "out", evaluation=load_dataset(str(data)), progress=Recorder()
        )
    assert list(dict.fromkeys(lines)) == ["export", "compare", "pass", "evaluate", "benchmark", "profile", "bundle"]
    return folder / "out", outcome


def test_a_transformers_folder_with_labels(pressed: tuple[Path, Outcome], classifier: Path) -> None:
    folder, outcome = pressed
    manifest = _checked(folder)
    assert outcome.manifest["task"] == "text-classification"
    assert (manifest.source.kind, manifest.source.name) == ("transformers", "tiny-bert")
    assert manifest.source.architecture == "BertForSequenceClassification"
    assert set(manifest.metrics) == {"accuracy", "top1_agreement_with_reference"}
    assert [gate.expression for gate in manifest.gates] == ["cosine >= 0.95", "accuracy_drop <= 50", "size_ratio > 1"]
    for name in ("config.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (classifier / name).read_bytes()
    ours, theirs = (json.loads((place / "tokenizer.json").read_text("utf-8")) for place in (folder, classifier))
    changed = {key for key in theirs if ours[key] != theirs[key]}
    assert changed == {"padding", "truncation", "added_tokens"}, "as transformers has it in memory, and was called"
    told = outcome.manifest["tokenizer"]
    assert (told["origin"], told["reason"], told["differs"]) == ("rewritten", "transformers changes added_tokens", {})
    throughput = [row for row in manifest.benchmarks if row.setting == "throughput"]
    assert {(row.batch, row.shape) for row in throughput} == {(8, "8 x 40 tokens")}, "it has 40 positions"
    assert manifest.parity["logits"].cosine is not None


def test_golden_samples_are_the_texts_that_break_tokenizers(pressed: tuple[Path, Outcome]) -> None:
    folder, _ = pressed
    golden = json.loads((folder / "golden" / "golden.json").read_text("utf-8"))
    texts = [sample["text"] for sample in golden["samples"]]
    assert texts == list(HARD_TEXTS)
    for part in ("ä", "😀", "模型", ""):
        assert any(part == text or (part and part in text) for text in texts)
    assert verify(folder).samples_run == len(HARD_TEXTS)


def test_the_report_and_the_card_are_about_this_model(pressed: tuple[Path, Outcome]) -> None:
    folder, _ = pressed
    report = (folder / "report.html").read_text("utf-8")
    assert "tiny-bert" in report
    assert "text-classification" in (folder / "README.md").read_text("utf-8")


# --- with calibration data --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unprobed")
def test_a_static_recipe_measures_on_the_calibration_data(net: Path, arrays: Path, tmp_path: Path) -> None:
    data, lines = load_dataset(str(arrays)), []

    class Recorder(Progress):
        def __call__(self, stage: str, detail: str = "") -> None:
            lines.append(stage)

    recipe = quick_recipe("int8-static", **{"calibration.batch": 5})
    outcome = press(str(net), recipe, tmp_path / "out", calibration=data, cache=tmp_path / "cache", progress=Recorder())
    manifest = _checked(tmp_path / "out")
    assert "onnx/model_quantized.onnx" in manifest.files
    assert 2 < manifest.size.ratio < 4
    assert manifest.operators["QuantizeLinear"] == 1
    assert manifest.operators["DequantizeLinear"] >= 2
    facts = outcome.manifest["data"]["calibration"]
    assert facts == {"name": "dev.npz", "sha256": data.sha256, "examples": 32, "batches": 7}
    (report,) = [entry for entry in outcome.manifest["passes"] if entry["pass"] == "quantize_static"]
    assert report["details"]["multiply_adds_percent"] == pytest.approx(100 * 8192 / 9216, abs=0.01)
    assert "fewer than 4096 elements" in report["left"][0]["reason"]
    assert "calibrate" in lines
    assert list((tmp_path / "cache").iterdir())
    lines.clear()
    again = press(str(net), recipe, tmp_path / "again", calibration=data, cache=tmp_path / "cache", progress=Recorder())
    assert "calibrate" not in lines, "the second press of the same model and data measures nothing"
    assert again.accepted
    assert _model_bytes(tmp_path / "again") == _model_bytes(tmp_path / "out")


def test_calibration_data_that_is_missing_is_asked_for_before_anything_is_exported(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "load", lambda *_: pytest.fail("exported"))
    with pytest.raises(InputError, match="recipe int8-static needs calibration data") as caught:
        press(str(net), quick_recipe("int8-static"), tmp_path / "out")
    assert "--calibration DATA" in caught.value.next_step
    assert not list(tmp_path.iterdir())


def test_calibration_data_that_does_not_fit_leaves_nothing_behind(net: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", z=np.zeros((4, 64), np.float32))
    with pytest.raises(InputError, match=r"other\.npz has no array for input 'x'"):
        press(
            str(net),
            quick_recipe("int8-static"),
            tmp_path / "out",
            calibration=load_dataset(str(tmp_path / "other.npz")),
        )
    np.savez(tmp_path / "nan.npz", x=np.full((4, 64), np.nan, np.float32))
    with pytest.raises(InputError, match=r"'x' \(made by input x\) is NaN on calibration batch 1"):
        press(
            str(net), quick_recipe("int8-static"), tmp_path / "out", calibration=load_dataset(str(tmp_path / "nan.npz"))
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.npz", "other.npz"]


# --- what is wrong is refused -----------------------------------------------------------------------------------------


def _corrupting(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let the exporter return a graph in which one weight is not the original's."""
    load = sources.load

    def corrupted(*arguments: Any) -> Any:
        exported = load(*arguments)
        value = exported.model.graph.initializers["w1"]
        value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name="w1")
        return exported

    monkeypatch.setattr(sources, "load", corrupted)


def test_a_wrong_export_is_refused(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _corrupting(monkeypatch, lambda weight: np.where(np.arange(128) == 3, weight * -1, weight).astype(np.float32))
    with pytest.raises(ExportError, match="the exported graph is wrong: output 'logits' departs") as caught:
        press(str(net), quick_recipe(), tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_an_export_with_nan_in_it_is_refused(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _corrupting(monkeypatch, lambda weight: np.full_like(weight, np.nan))
    with pytest.raises(ExportError, match="departs from the original by inf"):
        press(str(net), quick_recipe(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unprobed")
def test_a_tiny_departure_within_the_tolerance_is_not(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _corrupting(monkeypatch, lambda weight: weight * np.float32(1 + 1e-5))
    assert press(str(net), quick_recipe("fp32"), tmp_path / "out").accepted


@pytest.mark.usefixtures("unprobed")
def test_a_refused_outcome_still_tells_everything(net: Path, tmp_path: Path) -> None:
    outcome = press(str(net), quick_recipe(gates=["size_ratio >= 50"]), tmp_path / "out")
    assert not outcome.accepted
    assert outcome.folder is None
    assert outcome.manifest["status"] == "refused"
    assert outcome.manifest["benchmarks"]
    with pytest.raises(GateFailed, match=r"size_ratio >= 50 \(measured 2\.\d+\)"):
        outcome.require_accepted()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unprobed")
def test_a_gate_on_speed_is_judged_by_the_candidate_s_own_ratio(net: Path, tmp_path: Path) -> None:
    gates = ["latency_ratio > 0", "throughput_ratio > 0", "latency_ratio < 1e6"]
    outcome = press(str(net), quick_recipe(gates=gates), tmp_path / "out")
    rows = {r["setting"]: r["ratio_to_reference"]["median"] for r in outcome.manifest["benchmarks"][1::2]}
    judged = {gate["expression"]: gate["value"] for gate in outcome.manifest["gates"]}
    assert judged["latency_ratio > 0"] == rows["latency"]
    assert judged["throughput_ratio > 0"] == rows["throughput"]


def test_timings_that_vary_too_much_come_with_a_warning() -> None:
    from onnxpress.pipeline.pressing import _unsteady

    steady = {"ratio_to_reference": {"median": 2.0, "low": 1.6, "high": 3.1}}
    unsteady = {"ratio_to_reference": {"median": 57.24, "low": 27.73, "high": 71.92}}
    assert _unsteady([steady, steady]) == []
    assert _unsteady([steady, unsteady])[0].startswith("The timings are unsteady, the machine was probably busy")


def test_the_candidate_computes_what_the_manifest_says(finished: Path, net: Path, arrays: Path) -> None:
    """An independent check: both models run on the evaluation data, without any of our metrics."""
    data = np.load(arrays)
    reference = Session(net).run({"x": data["x"]})["logits"]
    candidate = Session(finished / "onnx" / "model_quantized.onnx").run({"x": data["x"]})["logits"]
    accuracy = 100 * np.mean(candidate.argmax(1) == data["labels"])
    manifest = json.loads((finished / "manifest.json").read_text("utf-8"))
    assert manifest["metrics"]["accuracy"]["candidate"] == accuracy
    assert manifest["metrics"]["accuracy"]["reference"] == 100 * np.mean(reference.argmax(1) == data["labels"])
