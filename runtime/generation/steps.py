# SPDX-License-Identifier: Apache-2.0
"""A batch of texts within the graph, token by token: four ways of keeping what earlier tokens left.

BoundSteps    the cache is ONNX Runtime's own values: one step's outputs are bound as the next one's inputs
SharedSteps   the graph appends to one buffer that is bound as past and as present (GroupQueryAttention)
CopiedSteps   numpy arrays in and out, for engines without bindings; the oracle of the other two
WholeSteps    no cache: the whole text again each time
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ...contracts.decoding import Decoding, cache_shape, growing_axis
from ...contracts.errors import InputError
from ...contracts.signature import TensorSpec
from ..onnxruntime_engine import OnnxRuntimeEngine, onnxruntime
from ..session import Array, Session
from .chunks import Cancellation
from .padding import Padded

LOGITS = "logits"
_ONNX_TYPES = {"bfloat16": 16}
"""Element types that numpy has no name for, by their numbers in onnx.proto3."""


class Steps(Protocol):
    """One batch. Logits are float32 [rows, vocabulary] behind each row's last token; the caller may change them."""

    @property
    def graph_seconds(self) -> float:
        """Spent within the engine so far."""
        ...

    def start(self) -> Array:
        """Read the prompts."""
        ...

    def step(self, tokens: Array) -> Array:
        """Read one more token in each row, int64 [rows]."""
        ...

    def follow(self, rows: Array) -> None:
        """Let row i go on from what row `rows[i]` was, int64 [rows]."""
        ...


class Device:
    """Where caches lie, and how values get there.

    Args:
        provider: The session's.
    """

    def __init__(self, provider: str) -> None:
        self.name = "cuda" if provider in ("cuda", "tensorrt") else "cpu"

    def value(self, array: Array) -> Any:
        """An OrtValue of an array; on the CPU it is the array's own memory."""
        return onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.name, 0)

    def zeros(self, spec: TensorSpec, shape: Sequence[int]) -> Any:
        """An OrtValue of zeros."""
        if spec.dtype not in _ONNX_TYPES:
            return self.value(np.zeros(shape, spec.dtype))
        words = np.zeros(shape, np.uint16)
        if self.name == "cpu":
            return onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(words, _ONNX_TYPES[spec.dtype])
        return onnxruntime().OrtValue.ortvalue_from_shape_and_type(list(shape), _ONNX_TYPES[spec.dtype], self.name, 0)


