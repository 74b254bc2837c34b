# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a calibration run, and what comes back: small, mergeable summaries of activations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from .histogram import Histogram


@dataclass(frozen=True, init=False)
class Wanted:
    """Which statistics of which values, by the values' names.

    Attributes:
        ranges: Smallest and largest value.
        histograms: Counts, from which percentiles, entropy and squared error follow.
        channels: Name to the axis whose channels are summarized one by one.
        grams: X^T X over the last axis.
        rows: Sampled rows (vectors along the last axis).
        row_count: At most so many rows of each value.
    """

    ranges: tuple[str, ...]
    histograms: tuple[str, ...]
    channels: Mapping[str, int]
    grams: tuple[str, ...]
    rows: tuple[str, ...]
    row_count: int

    def __init__(
        self,
        ranges: Iterable[str] = (),
        histograms: Iterable[str] = (),
        channels: Mapping[str, int] | None = None,
        grams: Iterable[str] = (),
        rows: Iterable[str] = (),
        row_count: int = 512,
    ) -> None:
        put = object.__setattr__
        put(self, "ranges", tuple(dict.fromkeys(ranges)))
        put(self, "histograms", tuple(dict.fromkeys(histograms)))
        put(self, "channels", dict(channels or {}))
        put(self, "grams", tuple(dict.fromkeys(grams)))
        put(self, "rows", tuple(dict.fromkeys(rows)))
        put(self, "row_count", row_count)

    @property
    def names(self) -> list[str]:
        """Every value that something is asked of, once."""
        return list(dict.fromkeys([*self.ranges, *self.histograms, *self.channels, *self.grams, *self.rows]))

    def only(self, names: Iterable[str]) -> Wanted:
        """The same questions about some of the values."""
        keep = set(names)
        return Wanted(
            [n for n in self.ranges if n in keep],
            [n for n in self.histograms if n in keep],
            {n: axis for n, axis in self.channels.items() if n in keep},
            [n for n in self.grams if n in keep],
            [n for n in self.rows if n in keep],
            self.row_count,
        )

    def key(self) -> str:
        """The same text for the same questions, whatever their order."""
        parts = [sorted(self.ranges), sorted(self.histograms), sorted(self.channels.items()), sorted(self.grams)]
        return repr([*parts, sorted(self.rows), self.row_count])


@dataclass
class Range:
    """The range of one tensor.

    Attributes:
        low: Smallest value of all batches.
        high: Largest value of all batches.
        average_low: Mean over the batches of their smallest values.
        average_high: Mean over the batches of their largest values.
        batches: How many batches were seen.
    """

    low: float = math.inf
    high: float = -math.inf
    average_low: float = 0.0
    average_high: float = 0.0
    batches: int = 0

    def add(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.batches += 1
        self.average_low += (low - self.average_low) / self.batches
        self.average_high += (high - self.average_high) / self.batches


@dataclass
class Channels:
    """Each channel of one tensor.

    Attributes:
        peak: Largest absolute value, float64 [C].
        mean: float64 [C].
        mean_abs: Mean of the absolute value, float64 [C].
        rows: Over how many vectors.
    """

    peak: np.ndarray
    mean: np.ndarray
    mean_abs: np.ndarray
    rows: int

    def add(self, peak: np.ndarray, total: np.ndarray, total_abs: np.ndarray, rows: int) -> None:
        """Merge the maxima and the sums (not means) of another batch of `rows` vectors."""
        if not rows:
            return
        share = rows / (self.rows + rows)
        self.peak = np.maximum(self.peak, peak)
        self.mean = self.mean + share * (total / rows - self.mean)
        self.mean_abs = self.mean_abs + share * (total_abs / rows - self.mean_abs)
        self.rows += rows


@dataclass
class Gram:
    """X^T X of one tensor.

    Attributes:
        matrix: float64 [K, K], the sum over all rows; K is the last axis.
        rows: How many rows.
    """

    matrix: np.ndarray
    rows: int


@dataclass
class Statistics:
    """The answers, by the values' names. What could not be measured stands in `missing`, with the reason."""

    ranges: dict[str, Range] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    channels: dict[str, Channels] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def update(self, other: Statistics) -> None:
        """Take over the answers about other values."""
        for name, mine in vars(self).items():
            mine.update(getattr(other, name))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file without pickle."""
        arrays: dict[str, np.ndarray] = {}
        for kind, name, result in self._all():
            for key, value in vars(result).items() if kind != "rows" else [("", result)]:
                arrays[f"{kind}|{key}|{name}"] = np.asarray(value)
        arrays.update({f"missing||{name}": np.asarray(reason) for name, reason in self.missing.items()})
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Statistics:
        found = cls()
        parts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for label, array in arrays.items():
            kind, key, name = label.split("|", 2)
            parts.setdefault((kind, name), {})[key] = array
        types = {"ranges": Range, "histograms": Histogram, "channels": Channels, "grams": Gram}
        for (kind, name), values in parts.items():
            if kind in types:
                plain = {key: array.item() if array.ndim == 0 else array for key, array in values.items()}
                getattr(found, kind)[name] = types[kind](**plain)
            else:
                getattr(found, kind)[name] = values[""] if kind == "rows" else str(values[""])
        return found

    def _all(self) -> Iterator[tuple[str, str, object]]:
        for kind in ("ranges", "histograms", "channels", "grams", "rows"):
            for name, result in getattr(self, kind).items():
                yield kind, name, result
