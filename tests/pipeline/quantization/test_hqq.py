# SPDX-License-Identifier: Apache-2.0
"""HQQ: between plain rounding and a search for the least squared error, and best where outliers are not to count."""

import numpy as np
import pytest

from onnxpress.pipeline.quantization.blocks import Grid, Rounded, round_blocks
from onnxpress.pipeline.quantization.codes import WIDTHS, Bits
from onnxpress.pipeline.quantization.hqq import NORM, round_hqq


def heavy_tailed(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_t(4, shape).astype(np.float32)


def norm(matrix: np.ndarray, rounded: Rounded) -> float:
    return float((np.abs(rounded.dequantized() - matrix) ** NORM).sum())


@pytest.mark.parametrize("bits", [8, 4, 3, 2, "ternary"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 64, 100])
def test_its_own_error_falls(bits: Bits, symmetric: bool, block: int) -> None:
    matrix, grid = heavy_tailed(48, 192), Grid(WIDTHS[bits], block, symmetric)
    assert norm(matrix, round_hqq(matrix, grid)) < 0.998 * norm(matrix, round_blocks(matrix, grid))


@pytest.mark.parametrize("bits", [3, 2])
def test_it_lets_outliers_be(bits: Bits) -> None:
    """The search for the least squared error has to look after outliers; HQQ has not."""
    matrix, grid = heavy_tailed(48, 256), Grid(WIDTHS[bits], 64)
    searched, hqq = round_blocks(matrix, grid, clip_search=True), round_hqq(matrix, grid)
    assert norm(matrix, hqq) < norm(matrix, searched)
    off = [np.abs(r.dequantized() - matrix).max() for r in (hqq, searched)]
    assert off[0] > off[1]


def test_edge_cases() -> None:
    for bits, width in WIDTHS.items():
        matrix = np.zeros((3, 40), np.float32)
        matrix[1] = heavy_tailed(40)
        rounded = round_hqq(matrix, Grid(width, 16))
        assert rounded.codes.max() < width.levels
        assert (rounded.dequantized()[[0, 2]] == 0).all(), bits
        huge = round_hqq(matrix * np.float32(2.0**120), Grid(width, 16))
        assert np.isfinite(huge.dequantized()).all()
