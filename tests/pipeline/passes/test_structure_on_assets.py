# SPDX-License-Identifier: Apache-2.0
"""Low rank and palettes over real `.onnx` files that we did not make; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pass_tools import run, to_bytes
from test_passes_on_assets import every_file, feeds_for, outputs_of

from onnxpress.exporters.graph_file import read
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.factorize import Factorize
from onnxpress.pipeline.passes.share_weights import ShareWeights

ANY = ("MatMul", "Gemm", "Conv", "Gather")
NEARLY_EXACT = Factorize(whiten=False, measure=False, energy=1 - 1e-5, multiple=1, operators=ANY, optional=True)


@every_file
@pytest.mark.parametrize("settings", [ShareWeights(bits=8, optional=True), NEARLY_EXACT], ids=lambda s: s.name)
def test_the_file_is_smaller_and_computes_nearly_the_same(path: Path, settings: Pass) -> None:
    model, _ = run_pass(Clean(), read(path))
    model, report = run_pass(settings, model)
    assert report.bytes_after < report.bytes_before or not report.changed
    for expected, got in zip(outputs_of(path), run(to_bytes(model), feeds_for(path)), strict=True):
        assert np.linalg.norm(expected.astype(np.float64) - got) < 0.1 * np.linalg.norm(expected)
