# SPDX-License-Identifier: Apache-2.0
"""Every pass over real `.onnx` files that we did not make; skipped where they are absent."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from pass_tools import Array, session, to_bytes

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import read, signature_of
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[4] / "shared" / "assets"))
FILES = sorted(ASSETS.rglob("*.onnx")) if ASSETS.is_dir() else []
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"no .onnx files under {ASSETS}"))

every_file = pytest.mark.parametrize("path", FILES or [ABSENT], ids=lambda p: p.name if p else "absent")


def feeds_for(path: Path) -> dict[str, Array]:
    """Random inputs that the model accepts."""
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in signature_of(read(path)).inputs:
        shape = [d if isinstance(d, int) else 1 for d in spec.shape]
        if path.name == "silero_vad.onnx" and spec.name == "input":
            shape = [1, 576]
        if spec.name == "sr":
            feeds[spec.name] = np.array(16000)
        elif spec.dtype == "float32":
            feeds[spec.name] = random.standard_normal(shape).astype(np.float32)
        else:
            feeds[spec.name] = random.integers(0, 256, shape).astype(spec.dtype)
    return feeds


def outputs_of(path: Path) -> list[Array]:
    """What the file itself says, as it lies on the disk."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # old files list their weights as inputs, which the runtime remarks on
    return list(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds_for(path)))


def press(path: Path, *passes: Pass) -> list[Array]:
    model = read(path)
    for settings in passes:
        model, _ = run_pass(settings, model)
    return list(session(to_bytes(model)).run(None, feeds_for(path)))


def distance(expected: Array, got: Array) -> float:
    """The largest difference, relative to the largest value."""
    assert expected.shape == got.shape
    assert expected.dtype == got.dtype
    return float(np.abs(expected.astype(np.float64) - got).max() / max(np.abs(expected).max(), 1e-30))


@every_file
def test_clean_and_fuse_change_no_output(path: Path) -> None:
    for expected, got in zip(outputs_of(path), press(path, Clean(), Fuse()), strict=True):
        assert distance(expected, got) < 1e-4


@every_file
def test_clean_is_left_with_no_broken_step(path: Path) -> None:
    _, report = run_pass(Clean(), read(path))
    assert report.left == ()
    assert report.nodes_after <= report.nodes_before


@every_file
def test_quantize_dynamic_runs_or_refuses(path: Path) -> None:
    model, _ = run_pass(Clean(), read(path))
    if not QuantizeDynamic().plan(model).actions:
        with pytest.raises(InputError, match="nothing to do"):
            run_pass(QuantizeDynamic(), model)
        return
    got = press(path, Clean(), Fuse(), QuantizeDynamic())
    for expected, result in zip(outputs_of(path), got, strict=True):
        assert distance(expected, result) < 0.1


@every_file
@pytest.mark.parametrize("clean", [True, False], ids=["cleaned", "raw"])
def test_cast_runs(path: Path, clean: bool) -> None:
    if not clean and not CastPass().plan(read(path)).actions:
        with pytest.raises(InputError, match="put the clean pass before"):
            run_pass(CastPass(), read(path))
        return
    got = press(path, *([Clean()] if clean else []), CastPass())
    for expected, result in zip(outputs_of(path), got, strict=True):
        assert distance(expected, result) < 0.05
