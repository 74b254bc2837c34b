# SPDX-License-Identifier: Apache-2.0
"""Weights that are rounded when they are written, some rows after the other, and then let go.

The weights of a model that is larger than memory stay in their file (`streamed_tensor`), and their rounded form may not
fit either. What takes their place in the graph are tensors of known shape that are computed when the writer asks for
them. Codes, scales and zero points of a weight come from one rounding: it is kept until the next weight is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...contracts.errors import InputError
from ...exporters.streamed_tensor import StreamedTensor, in_order
from ...runtime.machine import default_threads
from ..quantization.blocks import Rounded

_STEP = 1 << 20
"""Elements that one thread rounds at a time."""

Arrays = dict[str, np.ndarray]


@dataclass
class Latest:
    """One result that is kept, shared by all weights of a pass."""

    owner: object = None
    arrays: Arrays = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class LateWeight:
    """A weight on its way.

    Attributes:
        tensor: [rows, columns], scales along the rows.
        rounding: Rounds float32 [n, columns].
        latest: Where the last result is kept.
        outcome: For the report; its `weight_sqnr_db` is filled in when the weight is written.
    """

    tensor: StreamedTensor
    rounding: Callable[[np.ndarray], Rounded]
    latest: Latest
    outcome: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape.numpy()
        return int(rows), int(columns)

    def sample(self) -> Rounded:
        """A row of zeros, rounded: what the arrays of each row look like."""
        return self.rounding(np.zeros((1, self.shape[1]), np.float32))

    def part(self, key: str, arrays_of: Callable[[Rounded], Arrays]) -> ir.LazyTensor:
        """One of the arrays that the graph stores, [rows, ...].

        Args:
            key: Which of `arrays_of`.
            arrays_of: From rounded rows to what is stored of them; the first axis counts the rows.
        """
        like = arrays_of(self.sample())[key]
        shape, dtype = (self.shape[0], *like.shape[1:]), ir.DataType.from_numpy(like.dtype)
        return ir.LazyTensor(lambda: ir.Tensor(self._arrays(arrays_of)[key]), dtype=dtype, shape=ir.Shape(shape))

    def _arrays(self, arrays_of: Callable[[Rounded], Arrays]) -> Arrays:
        with self.latest.lock:
            if self.latest.owner is not self:
                self.latest.owner, self.latest.arrays = None, {}  # the last one goes before the next one comes
                self.latest.arrays = self._round(arrays_of)
                self.latest.owner = self
            return self.latest.arrays

    def _round(self, arrays_of: Callable[[Rounded], Arrays]) -> Arrays:
        rows, columns = self.shape

        def work(piece: np.ndarray) -> tuple[Arrays, float, float]:
            matrix = piece.reshape(-1, columns)
            signal = float(np.dot(piece, piece))
            if not np.isfinite(signal):
                raise InputError(
                    f"the weight '{self.tensor.name}' holds NaN or infinity",
                    next_step="Leave it out: --set passes.quantize_weights.exclude=[NAME].",
                )
            rounded = self.rounding(matrix)
            off = rounded.dequantized()
            off -= matrix
            return arrays_of(rounded), signal, float(np.dot(off.reshape(-1), off.reshape(-1)))

        result: Arrays = {}
        start, signal, noise = 0, 0.0, 0.0
        pieces = self.tensor.pieces(max(1, _STEP // columns) * columns)
        for arrays, strong, weak in in_order(work, pieces, default_threads()):
            if not result:
                result = {key: np.empty((rows, *a.shape[1:]), a.dtype) for key, a in arrays.items()}
            count = len(next(iter(arrays.values())))
            for key, array in arrays.items():
                result[key][start : start + count] = array
            start, signal, noise = start + count, signal + strong, noise + weak
        self.outcome["weight_sqnr_db"] = round(10 * float(np.log10(signal / noise)), 2) if signal and noise else None
        return result
