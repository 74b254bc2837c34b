# SPDX-License-Identifier: Apache-2.0
"""Look into a graph while it runs: reductions added to a copy of it, and the same reductions on fetched arrays.

A batch then returns a few numbers for each value instead of the value. What no operator computes cheaply (histograms,
sampled rows), and batches in which padding has to be left out, are fetched whole, reduced here, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..passes.graph import add_weight, label, make_node
from .results import Channels, Gram, Range, Statistics, Wanted

PREFIX = "onnxpress_observed"


@dataclass(frozen=True)
class Reduced:
    """What one batch says about one value; None where it was not asked. All float64.

    Attributes:
        span: Smallest and largest value, and the sum of magnitudes, which is NaN if any value is.
        channels: Per channel the largest absolute value, the sum, the sum of absolute values: [3, C].
        channel_rows: How many vectors over the channels there were.
        gram: X^T X, [K, K].
        gram_rows: How many rows of the last axis there were.
    """

    span: tuple[float, float, float] | None = None
    channels: np.ndarray | None = None
    channel_rows: int = 0
    gram: np.ndarray | None = None
    gram_rows: int = 0

    @property
    def extremes(self) -> np.ndarray:
        """Numbers of which one is NaN, or infinite, if any value is."""
        parts = []
        if self.span is not None:
            low, high, size = self.span
            parts.append(np.asarray([low, high, size if np.isnan(size) else 0.0]))  # a sum may well overflow
        if self.channels is not None:
            parts += [self.channels[0], self.channels[2]]
        if self.gram is not None:
            parts.append(np.diag(self.gram))
        return np.concatenate([np.zeros(0), *parts])


def unobservable(model: ir.Model, wanted: Wanted) -> dict[str, str]:
    """Name -> reason, for every name that no run of this model can measure."""
    known = _named(model)
    inside = {v.name for graph in model.graph.subgraphs() for v in (*graph.inputs, *_outputs(graph))}
    found: dict[str, str] = {}
    for name in wanted.names:
        value, reason = known.get(name), None
        if value is None:
            fixed = name in model.graph.initializers
            reason = "a constant" if fixed else "inside a subgraph" if name in inside else "not in the graph"
        elif value.type is not None and not isinstance(value.type, ir.TensorType):
            reason = "not a tensor"
        elif value.dtype is not None and not value.dtype.is_floating_point():
            reason = f"{value.dtype.name.lower()}, not floating point"
        elif name in (*wanted.channels, *wanted.grams, *wanted.rows):
            reason = _no_rows(value, wanted.channels.get(name, -1))
        if reason is not None:
            found[name] = reason
    return found


def _no_rows(value: ir.Value, axis: int) -> str | None:
    """Why a value is not made of vectors along `axis`, if so."""
    if value.shape is None:
        return None if axis == -1 else f"its rank is unknown, so axis {axis} cannot be found"
    rank = len(value.shape)
    if rank == 0:
        return "a scalar, without channels"
    return None if -rank <= axis < rank else f"it has no axis {axis}"


def observed(model: ir.Model, wanted: Wanted, *, fetch: Iterable[str]) -> tuple[ir.Model, dict[str, str]]:
    """Return a copy of `model` whose only outputs are the observations.

    Args:
        model: Stays as it is; weights are shared with the copy.
        wanted: The names have to be observable.
        fetch: Values to return whole, as float32.

    Returns:
        The copy, and which node makes each value, for messages.
    """
    copy = model.clone()
    values = _named(copy)
    makers = {n: label(node) if (node := values[n].producer()) else f"input {n}" for n in wanted.names}
    whole = set(fetch)
    added: list[ir.Value] = []
    for index, name in enumerate(wanted.names):
        new = _Reductions(copy, values[name], f"{PREFIX}_{index}")
        if name in whole:
            added.append(new.add("Identity", [new.source], "value"))
            continue
        if name in wanted.ranges:
            added += [new.reduce(op, new.source, None, part) for op, part in _SPAN.items()]
        if name in wanted.channels:
            added += new.channels(wanted.channels[name])
        if name in wanted.grams:
            added += new.gram()
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(added)
    return copy, makers


# The runtime's minimum and maximum pass NaN over. The sum of magnitudes is NaN for no other reason: not where both
# infinities meet, as a plain sum would be
_SPAN = {"ReduceMin": "low", "ReduceMax": "high", "ReduceL1": "size"}


class _Reductions:
    """Nodes that summarize one value, appended to its graph."""

    def __init__(self, model: ir.Model, value: ir.Value, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        self.opset = model.opset_imports.get("", 13)
        self.source = value
        if value.dtype not in (None, ir.DataType.FLOAT):
            self.source = self.add("Cast", [value], "float", to=int(ir.DataType.FLOAT))

    def add(self, op: str, inputs: list[ir.Value], part: str, **attributes: object) -> ir.Value:
        node = make_node(op, inputs, [f"{self.prefix}_{part}"], attributes=attributes)
        self.model.graph.append(node)
        return node.outputs[0]

    def reduce(self, op: str, value: ir.Value, axis: int | None, part: str) -> ir.Value:
        """Reduce one axis, or all; the axes became an input at opset 18, for ReduceSum at 13."""
        if axis is None:
            return self.add(op, [value], part, keepdims=0)
        if self.opset >= 18 or (op == "ReduceSum" and self.opset >= 13):
            axes = add_weight(self.model, self.model.graph, f"{self.prefix}_axes", np.asarray([axis], np.int64))
            return self.add(op, [value, axes], part, keepdims=0)
        return self.add(op, [value], part, keepdims=0, axes=[axis])

    def channels(self, axis: int) -> list[ir.Value]:
        rows = self._rows(axis, "channel")
        size = self.add("Abs", [rows], "channel_abs")
        return [
            self.reduce("ReduceMax", size, 0, "peak"),
            self.reduce("ReduceSum", rows, 0, "total"),
            self.reduce("ReduceSum", size, 0, "total_abs"),
            self.add("Shape", [rows], "channel_shape"),
        ]

    def gram(self) -> list[ir.Value]:
        rows = self._rows(-1, "gram")
        turned = self.add("Transpose", [rows], "gram_turned", perm=[1, 0])
        return [self.add("MatMul", [turned, rows], "gram"), self.add("Shape", [rows], "gram_shape")]

    def _rows(self, axis: int, part: str) -> ir.Value:
        """The value as a matrix whose columns are the channels."""
        value, rank = self.source, len(self.source.shape) if self.source.shape is not None else None
        if rank is not None and axis % rank != rank - 1:
            perm = [a for a in range(rank) if a != axis % rank] + [axis % rank]
            value = self.add("Transpose", [value], f"{part}_last", perm=perm)
        shape = self.add("Shape", [value], f"{part}_last_shape")
        last = add_weight(self.model, self.model.graph, f"{self.prefix}_last", np.asarray([-1], np.int64))
        width = self.add("Gather", [shape, last], f"{part}_width", axis=0)
        target = self.add("Concat", [last, width], f"{part}_target", axis=0)
        return self.add("Reshape", [value, target], f"{part}_rows")


def read_reduced(wanted: Wanted, outputs: Mapping[str, np.ndarray]) -> dict[str, Reduced]:
    """The outputs of an observed graph, for every value that was reduced in it."""
    found = {}
    for index, name in enumerate(wanted.names):
        part = {key.removeprefix(f"{PREFIX}_{index}_"): a for key, a in outputs.items() if _index(key) == index}
        if not part or "value" in part:
            continue
        span, rows, gram_rows = None, *(int(part.get(f"{kind}_shape", [0])[0]) for kind in ("channel", "gram"))
        if "low" in part and (part["low"] <= part["high"] or np.isnan(part["size"])):  # else there were no elements
            span = (float(part["low"]), float(part["high"]), float(part["size"]))
        found[name] = Reduced(
            span=span,
            channels=np.stack([part[k] for k in ("peak", "total", "total_abs")]).astype(np.float64) if rows else None,
            channel_rows=rows,
            gram=part["gram"].astype(np.float64) if gram_rows else None,
            gram_rows=gram_rows,
        )
    return found


def fetched(wanted: Wanted, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values that an observed graph returned whole, float32."""
    names = wanted.names
    return {names[_index(key)]: array for key, array in outputs.items() if key.endswith("_value")}


