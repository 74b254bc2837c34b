# SPDX-License-Identifier: Apache-2.0
"""Masks against sorting, and the laws of ratios and patterns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from onnxpress.pipeline.sparsity.masks import (
    Pattern,
    keep_largest,
    keep_largest_in_rows,
    keep_largest_of_all,
    keep_pattern,
)

FEW = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
"""Few different scores: ties are what goes wrong."""


def scores(rows: int = 6, columns: int = 12) -> st.SearchStrategy[np.ndarray]:
    return npst.arrays(np.float32, (rows, columns), elements=FEW)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("remove", [0, 1, 100, 199, 200])
def test_exactly_the_smallest_go(remove: int) -> None:
    array = normal(10, 20)
    keep = keep_largest(array, remove)
    assert keep.shape == array.shape
    assert set(array[~keep]) == set(np.sort(array, axis=None)[:remove])


@given(scores(), st.integers(0, 72))
def test_the_number_is_exact_and_nothing_smaller_stays(array: np.ndarray, remove: int) -> None:
    keep = keep_largest(array, remove)
    assert (~keep).sum() == remove
    if 0 < remove < array.size:
        assert array[~keep].max() <= array[keep].min()


@given(st.lists(scores(3, 5), min_size=1, max_size=4), st.data())
def test_several_arrays_are_one_long_one(parts: list[np.ndarray], data: st.DataObject) -> None:
    remove = data.draw(st.integers(0, 15 * len(parts)))
    apart = keep_largest_of_all(parts, remove)
    whole = keep_largest(np.concatenate(parts), remove)
    np.testing.assert_array_equal(np.concatenate(apart), whole)


@given(scores(), st.integers(0, 12))
def test_rows_lose_the_same_number_each(array: np.ndarray, remove: int) -> None:
    keep = keep_largest_in_rows(array, remove)
    assert ((~keep).sum(axis=1) == remove).all()
    for row, mask in zip(array, keep, strict=True):
        if 0 < remove < len(row):
            assert row[~mask].max() <= row[mask].min()


@given(scores(), st.sampled_from(["1:2", "1:3", "2:3", "2:4", "1:4", "3:4", "2:6", "7:12"]))
def test_every_group_keeps_its_n_largest(array: np.ndarray, text: str) -> None:
    pattern = Pattern.of(text)
    keep = keep_pattern(array, pattern).reshape(-1, pattern.group)
    assert (keep.sum(axis=1) == pattern.kept).all()
    for group, mask in zip(array.reshape(-1, pattern.group), keep, strict=True):
        assert group[~mask].max() <= group[mask].min()


@pytest.mark.parametrize(
    "text", ["", "2", "2:", "4:2", "2:2", "0:4", "-1:4", "2:4:8", "2.5:4", " 2:4", "2:99999", "²:4"]
)
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match="no pattern N:M"):
        Pattern.of(text)
