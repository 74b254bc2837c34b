# SPDX-License-Identifier: Apache-2.0
"""AWQ's search for input scales."""

import numpy as np
import pytest

from onnxpress.pipeline.quantization.awq import input_scale, search_input_scale
from onnxpress.pipeline.quantization.blocks import Grid, round_blocks
from onnxpress.pipeline.quantization.codes import WIDTHS
from onnxpress.pipeline.quantization.gptq import output_error


def data(spread: float, channels: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """X^T X and mean|x| of channels of different size."""
    random = np.random.default_rng(0)
    x = random.standard_normal((512, channels)) * np.exp(spread * random.standard_normal(channels))
    return x.T @ x, np.abs(x).mean(0)


def normal(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(matrix: np.ndarray, grid: Grid, gram: np.ndarray, scale: np.ndarray, search: bool) -> float:
    importance = np.diag(gram) / scale.astype(np.float64) ** 2
    rounded = round_blocks(matrix * scale, grid, clip_search=search, importance=importance)
    return float(output_error(rounded.dequantized() / scale - matrix, gram).sum())


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [4, 3])
def test_it_pays_where_channels_differ_in_size(bits: int, search: bool) -> None:
    gram, mean_abs = data(1.0)
    matrices, grid = [normal(64, 128), normal(32, 128, seed=4)], Grid(WIDTHS[bits], 64)  # type: ignore[index]
    found = search_input_scale(matrices, [grid, grid], gram, mean_abs, clip_search=search)
    assert found.alpha > 0
    assert found.error < (0.92 if search else 0.75)
    before = sum(error(m, grid, gram, np.ones(128, np.float32), search) for m in matrices)
    after = sum(error(m, grid, gram, found.scale, search) for m in matrices)
    assert after / before == pytest.approx(found.error, rel=1e-3)


def test_one_scale_serves_matrices_of_different_widths() -> None:
    gram, mean_abs = data(1.0)
    grids = [Grid(WIDTHS[4], 32), Grid(WIDTHS[3], 64), Grid(WIDTHS[2], None)]
    found = search_input_scale([normal(16, 128)] * 3, grids, gram, mean_abs)
    assert found.error < 1
    assert found.scale.shape == (128,)


def test_equal_channels_need_no_scale() -> None:
    found = search_input_scale([normal(16, 128)], [Grid(WIDTHS[4], 32)], np.eye(128), np.ones(128))
    assert found.alpha == 0
    assert found.error == 1
    assert (found.scale == 1).all()


def test_scales_are_positive_and_centred() -> None:
    mean_abs = np.array([0.0, 1e-30, 0.5, 100.0])
    for alpha in (0.0, 0.3, 1.0):
        scale = input_scale(mean_abs, alpha)
        assert (np.isfinite(scale) & (scale > 0)).all()
        assert scale.max() * scale.min() == pytest.approx(1, rel=1e-5)
    assert (input_scale(np.zeros(3), 0.5) == 1).all()
