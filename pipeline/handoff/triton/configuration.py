# SPDX-License-Identifier: Apache-2.0
"""What config.pbtxt says of a model: tensors without their batch axis, and how large batches may be.

Triton leaves dimension 0 out of `dims` where `max_batch_size` is not 0 and then joins requests along it, so it has to
be the batch axis of every input and output, and rows must not see each other. Names alone do not prove that: the model
is run on a row beside a foreign one. A tensor of no dimensions is not allowed in a request; it travels as [1] and is
reshaped (docs of Triton, model_configuration, "Reshape").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....contracts.errors import InputError
from ....contracts.signature import TensorSpec
from ....runtime.bundle import largest_difference
from ....runtime.opened import Bundle
from ....runtime.session import Array, Session

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16", "string": "BYTES",
}  # fmt: skip
"""numpy's name of a dtype -> the Open Inference Protocol's. Triton's configuration has TYPE_ before it."""

MAX_BATCH = 16
QUEUE_DELAY_US = 2000


@dataclass(frozen=True)
class Tensor:
    """One input or output as Triton has it.

    Attributes:
        name: In the graph.
        kind: `TYPE_INT64`.
        dims: Without the batch axis where requests are joined; -1 for any size.
        scalar: The graph's tensor has no dimensions besides the batch axis: `dims` is [1] and reshaped away.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    scalar: bool


@dataclass(frozen=True)
class Configuration:
    """What the template is filled with."""

    name: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    label_output: str | None

    @property
    def preferred(self) -> tuple[int, ...]:
        """Batch sizes worth waiting for."""
        return tuple(size for size in (4, 8, 16, 32) if size <= self.max_batch_size)

    def request_shape(self, array: Array) -> tuple[int, ...]:
        """The shape that a graph's array has in a request to Triton."""
        rank_free = array.ndim == (1 if self.max_batch_size else 0)
        return (*array.shape, 1) if rank_free else array.shape


def service_name(bundle: Bundle) -> str:
    """The bundle's name as a folder and a path of a URL can have it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", bundle.name).strip("-.") or "model"


def configuration_of(bundle: Bundle) -> Configuration:
    """Decide what stands in config.pbtxt.

    Raises:
        InputError: A tensor has a type that Triton does not know, or the model consists of several graphs.
    """
    if bundle.manifest.get("companions"):
        raise InputError(
            f"{bundle.name} consists of several graphs, and Triton would need code of ours to call them in turn",
            next_step="Run it with: onnxpress generate, or onnxpress serve.",
        )
    session = bundle.session()
    largest = MAX_BATCH if _rows_are_independent(bundle, session) else 0
    signature = bundle.signature
    labels = list(bundle.labels) == list(range(len(bundle.labels))) and len(bundle.labels) > 0
    scored = [s.name for s in signature.outputs if s.shape and s.shape[-1] == len(bundle.labels)]
    return Configuration(
        service_name(bundle),
        largest,
        tuple(_tensor(spec, batched=bool(largest)) for spec in signature.inputs),
        tuple(_tensor(spec, batched=bool(largest)) for spec in signature.outputs),
        scored[0] if labels and len(scored) == 1 else None,
    )


def repeated(feeds: Mapping[str, Array], rows: int) -> dict[str, Array]:
    """The first row of each input, `rows` times."""
    return {name: np.repeat(array[:1], rows, axis=0) for name, array in feeds.items()}


def _tensor(spec: TensorSpec, *, batched: bool) -> Tensor:
    if spec.dtype not in DATATYPES:
        raise InputError(f"'{spec.name}' is {spec.dtype}, which the Open Inference Protocol has no name for")
    shape = spec.shape[1:] if batched else spec.shape
    dims = tuple(dim if isinstance(dim, int) else -1 for dim in shape)
    kind = "STRING" if spec.dtype == "string" else DATATYPES[spec.dtype]
    return Tensor(spec.name, f"TYPE_{kind}", dims or (1,), not dims)


def _rows_are_independent(bundle: Bundle, session: Session) -> bool:
    """Whether one named axis comes first everywhere, and a row's answer is the same beside another row."""
    firsts = {spec.shape[0] if spec.shape else None for spec in (*bundle.signature.inputs, *bundle.signature.outputs)}
    if len(firsts) != 1 or not isinstance(next(iter(firsts)), str) or not bundle.golden:
        return False
    sample = max(bundle.golden, key=lambda golden: sum(array.size for array in golden.inputs.values()))
    alone = session.run({name: array[:1] for name, array in sample.inputs.items()})
    pair = {name: np.concatenate([array[:1], _foreign(array)]) for name, array in sample.inputs.items()}
    try:
        together = session.run(pair)
    except InputError:
        return False
    return all(
        together[name].shape[0] == 2 and largest_difference(together[name][:1], answer) <= bundle.tolerance(name)
        for name, answer in alone.items()
    )


def _foreign(array: Array) -> Array:
    """Another row with values that the model knows: the last one, turned by one place."""
    return np.roll(array[-1:], 1, axis=-1) if array.ndim > 1 else array[-1:]