def _index(key: str) -> int:
    return int(key[len(PREFIX) + 1 :].partition("_")[0])


def reduce_array(name: str, values: np.ndarray, keep: np.ndarray | None, wanted: Wanted) -> Reduced:
    """The reductions of `observed`, on an array.

    Args:
        name: Of the value in `wanted`.
        values: float32, any shape.
        keep: bool, broadcastable to `values`: what counts. None counts all.
        wanted: What to compute; the span always is, to see whether all values are finite.
    """
    channels = gram = None
    rows = gram_rows = 0
    flat = kept(values, keep)
    # Unlike the runtime's, numpy's minimum and maximum are NaN if any value is
    span = (float(flat.min()), float(flat.max()), 0.0) if flat.size else None
    if span is None or not np.isfinite(span).all():
        return Reduced(span)
    if name in wanted.channels:
        matrix = kept_rows(values, keep, wanted.channels[name]).astype(np.float64)
        rows, size = len(matrix), np.abs(matrix)
        channels = np.stack([size.max(axis=0, initial=0.0), matrix.sum(axis=0), size.sum(axis=0)])
    if name in wanted.grams:
        matrix = kept_rows(values, keep, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # as in the runtime: what overflows is said to
            gram_rows, gram = len(matrix), (matrix.T @ matrix).astype(np.float64)
    return Reduced(span, channels, rows, gram, gram_rows)


def kept(values: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    return values.reshape(-1) if keep is None else values[np.broadcast_to(keep, values.shape)]


def kept_rows(values: np.ndarray, keep: np.ndarray | None, axis: int) -> np.ndarray:
    """[rows, C]: the vectors along `axis` at the positions that count."""
    moved = np.moveaxis(values, axis, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    if keep is None:
        return rows
    # A position along the channels cannot be left out: what counts is decided by the other axes
    positions = np.moveaxis(np.broadcast_to(keep, values.shape), axis, -1).any(axis=-1)
    return rows[positions.reshape(-1)]


def merge(statistics: Statistics, name: str, reduced: Reduced, wanted: Wanted) -> None:
    """Add one batch's reductions of one value to the results; a width that changes makes the value `missing`."""
    if reduced.span is not None and name in wanted.ranges:
        statistics.ranges.setdefault(name, Range()).add(*reduced.span[:2])
    if reduced.channels is not None:
        peak, total, total_abs = reduced.channels
        zero = np.zeros_like(peak)
        channels = statistics.channels.setdefault(name, Channels(zero, zero, zero, 0))
        if channels.peak.shape == peak.shape:
            channels.add(peak, total, total_abs, reduced.channel_rows)
        else:
            statistics.missing[name] = f"its axis {wanted.channels[name]} changes in size from batch to batch"
    if reduced.gram is not None:
        gram = statistics.grams.setdefault(name, Gram(np.zeros_like(reduced.gram), 0))
        if gram.matrix.shape == reduced.gram.shape:
            gram.matrix += reduced.gram
            gram.rows += reduced.gram_rows
        else:
            statistics.missing[name] = "its last axis changes in size from batch to batch"


def _outputs(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]


def _named(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for value in (*model.graph.inputs, *_outputs(model.graph))}
