# SPDX-License-Identifier: Apache-2.0
"""The histogram that grows with its data counts as exactly as one that saw all of it at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxpress.pipeline.statistics import Histogram
from onnxpress.pipeline.statistics.histogram import BINS

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-38, -1e-38, 1e-45, 3.4e38, -3.4e38, 1.0, 0.5, 2.0**-20, 255.0, 256.0]),
)
BATCHES = st.lists(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS), max_size=5)


def of(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    return (one.exponent, one.first, one.low, one.high) == (
        other.exponent,
        other.first,
        other.low,
        other.high,
    ) and np.array_equal(one.counts, other.counts)


def counted_exactly(histogram: Histogram, values: np.ndarray) -> bool:
    """Every bin against the comparison width * k <= x < width * (k + 1), in rational arithmetic."""
    counts = np.zeros(BINS, np.int64)
    for value in values.reshape(-1).tolist():
        numerator, denominator = value.as_integer_ratio()
        shift = histogram.exponent
        k = (numerator << max(-shift, 0)) // (denominator << max(shift, 0))
        counts[k - histogram.first] += 1
    return np.array_equal(counts, histogram.counts)


def joined(batches: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(batch.reshape(-1) for batch in batches)])


@settings(max_examples=150, deadline=None)
@given(BATCHES, st.randoms(use_true_random=False))
def test_neither_the_order_nor_the_cut_of_the_batches_matters(batches: list[np.ndarray], random: object) -> None:
    everything = joined(batches)
    whole = of(everything)
    assert same(of(*batches), whole)
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert same(of(*shuffled), whole)
    cut = everything.size // 3
    assert same(of(everything[:cut], everything[cut:]), whole)


@settings(max_examples=150, deadline=None)
@given(BATCHES)
def test_every_value_is_in_the_bin_whose_edges_hold_it(batches: list[np.ndarray]) -> None:
    everything = joined(batches)
    whole = of(*batches)
    assert whole.total == everything.size
    assert counted_exactly(whole, everything)
    if everything.size:
        assert (whole.low, whole.high) == (everything.min(), everything.max())


@settings(max_examples=150, deadline=None)
@given(BATCHES, BATCHES)
def test_merging_is_adding(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    merged = of(*left)
    merged.merge(of(*right))
    assert same(merged, of(*left, *right))


@settings(max_examples=100, deadline=None)
@given(BATCHES)
def test_about_half_of_the_bins_lie_inside_the_range(batches: list[np.ndarray]) -> None:
    everything = joined(batches)
    whole = of(*batches)
    if everything.size and whole.high - whole.low > max(abs(whole.low), abs(whole.high)) / 256 > 1e-38:
        assert BINS / 2 - 2 <= (whole.high - whole.low) / whole.width <= BINS


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
def test_every_width_of_float_counts_the_same(dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((40, 25)) * 10.0 ** rng.integers(-3, 3)).astype(np.float16)
    assert same(of(values.astype(dtype)), of(values.astype(np.float64)))
    assert counted_exactly(of(values.astype(dtype)), values.astype(np.float64))


def test_values_on_the_edges_belong_to_the_bin_that_begins_there() -> None:
    values = np.arange(-1024, 1024, dtype=np.float32)
    histogram = of(values, values / 2)
    assert histogram.width == 1.0
    assert (histogram.first, histogram.counts[0], histogram.counts[-1]) == (-1024, 1, 1)
    assert histogram.counts[1024] == 1 + 2, "0, and 0 / 2 and 1 / 2"
    assert histogram.counts[1023] == 1 + 2, "-1, and -1 / 2 and -2 / 2"


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-38, -1e-45, 3.4028235e38, -3.4028235e38])
def test_one_value_only(value: float) -> None:
    histogram = of(np.full((3, 7), value, np.float32))
    assert histogram.total == 21
    assert np.count_nonzero(histogram.counts) == 1
    centre = float(histogram.centres[histogram.counts > 0][0])
    assert abs(centre - np.float32(value)) <= histogram.width / 2
    assert histogram.width <= max(abs(value) * 2.0**-30, 2.0**-151)


def test_the_whole_of_float32_at_once() -> None:
    top = float(np.finfo(np.float32).max)
    histogram = of(np.array([top, -top, 1e-45, -1e-45, 0], np.float32))
    assert histogram.total == 5
    assert math.isfinite(histogram.width)
    assert np.isfinite(histogram.centres).all()
    assert (histogram.counts > 0).sum() == 4


def test_float64_beyond_float32() -> None:
    values = np.array([1e300, -1e299, 3.0])
    assert counted_exactly(of(values), values)


def test_a_range_that_grows_a_thousand_times_loses_no_count() -> None:
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal(500) * 2.0**k).astype(np.float32) for k in range(0, 60, 4)]
    growing = of(*batches)
    assert growing.total == 500 * len(batches)
    assert same(growing, of(np.concatenate(batches)))


def test_adding_to_many_values_goes_in_parts() -> None:
    values = np.random.default_rng(1).standard_normal(600_000).astype(np.float32)
    histogram = of(values)
    edges = (histogram.first + np.arange(BINS + 1)) * histogram.width
    assert np.array_equal(histogram.counts, np.histogram(values.astype(np.float64), edges)[0])


def test_nothing_changes_nothing_and_what_is_not_finite_is_refused() -> None:
    histogram = of(np.zeros((0, 4), np.float32))
    assert histogram.total == 0
    histogram.merge(Histogram())
    assert same(histogram, Histogram())
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            histogram.add(np.array([1.0, value], np.float32))
    assert same(histogram, Histogram())


def test_it_leaves_the_values_alone() -> None:
    values = np.linspace(-3, 3, 100, dtype=np.float64)
    before = values.copy()
    of(values, values.astype(np.float32))
    assert np.array_equal(values, before)
