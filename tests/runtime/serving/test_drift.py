# SPDX-License-Identifier: Apache-2.0
"""The drift statistics against scipy's distributions, and against what they promise: the rate of false alarms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.runtime.serving.drift import (
    below,
    chi_square_point,
    chi_square_tail,
    class_drift,
    direction_drift,
    kolmogorov_point,
    kolmogorov_tail,
    number_drift,
)


@pytest.mark.parametrize(("tail", "degrees", "value"), [(0.05, 1, 3.8415), (0.001, 1, 10.8276), (0.01, 10, 23.2093)])
def test_chi_squared_is_the_table_s(tail: float, degrees: int, value: float) -> None:
    assert chi_square_point(tail, degrees) == pytest.approx(value, abs=1e-3)


@settings(deadline=None)
@given(st.floats(0.01, 400), st.floats(0.3, 300))
def test_chi_squared_is_scipy_s(value: float, degrees: float) -> None:
    chi2 = pytest.importorskip("scipy.stats").chi2
    assert chi_square_tail(value, degrees) == pytest.approx(chi2.sf(value, degrees), rel=1e-8, abs=1e-13)


def test_kolmogorov_is_the_table_s() -> None:
    assert kolmogorov_point(0.05) == pytest.approx(1.3581, abs=1e-4)
    assert kolmogorov_point(0.01) == pytest.approx(1.6276, abs=1e-4)
    assert kolmogorov_tail(0.0) == 1.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.lists(st.integers(0, 9), min_size=2, max_size=60))
def test_the_statistics_are_scipy_s(first: list[int], second: list[int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array(first, np.float64), np.array(second, np.float64)
    assert number_drift(a, b, 0.01).statistic == pytest.approx(stats.ks_2samp(a, b, method="asymp").statistic)
    counts = np.array([[30, 20, 50], [25 + first[0], 25, 50]])
    g = stats.chi2_contingency(counts, lambda_="log-likelihood", correction=False).statistic
    assert class_drift(*counts, 0.01).statistic == pytest.approx(g / (2 * counts.sum()), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_the_divergence_is_symmetric_bounded_and_zero_for_the_same(first: list[int], second: list[int]) -> None:
    size = max(len(first), len(second))
    a, b = (np.pad(np.array(x), (0, size - len(x))) for x in (first, second))
    one, other = class_drift(a, b, 0.01), class_drift(b, a, 0.01)
    assert one.statistic == pytest.approx(other.statistic, abs=1e-12)
    assert 0 <= one.statistic <= math.log(2) + 1e-12
    assert class_drift(a, a, 0.01).statistic == pytest.approx(0, abs=1e-12)


TRIALS, RATE = 1000, 0.02
MOST = RATE * TRIALS + 4 * math.sqrt(RATE * TRIALS)
"""Four standard deviations above the alarms that are allowed."""


@pytest.mark.parametrize("classes", [2, 5, 200])
def test_unchanged_classes_alarm_as_rarely_as_promised(classes: int) -> None:
    draw = np.random.default_rng(0)
    shares = draw.dirichlet(np.ones(classes))
    found = [class_drift(draw.multinomial(1000, shares), draw.multinomial(500, shares), RATE, 0) for _ in range(TRIALS)]
    assert sum(drift.alarm for drift in found) <= MOST
    mean = np.mean([drift.statistic for drift in found])
    assert mean == pytest.approx(np.mean([drift.expected for drift in found]), rel=0.15)


def test_unchanged_numbers_alarm_as_rarely_as_promised_with_and_without_ties() -> None:
    draw = np.random.default_rng(1)
    found = [number_drift(draw.normal(size=400), draw.normal(size=300), RATE, 0) for _ in range(TRIALS)]
    assert sum(drift.alarm for drift in found) <= MOST
    assert np.mean([d.statistic for d in found]) == pytest.approx(found[0].expected, rel=0.1)
    tied = [number_drift(draw.poisson(1, 400), draw.poisson(1, 300), RATE, 0) for _ in range(TRIALS)]
    assert sum(drift.alarm for drift in tied) <= MOST


@pytest.mark.parametrize("spread", ["round", "flat", "around a mean"])
def test_unchanged_directions_alarm_as_rarely_as_promised(spread: str) -> None:
    draw = np.random.default_rng(2)
    axes = np.ones(24) if spread != "flat" else 0.5 ** np.arange(24)
    mean = np.zeros(24) if spread != "around a mean" else np.full(24, 0.5)
    found = [
        direction_drift(draw.normal(size=(200, 24)) * axes + mean, draw.normal(size=(100, 24)) * axes + mean, RATE, 0)
        for _ in range(TRIALS)
    ]
    assert sum(drift.alarm for drift in found) <= MOST * 1.3  # the threshold has two moments of the true distribution
    assert np.mean([d.statistic for d in found]) == pytest.approx(np.mean([d.expected for d in found]), rel=0.1)


def test_a_change_is_seen() -> None:
    draw = np.random.default_rng(3)
    assert class_drift(np.array([500, 500]), np.array([350, 150]), 1e-6).alarm
    assert class_drift(np.array([500, 500, 0]), np.array([240, 240, 20]), 1e-6).alarm  # a class never seen before
    assert number_drift(draw.normal(size=500), draw.normal(0.6, size=500), 1e-6).alarm
    away = np.zeros(32)
    away[5] = 3.0
    assert direction_drift(draw.normal(size=(500, 32)), draw.normal(size=(300, 32)) + away, 1e-6).alarm


def test_a_certain_trifle_raises_no_alarm() -> None:
    assert not class_drift(np.array([500_000, 500_000]), np.array([495_000, 505_000]), 1e-3).alarm
    assert class_drift(np.array([500_000, 500_000]), np.array([495_000, 505_000]), 1e-3, floor=0).alarm


def test_one_class_and_one_direction_are_no_error() -> None:
    assert not class_drift(np.array([9]), np.array([9]), 0.01).alarm
    same = np.tile([1.0, 2.0], (10, 1))
    assert not direction_drift(same, same * 3, 0.01).alarm
    assert direction_drift(same, same[:, ::-1], 0.01).alarm
    assert not number_drift(np.zeros(5), np.zeros(9), 0.01).alarm


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.5, 0.999), st.sampled_from([1e-2, 1e-4, 1e-6]))
def test_a_share_that_is_as_wanted_is_seldom_called_too_low(trials: int, wanted: float, rate: float) -> None:
    binom = pytest.importorskip("scipy.stats").binom
    called = [hits for hits in range(trials + 1) if below(hits, trials, wanted, rate)]
    assert binom.cdf(max(called, default=-1), trials, wanted) <= rate * 1.0001
    assert below(0, 100_000, wanted, rate)
    assert not below(0, 0, wanted, rate)
