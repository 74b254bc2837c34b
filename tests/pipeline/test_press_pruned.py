# SPDX-License-Identifier: Apache-2.0
"""`pruned-int8` on a user's own .onnx, with nothing but calibration data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file
from onnxpress.pipeline.data import load_dataset
from onnxpress.pipeline.pressing import press
from onnxpress.runtime.bundle import verify

from .samples import NET, model_from, quick_recipe, write_arrays, write_net


def write_redundant_net(path: Path) -> Path:
    """Every neuron has a twin, as trained networks have relatives: a random one could not lose a third of its own."""
    model = model_from(NET)
    for name, axis in (("w1", 1), ("b1", 0)):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        half = np.split(value.const_value.numpy(), 2, axis=axis)[0]
        value.const_value = ir.tensor(np.concatenate([half, half], axis=axis), name=name)
    graph_file.write(model, path)
    return path


def test_an_onnx_file_is_pruned_repaired_and_quantized(tmp_path: Path) -> None:
    file, data = write_redundant_net(tmp_path / "net.onnx"), write_arrays(tmp_path / "data.npz", count=400)
    recipe = quick_recipe("pruned-int8", gates=["cosine >= 0.99", "size_ratio >= 3"])
    outcome = press(
        str(file), recipe, tmp_path / "bundle", calibration=load_dataset(str(data)), evaluation=load_dataset(str(data))
    )
    assert outcome.accepted
    passes = {entry["pass"]: entry for entry in outcome.manifest["passes"]}
    pruned = passes["prune_structured"]
    assert pruned["details"]["neurons"]["kept"] < 128
    assert pruned["details"]["saved_percent"] >= 35
    assert pruned["bytes_after"] < 0.7 * pruned["bytes_before"]
    assert passes["quantize_dynamic"]["changed"] >= 1
    assert passes["narrow"]["changed"] == 0
    model = graph_file.read(tmp_path / "bundle" / "onnx" / "model_quantized.onnx")
    assert any(node.op_type in ("DynamicQuantizeMatMul", "MatMulInteger") for node in model.graph)
    verify(tmp_path / "bundle")


def test_it_asks_for_calibration_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        press(str(write_net(tmp_path / "net.onnx")), quick_recipe("pruned-int8"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
