# SPDX-License-Identifier: Apache-2.0
"""From what was measured to the range that a quantizer represents, and from that to scale and zero point.

minmax       everything that was seen
average      the mean over the batches of their smallest and largest values
percentile   all but a share of the values, half of it cut at either end
entropy      least Kullback-Leibler divergence of the quantized from the original distribution: S. Migacz, "8-bit
             Inference with TensorRT" (GTC 2017), clipping at the same magnitude on either side
mse          least squared error of clipping and rounding: Banner et al., "Post training 4-bit quantization of
             convolutional networks" (arXiv 1810.05723), 2, on the histogram instead of an assumed distribution

Every range includes zero, which padding and ReLU need represented exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .histogram import BINS, Histogram
from .results import Statistics

RangeMethod = Literal["minmax", "average", "percentile", "entropy", "mse"]
IntegerType = Literal["uint8", "int8", "uint16", "int16"]
HISTOGRAM_METHODS = ("percentile", "entropy", "mse")
_SHARES = [share / 100 for share in range(1, 101)]
"""Candidate ranges, as shares of the full one."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class QuantizedRange:
    """How real numbers map to integers: q = clip(round(x / scale) + zero_point).

    Attributes:
        low, high: The real numbers that the ends of the integer type stand for, about.
        scale: float32, as it goes into the graph.
        zero_point: The integer that means 0.
    """

    low: float
    high: float
    scale: float
    zero_point: int


def activation_range(
    statistics: Statistics,
    name: str,
    method: RangeMethod,
    *,
    percentile: float = 99.999,
    levels: int = 256,
    symmetric: bool = False,
) -> tuple[float, float]:
    """The range (low <= 0 <= high) of one value by `method`.

    Args:
        statistics: Has `ranges` of the value, and `histograms` for the methods that need one.
        name: Of the value.
        method: See this module's docstring.
        percentile: For that method, in percent.
        levels: How many integers there are; entropy and mse weigh the loss of so many.
        symmetric: Zero will be in the middle of them, so that a range of one sign has half of them to itself.
    """
    if method == "average":
        span = statistics.ranges[name]
        low, high = span.average_low, span.average_high
    elif method in HISTOGRAM_METHODS:
        histogram = statistics.histograms[name]
        if method == "percentile":
            low, high = percentile_range(histogram, percentile)
        else:
            if symmetric and (peak := max(-histogram.low, histogram.high)) > 0:
                width = max(histogram.high, 0.0) - min(histogram.low, 0.0)
                levels = max(2, round(levels * width / (2 * peak)))
            low, high = (entropy_range if method == "entropy" else mse_range)(histogram, levels)
    else:
        found = statistics.ranges.get(name) or statistics.histograms[name]
        low, high = found.low, found.high
    return min(low, 0.0), max(high, 0.0)


def quantized_range(low: float, high: float, integers: IntegerType, *, symmetric: bool) -> QuantizedRange:
    """Scale and zero point for a range that includes zero.

    Symmetric ranges put zero in the middle of the type and leave the most negative signed integer unused. A value that
    is always zero gets scale 1.
    """
    limits = np.iinfo(integers)
    bottom, top = int(limits.min), int(limits.max)
    if symmetric:
        middle = 0 if limits.min < 0 else (top + 1) // 2
        peak = max(-low, high)
        scale = _usable(peak / (top - middle))
        return QuantizedRange(-peak, peak, scale, middle)
    scale = _usable((high - low) / (top - bottom))
    if scale * (top - bottom) * (1 - 1e-6) < high - low < min(scale * (top - bottom), _LARGEST):
        # Rounded up, the integers would reach beyond the bounds of a Clip, which then could not be dropped for them
        scale = _usable(float(np.nextafter(np.float32(scale), np.float32(0))))
    zero_point = int(np.clip(np.rint(bottom - low / scale), bottom, top))
    return QuantizedRange(low, high, scale, zero_point)


