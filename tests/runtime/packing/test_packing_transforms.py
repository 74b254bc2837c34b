# SPDX-License-Identifier: Apache-2.0
"""Each transform is undone exactly, and takes apart what it says that it does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing_samples import KINDS, values

from onnxpress.runtime.packing.codecs import Damaged
from onnxpress.runtime.packing.transforms import TRANSFORMS, Transform, candidates, forward, inverse


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: str(t.number))
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from(KINDS), st.integers(0, 5000), st.integers(0, 3))
def test_there_and_back(transform: Transform, itemsize: int, kind: str, count: int, seed: int) -> None:
    data = values(kind, count * itemsize, seed)
    if transform.palette and np.unique(np.frombuffer(data, f"<u{itemsize}")).size > 256:
        return
    kept, parts = forward(transform, data, itemsize)
    assert [len(part) for part in parts] == transform.sizes(len(data), itemsize, kept)
    assert inverse(transform, list(parts), len(data), itemsize).tobytes() == data


def test_numbers_stand_in_files() -> None:
    assert [transform.number for transform in TRANSFORMS] == list(range(8))


def test_more_than_one_block_of_elements() -> None:
    data = values("weights", 4 * 200_000, 0)
    kept, parts = forward(TRANSFORMS[2], data, 4)
    assert kept == 200_000
    assert inverse(TRANSFORMS[2], list(parts), len(data), 4).tobytes() == data


def test_planes_are_the_bytes_of_all_elements_in_turn() -> None:
    data = bytes(range(12))
    assert forward(TRANSFORMS[1], data, 4) == (3, [bytes([i, i + 4, i + 8]) for i in range(4)])


def test_a_rotation_puts_the_exponent_of_a_float_into_one_byte() -> None:
    numbers = np.float32([1.5, -1.5, 3e-5, -700])
    _, parts = forward(TRANSFORMS[2], numbers.tobytes(), 4)
    assert list(parts[3]) == [127, 127, 127 - 16, 127 + 9]
    assert [byte & 1 for byte in parts[0]] == [0, 1, 0, 1]


def test_zeros_are_one_bit_and_minus_zero_is_none() -> None:
    numbers = np.float32([0, 1, -0.0, np.nan, 0, 0, 0, 0, 2])
    kept, (bitmap, stored) = forward(TRANSFORMS[3], numbers.tobytes(), 4)
    assert (kept, bitmap) == (4, bytes([0b01110000, 0b10000000]))
    assert np.array_equal(np.frombuffer(stored, np.float32), [1, 0, np.nan, 2], equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "dtype", "itemsize", "expected"),
    [
        ("weights", "float32", 4, {0, 1, 2}),
        ("pruned", "float32", 4, {0, 1, 2, 4, 5}),
        ("palette", "float32", 4, {0, 1, 2, 4, 5, 6, 7}),
        ("weights", "float16", 2, {0, 1}),
        ("weights", "int8", 1, {0}),
        ("pruned", "int8", 1, {0}),
        ("zeros", "int8", 1, {0, 3}),
        ("noise", "int64", 8, {0, 1}),
    ],
)
def test_what_is_tried(kind: str, dtype: str, itemsize: int, expected: set[int]) -> None:
    assert {t.number for t in candidates(values(kind, 40_000, 0), dtype, itemsize)} == expected


def test_a_bitmap_that_does_not_match_is_damaged() -> None:
    _, parts = forward(TRANSFORMS[3], bytes([0, 1, 0, 2]), 1)
    with pytest.raises(Damaged):
        inverse(TRANSFORMS[3], [b"\xff", parts[1]], 4, 1)
