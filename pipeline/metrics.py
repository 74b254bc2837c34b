# SPDX-License-Identifier: Apache-2.0
"""What a model's outputs are worth (accuracy, F1, rank correlation) and how far two models' outputs are apart.

Pure numpy, float64 throughout. Nothing here turns a broken output into a good number: a row with NaN is a wrong answer,
a non-finite value that the reference does not have is an infinite error. Wrong shapes are ValueError, a caller's bug.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..contracts.errors import InputError

_TIE = 1e-12  # cosines closer than this are equal: matrix products differ in their last bits with their block size
_CHUNK = 2**20  # elements that are held in float64 at a time


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return in percent how often the highest of `logits` [n, c] is at `labels` [n]; a row with NaN is wrong.

    The first of equal logits counts. Raises ValueError for other shapes or no rows.
    """
    scores, ids = np.asarray(logits), np.asarray(labels)
    if scores.ndim != 2 or ids.shape != scores.shape[:1] or scores.size == 0:
        raise ValueError(f"expected logits [n, c] and labels [n], got {scores.shape} and {ids.shape}")
    return 100.0 * float(np.mean((scores.argmax(1) == ids) & ~np.isnan(scores).any(1)))


def top1_agreement(a: ArrayLike, b: ArrayLike) -> float:
    """Return in percent how often the highest value along the last axis is at the same place in both arrays [..., c].

    The first of equal values counts; a row with NaN in either array disagrees. Raises ValueError for other shapes or no
    rows.
    """
    left, right = np.asarray(a), np.asarray(b)
    if left.ndim < 1 or left.shape != right.shape or left.size == 0:
        raise ValueError(f"expected two arrays of one shape [..., c], got {left.shape} and {right.shape}")
    return 100.0 * float(np.mean(_same_top(left, right)))


