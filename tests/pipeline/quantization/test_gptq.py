# SPDX-License-Identifier: Apache-2.0
"""GPTQ against its definition, and against plain rounding."""

import numpy as np
import pytest

from onnxpress.pipeline.quantization.blocks import Grid, Rounded, find_scales, nearest, restored, round_blocks
from onnxpress.pipeline.quantization.codes import WIDTHS, Bits
from onnxpress.pipeline.quantization.gptq import feedback_of, output_error, round_gptq


def correlated(channels: int, rows: int = 1024, seed: int = 0) -> np.ndarray:
    """Activations whose channels go together, as those of real layers do."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((channels, channels)) * np.exp(-np.arange(channels) / (channels / 5))[:, None]
    noise = 0.05 * random.standard_normal((rows, channels))
    return random.standard_normal((rows, channels)) @ mix / np.sqrt(channels) + noise


def gram_of(channels: int, seed: int = 0) -> np.ndarray:
    x = correlated(channels, seed=seed)
    gram: np.ndarray = x.T @ x
    return gram


def normal(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decibel(matrix: np.ndarray, rounded: Rounded, gram: np.ndarray) -> float:
    off = output_error(rounded.dequantized() - matrix, gram).sum()
    return float(10 * np.log10(output_error(matrix, gram).sum() / off))


def gptq(matrix: np.ndarray, grid: Grid, gram: np.ndarray, *, act_order: bool = False, search: bool = False) -> Rounded:
    feedback = feedback_of(gram, act_order=act_order)
    assert feedback is not None
    plain = round_blocks(matrix, grid, clip_search=search, importance=feedback.importance)
    return round_gptq(matrix, grid, feedback, plain, clip_search=search)


def by_definition(matrix: np.ndarray, grid: Grid, gram: np.ndarray, order: np.ndarray, choose: bool) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order: the inverse Hessian, and one channel after the other taken out."""
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    weights = matrix[:, order].astype(np.float64)
    plain, codes = round_blocks(matrix, grid), np.empty(matrix.shape)
    length = grid.length(matrix.shape[1])
    zeros = np.full(plain.scales.shape, grid.width.zero) if plain.zeros is None else plain.zeros.astype(float)
    for i, channel in enumerate(order):
        group = channel // length
        scale, zero = plain.scales[:, group], zeros[:, group]
        if choose and i % length == 0:
            found = find_scales(weights[:, i : i + length].astype(np.float32), grid, clip_search=False)
            plain.scales[:, group], zeros[:, group] = scale, zero = found[0][:, 0], found[1][:, 0]
        codes[:, channel] = nearest(weights[:, i], scale, zero, grid.width)
        off = weights[:, i] - restored(codes[:, channel], scale, zero, grid.width)
        weights -= off[:, None] * inverse[i] / inverse[i, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 3, "ternary"])
@pytest.mark.parametrize("block", [16, 32, None])
def test_the_codes_are_those_of_the_definition(bits: Bits, block: int | None, act_order: bool) -> None:
    gram, matrix = gram_of(96), normal(24, 96)
    grid = Grid(WIDTHS[bits], block)
    feedback = feedback_of(gram, act_order=act_order)
    assert feedback is not None
    expected = by_definition(matrix, grid, gram, feedback.order, choose=block is not None and not act_order)
    rounded = gptq(matrix, grid, gram, act_order=act_order)
    # float32 may fall on the other side of a half, and what follows then differs
    assert (rounded.codes == expected).mean() > 0.98


def test_it_is_six_decibels_better_than_rounding() -> None:
    """int4 in groups of 32, a layer of 512 x 512: reading the wrong factor makes these equal."""
    gram, matrix = gram_of(512), normal(512, 512)
    for symmetric in (True, False):
        grid = Grid(WIDTHS[4], 32, symmetric)
        plain = decibel(matrix, round_blocks(matrix, grid), gram)
        assert decibel(matrix, gptq(matrix, grid, gram), gram) > plain + 6
        assert decibel(matrix, gptq(matrix, grid, gram, act_order=True), gram) > plain + 6


@pytest.mark.parametrize("bits", list(WIDTHS))
@pytest.mark.parametrize("search", [True, False])
def test_every_width_gains(bits: Bits, search: bool) -> None:
    gram, matrix = gram_of(128), normal(64, 128)
    for block in (32, None):
        grid = Grid(WIDTHS[bits], block)
        plain = round_blocks(matrix, grid, clip_search=search, importance=np.diag(gram))
        for act_order in (True, False):
            gain = decibel(matrix, gptq(matrix, grid, gram, act_order=act_order, search=search), gram)
            assert gain > decibel(matrix, plain, gram) + 2


