# SPDX-License-Identifier: Apache-2.0
"""A model that the first backend refuses is pressed with the next, and the manifest says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxpress.contracts.errors import ExportError
from onnxpress.pipeline import proof
from onnxpress.pipeline.pressing import press

from .conftest import Run, strip_probes
from .samples import HERE, quick_recipe


def test_press_with_the_second_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    strip_probes(monkeypatch)
    outcome = press("factories:signed", quick_recipe("fp32"), tmp_path / "signed")
    assert outcome.folder is not None
    export = json.loads((outcome.folder / "manifest.json").read_text("utf-8"))["export"]
    assert export["backend"] == "torchscript"
    first, second = export["attempts"]
    assert (first["backend"], second["backend"], second["error"]) == ("dynamo", "torchscript", None)
    assert "factories.py line" in first["error"]
    assert outcome.manifest["operators"]["If"] == 1


def test_export_says_it_too(onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    result = onnxpress("export", "factories:signed", "-o", tmp_path / "a.onnx", "--set", "export.backend=torchscript")
    assert result.code == 0, result.err
    result = onnxpress("export", "factories:signed", "-o", tmp_path / "a.onnx", "--force", "--json")
    assert [row["backend"] for row in json.loads(result.out)["export"]["attempts"]] == ["dynamo", "torchscript"]
    assert "export     again, with torchscript" in result.err
    result = onnxpress("export", "factories:signed", "-o", tmp_path / "b.onnx", "--set", "export.backend=dynamo")
    assert result.code == 4
    assert result.error.startswith("onnxpress: torch.export cannot trace the model: ")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_a_graph_that_departs_is_not_written(onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity is the judge: a graph that the first backend made without complaint is passed over."""
    monkeypatch.chdir(HERE)
    judged: list[str] = []
    real = proof.require_export_parity

    def judge(parity: proof.Parity, tolerance: float) -> None:
        judged.append("once")
        if len(judged) == 1:
            raise ExportError("the exported graph is wrong: output 'output' departs from the original by 0.3")
        real(parity, tolerance)

    monkeypatch.setattr(proof, "require_export_parity", judge)
    result = onnxpress("export", "factories:mlp", "-o", tmp_path / "mlp.onnx", "--json")
    first, second = json.loads(result.out)["export"]["attempts"]
    assert (first["backend"], second["backend"]) == ("dynamo", "torchscript")
    assert first["error"].endswith("departs from the original by 0.3")
    assert second["error"] is None


def test_validate_and_benchmark_find_the_original(
    onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    out = tmp_path / "a.onnx"
    assert onnxpress("export", "factories:signed", "-o", out).code == 0
    result = onnxpress("validate", "factories:signed", out, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["parity"]["output"]["relative_error"] < 1e-5
