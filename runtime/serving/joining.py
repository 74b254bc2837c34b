# SPDX-License-Identifier: Apache-2.0
"""Which requests can share one run of a model, how their tensors are joined, and how the answer is taken apart.

Rows are joined along the first axis where every input and output has the same open axis there. Text of similar length
is also joined by padding, where the graph has an attention mask and every open axis of its outputs is known. A row
that runs alone is never padded, and a batch is padded to its own longest row only: buckets are narrow (at most an
eighth longer, or 3 tokens), so that little is computed for nothing.

What this changes in an answer, and whether it may, is for `row_independence` to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...contracts.decoding import INPUT_IDS, MASK
from ...contracts.signature import Signature

Arrays = Mapping[str, np.ndarray]
Key = tuple[object, ...]

TYPES = "token_type_ids"


@dataclass(frozen=True)
class Joining:
    """How the rows of one model are joined.

    Attributes:
        batched: The first axis is one of rows, so that a run can have those of several requests, or a part of one's.
        apart: Why rows of several requests do not share a run all the same; empty where they do.
        fill: Input name to what it is padded with; empty where nothing is padded.
        left: Padding stands on the left.
        sequence_axis: Output name to the axis that follows the padded one, for outputs that have it.
    """

    batched: bool = False
    apart: str = ""
    fill: Mapping[str, int] | None = None
    left: bool = False
    sequence_axis: Mapping[str, int] | None = None

    @classmethod
    def of(cls, signature: Signature, *, pad: int | None = None, left: bool = False) -> Joining:
        """What the signature allows.

        Args:
            signature: Of the graph.
            pad: The padding token, or None where there is no text or none is known.
            left: On which side it stands.
        """
        specs = (*signature.inputs, *signature.outputs)
        first = {spec.shape[0] if spec.shape else None for spec in specs}
        if len(first) != 1 or not isinstance(next(iter(first)), str):
            return cls(apart="its tensors have no first axis in common that is open")
        (batch,) = first
        second = {spec.shape[1] if len(spec.shape) == 2 else None for spec in signature.inputs}
        fills = {INPUT_IDS: pad, MASK: 0, TYPES: 0}
        names = {spec.name for spec in signature.inputs}
        length = next(iter(second)) if len(second) == 1 else None
        known = all(dim in (batch, length) or isinstance(dim, int) for spec in signature.outputs for dim in spec.shape)
        axes = {spec.name: [i for i, dim in enumerate(spec.shape) if dim == length] for spec in signature.outputs}
        once = all(len(found) <= 1 for found in axes.values())
        if not isinstance(length, str) or length == batch or pad is None or not (known and once):
            return cls(batched=True)
        if not {INPUT_IDS, MASK} <= names or not names <= fills.keys():
            return cls(batched=True)
        fill = {name: value for name, value in fills.items() if value is not None and name in names}
        return cls(True, "", fill, left, {name: found[0] for name, found in axes.items() if found})

    @property
    def shared(self) -> bool:
        """Whether rows of several requests may share a run."""
        return self.batched and not self.apart

    def told(self) -> str:
        """The same in words, for whoever starts a server."""
        if not self.shared:
            return f"requests run alone: {self.apart}"
        return f"requests {'of similar length ' if self.fill else ''}share a run"

    def rows(self, feeds: Arrays) -> int:
        """How many rows a request has; 1 where rows mean nothing."""
        return len(next(iter(feeds.values()))) if self.batched else 1

    def key(self, feeds: Arrays) -> Key:
        """Requests with equal keys can be joined."""
        if self.fill:
            return (bucket(feeds[INPUT_IDS].shape[1]),)
        return tuple(array.shape[1:] for array in feeds.values())

    def join(self, requests: Sequence[Arrays]) -> dict[str, np.ndarray]:
        """One set of feeds out of several with equal keys."""
        if len(requests) == 1:
            return dict(requests[0])
        names = list(requests[0])
        if self.fill:
            longest = max(feeds[INPUT_IDS].shape[1] for feeds in requests)
            requests = [self.padded(feeds, longest) for feeds in requests]
        return {name: np.concatenate([feeds[name] for feeds in requests]) for name in names}

    def padded(self, feeds: Arrays, length: int) -> Arrays:
        """Feeds of [rows, length], from shorter ones."""
        missing = length - feeds[INPUT_IDS].shape[1]
        if not missing or not self.fill:
            return feeds
        widths = ((0, 0), (missing, 0) if self.left else (0, missing))
        return {name: np.pad(array, widths, constant_values=self.fill[name]) for name, array in feeds.items()}

    def split(self, outputs: Arrays, requests: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """Give every request its rows, without padding."""
        if len(requests) == 1:
            return [dict(outputs)]
        parts, start = list[dict[str, np.ndarray]](), 0
        for feeds in requests:
            stop = start + self.rows(feeds)
            length = feeds[INPUT_IDS].shape[1] if self.fill else 0
            parts.append({name: self._cut(name, array[start:stop], length) for name, array in outputs.items()})
            start = stop
        return parts

    def _cut(self, name: str, array: np.ndarray, length: int) -> np.ndarray:
        axis = (self.sequence_axis or {}).get(name)
        if axis is None or array.shape[axis] == length:
            return array
        kept = slice(-length, None) if self.left else slice(length)
        return array[(slice(None),) * axis + (kept,)]


def bucket(length: int) -> int:
    """The longest length that is joined with this one."""
    step = 4
    while step * 16 <= length:
        step *= 2
    return -(-length // step) * step
