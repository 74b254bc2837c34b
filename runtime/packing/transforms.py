# SPDX-License-Identifier: Apache-2.0
"""What turns the bytes of a tensor into parts that an entropy coder can do something with; all of it can be undone.

planes    The first bytes of all elements, then all second ones, and so on: the bytes that hold exponents of float
          weights take few values, and those of the mantissa are noise that is better left alone (Burtscher and
          Ratanaworabhan, FPC, 2009; ZipNN, arXiv 2411.05239).
rotated   Planes after a rotation by one bit, sign last: the exponent of float32 and bfloat16 fills one byte.
sparse    One bit an element says whether it is zero, then the others alone. Planes say it once in every plane; half of
          the float32 weights pruned takes 43 instead of 52 % this way (Deep Compression, arXiv 1510.00149, stores
          distances instead of bits).
palette   The values that occur, at most 256 of them, and for each element which one it is: weights that share values
          (k-means, the same paper) are often stored as the floats that they stand for.

Elements are compared as bit patterns, so that -0.0 and every NaN come back as they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine import Array
from .codecs import Damaged

Buffer = bytes | bytearray | memoryview

_SPARSE_FROM, _SPARSE_BYTES_FROM = 0.15, 0.65
"""Share of zeros from which marking them is tried. In bytes it saves less (1 % at one half, 10 % at four fifths), and
putting them back in their places takes as long as all the rest."""

_COLOURS = 256
"""Values of a palette; the table is always that long, zeros at its end."""

_BLOCK = 1 << 16
"""Elements that are put together at once: their bytes stay in the cache between the steps."""


@dataclass(frozen=True)
class Transform:
    """How one chunk is taken apart; `number` stands in files."""

    number: int
    sparse: bool = False
    planes: bool = False
    rotated: bool = False
    palette: bool = False

    def sizes(self, size: int, itemsize: int, kept: int) -> list[int]:
        """Bytes of each part of a chunk of `size` bytes of which `kept` elements are stored."""
        elements = size // itemsize
        bitmap = [-(-elements // 8)] if self.sparse else []
        if self.palette:
            return [*bitmap, _COLOURS * itemsize, kept]
        return bitmap + ([kept] * itemsize if self.planes else [kept * itemsize])


NONE = Transform(0)
TRANSFORMS = (
    NONE,
    Transform(1, planes=True),
    Transform(2, planes=True, rotated=True),
    Transform(3, sparse=True),
    Transform(4, sparse=True, planes=True),
    Transform(5, sparse=True, planes=True, rotated=True),
    Transform(6, palette=True),
    Transform(7, sparse=True, palette=True),
)


def candidates(data: Buffer, dtype: str, itemsize: int) -> list[Transform]:
    """The transforms that are worth trying on some elements."""
    elements = np.frombuffer(data, f"<u{itemsize}")
    zeros = 1 - np.count_nonzero(elements) / max(1, elements.size)
    wide = itemsize > 1
    enough = _SPARSE_FROM if wide else _SPARSE_BYTES_FROM
    floats = dtype in ("float32", "bfloat16")
    palette = wide and elements.size > _COLOURS and np.unique(elements[: 8 * _COLOURS]).size <= _COLOURS
    palette = palette and np.unique(elements).size <= _COLOURS
    chosen = []
    for transform in TRANSFORMS:
        fits = transform.planes == (wide and not transform.palette) or transform is NONE
        if (
            fits
            and (floats or not transform.rotated)
            and (palette or not transform.palette)
            and (zeros >= enough or not transform.sparse)
        ):
            chosen.append(transform)
    return chosen


def forward(transform: Transform, data: Buffer, itemsize: int) -> tuple[int, list[bytes]]:
    """Take a chunk apart: how many elements were kept, and the parts."""
    elements: Array = np.frombuffer(data, f"<u{itemsize}")
    parts = []
    if transform.sparse:
        kept = elements != 0
        parts.append(np.packbits(kept).tobytes())
        elements = elements[kept]
    if transform.rotated:
        elements = (elements << 1) | (elements >> (8 * itemsize - 1))
    count = elements.size
    if transform.palette:
        values, places = np.unique(elements, return_inverse=True)
        table = np.zeros(_COLOURS, elements.dtype)
        table[: values.size] = values
        return count, [*parts, table.tobytes(), places.astype(np.uint8).tobytes()]
    if not transform.planes:
        return count, [*parts, elements.tobytes()]
    return count, parts + [plane.tobytes() for plane in elements.view(np.uint8).reshape(count, itemsize).T]


def inverse(transform: Transform, parts: list[bytes | memoryview], size: int, itemsize: int) -> Array:
    """Put a chunk together again.

    Args:
        parts: Of the sizes that `Transform.sizes` gives.

    Returns:
        uint8 [size]

    Raises:
        Damaged: The bitmap keeps another number of elements than there are.
    """
    if not transform.sparse:
        return _elements(transform, parts, itemsize).view(np.uint8)
    values = _elements(transform, parts[1:], itemsize)
    # Indices, not the mask itself: numpy scatters by them three to five times as fast
    places = np.flatnonzero(np.unpackbits(np.frombuffer(parts[0], np.uint8), count=size // itemsize).view(bool))
    if places.size != values.size:
        raise Damaged("the zeros do not match")
    found = np.zeros(size // itemsize, values.dtype)
    found[places] = values
    return found.view(np.uint8)


def _elements(transform: Transform, parts: list[bytes | memoryview], itemsize: int) -> Array:
    dtype = np.dtype(f"<u{itemsize}")
    if transform.palette:
        table, places = np.frombuffer(parts[0], dtype), np.frombuffer(parts[1], np.uint8)
        return table[places]
    if not transform.planes:
        return np.frombuffer(parts[0], dtype)
    planes = [np.frombuffer(part, np.uint8) for part in parts]
    elements: Array = np.empty(planes[0].size, dtype)
    for start in range(0, elements.size, _BLOCK):
        block = elements[start : start + _BLOCK]
        for index, view in enumerate(block.view(np.uint8).reshape(-1, itemsize).T):
            view[:] = planes[index][start : start + _BLOCK]
        if transform.rotated:
            sign = block << (8 * itemsize - 1)
            block >>= 1
            block |= sign
    return elements
