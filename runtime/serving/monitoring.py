# SPDX-License-Identifier: Apache-2.0
"""Does a model still answer as it did, and as another bundle of it does?

Three things are watched for each model:

    not finite   answers that hold NaN or infinity are counted; one in the last window is an alert
    drift        each window of rows is compared with a reference (the first rows after loading, or the golden
                 samples) by the statistics of `drift`: for classifiers the predicted classes and the confidence, for
                 vectors their direction and length, for written texts their length and the share of distinct tokens
                 (a model that repeats itself has few), else the size of the output
    agreement    some requests are replayed on a shadow bundle: a row agrees where both name the same class, or where
                 the cosine of both vectors is high enough

Windows do not overlap, so that a rate of false alarms is one of windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...contracts.errors import InputError
from ...contracts.signature import TensorSpec
from ...contracts.tasks import TASKS
from ..opened import Bundle
from .drift import Drift, below, class_drift, direction_drift, number_drift
from .events import Answer

CLASSES, VECTORS, TEXTS, NUMBERS = "classes", "vectors", "texts", "numbers"

FIRST, GOLDEN = "first", "golden"

DRIFTS = {
    CLASSES: ("classes", "confidence"),
    VECTORS: ("direction", "norm"),
    TEXTS: ("length", "variety"),
    NUMBERS: ("size",),
}
"""What is compared for each kind of output."""

_CLASSIFIERS = {
    "text-classification",
    "token-classification",
    "fill-mask",
    "image-classification",
    "audio-classification",
    "audio-frame-classification",
    "zero-shot-image-classification",
}
_LEAST_GOLDEN = 30
_WIDEST = 8192
"""Vectors with more values are watched by their size alone: windows of them would fill the memory."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Expectations:
    """When to raise an alert.

    Attributes:
        window: Rows that are compared with the reference at once.
        reference: `FIRST`, the first rows after loading, or `GOLDEN`, what the golden samples answer.
        reference_rows: How many rows `FIRST` means.
        false_alarms: In which share of the windows an alert may be wrong, in each of drift and agreement.
        agreement: Least share of rows in which the shadow bundle agrees.
        cosine: From where on two vectors agree.
    """

    window: int = 500
    reference: str = FIRST
    reference_rows: int = 1000
    false_alarms: float = 1e-5
    agreement: float = 0.95
    cosine: float = 0.95

    def __post_init__(self) -> None:
        if min(self.window, self.reference_rows) < 20:
            raise InputError("a window and its reference need 20 rows or more")
        if self.reference not in (FIRST, GOLDEN):
            raise InputError(f"unknown reference '{self.reference}'", next_step=f"Use {FIRST} or {GOLDEN}.")
        if not (0 < self.false_alarms < 1 and 0 < self.agreement < 1 and 0 < self.cosine < 1):
            raise InputError("a rate of false alarms, an agreement or a cosine lies between 0 and 1")


