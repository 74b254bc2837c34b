# SPDX-License-Identifier: Apache-2.0
"""Packing codes into bytes, for every width and shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxpress.pipeline.quantization.codes import WIDTHS, Bits, pack, pack_plane, packed_bytes, unpack

every_width = pytest.mark.parametrize("bits", list(WIDTHS))
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=19)


@st.composite
def codes(draw: st.DrawFn) -> tuple[Bits, np.ndarray]:
    bits = draw(st.sampled_from(list(WIDTHS)))
    top = WIDTHS[bits].levels - 1
    return bits, draw(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, top)))


@given(codes())
def test_unpacking_gives_back_what_was_packed(case: tuple[Bits, np.ndarray]) -> None:
    bits, array = case
    packed = pack(array, WIDTHS[bits])
    assert packed.dtype == np.uint8
    assert packed.shape == (*array.shape[:-1], packed_bytes(WIDTHS[bits], array.shape[-1]))
    again = unpack(packed, WIDTHS[bits], array.shape[-1])
    assert again.dtype == np.uint8
    assert np.array_equal(again, array)


@given(codes())
def test_the_tables_say_what_bytes_hold(case: tuple[Bits, np.ndarray]) -> None:
    """The graph looks bytes up in these tables: it must read what `unpack` reads."""
    bits, array = case
    count, total = array.shape[-1], np.zeros(array.shape, np.uint8)
    for plane in WIDTHS[bits].planes:
        digits = plane.table()[pack_plane(array, plane)]
        total += digits.reshape(*array.shape[:-1], plane.bytes_for(count) * plane.per_byte)[..., :count]
    assert np.array_equal(total, array)


@pytest.mark.parametrize(
    ("bits", "bytes_of_240"), [(8, 240), (4, 120), (3, 90), (2, 60), ("ternary", 48), ("sign", 30)]
)
def test_bytes_are_as_promised(bits: Bits, bytes_of_240: int) -> None:
    assert pack(np.zeros((7, 240), np.uint8), WIDTHS[bits]).nbytes == 7 * bytes_of_240
    assert packed_bytes(WIDTHS[bits], 240) == bytes_of_240 == 240 * WIDTHS[bits].stored_bits / 8


@every_width
def test_every_code_survives_in_every_place(bits: Bits) -> None:
    levels = WIDTHS[bits].levels
    array = (np.arange(levels * 41) % levels).astype(np.uint8)
    assert np.array_equal(unpack(pack(array, WIDTHS[bits]), WIDTHS[bits], len(array)), array)


def test_powers_of_two_lie_as_onnxruntime_reads_them() -> None:
    """The first code has the lowest bits."""
    assert pack(np.array([1, 15], np.uint8), WIDTHS[4]).tolist() == [0xF1]
    assert pack(np.array([3, 0, 1, 2], np.uint8), WIDTHS[2]).tolist() == [0b10_01_00_11]
    assert pack(np.array([1, 0, 0, 0, 0, 0, 0, 1], np.uint8), WIDTHS["sign"]).tolist() == [0b1000_0001]


@every_width
def test_a_code_that_does_not_fit_is_refused(bits: Bits) -> None:
    too_large = np.array([WIDTHS[bits].levels], np.int64)
    with pytest.raises(ValueError, match="does not fit"):
        pack(too_large, WIDTHS[bits])
    with pytest.raises(ValueError, match="axis"):
        pack(np.array(0, np.uint8), WIDTHS[bits])
