# SPDX-License-Identifier: Apache-2.0
"""KServe's manifest is held to what KServe requires; the Triton layout in it has its own tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from onnxpress.pipeline.handoff.base import FAILED, NOT_RUN
from onnxpress.pipeline.handoff.kserve import TARGETS, label
from onnxpress.runtime.opened import Bundle

KSERVE = TARGETS["kserve"]


def test_the_service_runs_the_triton_layout_by_protocol_v2(text_bundle: Bundle, tmp_path: Path) -> None:
    KSERVE.write(text_bundle, tmp_path)
    service = yaml.safe_load((tmp_path / "inference-service.yaml").read_text("utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["modelFormat"] == {"name": "onnx"}
    assert predictor["model"]["protocolVersion"] == "v2"
    assert predictor["model"]["storageUri"].endswith("/model_repository")
    assert predictor["scaleTarget"] == 16
    (config,) = tmp_path.glob("model_repository/*/config.pbtxt")
    readme = (tmp_path / "README.md").read_text("utf-8")
    assert f"/v2/models/{config.parent.name}/infer" in readme
    assert "\n\n## Batching" in readme
    assert "\n\n## Text" in readme
    check = KSERVE.check(text_bundle, tmp_path, tmp_path)
    assert (check.status, check.done) == (NOT_RUN, ("generated", "parsed")), check.reason
    assert "Kubernetes" in check.reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("protocolVersion: v2", "protocolVersion: v1"),
        ("kind: InferenceService", "kind: Service"),
        ("name: onnx", "name: pytorch"),
        ("storageUri: pvc://", "storageUri: "),
        ("spec:", "spec: ["),
        ("    model:", "    models:"),
    ],
)
def test_a_manifest_that_kserve_would_not_run_fails(text_bundle: Bundle, tmp_path: Path, old: str, new: str) -> None:
    KSERVE.write(text_bundle, tmp_path)
    file = tmp_path / "inference-service.yaml"
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")
    assert KSERVE.check(text_bundle, tmp_path, tmp_path).status == FAILED


def test_a_wrong_triton_configuration_fails_here_too(text_bundle: Bundle, tmp_path: Path) -> None:
    KSERVE.write(text_bundle, tmp_path)
    (file,) = tmp_path.glob("model_repository/*/config.pbtxt")
    file.write_text(file.read_text("utf-8").replace("TYPE_FP32", "TYPE_FP16"), "utf-8")
    assert KSERVE.check(text_bundle, tmp_path, tmp_path).status == FAILED


@pytest.mark.parametrize(
    ("name", "wanted"), [("My_Model.v2", "my-model-v2"), ("模型", "model"), ("a" * 80, "a" * 63), ("-x-", "x")]
)
def test_names_become_kubernetes_labels(name: str, wanted: str) -> None:
    assert label(SimpleNamespace(name=name)) == wanted  # type: ignore[arg-type]
