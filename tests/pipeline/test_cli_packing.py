# SPDX-License-Identifier: Apache-2.0
"""The verbs pack and unpack, as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from onnxpress.runtime.bundle import verify

from .conftest import Run


def test_a_model_is_packed_and_restored(onnxpress: Run, tmp_path: Path, net: Path) -> None:
    shutil.copy(net, tmp_path / "net.onnx")
    result = onnxpress("pack", tmp_path / "net.onnx")
    packed = tmp_path / "net.onnx.pack"
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{packed}: {net.stat().st_size:,} -> {packed.stat().st_size:,} bytes (")
    assert packed.stat().st_size < 0.9 * net.stat().st_size
    result = onnxpress("unpack", packed, "-o", tmp_path / "back.onnx", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == {"files": {str(tmp_path / "back.onnx"): net.stat().st_size}}
    assert (tmp_path / "back.onnx").read_bytes() == net.read_bytes()


def test_a_bundle_is_packed_beside_itself_and_still_verifies(onnxpress: Run, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "net")
    result = onnxpress("pack", tmp_path / "net", "--json", "--codec", "huffman", "--threads", "1")
    assert json.loads(result.out)["file"] == str(tmp_path / "net.pack")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "net.pack"]
    verify(tmp_path / "net", run=False)
    assert onnxpress("unpack", tmp_path / "net.pack").code == 0
    assert (tmp_path / "model_quantized.onnx").is_file()


def test_mistakes_are_one_line(onnxpress: Run, tmp_path: Path, net: Path) -> None:
    shutil.copy(net, tmp_path / "net.onnx")
    onnxpress("pack", tmp_path / "net.onnx")
    result = onnxpress("pack", tmp_path / "net.onnx")
    assert (result.code, result.out) == (2, "")
    assert result.error.endswith("net.onnx.pack exists. Add --force to replace it.")
    assert onnxpress("pack", tmp_path / "net.onnx", "--force").code == 0
    assert onnxpress("pack", tmp_path / "net.onnx", "--force", "--codec", "hufman").error == (
        "onnxpress: unknown codec 'hufman'. Did you mean 'huffman'?"
    )
    result = onnxpress("unpack", tmp_path / "net.onnx", "-o", tmp_path / "x.onnx")
    assert (result.code, result.error) == (
        2,
        "onnxpress: net.onnx is no packed model. Pack a model with: onnxpress pack model.onnx",
    )
    data = bytearray((tmp_path / "net.onnx.pack").read_bytes())
    data[1000] ^= 1
    (tmp_path / "net.onnx.pack").write_bytes(data)
    result = onnxpress("unpack", tmp_path / "net.onnx.pack", "-o", tmp_path / "x.onnx")
    assert (result.code, result.error) == (
        2,
        "onnxpress: net.onnx.pack is damaged: its chunks were changed. Fetch the file again, or pack the model again.",
    )
    assert not (tmp_path / "x.onnx").exists()
