# SPDX-License-Identifier: Apache-2.0
"""Palettes against the optimum that dynamic programming over all values finds, and laws of k-means."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from onnxpress.pipeline.quantization import palettes
from onnxpress.pipeline.quantization.palettes import _even, _sums, find_palette, lloyd, nearest_codes, squared_error

Array = np.ndarray

arrays = npst.arrays(
    np.float32, st.integers(1, 60), elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def optimum(weights: Array, importance: Array, levels: int) -> float:
    """The least sum of h (w - p)^2 with so many values: every partition into intervals is considered."""
    order = np.argsort(weights)
    w, h = weights[order].astype(np.float64), importance[order]
    best = np.full(len(w) + 1, np.inf)
    best[0] = 0.0

    def cost(begin: int, end: int) -> float:
        mean = np.average(w[begin:end], weights=h[begin:end])
        return float((h[begin:end] * (w[begin:end] - mean) ** 2).sum())

    least = np.inf
    for _ in range(levels):
        best = np.array([np.inf, *(min(best[i] + cost(i, j) for i in range(j)) for j in range(1, len(w) + 1))])
        least = min(least, best[-1])
    return float(least)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_few_values_are_the_optimum(bits: int, seed: int) -> None:
    weights, importance = normal(40, seed), np.random.default_rng(seed).random(40) + 0.01
    found = find_palette(weights, bits, importance)
    error = squared_error(weights, found.restored(), importance)
    assert error == pytest.approx(optimum(weights, importance, 2**bits), rel=1e-6)


@pytest.mark.parametrize("count", [5000, 200_000])
@pytest.mark.parametrize(("bits", "known"), [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01)])
def test_a_normal_distribution_is_as_well_served_as_lloyd_and_max_found(count: int, bits: int, known: float) -> None:
    """Signal to noise in dB of the optimum quantizer: Max, "Quantizing for minimum distortion", 1960, table I."""
    weights = normal(count, 3)
    noise = squared_error(weights, find_palette(weights, bits).restored())
    sqnr = 10 * np.log10(squared_error(weights, np.zeros((), np.float32)) / noise)
    assert sqnr > known - 0.25  # of few weights, a palette can serve each cluster better than the distribution
    assert count < 10_000 or sqnr < known + 0.05


@given(arrays, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_no_uniform_grid_is_better(weights: Array, bits: int) -> None:
    low, high = float(weights.min()), float(weights.max())
    grid = np.linspace(low, high, 2**bits)
    uniform = grid[np.abs(weights[:, None].astype(np.float64) - grid).argmin(axis=1)]
    found = find_palette(weights, bits)
    assert len(found.values) <= 2**bits
    error, other = squared_error(weights, found.restored()), squared_error(weights, uniform)
    rounding = len(weights) * (max(abs(low), abs(high)) * 2.0**-23) ** 2
    assert error <= other * (1 + 1e-6) + rounding


@given(arrays, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_weight_takes_the_nearest_value(weights: Array, bits: int) -> None:
    found = find_palette(weights, bits)
    distance = np.abs(weights[:, None].astype(np.float64) - found.values)
    taken = np.take_along_axis(distance, found.codes[:, None].astype(int), axis=1)[:, 0]
    assert np.all(taken <= distance.min(axis=1) * (1 + 1e-6))


@given(arrays, st.integers(1, 6), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_lloyds_iterations_never_make_it_worse(weights: Array, bits: int, seed: int) -> None:
    importance = np.random.default_rng(seed).random(len(weights)) + 0.01
    sums = _sums(weights, importance)
    errors = [float(sums.clusters(borders).spread.sum()) for borders in lloyd(sums, _even(sums, 2**bits))]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-9) + 1e-12 * float((importance * weights.astype(np.float64) ** 2).sum())


def test_few_distinct_weights_are_kept_exactly() -> None:
    weights = np.asarray([[0.5, -2.0, 0.5], [3.25, 3.25, -2.0]], np.float32)
    found = find_palette(weights, 2)
    assert found.codes.shape == weights.shape
    assert np.array_equal(found.restored(), weights)
    assert len(found.values) == 3


def test_an_outlier_gets_a_value_of_its_own() -> None:
    weights = np.append(normal(1000), np.float32(1e6))
    found = find_palette(weights, 3)
    assert found.restored()[-1] == np.float32(1e6)
    assert len(np.unique(found.codes[:-1])) > 1


def test_what_matters_more_is_nearer() -> None:
    weights = normal(2000)
    importance = np.where(weights > 0, 1.0, 100.0)
    plain, weighed = find_palette(weights, 2), find_palette(weights, 2, importance)
    assert squared_error(weights, weighed.restored(), importance) < squared_error(weights, plain.restored(), importance)
    assert squared_error(weights, plain.restored()) < squared_error(weights, weighed.restored())


def test_importance_is_broadcast_and_may_be_zero() -> None:
    weights = normal(64).reshape(8, 8)
    column = np.asarray([0, 0, 1, 1, 1, 1, 1, 1.0])[:, None]
    found = find_palette(weights, 3, column)
    assert np.isfinite(found.values).all()
    again = find_palette(weights, 3, np.broadcast_to(column, weights.shape))
    assert np.array_equal(found.codes, again.codes)
    plain = find_palette(weights, 3, np.zeros((8, 1)))
    assert np.array_equal(plain.codes, find_palette(weights, 3).codes)


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_many_weights_are_summed_with_hardly_a_loss(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    weights, importance = normal(20_000), np.random.default_rng(1).random(20_000)
    exact = squared_error(weights, find_palette(weights, bits, importance).restored(), importance)
    monkeypatch.setattr(palettes, "_EXACT", 100)
    summed = squared_error(weights, find_palette(weights, bits, importance).restored(), importance)
    assert summed == pytest.approx(exact, rel=0.02)


def test_the_same_weights_give_the_same_palette() -> None:
    weights = normal(3000)
    one, other = find_palette(weights, 5), find_palette(weights.copy(), 5)
    assert np.array_equal(one.values, other.values)
    assert np.array_equal(one.codes, other.codes)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 3e37])
def test_any_scale_will_do(scale: float) -> None:
    weights = (normal(500) * np.float32(scale)).astype(np.float32)
    found = find_palette(weights, 4)
    assert np.isfinite(found.values).all()
    noise = squared_error(weights.astype(np.float64) / scale, found.restored().astype(np.float64) / scale)
    assert noise < 0.02 * squared_error(weights.astype(np.float64) / scale, np.zeros((), np.float32))


def test_codes_end_with_the_palette() -> None:
    weights, values = np.asarray([0.4, 0.6, -9, 9], np.float32), np.asarray([0, 1], np.float32)
    assert nearest_codes(weights, values).tolist() == [0, 1, 0, 1]