def _same_top(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    broken = np.isnan(a).any(-1) | np.isnan(b).any(-1)
    same: NDArray[np.bool_] = (a.argmax(-1) == b.argmax(-1)) & ~broken
    return same


def entity_f1(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> float:
    """Return the micro-averaged F1 of whole entities, in percent.

    The definition is conlleval's (Tjong Kim Sang & Buchholz 2000), which is seqeval's default mode: an entity counts if
    its type and both ends agree. Tags are O, or B-, I-, E-, S- and a type. IOB1 and IOB2 may meet, as predictions and
    gold or within one: an I- after O or after another type begins an entity in both. Without any entity on either side
    F1 is 0, as in seqeval.

    Args:
        predicted: One list of tags a sentence.
        gold: The same number of sentences, of the same lengths.

    Raises:
        InputError: A tag of another form.
        ValueError: Sentences or lengths that do not match.
    """
    if [len(tags) for tags in predicted] != [len(tags) for tags in gold]:
        raise ValueError("predicted and gold tags differ in the number of sentences or in a sentence's length")
    found = {(n, *entity) for n, tags in enumerate(predicted) for entity in _entities(tags)}
    wanted = {(n, *entity) for n, tags in enumerate(gold) for entity in _entities(tags)}
    total = len(found) + len(wanted)
    return 100.0 * 2 * len(found & wanted) / total if total else 0.0


def _entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (type, first, last) of each entity."""
    before, kind, first = "O", "", 0
    for position, tag in enumerate([*tags, "O"]):
        if not re.fullmatch(r"O|[BIES](-.*)?", tag, re.DOTALL):
            raise InputError(
                f"'{tag}' is not an entity tag",
                next_step="Tags are O, or B-, I-, E-, S- and a type; check the model's id2label and the data's tags.",
            )
        head, next_kind = tag[0], tag[2:]
        changed = next_kind != kind
        if before != "O" and (before in "ES" or head in "BSO" or changed):
            yield kind, first, position - 1
        if head != "O" and (head in "BS" or before in "ESO" or changed):
            first = position
        before, kind = head, next_kind


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation of `x` [n] and `y` [n], in -1 .. 1: Pearson's of the ranks, ties averaged.

    NaN where there is no correlation to speak of: fewer than two values, all values equal, or a NaN among them. Raises
    ValueError for other shapes.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two arrays [n], got {a.shape} and {b.shape}")
    if len(a) < 2 or np.isnan(a).any() or np.isnan(b).any():
        return math.nan
    a, b = _ranks(a), _ranks(b)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale else math.nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks, those of equal values averaged, less the mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2
    return ranks


def cosine_rows(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return the cosine [n] of each row of `a` [n, d] with the same row of `b` [n, d].

    Two zero rows have cosine 1, a zero row and another one 0; a row that is not finite has NaN. Raises ValueError for
    other shapes.
    """
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if left.ndim != 2 or left.shape != right.shape:
        raise ValueError(f"expected two arrays [n, d], got {left.shape} and {right.shape}")
    left, right = _unit_rows(left), _unit_rows(right)
    cosines: NDArray[np.float64] = np.clip(np.einsum("nd,nd->n", left, right), -1.0, 1.0)
    return np.where(~left.any(1) & ~right.any(1), 1.0, cosines)


def _unit_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows of length 1; zero rows stay zero, a row that is not finite becomes NaN. Squares cannot overflow."""
    largest = np.abs(rows).max(1, initial=0.0, keepdims=True)
    with np.errstate(invalid="ignore"):
        scaled = rows / np.where(largest > 0, largest, 1.0)
    length = np.sqrt(np.einsum("nd,nd->n", scaled, scaled))[:, None]
    unit: NDArray[np.float64] = scaled / np.where(length > 0, length, 1.0)
    return np.where(np.isfinite(length), unit, np.nan)


def neighbour_accuracy(embeddings: ArrayLike, labels: ArrayLike, *, chunk: int | None = None) -> float:
    """Return in percent how often the nearest other row, by cosine, has the same label: leave-one-out 1-NN.

    The lowest index wins among rows whose cosines are within 1e-12 of the best one. A row that is not finite is wrong
    and nobody's neighbour; a zero row has cosine 0 with all others.

    Args:
        embeddings: [n, d], n at least 2.
        labels: [n], of any type that compares.
        chunk: Rows compared at a time; by default as many as keep the [chunk, n] cosines at 64 MiB.

    Raises:
        ValueError: Other shapes.
    """
    rows, names = np.asarray(embeddings), np.asarray(labels)
    if rows.ndim != 2 or names.shape != rows.shape[:1] or len(rows) < 2:
        raise ValueError(f"expected embeddings [n, d] and labels [n] with n >= 2, got {rows.shape} and {names.shape}")
    unit = _unit_rows(rows.astype(np.float64))
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(unit).all(1))
    unit[~finite] = 0.0
    step, hits = chunk or max(1, 2**23 // len(unit)), 0
    for start in range(0, len(unit), step):
        here = np.arange(start, min(start + step, len(unit)))
        cosines = unit[here] @ unit.T
        cosines[:, ~finite] = -np.inf
        cosines[here - start, here] = -np.inf
        best = cosines.max(1, keepdims=True)
        nearest = (cosines >= best - _TIE).argmax(1)
        found = finite[here] & (best[:, 0] > -np.inf)
        hits += int(np.count_nonzero(found & (names[nearest] == names[here])))
    return 100.0 * hits / len(unit)


def tensor_errors(reference: ArrayLike, candidate: ArrayLike, mask: ArrayLike | None = None) -> dict[str, float | None]:
    """Return how far `candidate` is from `reference`; see `ErrorAccumulator`, which this feeds once."""
    errors = ErrorAccumulator()
    errors.add(reference, candidate, mask)
    return errors.result()


def negative_log_likelihood(logits: ArrayLike, targets: ArrayLike) -> float:
    """Sum of -log softmax(logits)[target], in nats and float64; logits [tokens, vocabulary], targets [tokens]."""
    scores, chosen = np.asarray(logits), np.asarray(targets)
    total = 0.0
    step = max(1, _CHUNK // max(1, scores.shape[-1]))
    for start in range(0, len(scores), step):
        part = scores[start : start + step].astype(np.float64)
        highest = part.max(axis=-1, keepdims=True)
        log_sums = highest[:, 0] + np.log(np.exp(part - highest).sum(axis=-1))
        total += float((log_sums - part[np.arange(len(part)), chosen[start : start + step]]).sum())
    return total


class ErrorAccumulator:
    """The distance between a reference's and a candidate's outputs, over any number of batches.

    Counts and maxima are the same however the elements are split into batches, sums up to the rounding of float64.
    Memory does not grow with the number of batches, and by a few MiB only for the size of one (unless its last axis is
    longer than a million).
    """

    def __init__(self) -> None:
        self._elements = self._mismatches = self._rows = self._agreeing_rows = 0
        self._reference_nonfinite = self._candidate_nonfinite = 0
        self._largest = self._absolute = self._noise = 0.0  # of |a - b|: maximum, sum, sum of squares
        self._signal = self._candidate_signal = self._product = 0.0  # sums of a^2, b^2, a b

    def add(self, reference: ArrayLike, candidate: ArrayLike, mask: ArrayLike | None = None) -> None:
        """Take in one batch.

        Args:
            reference: Any shape, integers or floats of any width; compared in float64, so integers beyond 2^53 are
                rounded first.
            candidate: The same shape.
            mask: Boolean, for the leading axes: [batch, sequence] for outputs [batch, sequence, ...]; an axis of 1 is
                repeated. Only elements where it is True are compared.

        Raises:
            ValueError: Shapes that do not match, elements that are not numbers, a mask that is not boolean.
        """
        a, b = np.asarray(reference), np.asarray(candidate)
        if a.shape != b.shape:
            raise ValueError(f"reference {a.shape} and candidate {b.shape} differ in shape")
        if {a.dtype.kind, b.dtype.kind} & set("USTOcmM"):
            raise ValueError(f"expected numbers, got {a.dtype} and {b.dtype}")
        chosen = None if mask is None else _spread(np.asarray(mask), a.shape)
        if a.size == 0:
            return
        ranked = a.ndim >= 2 and a.shape[-1] >= 2
        width = a.shape[-1] if ranked else 1
        a, b = a.reshape(-1, width), b.reshape(-1, width)
        chosen = None if chosen is None else chosen.reshape(-1, width)
        step = max(1, _CHUNK // width)
        for start in range(0, len(a), step):
            part = slice(start, start + step)
            here = None if chosen is None else chosen[part]
            left, right = a[part].astype(np.float64), b[part].astype(np.float64)
            if ranked:
                self._add_rows(left, right, here)
            self._add_elements(*((left, right) if here is None else (left[here], right[here])))

    def _add_rows(self, a: NDArray[np.float64], b: NDArray[np.float64], chosen: NDArray[np.bool_] | None) -> None:
        """Compare the places of the highest chosen values of the rows [n, c] that have any."""
        if chosen is not None:
            some = chosen.any(1)
            a, b = (np.where(chosen, values, -np.inf)[some] for values in (a, b))
        self._rows += len(a)
        self._agreeing_rows += int(np.count_nonzero(_same_top(a, b)))

    def _add_elements(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        finite_a, finite_b = np.isfinite(a), np.isfinite(b)
        both = finite_a & finite_b
        self._elements += a.size
        self._reference_nonfinite += int(np.count_nonzero(~finite_a))
        self._candidate_nonfinite += int(np.count_nonzero(~finite_b))
        self._mismatches += int(np.count_nonzero(~both & (a != b)))  # a NaN differs from everything
        a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
        with np.errstate(over="ignore"):
            difference = np.abs(a - b)
            self._largest = max(self._largest, float(difference.max(initial=0.0)))
            self._absolute += float(difference.sum())
            self._noise += float((difference * difference).sum())
            self._signal += float((a * a).sum())
            self._candidate_signal += float((b * b).sum())
            self._product += float((a * b).sum())

    def result(self) -> dict[str, float | None]:
        """Return the errors over everything added so far.

        With a the reference and b the candidate: `max_abs_error` and `mean_abs_error` of |a - b|; `relative_error`,
        ||a - b|| / ||a|| (Frobenius); `sqnr_db`, 10 log10(sum a^2 / sum (a - b)^2), +inf for equal arrays; `cosine` of
        the two as one vector; `top1_agreement` in percent of rows along the last axis, None where no array had two axes
        and two columns; `elements`, `reference_nonfinite` and `candidate_nonfinite`, counts.

        Infinities of the same sign are equal. Any other value that is not finite, and every NaN, makes the errors +inf,
        `sqnr_db` -inf and `cosine` -1. Equal zeros have error 0 and cosine 1; other candidates of a zero reference have
        relative error +inf, `sqnr_db` -inf and cosine 0. Of nothing, every error is NaN, which passes no gate.
        """
        errors = self._distances() if self._elements else dict.fromkeys(_DISTANCES, math.nan)
        return {
            **errors,
            "top1_agreement": 100.0 * self._agreeing_rows / self._rows if self._rows else None,
            "elements": self._elements,
            "reference_nonfinite": self._reference_nonfinite,
            "candidate_nonfinite": self._candidate_nonfinite,
        }

    def _distances(self) -> dict[str, float]:
        if self._mismatches:
            return dict(zip(_DISTANCES, (math.inf, math.inf, math.inf, -math.inf, -1.0), strict=True))
        if self._largest == 0:
            return dict(zip(_DISTANCES, (0.0, 0.0, 0.0, math.inf, 1.0), strict=True))
        # Where a square left float64's range, its limits stand in for it, on the side that makes the result worse.
        noise, signal = max(self._noise, 5e-324), min(self._signal, sys.float_info.max)
        bad = signal == 0 or noise == math.inf
        norms = math.sqrt(signal) * math.sqrt(self._candidate_signal)
        cosine = self._product / norms if norms else 0.0
        return {
            "max_abs_error": self._largest,
            "mean_abs_error": self._absolute / self._elements,
            "relative_error": math.inf if bad else math.sqrt(noise) / math.sqrt(signal),
            "sqnr_db": -math.inf if bad else 10 * (math.log10(signal) - math.log10(noise)),
            "cosine": max(-1.0, min(1.0, cosine)) if math.isfinite(norms) and math.isfinite(cosine) else -1.0,
        }


_DISTANCES = ("max_abs_error", "mean_abs_error", "relative_error", "sqnr_db", "cosine")


def _spread(mask: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return a mask of the leading axes as one of the whole `shape`."""
    if mask.dtype != np.bool_ or mask.ndim > len(shape):
        raise ValueError(f"expected a boolean mask of the leading axes of {shape}, got {mask.dtype} {mask.shape}")
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def json_number(value: float | None) -> float | None:
    """Return `value` as JSON can hold it: numbers as they are, +inf and NaN as None, -inf as the lowest float64.

    So None reads `unbounded`: equal arrays for `sqnr_db`, a broken candidate for the errors. The two never meet in one
    key except where `elements` is 0. A broken candidate's `sqnr_db` stays a number, and fails any threshold.
    """
    if value is None or math.isnan(value) or value == math.inf:
        return None
    return -sys.float_info.max if value == -math.inf else value
