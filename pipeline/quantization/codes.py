# SPDX-License-Identifier: Apache-2.0
"""Widths of quantized weights, and how their codes lie in bytes.

A code is a small unsigned integer; `(stride * code - zero) * scale` is the weight it stands for. A byte holds as many
codes as fit, as digits to a base, the first one lowest: base 16 is two 4 bit codes, base 3 five ternary ones (3^5 =
243). Three bits are two planes, the low two bits and the high bit, since eight codes then fill exactly three bytes.
For powers of two this is the order of MatMulNBits and GatherBlockQuantized (ONNX Runtime, ContribOperators.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Bits = Literal[8, 4, 3, 2, "ternary", "sign"]
"""How settings name a width: `ternary` is -1, 0, 1 in 1.6 bits, `sign` is -1, 1 in one bit."""


@dataclass(frozen=True)
class Plane:
    """One digit of the codes, packed by itself.

    Attributes:
        base: How many values the digit has.
        per_byte: How many digits a byte holds; base ** per_byte <= 256.
        weight: What the digit counts in the code.
    """

    base: int
    per_byte: int
    weight: int = 1

    def bytes_for(self, count: int) -> int:
        return -(-count // self.per_byte)

    def table(self) -> np.ndarray:
        """What each byte means: uint8 [256, per_byte], digits times `weight`."""
        powers = self.base ** np.arange(self.per_byte)
        return (np.arange(256)[:, None] // powers % self.base * self.weight).astype(np.uint8)


@dataclass(frozen=True)
class Width:
    """A number format for weights.

    Attributes:
        bits: Its name in settings.
        levels: Codes are 0 to levels - 1.
        stride: Distance of the integers that neighbouring codes stand for.
        zero: The zero point where the grid is symmetric.
        planes: How the codes are packed.
    """

    bits: Bits
    levels: int
    stride: int
    zero: int
    planes: tuple[Plane, ...]

    @property
    def uniform(self) -> bool:
        """Whether the codes are plain integers of some bits, which can have a zero point of their own."""
        return isinstance(self.bits, int)

    @property
    def stored_bits(self) -> float:
        """Bits a weight once packed, without scales."""
        return sum(8 / plane.per_byte for plane in self.planes)


WIDTHS: dict[Bits, Width] = {
    8: Width(8, 256, 1, 128, (Plane(256, 1),)),
    4: Width(4, 16, 1, 8, (Plane(16, 2),)),
    3: Width(3, 8, 1, 4, (Plane(4, 4), Plane(2, 8, weight=4))),
    2: Width(2, 4, 1, 2, (Plane(4, 4),)),
    "ternary": Width("ternary", 3, 1, 1, (Plane(3, 5),)),
    "sign": Width("sign", 2, 2, 1, (Plane(2, 8),)),
}


def packed_bytes(width: Width, count: int) -> int:
    """Bytes that `pack` needs for `count` codes in a row."""
    return sum(plane.bytes_for(count) for plane in width.planes)


def pack_plane(codes: np.ndarray, plane: Plane) -> np.ndarray:
    """One plane of `codes`, uint8 [..., n], as uint8 [..., ceil(n / per_byte)]; what is left of a byte is zero."""
    *lead, count = codes.shape
    length = plane.bytes_for(count)
    packed = np.zeros((*lead, length), np.uint8)
    for place in range(plane.per_byte):
        digits = codes[..., place :: plane.per_byte] // np.uint8(plane.weight)
        if plane.base < 256:
            digits = digits % np.uint8(plane.base)
        packed[..., : digits.shape[-1]] += digits * np.uint8(plane.base**place)
    return packed


def unpack_plane(packed: np.ndarray, plane: Plane, count: int) -> np.ndarray:
    """The share of one plane in `count` codes a row, uint8 [..., count]."""
    digits = np.empty((*packed.shape[:-1], count), np.uint8)
    for place in range(min(plane.per_byte, count)):
        some = packed[..., : len(range(place, count, plane.per_byte))] // np.uint8(plane.base**place)
        if plane.base < 256:
            some %= np.uint8(plane.base)
        digits[..., place :: plane.per_byte] = some * np.uint8(plane.weight)
    return digits


def pack(codes: np.ndarray, width: Width) -> np.ndarray:
    """Pack along the last axis.

    Args:
        codes: uint8 [..., n], each below `width.levels`.
        width: Their format.

    Returns:
        uint8 [..., packed_bytes(width, n)]: the planes behind each other.

    Raises:
        ValueError: A code is too large, or there is no axis.
    """
    if codes.ndim == 0:
        raise ValueError("codes to pack need an axis")
    if codes.size and int(codes.max()) >= width.levels:
        raise ValueError(f"code {int(codes.max())} does not fit {width.levels} levels")
    return np.concatenate([pack_plane(codes.astype(np.uint8), plane) for plane in width.planes], axis=-1)


def unpack(packed: np.ndarray, width: Width, count: int) -> np.ndarray:
    """What `pack` made, back again: uint8 [..., count]."""
    codes = np.zeros((*packed.shape[:-1], count), np.uint8)
    start = 0
    for plane in width.planes:
        end = start + plane.bytes_for(count)
        codes += unpack_plane(packed[..., start:end], plane, count)
        start = end
    return codes
