# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_bundle import seal, write_golden

from onnxpress.contracts.errors import BundleError, InputError
from onnxpress.runtime.opened import Bundle

SIGNATURE = {
    "inputs": [
        {"name": "x", "dtype": "float32", "shape": ["batch", 4]},
        {"name": "bias", "dtype": "int64", "shape": ["batch"]},
    ],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}],
}


@pytest.fixture
def folder(tmp_path: Path, tiny_bytes: bytes) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(tiny_bytes)
    (folder / "config.json").write_text('{"id2label": {"0": "no", "1": "yes"}}')
    write_golden(folder)
    seal(folder, signature=SIGNATURE, task="generic", max_length=None)
    return folder


def test_an_opened_bundle_answers_what_it_holds(folder: Path) -> None:
    bundle = Bundle(folder)
    assert (bundle.name, bundle.task, bundle.variants, bundle.max_length) == ("tiny", "generic", ["fp32"], None)
    assert bundle.labels == {0: "no", 1: "yes"}
    assert bundle.generation_config == {}
    assert bundle.encoder is None
    assert bundle.model_file() == bundle.model_file("fp32") == folder / "onnx" / "model.onnx"
    assert bundle.tolerance("y") == 1e-6
    assert [spec.name for spec in bundle.signature.inputs] == ["x", "bias"]
    session = bundle.session()
    for sample in bundle.golden:
        np.testing.assert_allclose(session.run(dict(sample.inputs))["y"], sample.outputs["y"], atol=1e-6)


def test_the_hash_names_the_content(folder: Path) -> None:
    before = Bundle(folder).sha256
    assert len(before) == 64
    assert Bundle(folder).sha256 == before
    (folder / "config.json").write_text("{}")
    seal(folder, signature=SIGNATURE)
    assert Bundle(folder).sha256 != before


def test_a_changed_file_is_refused_unless_the_folder_is_trusted(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"config\.json was changed"):
        Bundle(folder)
    assert Bundle(folder, check=False).labels == {}


def test_what_is_not_there_is_an_error_that_says_so(folder: Path) -> None:
    bundle = Bundle(folder)
    with pytest.raises(InputError, match="no variant 'fp16'"):
        bundle.model_file("fp16")
    with pytest.raises(BundleError, match="no tolerance for 'z'"):
        bundle.tolerance("z")
    assert bundle.companion_file("encoder_model") is None


def test_a_path_that_leads_outside_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["variants"]["fp32"]["path"] = "../elsewhere.onnx"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="does not stay inside"):
        Bundle(folder, check=False).model_file()


def test_config_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json is not JSON"):
        _ = Bundle(folder, check=False).config
