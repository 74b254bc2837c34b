# SPDX-License-Identifier: Apache-2.0
"""`--provider openvino`, from the source to a bundle that OpenVINO has run, and the verbs that take a provider."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxpress.runtime.bundle import verify

from .conftest import Run
from .samples import FAST, HERE

pytest.importorskip("openvino", reason="needs the extra openvino")


def test_press_measures_and_proves_with_openvino(onnxpress: Run, net: Path, arrays: Path, tmp_path: Path) -> None:
    words = ["press", net, "--recipe", "fp32", "--evaluation", arrays, *FAST, "--provider", "openvino"]
    result = onnxpress(*words, "--gate", "sqnr_db >= 60", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    rows = [(row["variant"], row["provider"], row["note"]) for row in manifest["benchmarks"]]
    assert set(rows) == {("onnx-original", "openvino", None), ("fp32", "openvino", None)}
    assert "FullyConnected" in {row["op"] for row in manifest["operator_times"]}  # only OpenVINO calls it that
    assert "openvino" in manifest["versions"]
    for provider in ("openvino", "cpu"):  # the same file, either engine
        assert verify(tmp_path / "out", provider=provider).samples_run > 0
        assert onnxpress("verify", tmp_path / "out", "--provider", provider).code == 0


def test_a_module_of_torch_against_openvino(onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    result = onnxpress(
        "press", "factories:cnn", "--recipe", "fp32", "--provider", "openvino", *FAST, "-o", tmp_path / "o"
    )
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert {row["provider"] for row in manifest["benchmarks"]} == {"pytorch", "openvino"}


def test_validate_and_benchmark(onnxpress: Run, net: Path) -> None:
    assert onnxpress("validate", net, net, "--provider", "openvino", "--gate", "sqnr_db >= 60").code == 0
    found = json.loads(onnxpress("benchmark", net, "--provider", "openvino", "--json", *FAST).out)
    assert {row["provider"] for row in found["benchmarks"]} == {"openvino"}


def test_doctor_lists_it(onnxpress: Run) -> None:
    assert "openvino" in json.loads(onnxpress("doctor", "--json").out)["providers"]
