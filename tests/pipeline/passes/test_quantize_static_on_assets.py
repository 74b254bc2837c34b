# SPDX-License-Identifier: Apache-2.0
"""`quantize_static` over real `.onnx` files that we did not make; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import run, to_bytes
from static_tools import executed, noise
from test_passes_on_assets import every_file, feeds_for

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import read
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_static import QuantizeStatic
from onnxpress.pipeline.statistics import Calibration

REFUSED = {"silero_vad.onnx": "12 candidates: inside a subgraph: its values cannot be measured"}
"""The whole network stands in the branches of an If."""


def prepared(path: Path) -> ir.Model:
    model, _ = run_pass(Clean(), read(path))
    return run_pass(Fuse(), model)[0]


def quantized(path: Path, model: ir.Model, **settings: Any) -> ir.Model:
    calibration = Calibration([feeds_for(path)], threads=2)
    return run_pass(QuantizeStatic(minimum_elements=0, **settings), model, calibration)[0]


@every_file
@pytest.mark.parametrize(
    "settings",
    [{}, {"target": "openvino"}, {"target": "tensorrt"}, {"ranges": "mse", "activations": "uint16"}],
    ids=["cpu", "openvino", "tensorrt", "16 bits"],
)
def test_every_file_runs_or_says_why_not(path: Path, settings: dict[str, Any]) -> None:
    model = prepared(path)
    if path.name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[path.name]):
            quantized(path, model, **settings)
        return
    before = to_bytes(model)
    after = quantized(path, model, **settings)
    assert 1.9 < len(before) / len(to_bytes(after)) < 4, "small files: names and scales weigh as much as weights"
    for expected, got in zip(run(before, feeds_for(path)), run(after, feeds_for(path)), strict=True):
        assert (expected.shape, expected.dtype) == (got.shape, got.dtype)
        assert np.isfinite(got).all()
    assert noise(before, after, feeds_for(path)) > 10


@every_file
def test_no_product_is_left_in_floating_point_on_the_cpu(path: Path) -> None:
    if path.name in REFUSED:
        pytest.skip("nothing is quantized")
    found = executed(quantized(path, prepared(path)), feeds_for(path))
    assert not {"Conv", "FusedConv", "MatMul", "Gemm", "FusedGemm", "FusedMatMul"} & set(found)
    assert found["QuantizeLinear"] + found.get("DequantizeLinear", 0) <= 10
