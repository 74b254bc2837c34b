# SPDX-License-Identifier: Apache-2.0
"""A model loaded into ONNX Runtime, on the provider asked for and no other."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import InputError, MissingDependency, OnnxpressError
from ..contracts.signature import Signature, TensorSpec
from .engine import Array, model_label

_DTYPES = {"float": "float32", "double": "float64"}
"""ONNX Runtime's element types whose names differ from numpy's."""

_BOUND_SHAPES = 8
"""How many input shapes keep their device buffers; the oldest goes when another comes."""

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


def onnxruntime() -> Any:
    """Return the onnxruntime module with its telemetry off.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingDependency("onnxruntime is not installed", next_step='pip install "onnxpress[cpu]"') from None
    ort.disable_telemetry_events()  # official Windows wheels have it on
    return ort


class OnnxRuntimeEngine:
    """One `onnxruntime.InferenceSession`; attributes as in `Engine`.

    Args:
        model: Path of an `.onnx` file, or the bytes of one.
        provider: What the user calls the provider, for messages.
        full_name: ONNX Runtime's name of it.
        threads: Threads that one operator may use.
        profile_to: Prefix of the trace file that `end_profiling` finishes; None records nothing.
        external: Name of an external data file -> its bytes, uint8 [size], where the model is bytes too.
        in_place: Leave the weights in their file, see `Session`.
        spinning: Keep worker threads awake between runs, see `Session`.

    Raises:
        InputError: It is no ONNX model, or ONNX Runtime cannot run it.
        MissingDependency: The provider could not be started.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        provider: str,
        full_name: str,
        threads: int,
        profile_to: Path | None,
        external: Mapping[str, Array] | None = None,
        in_place: bool = False,
        spinning: bool = False,
    ) -> None:
        options = _options(onnxruntime(), threads, profile_to, spinning=spinning)
        loaded = _load(model, provider, full_name, options, external or {}, in_place=in_place)
        self.session, self.load_ms = loaded
        self.threads = threads
        self.signature = Signature(
            tuple(_spec(node) for node in self.session.get_inputs()),
            tuple(_spec(node) for node in self.session.get_outputs()),
        )
        strings = any(spec.dtype == "string" for spec in self.signature.inputs)
        self._bound = _DeviceRun(self.session, "cuda") if full_name == _CUDA and not strings else None

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        """See `Engine.run`."""
        try:
            values: Sequence[Array]
            values = self._bound(outputs, feeds) if self._bound else self.session.run(outputs, dict(feeds))
        except Exception as error:
            raise _failure(error) from error
        return values

    def run_bound(self, binding: Any, options: Any = None) -> None:
        """Run on what the caller has bound, an `onnxruntime.IOBinding` of `session`; raises what `run` does."""
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise _failure(error) from error

    def end_profiling(self) -> Path:
        """See `Engine.end_profiling`; ONNX Runtime adds a time to the prefix."""
        return Path(self.session.end_profiling())


class _DeviceRun:
    """Runs a session on device buffers, so that one copy goes in and one comes out of each run and nothing else.

    Args:
        session: An `onnxruntime.InferenceSession`.
        device: `cuda`; `cpu` works too, which is how it is tested.
    """

    def __init__(self, session: Any, device: str) -> None:
        self._session = session
        self._device = device
        self._names = [node.name for node in session.get_inputs()]
        self._bindings: dict[tuple[tuple[int, ...], ...], tuple[Any, list[Any]]] = {}
        self._lock = threading.Lock()  # a binding belongs to one run at a time

    def __call__(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        arrays = [np.asarray(feeds[name], order="C") for name in self._names]
        with self._lock:
            binding, buffers = self._binding(arrays)
            for buffer, array in zip(buffers, arrays, strict=True):
                buffer.update_inplace(array)
            # Outputs are bound afresh each time: other ones may be asked for, and a kept one would be taken as
            # preallocated although its shape may depend on the values.
            binding.clear_binding_outputs()
            for name in outputs:
                binding.bind_output(name, self._device)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return [value.numpy() for value in binding.get_outputs()]

    def _binding(self, arrays: list[Array]) -> tuple[Any, list[Any]]:
        """Return the binding and its input buffers for these shapes, made once for each."""
        key = tuple(array.shape for array in arrays)
        if key not in self._bindings:
            if len(self._bindings) >= _BOUND_SHAPES:
                del self._bindings[next(iter(self._bindings))]
            make = onnxruntime().OrtValue.ortvalue_from_numpy
            buffers = [make(array, self._device, 0) for array in arrays]
            binding = self._session.io_binding()
            for name, buffer in zip(self._names, buffers, strict=True):
                binding.bind_ortvalue_input(name, buffer)
            self._bindings[key] = binding, buffers
        return self._bindings[key]


def _load(
    model: str | Path | bytes,
    provider: str,
    full_name: str,
    options: Any,
    external: Mapping[str, Array],
    *,
    in_place: bool,
) -> tuple[Any, float]:
    """Return an `onnxruntime.InferenceSession` on the provider, and the milliseconds that creating it took."""
    ort = onnxruntime()
    if full_name in (_CUDA, _TENSORRT):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it could not find; the check below says it
            ort.preload_dlls()  # CUDA and cuDNN from pip's nvidia packages, when torch did not bring them
    if in_place:  # what is folded, cast or prepacked is a copy in memory
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    if external:
        names, arrays = list(external), list(external.values())
        options.add_external_initializers_from_files_in_memory(names, arrays, [array.size for array in arrays])
    chain = dict.fromkeys([full_name, *([_CUDA] if full_name == _TENSORRT else []), _CPU])
    start = time.perf_counter()
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, options, providers=list(chain), enable_fallback=0)
    except Exception as error:
        raise InputError(f"{model_label(model)} cannot be loaded: {_first_line(error)}") from error
    load_ms = (time.perf_counter() - start) * 1e3
    if session.get_providers()[0] != full_name:  # onnxruntime only logs this and goes on with the next provider
        raise MissingDependency(
            f"provider '{provider}' could not be started; onnxruntime would have run on {session.get_providers()[0]}",
            next_step=f"Check the driver and the libraries that {full_name} needs, or choose another provider.",
        )
    return session, load_ms


def _options(ort: Any, threads: int, profile_to: Path | None, *, spinning: bool = False) -> Any:
    """Return session options that neither print nor disturb other sessions on the same cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # Worker threads keep spinning for a while after run() returns. On 2 cores, with several sessions taking turns,
    # a call takes two to three times as long with the spinning of its neighbours (benchmarks/spinning.py).
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    return options