def test_the_order_pays_where_channels_differ_in_size() -> None:
    size = np.exp(np.random.default_rng(1).standard_normal(256))
    gram, matrix = gram_of(256) * np.outer(size, size), normal(64, 256)
    grid = Grid(WIDTHS[4], 128)
    ordered = decibel(matrix, gptq(matrix, grid, gram, act_order=True), gram)
    assert ordered > decibel(matrix, gptq(matrix, grid, gram), gram) + 2


@pytest.mark.parametrize("columns", [7, 100, 130, 300])
@pytest.mark.parametrize("block", [16, 256, None])
def test_any_number_of_channels(columns: int, block: int | None) -> None:
    gram, matrix = gram_of(columns), normal(20, columns)
    grid = Grid(WIDTHS[4], block)
    plain = decibel(matrix, round_blocks(matrix, grid), gram)
    for act_order in (True, False):
        assert decibel(matrix, gptq(matrix, grid, gram, act_order=act_order), gram) > plain


def test_updating_in_blocks_changes_nothing() -> None:
    gram, matrix, grid = gram_of(160), normal(16, 160), Grid(WIDTHS[4], 32)
    for act_order in (True, False):
        feedback = feedback_of(gram, act_order=act_order)
        assert feedback is not None
        plain = round_blocks(matrix, grid)
        results = [round_gptq(matrix, grid, feedback, plain, block=size) for size in (32, 64, 1000)]
        for other in results[1:]:
            assert (other.codes == results[0].codes).mean() > 0.99


def test_without_correlation_it_is_plain_rounding() -> None:
    matrix, grid = normal(16, 64), Grid(WIDTHS[4], 32)
    rounded = gptq(matrix, grid, np.diag(np.random.default_rng(0).uniform(1, 2, 64)))
    plain = round_blocks(matrix, grid)
    assert np.array_equal(rounded.codes, plain.codes)
    assert np.array_equal(rounded.scales, plain.scales)


def test_channels_that_are_always_zero_are_rounded_by_themselves() -> None:
    gram, matrix, grid = gram_of(64), normal(16, 64), Grid(WIDTHS[4], None)
    dead = [3, 40, 63]
    gram[dead], gram[:, dead] = 0, 0
    plain = round_blocks(matrix, grid)
    for damping in (0.0, 0.01):
        feedback = feedback_of(gram, damping=damping, act_order=True)
        assert feedback is not None
        rounded = round_gptq(matrix, grid, feedback, plain)
        assert np.array_equal(rounded.codes[:, dead], plain.codes[:, dead])
        assert decibel(matrix, rounded, gram) > decibel(matrix, plain, gram) + 2
    assert feedback_of(np.zeros((8, 8))) is None


def test_a_matrix_that_is_not_positive_definite_gets_more_damping() -> None:
    """float32 sums of few rows are slightly off."""
    x = normal(4, 64).astype(np.float64)
    gram = x.T @ x
    gram -= 0.05 * np.diag(gram).mean() * np.eye(64)
    feedback = feedback_of(gram, damping=0.01)
    assert feedback is not None
    assert feedback.damping > 0.01
    matrix, grid = normal(16, 64), Grid(WIDTHS[4], None)
    plain = round_blocks(matrix, grid)
    assert decibel(matrix, round_gptq(matrix, grid, feedback, plain), x.T @ x) > decibel(matrix, plain, x.T @ x)


def test_the_scales_are_those_that_were_rounded_with() -> None:
    """Every weight is a code times a scale: nothing is derived again from the result."""
    gram, matrix = gram_of(128), normal(32, 128)
    for act_order in (True, False):
        rounded = gptq(matrix, Grid(WIDTHS[4], 32, symmetric=True), gram, act_order=act_order, search=True)
        again = round_blocks(rounded.dequantized(), rounded.grid)
        values = rounded.codes.astype(np.float32).reshape(32, 4, 32) - 8
        assert np.array_equal(rounded.dequantized(), (values * rounded.scales[..., None]).reshape(32, 128))
        assert not np.array_equal(again.scales, rounded.scales)


def test_the_error_of_outputs_is_that_of_the_data() -> None:
    x, off = correlated(32, rows=100), normal(5, 32)
    assert np.allclose(output_error(off, x.T @ x), np.square(x @ off.T).sum(0), rtol=1e-6)