def _usable(scale: float) -> float:
    """Rounded to float32; 1 where it would be zero or subnormal, which hardware may take for zero."""
    rounded = float(np.float32(min(scale, _LARGEST)))
    return rounded if rounded >= np.finfo(np.float32).tiny else 1.0


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The range that leaves out (100 - percentile) / 2 percent at either end, exact to one bin."""
    tail = (100 - percentile) / 200 * histogram.total
    reached = np.cumsum(histogram.counts)

    def value_at(rank: float) -> float:
        """Where `rank` values lie below, as if those of a bin were spread evenly over it."""
        index = min(int(np.searchsorted(reached, rank, side="left")), BINS - 1)
        count = max(int(histogram.counts[index]), 1)
        inside = (rank - (reached[index] - histogram.counts[index])) / count
        return float((histogram.first + index + min(max(inside, 0.0), 1.0)) * histogram.width)

    low, high = np.clip([value_at(tail), value_at(histogram.total - tail)], histogram.low, histogram.high)
    return float(low), float(high)


def mse_range(histogram: Histogram, levels: int) -> tuple[float, float]:
    """The range of least squared error: both ends shrunk together first, then each by itself."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    used = histogram.counts > 0
    # A bin may be as wide as a step: its values are taken as spread evenly over it, at four points
    spread = (np.arange(4) - 1.5) / 4 * histogram.width
    centres = (histogram.centres[used][:, None] + spread).reshape(-1)
    counts = np.repeat(histogram.counts[used] / 4, 4)

    def error(a: float, b: float) -> float:
        step = (b - a) / (levels - 1)
        if step <= 0:
            return float((counts * centres**2).sum())
        zero = np.rint(a / step)
        quantized = (np.clip(np.rint(centres / step), zero, zero + levels - 1)) * step
        return float((counts * (centres - quantized) ** 2).sum())

    low_share = high_share = min(_SHARES, key=lambda share: (error(low * share, high * share), -share))
    for _ in range(2):
        low_share = min(_SHARES, key=lambda share: (error(low * share, high * high_share), -share))
        high_share = min(_SHARES, key=lambda share: (error(low * low_share, high * share), -share))
    return low * low_share, high * high_share


def entropy_range(histogram: Histogram, levels: int) -> tuple[float, float]:
    """The range whose quantized distribution diverges least from the original, clipped one."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    peaks = [share * max(-low, high) for share in _SHARES[::-1]]
    return min(
        ((max(low, -peak), min(high, peak)) for peak in peaks),
        key=lambda span: _divergence(histogram, span[0], span[1], levels),
    )


def _divergence(histogram: Histogram, low: float, high: float, levels: int) -> float:
    """KL(P || Q): P is the histogram with what lies outside moved to its ends, Q what `levels` integers keep of it."""
    first = max(int(np.floor(low / histogram.width)) - histogram.first, 0)
    last = min(max(int(np.ceil(high / histogram.width)) - histogram.first, 0), BINS)
    counts = histogram.counts.astype(np.float64)
    zero = -histogram.first
    if 0 < zero < BINS - 1:  # the many exact zeros behind a ReLU cost nothing in any range, and would decide alone
        counts[zero] = min(counts[zero], max(counts[zero - 1], counts[zero + 1]))
    elif zero == 0:
        counts[0] = min(counts[0], counts[1])
    inside = counts[first:last]
    if len(inside) <= levels:  # at least one integer a bin: nothing is lost but what is cut off
        inside_share = inside.sum() / max(counts.sum(), 1e-12)
        return float(-np.log(max(inside_share, 1e-12)))
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    level = np.arange(len(inside)) * levels // len(inside)
    used = inside > 0
    mass = np.bincount(level, weights=inside, minlength=levels)
    share = np.bincount(level, weights=used, minlength=levels)
    kept = np.where(used, mass[level] / np.maximum(share[level], 1), 0.0)
    p, q = clipped / clipped.sum(), kept / max(kept.sum(), 1e-12)
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())
