# SPDX-License-Identifier: Apache-2.0
"""Whether a row's answer depends on the rows that run beside it, found by running golden samples with and without.

Where it does not, joining the rows of several requests is free of consequences. It does with dynamic int8, whoever
serves it: the scale of an activation is chosen over the whole run. On MiniLM and SST-2, single logits then move by up
to 1.7, while batches gain less than a tenth of the time of a row of 32 tokens; in fp32, fp16 and static int8 not one
bit moves, padded or not. So `exact` joins what keeps its answers up to the rounding of floats: 1e-4 of the largest
value is a hundred times what another order of additions does in fp32, and a hundredth of what dynamic int8 does to the
sample that it moves least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...contracts.decoding import INPUT_IDS
from ...contracts.errors import OnnxpressError
from ..bundle import largest_difference
from .joining import Arrays, Joining, bucket
from .settings import EXACT, NEVER

_NOISE, _LEAST, _ULPS = 1e-4, 1e-6, 4
_LARGE = 16
"""How much larger the neighbour is that a range over the whole run would notice."""


def proven(
    joining: Joining,
    samples: Sequence[Arrays],
    run: Callable[[Arrays], Arrays],
    tolerance: Callable[[str], float],
    join: str = EXACT,
) -> Joining:
    """A joining, less what changes an answer of a golden sample by more than it may.

    Args:
        joining: What the signature allows.
        samples: Inputs of golden samples.
        run: The model.
        tolerance: The largest absolute difference that each output may show.
        join: As in `Settings`.
    """
    if not joining.batched:
        return joining
    trial = _Trial(run, tolerance)
    rows = [{name: array[:1] for name, array in feeds.items()} for feeds in samples]
    plain = replace(joining, fill=None, sequence_axis=None)
    try:
        moved = [trial.moved(plain, row, _company(plain, row, rows)) for row in rows]
        if not all(found.within for found in moved):
            return Joining(apart="an answer moves by more than the bundle's tolerance when rows are joined")
        if joining.fill:
            padded = [trial.moved(joining, _shortest(row), [row]) for row in rows]
            joining = joining if all(found.within for found in padded) else plain
    except OnnxpressError:  # a graph that says its first axis is open, and fails on two rows
        return Joining(apart="it fails on several rows")
    if join == NEVER:
        return replace(joining, apart="so it was asked for")
    if join != EXACT:
        return joining
    if not rows:
        return replace(joining, apart="there is no golden sample to show that joining changes nothing")
    return _exact(joining, rows, trial)


def _exact(joining: Joining, rows: Sequence[Arrays], trial: _Trial) -> Joining:
    """The same for neighbours that are as different as they can be made, and for float noise."""
    plain = replace(joining, fill=None, sequence_axis=None)
    for number, row in enumerate(rows):
        found = trial.moved_by_any(plain, row, _strangers(number, rows, row))
        if not found.exact:
            return replace(joining, apart=f"beside others, {found.told}")
    if joining.fill:
        for number, row in enumerate(rows):
            longest = _fitted(row, {name: (1, bucket(array.shape[1])) for name, array in row.items()})
            strangers = [row, longest, *_strangers(number, rows, longest)]
            if not trial.moved_by_any(joining, _shortest(row), strangers).exact:
                return plain
    return joining


@dataclass(frozen=True)
class _Moved:
    """What company does to a row: whether every output stays within the tolerance, and within float noise."""

    within: bool = True
    exact: bool = True
    told: str = ""


@dataclass(frozen=True)
class _Trial:
    run: Callable[[Arrays], Arrays]
    tolerance: Callable[[str], float]

    def moved(self, joining: Joining, row: Arrays, company: Sequence[Arrays]) -> _Moved:
        """Run a row alone and in company."""
        group = [row, *company]
        alone, joined = self.run(row), joining.split(self.run(joining.join(group)), group)[0]
        moved = _Moved()
        for name, expected in alone.items():
            if _alike(joined[name], expected, _noise(expected)):
                continue
            within = moved.within and _alike(joined[name], expected, self.tolerance(name))
            moved = _Moved(within, False, moved.told or f"output '{name}' moves{_by(joined[name], expected)}")
        return moved

    def moved_by_any(self, joining: Joining, row: Arrays, company: Sequence[Arrays]) -> _Moved:
        """The same with company that the model may refuse, which then stays away."""
        try:
            return self.moved(joining, row, company)
        except OnnxpressError:
            return self.moved(joining, row, [other for other in company if self._takes(other)])

    def _takes(self, feeds: Arrays) -> bool:
        try:
            self.run(feeds)
        except OnnxpressError:
            return False
        return True


def _company(joining: Joining, row: Arrays, rows: Sequence[Arrays]) -> list[Arrays]:
    """A few others that can be joined with a row: golden ones, and the row backwards."""
    others = [other for other in rows if joining.key(other) == joining.key(row)]
    return [*others[:3], _backwards(row)]


def _strangers(number: int, rows: Sequence[Arrays], row: Arrays) -> list[Arrays]:
    """The next three golden rows in the shape of this one, it backwards, and, of floats, it much larger."""
    shapes = {name: array.shape for name, array in row.items()}
    others = [_fitted(rows[(number + i) % len(rows)], shapes) for i in range(1, min(4, len(rows)))]
    large = {
        name: array * array.dtype.type(_LARGE) if array.dtype.kind == "f" else array for name, array in row.items()
    }
    return [*others, _backwards(row), large]


def _backwards(row: Arrays) -> Arrays:
    return {name: array[:, ::-1] if array.ndim > 1 else array for name, array in row.items()}


def _fitted(feeds: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Feeds in other shapes: cut, or gone through again from the beginning; zeros in place of nothing."""
    fitted = {}
    for name, array in feeds.items():
        if array.size:
            for axis, size in enumerate(shapes[name]):
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        fitted[name] = array if array.shape == shapes[name] else np.zeros(shapes[name], array.dtype)
    return fitted


def _shortest(row: Arrays) -> Arrays:
    """The beginning of a text, as short as it can be while its bucket stays the same."""
    short = length = row[INPUT_IDS].shape[1]
    while short > 1 and bucket(short - 1) == bucket(length):
        short -= 1
    return {name: array[:, :short] for name, array in row.items()}


def _noise(expected: np.ndarray) -> float:
    """How far a float may be off by the order of additions alone; nothing else may."""
    if expected.dtype.kind != "f" or not expected.size:
        return 0.0
    share = max(_NOISE, _ULPS * float(np.finfo(expected.dtype).eps))
    return _LEAST + share * float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))


def _alike(array: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    if array.shape != expected.shape:
        return False
    if array.dtype.kind in "OUS":
        return bool(np.array_equal(array, expected))
    return largest_difference(array, expected) <= tolerance


def _by(array: np.ndarray, expected: np.ndarray) -> str:
    if array.shape != expected.shape or array.dtype.kind != "f":
        return ""
    return f" by {largest_difference(array, expected):.2g}"