class _Binding:
    """One graph's inputs and outputs bound, and its logits read.

    Args:
        session: On ONNX Runtime.
        device: Where caches lie.
        cancellation: Interrupts a run.
    """

    def __init__(self, session: Session, device: Device, cancellation: Cancellation) -> None:
        assert isinstance(session.engine, OnnxRuntimeEngine)
        self._engine, self.device, self._cancellation = session.engine, device, cancellation
        self.io = self._engine.session.io_binding()
        self._options = onnxruntime().RunOptions()
        # Asked for in each run; where it is absent, that is an exception within, which takes longer than all the rest
        self._options.add_run_config_entry("gpu_graph_id", "-1")
        logits = next(spec for spec in session.signature.outputs if spec.name == LOGITS)
        self._size, self._dtype = logits.shape[-1], logits.dtype
        self._buffer: tuple[Array, Any] | None = None
        self.seconds = 0.0

    def feed(self, values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            self.io.bind_cpu_input(name, array)

    def bind_logits(self, rows: int | None) -> None:
        """Ask for the logits: of so many rows with one token each, into a buffer that is reused; or of any shape."""
        if rows is None or not isinstance(self._size, int) or self._dtype in _ONNX_TYPES:
            self._buffer = None
            self.io.bind_output(LOGITS, "cpu")
            return
        if self._buffer is None:
            array = np.empty((rows, 1, self._size), self._dtype)
            self._buffer = array, onnxruntime().OrtValue.ortvalue_from_numpy(array)
        self.io.bind_ortvalue_output(LOGITS, self._buffer[1])

    def run(self) -> None:
        began = time.perf_counter()
        self._cancellation.interrupt_with(self._interrupt)
        try:
            if self.device.name != "cpu":
                self.io.synchronize_inputs()
            self._engine.run_bound(self.io, self._options)
            if self.device.name != "cpu":
                self.io.synchronize_outputs()
        finally:
            self._cancellation.interrupt_with(None)
        self.seconds += time.perf_counter() - began

    def logits(self) -> Array:
        """Of the last run, [rows, tokens, vocabulary]; they were the first output that was bound."""
        found: Array = self._buffer[0] if self._buffer is not None else self.io.get_outputs()[0].numpy()
        return found

    def _interrupt(self) -> None:
        self._options.terminate = True


class BoundSteps:
    """See above. What the graph writes, it allocates; nothing is copied.

    Args:
        session: The graph, on ONNX Runtime.
        decoding: How it is fed.
        batch: The texts.
        cancellation: Interrupts a run.
        fixed: Inputs that stay as they are: what an encoder left.
    """

    def __init__(
        self,
        session: Session,
        decoding: Decoding,
        batch: Padded,
        cancellation: Cancellation,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self._decoding, self._batch = decoding, batch
        self._device = Device(session.provider)
        self._binding = _Binding(session, self._device, cancellation)
        for name, value in (fixed or {}).items():
            self._binding.io.bind_ortvalue_input(name, value)
        for spec in decoding.caches:
            shape = cache_shape(spec, batch.rows, 0)
            self._binding.io.bind_ortvalue_input(spec.name, self._device.zeros(spec, shape))
        self._values: list[Any] = []

    @property
    def graph_seconds(self) -> float:
        """See `Steps`."""
        return self._binding.seconds

    def start(self) -> Array:
        """See `Steps`."""
        logits = self._run(self._batch.first(), None)
        return self._batch.last_logits(logits)

    def step(self, tokens: Array) -> Array:
        """See `Steps`."""
        return np.asarray(self._run(self._batch.next(tokens), self._batch.rows)[:, -1], np.float32)

    def follow(self, rows: Array) -> None:
        """See `Steps`; through the host's memory."""
        self._batch.follow(rows)
        for position, name in enumerate(self._decoding.present):
            value = self._device.value(self._values[position].numpy()[rows])
            self._values[position] = value
            self._binding.io.bind_ortvalue_input(name, value)

    def _run(self, feeds: Mapping[str, Array], rows: int | None) -> Array:
        io, device = self._binding.io, self._device.name
        self._binding.feed(feeds)
        io.clear_binding_outputs()  # one that was kept would be taken as preallocated, in the last step's shape
        self._binding.bind_logits(rows)
        for name in self._decoding.present.values():
            io.bind_output(name, device)
        self._binding.run()
        self._values = io.get_outputs()[1:]
        for name, value in zip(self._decoding.present, self._values, strict=True):
            io.bind_ortvalue_input(name, value)
        return self._binding.logits()


class SharedSteps:
    """See above. The buffers have room for all tokens from the beginning; nothing is bound anew but the new tokens.

    Args:
        session: The graph, on ONNX Runtime, with GroupQueryAttention over every cache.
        decoding: How it is fed.
        batch: The texts, padded on the right.
        cancellation: Interrupts a run.

    Raises:
        InputError: There is no memory for so many tokens.
    """

    def __init__(self, session: Session, decoding: Decoding, batch: Padded, cancellation: Cancellation) -> None:
        self._batch = batch
        self._binding = _Binding(session, Device(session.provider), cancellation)
        self._buffers: list[Any] = []
        self._decoding, self._started = decoding, False
        for spec in decoding.caches:
            try:
                buffer = self._binding.device.zeros(spec, cache_shape(spec, batch.rows, batch.capacity))
            except MemoryError:
                raise InputError(
                    f"there is no memory for {batch.capacity} tokens in {batch.rows} rows",
                    next_step="Ask for fewer new tokens.",
                ) from None
            self._buffers.append(buffer)
            self._binding.io.bind_ortvalue_input(spec.name, buffer)

    @property
    def graph_seconds(self) -> float:
        """See `Steps`."""
        return self._binding.seconds

    def start(self) -> Array:
        """See `Steps`."""
        return self._batch.last_logits(self._run(self._batch.first(), None))

    def step(self, tokens: Array) -> Array:
        """See `Steps`."""
        return np.asarray(self._run(self._batch.next(tokens), self._batch.rows)[:, -1], np.float32)

    def follow(self, rows: Array) -> None:
        """See `Steps`; through the host's memory."""
        self._batch.follow(rows)
        for buffer in self._buffers:
            buffer.update_inplace(np.ascontiguousarray(buffer.numpy()[rows]))

    def _run(self, feeds: Mapping[str, Array], rows: int | None) -> Array:
        self._binding.feed(feeds)
        if rows is None or not self._started:
            self._bind_outputs(rows)
        self._binding.run()
        return self._binding.logits()

    def _bind_outputs(self, rows: int | None) -> None:
        self._binding.io.clear_binding_outputs()
        self._binding.bind_logits(rows)
        for name, buffer in zip(self._decoding.present.values(), self._buffers, strict=True):
            self._binding.io.bind_ortvalue_output(name, buffer)
        self._started = rows is not None


class CopiedSteps:
    """See above.

    Args:
        session: The graph, on any engine.
        decoding: How it is fed.
        batch: The texts.
        fixed: Inputs that stay as they are: what an encoder left.
    """

    def __init__(
        self, session: Session, decoding: Decoding, batch: Padded, fixed: Mapping[str, Array] | None = None
    ) -> None:
        self._session, self._decoding, self._batch = session, decoding, batch
        self._fixed = dict(fixed or {})
        self._cache = decoding.empty_cache(batch.rows)
        self._outputs = [LOGITS, *decoding.present.values()]
        self.graph_seconds = 0.0

    def start(self) -> Array:
        """See `Steps`."""
        return self._batch.last_logits(self._run(self._batch.first()))

    def step(self, tokens: Array) -> Array:
        """See `Steps`."""
        return np.asarray(self._run(self._batch.next(tokens))[:, -1], np.float32)

    def follow(self, rows: Array) -> None:
        """See `Steps`."""
        self._batch.follow(rows)
        self._cache = {name: array[rows] for name, array in self._cache.items()}

    def _run(self, feeds: Mapping[str, Array]) -> Array:
        began = time.perf_counter()
        outputs = self._session.run({**feeds, **self._fixed, **self._cache}, self._outputs)
        self.graph_seconds += time.perf_counter() - began
        self._cache = self._decoding.next_cache(outputs)
        return outputs[LOGITS]


class WholeSteps:
    """See above. Each row is padded on the right, where causal attention does not look.

    Args:
        session: The graph, on any engine.
        prompts: Token ids of each row.
        pad: What padding consists of.
        longest: Tokens that the model reads at most, or None; rows that have ended stay at it beside the others.
    """

    def __init__(
        self, session: Session, prompts: Sequence[Sequence[int]], pad: int = 0, longest: int | None = None
    ) -> None:
        self._session, self._pad, self._longest = session, pad, longest
        self._inputs = {spec.name: spec for spec in session.signature.inputs}
        self._texts = [list(prompt) for prompt in prompts]
        self.graph_seconds = 0.0

    def start(self) -> Array:
        """See `Steps`."""
        batch = Padded(self._texts, 0, self._inputs, pad=self._pad, left=False)
        feeds, began = batch.first(), time.perf_counter()
        logits = self._session.run(feeds, [LOGITS])[LOGITS]
        self.graph_seconds += time.perf_counter() - began
        return batch.last_logits(logits)

    def step(self, tokens: Array) -> Array:
        """See `Steps`."""
        for text, token in zip(self._texts, tokens, strict=True):
            if len(text) != self._longest:
                text.append(int(token))
        return self.start()

    def follow(self, rows: Array) -> None:
        """See `Steps`."""
        self._texts = [list(self._texts[row]) for row in rows]


def grows(decoding: Decoding) -> bool:
    """Whether the cache keeps something of every token."""
    return any(growing_axis(spec) is not None for spec in decoding.caches)
