# SPDX-License-Identifier: Apache-2.0
"""From measurements to ranges, and from ranges to scale and zero point: laws that hold whatever the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.pipeline.statistics import Histogram, Range, Statistics
from onnxpress.pipeline.statistics.ranges import (
    IntegerType,
    QuantizedRange,
    RangeMethod,
    activation_range,
    entropy_range,
    mse_range,
    percentile_range,
    quantized_range,
)

TYPES: list[IntegerType] = ["uint8", "int8", "uint16", "int16"]
FINITE = st.floats(0, float(np.float32(3e38)), width=32, allow_nan=False)


def histogram_of(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(values.astype(np.float32))
    return histogram


def statistics_of(values: np.ndarray) -> Statistics:
    span = Range()
    for batch in np.array_split(values, 4):
        span.add(float(batch.min()), float(batch.max()))
    return Statistics(ranges={"x": span}, histograms={"x": histogram_of(values)})


def samples(kind: str, count: int = 50_000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(count)
    made = {
        "gaussian": x,
        "relu": np.maximum(x, 0),
        "shifted": x + 3,
        "negative": -np.abs(x) - 1,
        "laplace": rng.laplace(size=count),
        "outliers": np.where(rng.random(count) < 1e-4, 60 * x, x),
        "one outlier": np.append(x[1:], 500.0),
        "uniform": rng.random(count),
        "constant": np.full(count, 5.0),
        "zeros": np.zeros(count),
        "tiny": x * 1e-38,
        "huge": x * 1e37,
        "two values": np.where(x > 0, 1.0, 0.0),
        "gelu": x / (1 + np.exp(-1.702 * x)),
    }[kind]
    return np.asarray(made, np.float32)


KINDS = [
    "gaussian", "relu", "shifted", "negative", "laplace", "outliers", "one outlier", "uniform", "constant", "zeros",
    "tiny", "huge", "two values", "gelu",
]  # fmt: skip


def fake_quantized(values: np.ndarray, found: QuantizedRange, integers: IntegerType) -> np.ndarray:
    """As QuantizeLinear and DequantizeLinear do it, in float32."""
    limits = np.iinfo(integers)
    steps = np.rint(values.astype(np.float32) / np.float32(found.scale)).astype(np.float64)
    return (np.clip(steps + found.zero_point, limits.min, limits.max) - found.zero_point) * np.float32(found.scale)


def squared_error(values: np.ndarray, low: float, high: float, integers: IntegerType = "uint8") -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    found = quantized_range(low, high, integers, symmetric=False)
    return float(np.square(values.astype(np.float64) - fake_quantized(values, found, integers)).mean())


# --- percentile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 99.99, 99.999, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_percentile_is_numpy_s_within_one_bin(kind: str, percentile: float) -> None:
    values = samples(kind)
    histogram = histogram_of(values)
    low, high = percentile_range(histogram, percentile)
    tail = (100 - percentile) / 200
    exact = np.quantile(values.astype(np.float64), [tail, 1 - tail], method="inverted_cdf")
    assert abs(low - exact[0]) <= histogram.width
    assert abs(high - exact[1]) <= histogram.width
    assert histogram.low <= low <= high <= histogram.high
    if percentile == 100:
        assert low == histogram.low
        assert high == histogram.high


def test_what_is_cut_off_is_no_more_than_was_said() -> None:
    values = samples("outliers")
    low, high = percentile_range(histogram_of(values), 99.9)
    assert (values < low).mean() <= 0.0005
    assert (values > high).mean() <= 0.0005
    assert (values > high).any()


# --- mse and entropy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_no_worse_than_everything_that_was_seen(kind: str) -> None:
    values = samples(kind)
    low, high = mse_range(histogram_of(values), 256)
    full = squared_error(values, float(values.min()), float(values.max()))
    assert squared_error(values, low, high) <= full * 1.02
    assert low <= 0 <= high


@pytest.mark.parametrize(("outlier", "times"), [(12.0, 1.5), (-12.0, 1.5), (20.0, 1.8)])
def test_mse_beats_it_where_there_are_outliers(outlier: float, times: float) -> None:
    values = np.append(samples("gaussian", 800_000), np.float32(outlier))
    low, high = mse_range(histogram_of(values), 256)
    full = squared_error(values, float(values.min()), float(values.max()))
    assert squared_error(values, low, high) * times < full
    assert max(high, -low) < 10


def test_mse_comes_near_the_best_of_all_ranges() -> None:
    values = samples("laplace")
    low, high = mse_range(histogram_of(values), 16)
    found = np.square(values - np.clip(values, low, high)).mean()
    assert found > 0, "with 16 levels it pays to clip"

    def error(share: float) -> float:
        a, b = float(values.min()) * share, float(values.max()) * share
        step = (b - a) / 15
        zero = np.rint(a / step)
        return float(np.square(values - np.clip(np.rint(values / step), zero, zero + 15) * step).mean())

    step = (high - low) / 15
    zero = np.rint(low / step)
    mine = float(np.square(values - np.clip(np.rint(values / step), zero, zero + 15) * step).mean())
    assert mine <= 1.05 * min(error(share) for share in np.linspace(0.05, 1, 96))


@pytest.mark.parametrize("method", [mse_range, entropy_range])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [256, 65536])
def test_a_range_includes_zero_and_lies_inside_what_was_seen(kind: str, levels: int, method: object) -> None:
    values = samples(kind)
    low, high = method(histogram_of(values), levels)  # type: ignore[operator]
    assert min(float(values.min()), 0.0) <= low <= 0 <= high <= max(float(values.max()), 0.0)
    if values.any():
        assert high > low


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("gaussian", 2.5, 4.8), ("relu", 2.5, 4.8), ("gelu", 2.5, 4.8), ("constant", 5.0, 5.0), ("uniform", 0.98, 1.0)],
)
def test_entropy_keeps_the_body_of_a_distribution(kind: str, least: float, most: float) -> None:
    _, high = entropy_range(histogram_of(samples(kind)), 256)
    assert least <= high <= most


@pytest.mark.parametrize("zeros", [0.5, 0.9, 0.99])
def test_entropy_is_not_fooled_by_many_exact_zeros(zeros: float) -> None:
    rng = np.random.default_rng(3)
    values = np.where(rng.random(50_000) < zeros, 0, np.abs(rng.standard_normal(50_000)))
    _, high = entropy_range(histogram_of(values), 256)
    assert high > 2.0


@pytest.mark.parametrize("outlier", [12.0, 20.0, -20.0])
def test_entropy_cuts_an_outlier_off_and_nothing_at_the_other_end(outlier: float) -> None:
    values = samples("gaussian")
    low, high = entropy_range(histogram_of(np.append(values, outlier)), 256)
    assert 2.5 < high < 8
    assert -8 < low < -2.5


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_a_symmetric_range_of_one_sign_is_clipped_as_by_half_the_integers(method: RangeMethod) -> None:
    found = statistics_of(np.maximum(samples("laplace"), 0))
    half = activation_range(found, "x", method, levels=16)
    assert activation_range(found, "x", method, levels=32, symmetric=True) == half
    assert activation_range(found, "x", method, levels=32)[1] > half[1]


# --- which method asks for what --------------------------------------------------------------------------------------


def test_each_method_gives_its_own_range() -> None:
    values = samples("outliers")
    found = statistics_of(values)
    methods: list[RangeMethod] = ["minmax", "average", "percentile", "entropy", "mse"]
    highs = {method: activation_range(found, "x", method, percentile=99.9)[1] for method in methods}
    assert highs["minmax"] == values.max()
    assert highs["average"] == pytest.approx(np.mean([b.max() for b in np.array_split(values, 4)]))
    assert highs["average"] < highs["minmax"]
    assert len(set(highs.values())) == len(methods)
    assert all(high <= highs["minmax"] for high in highs.values())


def test_minmax_can_be_read_from_a_histogram() -> None:
    values = samples("shifted")
    found = Statistics(histograms={"x": histogram_of(values)})
    assert activation_range(found, "x", "minmax") == (min(float(values.min()), 0.0), float(values.max()))


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("kind", ["shifted", "negative"])
def test_zero_is_always_inside(kind: str, method: RangeMethod) -> None:
    low, high = activation_range(statistics_of(samples(kind) + (8 if kind == "shifted" else 0)), "x", method)
    assert low <= 0 <= high
    assert (low == 0) == (kind == "shifted")


# --- scale and zero point --------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(FINITE, FINITE, st.sampled_from(TYPES), st.booleans())
def test_zero_is_exact_and_the_rest_within_half_a_step(
    below: float, above: float, integers: IntegerType, symmetric: bool
) -> None:
    found = quantized_range(-below, above, integers, symmetric=symmetric)
    limits = np.iinfo(integers)
    assert limits.min <= found.zero_point <= limits.max
    assert np.float32(found.scale) == found.scale, "as the graph will hold it"
    assert np.isfinite(found.scale)
    assert found.scale >= np.finfo(np.float32).tiny
    assert fake_quantized(np.zeros(1), found, integers)[0] == 0
    points = np.linspace(-below, above, 101).astype(np.float32)
    errors = np.abs(points.astype(np.float64) - fake_quantized(points, found, integers))
    slack = 2e-7 * (limits.max - limits.min)  # of rounding the scale itself to float32
    assert (errors <= found.scale * (0.5 + slack)).all()


@pytest.mark.parametrize(("integers", "middle"), [("uint8", 128), ("int8", 0), ("uint16", 32768), ("int16", 0)])
def test_symmetric_ranges_have_zero_in_the_middle(integers: IntegerType, middle: int) -> None:
    for low, high in ((-3.0, 1.0), (0.0, 2.0), (-1.0, 0.0), (0.0, 0.0)):
        found = quantized_range(low, high, integers, symmetric=True)
        assert found.zero_point == middle
        if high > low:
            most = max(-low, high)
            top = np.iinfo(integers).max - middle
            assert found.scale == pytest.approx(most / top)
            assert (found.low, found.high) == (-most, most)


@pytest.mark.parametrize("integers", TYPES)
def test_what_is_never_negative_has_its_zero_at_the_bottom(integers: IntegerType) -> None:
    found = quantized_range(0.0, 6.0, integers, symmetric=False)
    assert found.zero_point == np.iinfo(integers).min
    found = quantized_range(-6.0, 0.0, integers, symmetric=False)
    assert found.zero_point == np.iinfo(integers).max


@settings(max_examples=300, deadline=None)
@given(st.floats(-90, 90).map(lambda e: float(np.float32(2.0**e))), st.sampled_from(TYPES))
def test_the_integers_never_reach_beyond_the_range_of_a_clip(high: float, integers: IntegerType) -> None:
    """ONNX Runtime drops a Clip before a QuantizeLinear only if the integers cannot mean more than the Clip lets by."""
    found = quantized_range(0.0, float(np.float32(high)), integers, symmetric=False)
    limits = np.iinfo(integers)
    assert np.float32(found.scale * (int(limits.max) - int(limits.min))) <= np.float32(high)


@pytest.mark.parametrize("integers", TYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("high", [0.0, 1e-45, 1e-40, 1e-37])
def test_ranges_without_width_get_a_scale_that_hardware_can_divide_by(
    integers: IntegerType, symmetric: bool, high: float
) -> None:
    found = quantized_range(0.0, high, integers, symmetric=symmetric)
    assert found.scale >= np.finfo(np.float32).tiny
    assert np.isfinite(np.float32(1) / np.float32(found.scale))
    if high < 1e-37:
        assert found.scale == 1
        assert fake_quantized(np.array([high]), found, integers)[0] == 0
