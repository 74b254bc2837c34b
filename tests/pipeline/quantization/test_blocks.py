# SPDX-License-Identifier: Apache-2.0
"""Rounding in blocks: how far weights move, and that searching for scales pays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxpress.pipeline.quantization.blocks import Grid, round_blocks
from onnxpress.pipeline.quantization.codes import WIDTHS, Bits

UNIFORM: tuple[Bits, ...] = (8, 4, 3, 2)
every_width = pytest.mark.parametrize("bits", list(WIDTHS))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared(matrix: np.ndarray, grid: Grid, counts: np.ndarray | float = 1.0, **options: object) -> float:
    off = round_blocks(matrix, grid, **options).dequantized().astype(np.float64) - matrix  # type: ignore[arg-type]
    return float((off**2 * counts).sum())


MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(MATRICES, st.sampled_from(UNIFORM), st.sampled_from([16, 32, None]), st.booleans())
def test_no_weight_moves_by_more_than_half_a_step(
    matrix: np.ndarray, bits: Bits, block: int | None, symmetric: bool
) -> None:
    grid = Grid(WIDTHS[bits], block, symmetric)
    rounded = round_blocks(matrix, grid)
    assert rounded.codes.shape == matrix.shape
    assert rounded.scales.shape == (len(matrix), grid.blocks(matrix.shape[1]))
    assert (rounded.zeros is None) == symmetric
    step = np.repeat(np.abs(rounded.scales), grid.length(matrix.shape[1]), axis=1)[:, : matrix.shape[1]]
    off = np.abs(rounded.dequantized().astype(np.float64) - matrix)
    # Scales are rounded to float32, which counts as many times as there are steps
    assert (off <= step * (0.5 + WIDTHS[bits].levels * 2.0**-21)).all()


@given(MATRICES, st.sampled_from(list(WIDTHS)), st.booleans(), st.booleans())
def test_codes_stay_inside_their_width(matrix: np.ndarray, bits: Bits, symmetric: bool, search: bool) -> None:
    rounded = round_blocks(matrix, Grid(WIDTHS[bits], 16, symmetric), clip_search=search)
    assert rounded.codes.max() < WIDTHS[bits].levels
    assert np.isfinite(rounded.dequantized()).all()
    assert np.isfinite(rounded.scales).all()


@every_width
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 64, None])
def test_the_search_never_loses_and_mostly_wins(bits: Bits, symmetric: bool, block: int | None) -> None:
    matrix, grid = normal(64, 192), Grid(WIDTHS[bits], block, symmetric)
    plain, searched = squared(matrix, grid), squared(matrix, grid, clip_search=True)
    assert searched <= plain * (1 + 1e-6)
    if bits not in (8, "sign"):
        assert searched < 0.95 * plain


@pytest.mark.parametrize("bits", [4, 3, 2, "ternary", "sign"])
def test_the_search_spends_its_error_where_it_does_not_count(bits: Bits) -> None:
    matrix, grid = normal(64, 128), Grid(WIDTHS[bits], 32)
    importance = np.exp(3 * np.random.default_rng(1).standard_normal(128))
    blind = squared(matrix, grid, importance, clip_search=True)
    assert squared(matrix, grid, importance, clip_search=True, importance=importance) < 0.97 * blind


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_more_bits_and_smaller_blocks_are_better(bits: Bits) -> None:
    matrix = normal(64, 256)
    errors = [squared(matrix, Grid(WIDTHS[bits], block), clip_search=True) for block in (16, 32, 64, 128, 256, None)]
    assert errors[:-1] == sorted(errors[:-1])
    assert errors[-1] == errors[-2], "a row of 256 is one block of 256"
    assert errors[1] > 3 * squared(matrix, Grid(WIDTHS[bits + 1 if bits < 4 else 8], 32), clip_search=True)  # type: ignore[operator,index]


def test_sign_keeps_the_mean_absolute_value() -> None:
    matrix = normal(5, 64)
    rounded = round_blocks(matrix, Grid(WIDTHS["sign"], 32))
    blocks = matrix.reshape(5, 2, 32)
    assert np.allclose(rounded.scales, np.abs(blocks).mean(2), rtol=1e-6)
    assert np.array_equal(np.sign(rounded.dequantized()), np.sign(matrix))


def test_ternary_without_a_search_is_that_of_bitnet() -> None:
    matrix = normal(5, 64)
    rounded = round_blocks(matrix, Grid(WIDTHS["ternary"], 32))
    mean = np.abs(matrix.reshape(5, 2, 32)).mean(2, keepdims=True)
    expected = np.clip(np.rint(matrix.reshape(5, 2, 32) / mean), -1, 1) * mean
    assert np.allclose(rounded.dequantized(), expected.reshape(5, 64), rtol=1e-6)


@every_width
@pytest.mark.parametrize("search", [True, False])
def test_zeros_stay_zeros(bits: Bits, search: bool) -> None:
    matrix = np.zeros((3, 70), np.float32)
    matrix[1] = normal(70)
    rounded = round_blocks(matrix, Grid(WIDTHS[bits], 32), clip_search=search).dequantized()
    assert (rounded[[0, 2]] == 0).all()
    assert (rounded[1] != 0).any()


@pytest.mark.parametrize("bits", UNIFORM)
def test_a_grid_that_is_there_already_is_found(bits: Bits) -> None:
    """Weights that lie on a grid are reproduced exactly."""
    random = np.random.default_rng(0)
    codes = random.integers(0, WIDTHS[bits].levels, (8, 64))
    codes[:, ::32], codes[:, 1::32] = 0, WIDTHS[bits].levels - 1
    matrix = ((codes - 1) * 0.25).astype(np.float32)
    rounded = round_blocks(matrix, Grid(WIDTHS[bits], 32))
    assert np.array_equal(rounded.dequantized(), matrix)
    assert np.array_equal(rounded.codes, codes)


def test_the_largest_numbers_do_not_overflow() -> None:
    matrix = np.full((2, 32), np.finfo(np.float32).max, np.float32)
    matrix[:, ::2] *= -1
    for bits in UNIFORM:
        for symmetric in (True, False):
            for search in (True, False):
                rounded = round_blocks(matrix, Grid(WIDTHS[bits], 16, symmetric), clip_search=search)
                assert np.isfinite(rounded.scales).all()
                assert np.isfinite(rounded.dequantized()).all()
