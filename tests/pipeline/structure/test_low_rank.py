# SPDX-License-Identifier: Apache-2.0
"""Low rank against exact computation: no other matrix of that rank does better, and errors are what is promised."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.pipeline.structure.low_rank import Option, allocate, break_even, decompose

Array = np.ndarray


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def inputs(rows: int, channels: int, seed: int) -> Array:
    """Correlated, with a few channels far larger than the others and a mean, as activations are."""
    scale = np.exp(normal(channels, seed=seed))
    return normal(rows, channels, seed=seed + 1) @ normal(channels, channels, seed=seed + 2) * scale + scale


shapes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(0, 99))


def parts_of(weight: Array, x: Array | None = None) -> tuple[Array, Array, Array]:
    """All factors, float64, and the relative errors."""
    found = decompose(weight, None if x is None else x.T @ x)
    assert found is not None
    return found.left.astype(np.float64), found.right.astype(np.float64), found.errors()


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_plain_errors_are_the_tails_of_the_singular_values(shape: tuple[int, int, int]) -> None:
    rows, columns, seed = shape
    weight = normal(rows, columns, seed=seed)
    left, right, errors = parts_of(weight)
    values = np.linalg.svd(weight, compute_uv=False)
    for rank in range(min(rows, columns) + 1):
        tail = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        assert errors[rank] == pytest.approx(tail, abs=1e-7)
        off = np.linalg.norm(weight - left[:, :rank] @ right[:rank]) / np.linalg.norm(weight)
        assert off == pytest.approx(tail, abs=1e-5)


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_whitened_errors_are_those_of_the_outputs(shape: tuple[int, int, int]) -> None:
    rows, columns, seed = shape
    weight, x = normal(rows, columns, seed=seed), inputs(4 * rows, rows, seed)
    left, right, errors = parts_of(weight, x)
    # The oracle needs no X^T X: in exact arithmetic the spectrum is that of the outputs themselves
    values = np.linalg.svd(x @ weight, compute_uv=False)[: min(rows, columns)]
    for rank in range(min(rows, columns) + 1):
        off = np.linalg.norm(x @ (weight - left[:, :rank] @ right[:rank])) / np.linalg.norm(x @ weight)
        tail = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        assert off == pytest.approx(tail, abs=1e-4)
        assert errors[rank] == pytest.approx(tail, abs=1e-5)


@given(shapes, st.integers(0, 999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_other_matrix_of_that_rank_is_better(shape: tuple[int, int, int], other: int, whiten: bool) -> None:
    """Eckart and Young, and the same for outputs: against random pairs whose second factor is fitted to the first."""
    rows, columns, seed = shape
    weight, x = normal(rows, columns, seed=seed), inputs(4 * rows, rows, seed) if whiten else np.eye(rows)
    rank = 1 + other % min(rows, columns)
    left, right, _ = parts_of(weight, x if whiten else None)
    ours = np.linalg.norm(x @ (weight - left[:, :rank] @ right[:rank]))
    start = normal(rows, rank, seed=other)
    fitted = np.linalg.lstsq(x @ start, x @ weight, rcond=None)[0]
    theirs = np.linalg.norm(x @ (weight - start @ fitted))
    assert ours <= theirs + 1e-4 * np.linalg.norm(x @ weight)


def test_whitening_beats_plain_decomposition_on_outputs() -> None:
    weight, x = normal(24, 32, seed=1), inputs(200, 24, seed=5)
    for rank in (4, 8, 12):
        off = []
        for parts in (parts_of(weight), parts_of(weight, x)):
            off.append(np.linalg.norm(x @ (weight - parts[0][:, :rank] @ parts[1][:rank])))
        assert off[1] < 0.7 * off[0]


def test_both_factors_share_the_scale() -> None:
    left, right, _ = parts_of(normal(20, 30), inputs(100, 20, seed=2) * 1e3)
    assert np.allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-4)


def test_a_direction_that_the_data_lacks_is_not_given_up() -> None:
    x = inputs(100, 8, seed=0)
    x[:, 3] = 0
    weight = normal(8, 6)
    found = decompose(weight, x.T @ x, damping=1e-4)
    assert found is not None
    left, right = found.factors(6)
    assert np.allclose(left @ right, weight, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_rows_than_channels_still_give_an_answer(rows: int) -> None:
    x = inputs(100, 8, seed=0)[:rows]
    found = decompose(normal(8, 6), x.T @ x)
    assert (found is None) == (rows == 0)
    if found is not None:
        assert np.isfinite(found.left).all()
        assert found.errors()[min(rows, 6)] < 1e-2


def test_only_the_terms_of_use_are_kept() -> None:
    found = decompose(normal(12, 10), keep=3)
    assert found is not None
    assert found.left.shape == (12, 3)
    assert found.right.shape == (3, 10)
    assert len(found.errors()) == 11


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_the_rank_for_an_energy_is_the_smallest(energy: float) -> None:
    found = decompose(normal(16, 12))
    assert found is not None
    rank = found.rank_for(energy)
    kept = 1 - found.errors() ** 2
    assert kept[rank] >= energy - 1e-9
    assert rank == 0 or kept[rank - 1] < energy


def test_a_weight_of_zeros_has_no_error() -> None:
    found = decompose(np.zeros((6, 5)))
    assert found is not None
    assert found.rank_for(0.99) == 0
    assert not found.errors().any()


@given(st.integers(1, 400), st.integers(1, 400))
def test_break_even_is_where_factors_stop_saving(rows: int, columns: int) -> None:
    rank = break_even(rows, columns)
    assert rank * (rows + columns) < rows * columns
    assert (rank + 1) * (rows + columns) >= rows * columns


@st.composite
def choices(draw: st.DrawFn) -> list[list[Option]]:
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        pairs = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), max_size=4))
        options = [Option(0, 0.0, 0.0), *(Option(i + 1, float(s), float(e)) for i, (s, e) in enumerate(pairs))]
        layers.append(options)
    return layers


@given(choices(), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_no_other_allocation_saves_as_much_with_less_error(layers: list[list[Option]], target: int) -> None:
    chosen = allocate(layers, target)
    saved, error = sum(o.saved for o in chosen), sum(o.error for o in chosen)
    for other in product(*layers):
        if sum(o.saved for o in other) >= saved:
            assert sum(o.error for o in other) >= error - 1e-9
    if saved < target:  # then there was no more to save
        assert saved == sum(max(o.saved for o in options) for options in layers)


def test_a_budget_goes_where_it_costs_least() -> None:
    cheap = [Option(0, 0, 0), Option(8, 10, 0.01), Option(4, 15, 0.02)]
    dear = [Option(0, 0, 0), Option(8, 10, 0.5), Option(4, 15, 0.9)]
    assert [option.rank for option in allocate([dear, cheap], 12)] == [0, 4]
    assert [option.rank for option in allocate([dear, cheap], 20)] == [8, 4]
