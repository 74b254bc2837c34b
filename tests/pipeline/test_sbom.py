# SPDX-License-Identifier: Apache-2.0
"""The bill of materials: valid CycloneDX, complete, the same bytes for the same facts, nothing secret or timed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from onnxpress.pipeline.sbom import sbom_of
from onnxpress.runtime.bundle import hash_file, read_manifest, verify
from onnxpress.runtime.sbom import check_sbom

from .test_report import empty, sample


def manifest(**changes: Any) -> dict[str, Any]:
    found = copy.deepcopy(sample())
    found["data"]["calibration"] = {"name": "train", "sha256": "c1" * 32, "examples": 64, "batches": 8}
    found["files"]["onnx/model_quantized.onnx"]["sha256"] = "ab" * 32
    return found | changes


def errors_of(text: str) -> Any:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def test_it_is_valid_and_complete() -> None:
    facts = manifest()
    facts["source"]["license"] = "apache-2.0"
    text = sbom_of(facts)
    assert errors_of(text) is None
    data = json.loads(text)
    model = data["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "all-MiniLM-L6-v2-int8")
    assert model["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert {part["name"] for part in model["components"]} == set(facts["files"])
    ancestor = model["pedigree"]["ancestors"][0]
    assert (ancestor["name"], ancestor["hashes"][0]["content"]) == ("all-MiniLM-L6-v2", "5f" * 32)
    used = {part["name"]: part["hashes"][0]["content"] for part in data["components"]}
    assert used == {"stdlib-docstrings-3.11": "b5" * 32, "train": "c1" * 32}
    tools = {tool["name"]: tool["version"] for tool in data["metadata"]["tools"]["components"]}
    assert tools == facts["versions"]
    card = model["modelCard"]
    assert card["modelParameters"]["task"] == "feature-extraction"
    assert {row["ref"] for row in card["modelParameters"]["datasets"]} == {"data:evaluation", "data:calibration"}
    metrics = {
        (row["type"], row.get("slice")): row["value"] for row in card["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert metrics["neighbour_accuracy (candidate)", "stdlib-docstrings-3.11"] == "71.0"
    assert metrics["cosine to the original", "output sentence_embedding"] == "0.99812"


def test_the_same_facts_give_the_same_bytes_whatever_was_timed() -> None:
    first = sbom_of(manifest())
    slow = manifest()
    for row in slow["benchmarks"]:
        row["latency_ms"] = {"p50": 99.0}
    assert sbom_of(slow) == first
    other = manifest()
    other["files"]["onnx/model_quantized.onnx"]["sha256"] = "cd" * 32
    assert json.loads(sbom_of(other))["serialNumber"] != json.loads(first)["serialNumber"]
    assert "timestamp" not in first


@pytest.mark.parametrize("licence", ["MIT", "bsd-3-clause", "llama3.1", "A licence of our own"])
def test_any_licence_is_valid(licence: str) -> None:
    facts = manifest()
    facts["source"]["license"] = licence
    assert errors_of(sbom_of(facts)) is None


def test_with_whatever_may_be_missing() -> None:
    bare = empty() | {
        "files": {"onnx/model.onnx": {"sha256": "ab" * 32, "size": 1}},
        "variants": {"fp32": {"path": "onnx/model.onnx"}},
        "recipe": {"name": "fp32", "sha256": "ab" * 32}, "versions": {"onnxpress": "0.1.0"},
    }  # fmt: skip
    assert errors_of(sbom_of(bare)) is None


def test_every_bundle_has_its_own(finished: Path) -> None:
    text = (finished / "sbom.cdx.json").read_text("utf-8")
    assert errors_of(text) is None
    found = read_manifest(finished)
    listed = {part["name"] for part in json.loads(text)["metadata"]["component"]["components"]}
    assert listed == set(found["files"]) - {"README.md", "report.html", "sbom.cdx.json"}
    assert check_sbom(finished, found) == len(listed)
    assert verify(finished, run=False).materials_checked == len(listed)
    assert str(finished.parent) not in text
    assert hash_file(finished / "onnx" / "model_quantized.onnx") in text
