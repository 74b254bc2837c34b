# SPDX-License-Identifier: Apache-2.0
"""The last two minutes, second by second, in a ring in memory: what the page draws."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SPAN = 120
"""Seconds that are kept."""

_LEAST_MS, _RATIO, _BINS = 0.05, 1.1, 152
"""Latencies are counted in bins that grow by a tenth, from 0.05 ms to 89 s, so a quantile is right within 5 %."""


@dataclass
class Second:
    """What one model did in one second."""

    second: int = -1
    requests: int = 0
    errors: int = 0
    rows: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    latencies: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))


class Ring:
    """The last seconds of one model."""

    def __init__(self) -> None:
        self._seconds = [Second() for _ in range(SPAN)]
        self.requests = self.errors = self.rows = 0

    def at(self, when: float) -> Second:
        """The second that a moment lies in, emptied if it held an older one."""
        second = int(when)
        place = second % SPAN
        if self._seconds[place].second != second:
            self._seconds[place] = Second(second)
        return self._seconds[place]

    def answered(self, when: float, status: int, rows: int, total_ms: float) -> None:
        """Count a request."""
        now, failed = self.at(when), status >= 400
        now.requests += 1
        now.errors += failed
        now.rows += rows
        self.requests += 1
        self.errors += failed
        self.rows += rows
        if not failed:
            now.latencies[_bin(total_ms)] += 1

    def ran(self, when: float, rows: int) -> None:
        """Count a batch."""
        self.at(when).batches[rows] += 1

    def series(self, now: float) -> dict[str, Any]:
        """The figures of every whole second, oldest first, and of the last minute together."""
        last = int(now) - 1
        empty = Second()
        kept = [
            row if (row := self._seconds[second % SPAN]).second == second else empty
            for second in range(last - SPAN + 2, last + 1)
        ]
        minute = kept[-60:]
        latencies = sum((row.latencies for row in minute), np.zeros(_BINS, np.int64))
        return {
            "requests_per_second": [row.requests for row in kept],
            "errors_per_second": [row.errors for row in kept],
            "rows_per_second": [row.rows for row in kept],
            "p50_ms": [quantile(row.latencies, 0.5) for row in kept],
            "p99_ms": [quantile(row.latencies, 0.99) for row in kept],
            "minute": {
                "requests_per_second": sum(row.requests for row in minute) / 60,
                "p50_ms": quantile(latencies, 0.5),
                "p99_ms": quantile(latencies, 0.99),
                "batches": _batches(minute),
            },
            "total": {"requests": self.requests, "errors": self.errors, "rows": self.rows},
        }


class Samples:
    """A few figures that are read once a second, such as memory: the last of them, oldest first."""

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {}

    def add(self, name: str, value: float) -> None:
        """Add this second's value."""
        self._values.setdefault(name, deque(maxlen=SPAN - 1)).append(value)

    def series(self) -> dict[str, list[float]]:
        """All of them."""
        return {name: list(values) for name, values in self._values.items()}


def quantile(latencies: np.ndarray, share: float) -> float | None:
    """A quantile of counted latencies, milliseconds; None without any."""
    total = int(latencies.sum())
    if not total:
        return None
    place = int(np.searchsorted(np.cumsum(latencies), max(math.ceil(share * total), 1)))
    return float(round(_LEAST_MS * _RATIO ** (place - 0.5), 3))


def _bin(milliseconds: float) -> int:
    if not milliseconds > _LEAST_MS:
        return 0
    return min(math.ceil(math.log(milliseconds / _LEAST_MS) / math.log(_RATIO)), _BINS - 1)


def _batches(seconds: Iterable[Second]) -> dict[str, int]:
    """Batches by rows, in powers of two: `3-4` holds those of three and of four rows."""
    counts: Counter[int] = Counter()
    for second in seconds:
        for rows, count in second.batches.items():
            counts[max(rows - 1, 0).bit_length()] += count
    return {_name(power): counts[power] for power in range(max(counts, default=-1) + 1)}


def _name(power: int) -> str:
    low, high = (1 if power == 0 else 2 ** (power - 1) + 1), 2**power
    return str(high) if low == high else f"{low}-{high}"
