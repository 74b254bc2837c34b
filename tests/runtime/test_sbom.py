# SPDX-License-Identifier: Apache-2.0
"""A bill of materials is that of its bundle, or it is refused with the file's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnxpress.contracts.errors import BundleError
from onnxpress.runtime.sbom import SBOM, check_sbom

MODEL = "onnx/model.onnx"
FILES = {MODEL: {"sha256": "a" * 64, "size": 1}, "config.json": {"sha256": "b" * 64, "size": 2}, SBOM: {"sha256": "c"}}


def manifest(**more: Any) -> dict[str, Any]:
    return {"files": FILES, "variants": {"fp32": {"path": MODEL}}, **more}


def component(path: str, sha256: str) -> dict[str, Any]:
    return {
        "name": path, "hashes": [{"alg": "SHA-256", "content": sha256}],
        "properties": [{"name": "other", "value": "x"}, {"name": "onnxpress:path", "value": path}],
    }  # fmt: skip


def write(folder: Path, *components: dict[str, Any]) -> None:
    (folder / SBOM).write_text(json.dumps({"metadata": {"component": {"components": list(components)}}}))


def test_hashes_that_agree_are_counted(tmp_path: Path) -> None:
    nested = {"name": "a group", "components": [component("config.json", "b" * 64)]}
    write(tmp_path, component(MODEL, "a" * 64), nested, {"name": "of no file"})
    assert check_sbom(tmp_path, manifest()) == 2


def test_a_bundle_without_one_is_fine(tmp_path: Path) -> None:
    assert check_sbom(tmp_path, {"files": {MODEL: FILES[MODEL]}, "variants": {}}) == 0


@pytest.mark.parametrize(
    ("components", "more", "words"),
    [
        ([(MODEL, "0" * 64)], {}, "has another hash for onnx/model.onnx"),
        ([("config.json", "b" * 64)], {}, "sbom.cdx.json does not list onnx/model.onnx"),
        ([(MODEL, "a" * 64), ("more.bin", "d" * 64)], {}, "manifest.json does not list more.bin"),
        ([(MODEL, "a" * 64)], {"companions": [{"path": "onnx/encoder.onnx"}]}, "does not list onnx/encoder.onnx"),
    ],
)
def test_one_that_contradicts_the_manifest_names_the_file(
    components: list[tuple[str, str]], more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write(tmp_path, *(component(*row) for row in components))
    with pytest.raises(BundleError, match=words):
        check_sbom(tmp_path, manifest(**more))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metadata": {"component": {"components": [3]}}}', "[" * 5000])
def test_one_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / SBOM).write_text(text)
    with pytest.raises(BundleError, match="no bill of materials"):
        check_sbom(tmp_path, manifest())
