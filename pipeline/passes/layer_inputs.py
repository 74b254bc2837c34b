# SPDX-License-Identifier: Apache-2.0
"""The activations that layers are multiplied by, measured: their Gram matrices, as many at a time as fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from ..statistics import Calibration, Wanted
from .graph import add_weight, attribute, dims, make_node


class Reader(Protocol):
    """A layer: its weight is multiplied by each of `inputs`."""

    @property
    def inputs(self) -> tuple[ir.Value, ...]: ...


L = TypeVar("L", bound=Reader)


@dataclass
class LayerInputs(Generic[L]):
    """The activations that some layers are multiplied by, and their Gram matrix, summed where they are several.

    Attributes:
        values: The activations.
        layers: All that read just these.
        waiting: Names of those that have not been measured yet.
        gram: float64 [K, K]; None where it could not be measured.
        rows: How many vectors it sums.
        mean: Of each channel, float64 [K], if asked for.
        mean_abs: Mean magnitude of each channel, float64 [K], if asked for.
        missing: Why there is no Gram matrix.
    """

    values: tuple[ir.Value, ...]
    layers: list[L] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    gram: np.ndarray | None = None
    rows: int = 0
    mean: np.ndarray | None = None
    mean_abs: np.ndarray | None = None
    missing: str | None = None


def inputs_of(
    model: ir.Model, layers: Sequence[L], calibration: Calibration, *, channels: bool = False
) -> Iterator[LayerInputs[L]]:
    """Measure the layers' inputs, as many at a time as fit, and hand each out once, with all layers that read it."""
    jobs: dict[tuple[ir.Value, ...], LayerInputs[L]] = {}
    for layer in layers:
        job = jobs.setdefault(layer.inputs, LayerInputs(layer.inputs, waiting={str(v.name) for v in layer.inputs}))
        job.layers.append(layer)
    readers: dict[str, list[LayerInputs[L]]] = {}
    for job in jobs.values():
        for name in sorted(job.waiting):
            readers.setdefault(name, []).append(job)
    for group in calibration.gram_groups(model, readers):
        found = calibration.collect(model, Wanted(grams=group, channels=dict.fromkeys(group, -1) if channels else {}))
        for name in group:
            gram = found.grams.pop(name, None)
            for job in readers[name]:
                job.waiting.discard(name)
                if gram is None or job.missing:
                    job.missing = job.missing or f"its input is {found.missing.get(name, 'always masked')}"
                elif job.gram is None:
                    job.gram = gram.matrix
                else:
                    job.gram = job.gram + gram.matrix
                job.rows += 0 if gram is None else gram.rows
                if name in found.channels and gram is not None:
                    mean, share = found.channels[name].mean, gram.rows / max(1, job.rows)
                    job.mean = mean if job.mean is None else job.mean + share * (mean - job.mean)
                    job.mean_abs = found.channels[name].mean_abs
                if not job.waiting:
                    job.gram = None if job.missing else job.gram
                    yield job
                    job.gram = None  # let go


def rows_read(
    model: ir.Model, node: ir.Node, value: ir.Value, name: str, kernels: np.ndarray | None = None
) -> ir.Value:
    """Append to the graph what a convolution reads, as rows: its channels [batch, ..., C], or patches [batch, ..., K].

    Args:
        model: Changed in place.
        node: The convolution, of this graph or of one that it was cloned from: its geometry is read, no more.
        value: Its input, in this graph.
        name: Of the result.
        kernels: For patches: a one-hot kernel for each of their elements, [K, C, window...].
    """
    factor = node.inputs[1]
    shape = dims(factor)
    assert factor is not None
    assert shape is not None
    width = int(shape[1] or 0) * int(attribute(node, "group", 1)) if kernels is None else len(kernels)
    dtype = factor.dtype or ir.DataType.FLOAT
    if kernels is not None:
        weight = add_weight(model, model.graph, f"{name}_kernels", kernels.astype(dtype.numpy()))
        unfold = make_node("Conv", [value, weight], [f"{name}_first"])
        unfold.attributes.update({key: a for key, a in node.attributes.items() if key not in ("group", "kernel_shape")})
        model.graph.append(unfold)
        value = unfold.outputs[0]
    turn = make_node("Transpose", [value], [name], attributes={"perm": [0, *range(2, len(shape)), 1]})
    turn.outputs[0].shape = ir.Shape([None] * (len(shape) - 1) + [width])
    turn.outputs[0].dtype = dtype
    model.graph.append(turn)
    return turn.outputs[0]