def _spec(node: Any) -> TensorSpec:
    """Translate an `onnxruntime.NodeArg`; what is no tensor keeps ONNX Runtime's name (`seq(tensor(float))`)."""
    tensor = re.fullmatch(r"tensor\((\w+)\)", node.type)
    dtype = _DTYPES.get(tensor[1], tensor[1]) if tensor else node.type
    return TensorSpec(node.name, dtype, tuple(node.shape or ()))


def _failure(error: Exception) -> OnnxpressError:
    refused = type(error).__name__ == "InvalidArgument"
    return (InputError if refused else OnnxpressError)(f"the model failed: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """Return what an ONNX Runtime error says, without its code, source locations and C++ signatures."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
    text = re.sub(r"^Load model from .*? failed:", "", text)
    text = re.sub(r"\S+\.(?:cc|h|cu|cpp):\d+ .*?\)(?: const)? ", "", text)
    lines = text.splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")[:300]


def optimized_graph(model: str | Path | bytes, file: Path, threads: int) -> Path:
    """Let ONNX Runtime write the graph that it would execute on the CPU to `file`, weights beside it; return `file`.

    Raises:
        InputError: It is no ONNX model, or ONNX Runtime cannot run it.
    """
    ort = onnxruntime()
    options = _options(ort, threads, None)
    options.optimized_model_filepath = str(file)
    # Else what is beyond 2 GB could not be written
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{file.name}_data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        source = model if isinstance(model, bytes) else str(model)
        ort.InferenceSession(source, options, providers=[_CPU])
    except Exception as error:
        raise InputError(f"{model_label(model)} cannot be loaded: {_first_line(error)}") from error
    return file