@dataclass(frozen=True)
class View:
    """Which output of a model is looked at, and how.

    Attributes:
        output: Its name.
        kind: `CLASSES`, `VECTORS`, `TEXTS` or `NUMBERS`.
        tokens: Whether its second axis runs over tokens.
    """

    output: str
    kind: str
    tokens: bool

    @classmethod
    def of(cls, bundle: Bundle) -> View:
        """The first output of numbers, or the tokens that a language model writes."""
        if bundle.task in TASKS and TASKS[bundle.task].generates:
            return cls("tokens", TEXTS, False)
        outputs = [spec for spec in bundle.signature.outputs if spec.dtype.startswith(("float", "double", "bfloat"))]
        spec = (outputs or list(bundle.signature.outputs))[0]
        size = spec.shape[-1] if spec.shape else None
        tokens = len(spec.shape) == 3 and _over_tokens(spec, bundle)
        kind = NUMBERS
        if outputs and isinstance(size, int) and (len(spec.shape) == 2 or tokens):
            if bundle.task in _CLASSIFIERS and size > 1:
                kind = CLASSES
            elif 1 < size <= _WIDEST:
                kind = VECTORS
        return cls(spec.name, kind, tokens)

    def rows(self, inputs: Arrays, outputs: Arrays) -> np.ndarray | None:
        """The output as [rows, size], float64; None where it was not asked for.

        Of classes of tokens one token a row is taken, since those of one text are not independent; vectors of tokens
        are averaged. Padding never counts.
        """
        found = outputs.get(self.output)
        if found is None or found.dtype.kind not in "fiub" or not found.size:
            return None
        rows = np.atleast_1d(found).astype(np.float64)
        if not self.tokens or rows.ndim != 3 or self.kind == NUMBERS:
            return rows.reshape(len(rows), -1)
        mask = inputs.get("attention_mask")
        counts = np.ones(rows.shape[:2]) if mask is None or mask.shape != rows.shape[:2] else (mask != 0).astype(float)
        if self.kind == CLASSES:  # the middle token that counts: the same one for the shadow bundle
            middle = [int(np.flatnonzero(row)[int(row.sum()) // 2]) if row.any() else 0 for row in counts]
            return np.asarray(rows[np.arange(len(rows)), middle])
        return np.asarray((rows * counts[:, :, None]).sum(1) / np.maximum(counts.sum(1), 1)[:, None])

    def features(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What `DRIFTS` names, of finite rows."""
        if self.kind == CLASSES:
            return {"classes": rows.argmax(1), "confidence": _probabilities(rows).max(1)}
        if self.kind == VECTORS:
            return {"direction": rows.astype(np.float32), "norm": np.linalg.norm(rows, axis=1)}
        if self.kind == TEXTS:
            lengths = np.full(len(rows), float(rows.shape[1]))
            return {"length": lengths, "variety": np.array([len(np.unique(row)) for row in rows]) / lengths}
        return {"size": np.sqrt((rows * rows).mean(1))}


def _over_tokens(spec: TensorSpec, bundle: Bundle) -> bool:
    masks = [other for other in bundle.signature.inputs if other.name in ("attention_mask", "input_ids")]
    return any(len(other.shape) == 2 and other.shape[1] == spec.shape[1] for other in masks)


def _probabilities(rows: np.ndarray) -> np.ndarray:
    """Softmax, unless they are probabilities already."""
    if (rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-3):
        return rows
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


class _Sample:
    """Features of rows, gathered until there are enough."""

    def __init__(self) -> None:
        self.rows = 0
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, features: Mapping[str, np.ndarray]) -> None:
        for name, values in features.items():
            self._parts.setdefault(name, []).append(values)
        self.rows += len(next(iter(features.values())))

    def values(self, name: str) -> np.ndarray:
        return np.concatenate(self._parts[name])


@dataclass
class Agreement:
    """What the replays on a shadow bundle showed.

    Attributes:
        rows: Rows compared.
        hits: Rows that agreed.
        largest: Largest difference of each output, ever.
        alarm: The last block of rows agreed less than wanted, and not by chance.
    """

    rows: int = 0
    hits: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    alarm: bool = False
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=1000))
    cosines: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    _block_rows: int = 0
    _block_hits: int = 0

    def add(self, agreed: np.ndarray, cosines: np.ndarray, wanted: Expectations) -> None:
        """Count rows; look at them at a few points of each block, which share its rate of false alarms."""
        points = [wanted.window // part for part in (8, 4, 2, 1)]
        for hit in agreed.tolist():
            self._block_rows += 1
            self._block_hits += hit
            if self._block_rows in points:
                low = below(self._block_hits, self._block_rows, wanted.agreement, wanted.false_alarms / len(points))
                self.alarm = low or (self.alarm and self._block_rows < wanted.window)
            if self._block_rows >= wanted.window:
                self._block_rows = self._block_hits = 0
        self.rows += len(agreed)
        self.hits += int(agreed.sum())
        self.recent.extend(agreed.tolist())
        self.cosines.extend(cosines.tolist())

    @property
    def share(self) -> float | None:
        """Of the last rows."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    @property
    def cosine(self) -> float | None:
        """Mean of the last rows."""
        return sum(self.cosines) / len(self.cosines) if self.cosines else None


class Monitor:
    """One version of one model, watched. Used from one thread at a time.

    Args:
        bundle: What answers.
        wanted: When to raise an alert.

    Attributes:
        view: What is looked at.
        seen: Rows seen.
        not_finite: Rows that held NaN or infinity.
        windows: Windows compared.
        drifts: What the last window showed, by the names of `DRIFTS`.
        agreement: What the replays showed.
        reference: `FIRST` or `GOLDEN`, whichever could be had.
    """

    def __init__(self, bundle: Bundle, wanted: Expectations) -> None:
        self.bundle, self.wanted = bundle.sha256, wanted
        self.view = View.of(bundle)
        self.seen = self.not_finite = self.windows = 0
        self.drifts: dict[str, Drift] = {}
        self.agreement = Agreement()
        self._bad_at = -(10**9)
        self._reference, self._window = _Sample(), _Sample()
        self._reference_rows, self.reference = wanted.reference_rows, FIRST
        if wanted.reference == GOLDEN:
            self._take_golden(bundle)

    @property
    def progress(self) -> tuple[str, int, int]:
        """What is being gathered (`reference` or `window`), how many rows it has, and how many it wants."""
        if self._reference.rows < self._reference_rows:
            return "reference", self._reference.rows, self._reference_rows
        return "window", self._window.rows, self.wanted.window

    def see(self, answers: Sequence[Answer]) -> None:
        """Look at answers: those that are one plain matrix all together, since numpy costs the same for a hundred."""
        plain: dict[tuple[int, ...], list[np.ndarray]] = {}
        for answer in answers:
            found = answer.outputs.get(self.view.output)
            if (
                found is not None
                and len(answer.outputs) == 1
                and found.ndim == 2
                and found.dtype.kind == "f"
                and len(found) == answer.rows
            ):
                plain.setdefault(found.shape[1:], []).append(found)
            else:
                self._see(answer)
        for parts in plain.values():
            rows = np.concatenate(parts).astype(np.float64)
            finite = np.asarray(np.isfinite(rows).all(1))
            self._count(finite)
            if finite.any():
                self._add(self.view.features(rows[finite]))

    def _see(self, answer: Answer) -> None:
        rows = self.view.rows(answer.inputs, answer.outputs)
        self._count(_finite_rows(answer.outputs, answer.rows))
        if rows is None:
            return
        rows = rows[np.isfinite(rows).all(1)]
        if len(rows):
            self._add(self.view.features(rows))

    def _count(self, finite: np.ndarray) -> None:
        bad = np.flatnonzero(~finite)
        if len(bad):
            self.not_finite += len(bad)
            self._bad_at = self.seen + int(bad[-1])
        self.seen += len(finite)

    def compare(self, answer: Answer, shadow: Arrays) -> None:
        """Compare an answer with what the shadow bundle answered to the same inputs."""
        ours, theirs = self.view.rows(answer.inputs, answer.outputs), self.view.rows(answer.inputs, shadow)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise InputError(f"the shadow bundle's output '{self.view.output}' has another shape")
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        with np.errstate(invalid="ignore"):
            cosines = np.where(lengths > 0, (ours * theirs).sum(1) / np.maximum(lengths, 1e-300), ours.shape[1] == 0)
        cosines = np.where((ours == theirs).all(1), 1.0, np.nan_to_num(cosines, nan=-1.0))
        agreed = ours.argmax(1) == theirs.argmax(1) if self.view.kind == CLASSES else cosines >= self.wanted.cosine
        self.agreement.add(agreed, cosines, self.wanted)
        for name in answer.outputs.keys() & shadow.keys():
            apart = _largest_difference(answer.outputs[name], shadow[name], answer.inputs.get("attention_mask"))
            self.agreement.largest[name] = max(self.agreement.largest.get(name, 0.0), apart)

    def alerts(self) -> dict[str, str]:
        """Kind of each alert that is on, and what a person should know."""
        found = {}
        if self.seen - self._bad_at <= self.wanted.window:
            found["not_finite"] = f"{self.not_finite} rows held NaN or infinity, the last one not long ago"
        for name, drift in self.drifts.items():
            if drift.alarm:
                found[f"drift_{name}"] = (
                    f"the last {self.wanted.window} rows differ from the reference in their {name}: "
                    f"{drift.statistic:.4g}, threshold {drift.threshold:.4g}, expected {drift.expected:.4g}"
                )
        if self.agreement.alarm and self.agreement.share is not None:
            found["agreement"] = (
                f"the shadow bundle agrees in {self.agreement.share:.1%} of the rows; "
                f"{self.wanted.agreement:.1%} are wanted"
            )
        return found

    def kinds(self) -> list[str]:
        """Every kind of alert that there can be."""
        return ["not_finite", "agreement", *(f"drift_{name}" for name in DRIFTS[self.view.kind])]

    def _add(self, features: Mapping[str, np.ndarray]) -> None:
        """Fill the reference, then one window after the other, each to its last row."""
        rows = len(next(iter(features.values())))
        while rows:
            _, has, wants = self.progress
            sample = self._reference if self._reference.rows < self._reference_rows else self._window
            taken = min(rows, wants - has)
            sample.add({name: values[:taken] for name, values in features.items()})
            features = {name: values[taken:] for name, values in features.items()}
            rows -= taken
            if self._window.rows >= self.wanted.window:
                rate = self.wanted.false_alarms / len(DRIFTS[self.view.kind])
                self.drifts = {name: self._drift(name, rate) for name in DRIFTS[self.view.kind]}
                self._window = _Sample()
                self.windows += 1

    def _drift(self, name: str, rate: float) -> Drift:
        before, now = self._reference.values(name), self._window.values(name)
        if name == "classes":
            classes = max(before.max(), now.max()) + 1
            return class_drift(np.bincount(before, minlength=classes), np.bincount(now, minlength=classes), rate)
        return direction_drift(before, now, rate) if name == "direction" else number_drift(before, now, rate)

    def _take_golden(self, bundle: Bundle) -> None:
        """Take the golden samples for the reference; too few of them would only show that they are few."""
        for sample in bundle.golden:
            rows = self.view.rows(sample.inputs, sample.outputs)
            if rows is not None and np.isfinite(rows).all():
                self._reference.add(self.view.features(rows))
        if self._reference.rows < _LEAST_GOLDEN:
            self._reference = _Sample()
        else:
            self._reference_rows, self.reference = self._reference.rows, GOLDEN


def _finite_rows(outputs: Arrays, rows: int) -> np.ndarray:
    """Whether each row is finite in every output, [rows]; one value for outputs that do not begin with the batch."""
    finite = np.ones(max(rows, 1), bool)
    for array in outputs.values():
        if array.dtype.kind != "f":
            continue
        fine = np.isfinite(array)
        if fine.all():
            continue
        per_row = fine.ndim and len(fine) == len(finite)
        finite &= fine.reshape(len(finite), -1).all(1) if per_row else False
    return finite


def _largest_difference(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray | None) -> float:
    """Largest difference where both are finite, padding left out."""
    if ours.shape != theirs.shape or ours.dtype.kind not in "fiub" or not ours.size:
        return 0.0
    apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    if mask is not None and apart.ndim > 1 and apart.shape[:2] == mask.shape:
        apart = apart[mask != 0]
    return float(np.nan_to_num(apart, nan=0.0, posinf=0.0).max(initial=0.0))
