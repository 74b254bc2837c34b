# SPDX-License-Identifier: Apache-2.0
"""A histogram that grows with its data and still counts exactly.

The width of a bin is a power of two and bins begin at multiples of it: bin k holds width * k <= x < width * (k + 1).
Dividing by a power of two is exact in floating point, and two neighbouring bins make exactly one of twice the width. So
the counts depend neither on the order of the batches nor on how the data is cut into them: they equal those of all
data at once. The finest width at which the data's range needs at most `BINS` bins is used, so that at least about half
of the bins lie inside the range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

BINS = 2048
_CHUNK = 1 << 18
"""Elements counted at a time, which stay in the processor's cache."""


@dataclass
class Histogram:
    """Counts of the values of one tensor.

    Attributes:
        counts: int64 [BINS].
        exponent: A bin is 2 ** exponent wide.
        first: The number of the first bin: counts[i] is that of bin first + i.
        low: The smallest value.
        high: The largest value.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    exponent: int = 0
    first: int = 0
    low: float = math.inf
    high: float = -math.inf

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def centres(self) -> np.ndarray:
        """The middle of each bin, float64 [BINS]."""
        return (self.first + np.arange(BINS) + 0.5) * self.width

    def add(self, values: np.ndarray) -> None:
        """Count finite values of any shape and floating point dtype; an empty array changes nothing."""
        if not values.size:
            return
        flat = values.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("a histogram takes finite values only")
        self._cover(low, high)
        # A product with a power of two is exact in float32 as well, as long as it neither underflows nor overflows
        narrow = flat.dtype == np.float32 and -100 < self.exponent <= 0
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            scaled = part * np.float32(1 / self.width) if narrow else np.ldexp(part.astype(np.float64), -self.exponent)
            np.floor(scaled, out=scaled)
            self.counts += np.bincount(scaled.astype(np.int64) - self.first, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        if not other.total:
            return
        self._cover(other.low, other.high)
        exponent = self.exponent
        bins = (other.first + np.flatnonzero(other.counts)) >> (exponent - other.exponent)
        np.add.at(self.counts, bins - self.first, other.counts[other.counts > 0])

    def _cover(self, low: float, high: float) -> None:
        """Widen the range to low .. high, merging bins where they have to become wider."""
        low, high = min(low, self.low), max(high, self.high)
        exponent = _exponent_for(low, high)
        filled = np.flatnonzero(self.counts)
        counts = np.zeros(BINS, np.int64)
        first = _bin_of(low, exponent)
        if filled.size:
            np.add.at(counts, ((self.first + filled) >> (exponent - self.exponent)) - first, self.counts[filled])
        self.counts, self.exponent, self.first, self.low, self.high = counts, exponent, first, low, high


def _bin_of(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _exponent_for(low: float, high: float) -> int:
    """The finest width at which low .. high lies in at most BINS bins."""
    largest = max(high - low, abs(low) * 2.0**-20, abs(high) * 2.0**-20, 2.0**-140)
    exponent = math.frexp(largest / BINS)[1] - 2
    while _bin_of(high, exponent) - _bin_of(low, exponent) >= BINS:
        exponent += 1
    return exponent
