# SPDX-License-Identifier: Apache-2.0
"""Removing inputs of linear layers, against least squares on the data itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.pipeline.structure.surgeon import Linear, Surgeon, refit, relative_error, static_costs

Array = np.ndarray
TINY = 1e-9
"""A ridge that does not show."""


def inputs(rows: int, width: int, seed: int = 0) -> Array:
    """Correlated, as activations are, and with a mean."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)


def layer(x: Array, outputs: int = 5, block: int = 1, *, bias: bool = False, seed: int = 1) -> Linear:
    rng = np.random.default_rng(seed)
    width = x.shape[1]
    weight = rng.standard_normal((width + bias, outputs))
    seen = np.concatenate([x, np.ones((len(x), 1))], axis=1) if bias else x
    return Linear(seen.T @ seen, weight, np.arange(width).reshape(-1, block), int(bias))


def least_squares(x: Array, found: Linear, removed: Array) -> tuple[Array, float]:
    """The best weights and their squared error, from the data."""
    seen = np.concatenate([x, np.ones((len(x), 1))], axis=1) if found.fixed else x
    stay = np.setdiff1d(np.arange(seen.shape[1]), found.rows[removed].reshape(-1))
    target = seen @ found.weight
    best = np.linalg.lstsq(seen[:, stay], target, rcond=None)[0]
    full = np.zeros_like(found.weight)
    full[stay] = best
    return full, float(np.square(seen[:, stay] @ best - target).sum())


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_refit_is_least_squares(block: int, bias: bool) -> None:
    x = inputs(200, 12)
    found = layer(x, block=block, bias=bias)
    removed = np.asarray([0, 2])
    best, error = least_squares(x, found, removed)
    np.testing.assert_allclose(refit(found, removed, TINY), best, atol=1e-5)
    assert relative_error(found, best) * found.energy() == pytest.approx(error, rel=1e-6)


def test_the_first_unit_to_go_is_the_one_that_least_squares_misses_least() -> None:
    x = inputs(200, 8, seed=3)
    found = layer(x)
    errors = [least_squares(x, found, np.asarray([unit]))[1] for unit in range(8)]
    removal = Surgeon([found], TINY).remove(1)
    assert removal.order.tolist() == [int(np.argmin(errors))]
    assert removal.errors[1] * found.energy() == pytest.approx(min(errors), rel=1e-5)


@given(st.integers(0, 50), st.sampled_from([1, 2, 4]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_step_by_step_arrives_where_one_solution_does(seed: int, block: int, bias: bool) -> None:
    found = layer(inputs(60, 16, seed), block=block, bias=bias, seed=seed)
    until = 16 // block // 2
    removal = Surgeon([found], 0.01).remove(until, [1, until])
    for count, (weights,) in removal.snapshots.items():
        np.testing.assert_allclose(weights, refit(found, removal.order[:count]), atol=1e-7)
        assert not weights[found.rows[removal.order[:count]].reshape(-1)].any()
    assert len(set(removal.order.tolist())) == until
    assert (np.diff(removal.errors) >= 0).all()


@given(st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_the_error_of_the_way_is_the_penalized_error_of_its_weights(seed: int) -> None:
    """Without batches of several units, each step's cost is exact: it adds up to the error with its ridge."""
    x = inputs(80, 10, seed)
    found = layer(x, seed=seed)
    removal = Surgeon([found], 0.01).remove(5, [5])
    ridge = 0.01 * float(np.trace(found.gram)) / 10
    change = removal.snapshots[5][0] - found.weight
    penalized = float(np.einsum("kn,kn->", change, (found.gram + ridge * np.eye(10)) @ change))
    assert removal.errors[5] * found.energy() == pytest.approx(penalized, rel=1e-6)


def test_a_twin_goes_for_nothing() -> None:
    x = inputs(100, 6)
    x = np.concatenate([x, x[:, :1]], axis=1)
    removal = Surgeon([layer(x)], 1e-6).remove(1)
    assert removal.order[0] in (0, 6)
    assert removal.errors[1] < 1e-5


def test_a_bias_takes_up_a_constant_input() -> None:
    x = inputs(100, 5)
    x[:, 2] = 7.0
    with_bias, without = layer(x, bias=True), layer(x)
    assert relative_error(with_bias, refit(with_bias, np.asarray([2]), TINY)) < 1e-9
    assert relative_error(without, refit(without, np.asarray([2]), TINY)) > 1e-6


def test_two_readers_both_count() -> None:
    """A unit that one layer does not need is kept for the other that does."""
    x = np.random.default_rng(0).standard_normal((300, 4))
    one, other = layer(x), layer(x, seed=2)
    one.weight[1] = 0
    other.weight[2] = 0
    removal = Surgeon([one, other], TINY).remove(1)
    costs = [np.square(one.weight[u]).sum() / one.energy() + np.square(other.weight[u]).sum() / other.energy()
             for u in range(4)]  # fmt: skip
    assert removal.order[0] == int(np.argmin(costs))


def test_static_costs() -> None:
    x = np.diag([1.0, 10.0, 1.0])
    weight = np.asarray([[1.0], [0.5], [2.0]])
    found = Linear(x.T @ x, weight, np.arange(3)[:, None])
    assert np.argsort(static_costs([found], "magnitude")).tolist() == [1, 0, 2]
    assert np.argsort(static_costs([found], "activation")).tolist() == [0, 2, 1]


def test_large_layers_shrink_on_the_way() -> None:
    """The matrices drop rows in between; the result does not show it."""
    found = layer(inputs(400, 120, seed=9), outputs=3)
    removal = Surgeon([found], 0.01).remove(100, [10, 60, 100])
    for count, (weights,) in removal.snapshots.items():
        np.testing.assert_allclose(weights, refit(found, removal.order[:count]), atol=1e-7)
