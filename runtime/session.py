# SPDX-License-Identifier: Apache-2.0
"""A model loaded into ONNX Runtime: checked inputs, named outputs, never another provider than the one asked for."""

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

from ..contracts.errors import InputError, MissingDependency, OnnxpressError, did_you_mean
from ..contracts.signature import Signature, TensorSpec
from .machine import default_threads

Array = np.ndarray[Any, np.dtype[Any]]

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "cann": "CANNExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
}
"""The word that a user writes -> ONNX Runtime's name of the execution provider."""

_INSTALL = {
    "cpu": 'pip install "onnxpress[cpu]"',
    "cuda": 'pip uninstall -y onnxruntime && pip install "onnxpress[gpu]"',
    "tensorrt": 'pip uninstall -y onnxruntime && pip install "onnxpress[gpu]"',
    "openvino": "pip uninstall -y onnxruntime && pip install onnxruntime-openvino",
    "directml": "pip uninstall -y onnxruntime && pip install onnxruntime-directml",
}
"""The command that installs a provider. The wheels share one folder, so the plain one has to go first."""

_DTYPES = {"float": "float32", "double": "float64"}
"""ONNX Runtime's element types whose names differ from numpy's."""

_BOUND_SHAPES = 8
"""How many input shapes keep their device buffers; the oldest goes when another comes."""


def onnxruntime() -> Any:
    """Return the onnxruntime module with its telemetry off.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingDependency("onnxruntime is not installed", next_step=_INSTALL["cpu"]) from None
    ort.disable_telemetry_events()  # official Windows wheels have it on
    return ort


def available_providers() -> list[str]:
    """Return the short names of the providers that the installed onnxruntime offers, in the order of `PROVIDERS`."""
    offered = set(onnxruntime().get_available_providers())
    return [name for name, full in PROVIDERS.items() if full in offered]


def require_provider(name: str) -> str:
    """Return ONNX Runtime's name of a provider.

    Raises:
        InputError: No provider has that name.
        MissingDependency: The installed onnxruntime was built without it.
    """
    if name not in PROVIDERS:
        raise InputError(f"unknown provider '{name}'", next_step=did_you_mean(name, PROVIDERS))
    offered = available_providers()
    if name not in offered:
        raise MissingDependency(
            f"the installed onnxruntime has no provider '{name}' (it has: {', '.join(offered)})",
            next_step=_INSTALL.get(name, f"Install a build of onnxruntime with the {PROVIDERS[name]}."),
        )
    return PROVIDERS[name]


class Session:
    """One model, loaded once, run many times.

    Args:
        model: Path of an `.onnx` file (its external data is found beside it), or the bytes of one.
        provider: A key of `PROVIDERS`.
        threads: Threads that one operator may use; by default one a usable physical core.
        profile_to: Prefix of the trace file that `end_profiling` finishes; None records nothing.

    Attributes:
        provider: The provider that runs the model, as asked for.
        threads: As above, resolved.
        signature: Inputs and outputs; dynamic axes keep the names they have in the graph.
        load_ms: Milliseconds from the file (or bytes) to a session ready to run, without importing onnxruntime.

    Raises:
        InputError: There is no such file, it is no ONNX model, or the provider is unknown.
        MissingDependency: The provider is not installed, or could not be started.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        profile_to: Path | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, not {threads}")
        self.provider = provider
        self.threads = threads or default_threads()
        self._session, self.load_ms = _load(model, provider, self.threads, profile_to)
        self.signature = Signature(
            tuple(_spec(node) for node in self._session.get_inputs()),
            tuple(_spec(node) for node in self._session.get_outputs()),
        )
        self._inputs = {spec.name: spec for spec in self.signature.inputs}
        self._outputs = [spec.name for spec in self.signature.outputs]
        strings = any(spec.dtype == "string" for spec in self.signature.inputs)
        self._bound = _DeviceRun(self._session, "cuda") if provider == "cuda" and not strings else None

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the model once.

        Args:
            feeds: One array for each input, with its dtype and shape.
            outputs: Names of the outputs to return; all of them when None.

        Returns:
            Output name -> array on the host, in the order asked for.

        Raises:
            InputError: An input is missing, unknown, or has another dtype or shape; an output is unknown; or the
                model refuses the values.
            OnnxpressError: The model failed while running.
        """
        names = self._outputs if outputs is None else list(outputs)
        for name in names:
            if name not in self._outputs:
                raise InputError(f"the model has no output '{name}'", next_step=did_you_mean(name, self._outputs))
        self._check(feeds)
        try:
            values = self._bound(names, feeds) if self._bound else self._session.run(names, dict(feeds))
        except Exception as error:
            refused = type(error).__name__ == "InvalidArgument"
            raise (InputError if refused else OnnxpressError)(f"the model failed: {_first_line(error)}") from error
        return dict(zip(names, values, strict=True))

    def end_profiling(self) -> Path:
        """Finish the trace that `profile_to` asked for and return its path (ONNX Runtime adds a time to the prefix)."""
        return Path(self._session.end_profiling())

    def _check(self, feeds: Mapping[str, Array]) -> None:
        """Raise InputError for the first input that the model would not take as it is."""
        for name in feeds:
            if name not in self._inputs:
                raise InputError(f"the model has no input '{name}'", next_step=did_you_mean(name, self._inputs))
        for name, spec in self._inputs.items():
            if name not in feeds:
                raise InputError(f"input '{name}' is missing: the model wants {_wanted(spec)}")
            if spec.dtype.endswith(")"):  # a sequence or a map: ONNX Runtime checks these itself
                continue
            array = feeds[name]
            if not isinstance(array, np.ndarray):
                raise InputError(f"input '{name}' is a {type(array).__name__}: the model wants {_wanted(spec)}")
            if not _fits(array, spec):
                got = f"{array.dtype.name} {_shape(array.shape)}"
                raise InputError(f"input '{name}' is {got}: the model wants {_wanted(spec)}")


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
        arrays = [np.ascontiguousarray(feeds[name]) for name in self._names]
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


def _load(model: str | Path | bytes, provider: str, threads: int, profile_to: Path | None) -> tuple[Any, float]:
    """Return an `onnxruntime.InferenceSession` on the provider, and the milliseconds that creating it took."""
    full_name = require_provider(provider)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"there is no model file {model}")
    label = "the model" if isinstance(model, bytes) else Path(model).name
    ort = onnxruntime()
    if provider in ("cuda", "tensorrt"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it could not find; the check below says it
            ort.preload_dlls()  # CUDA and cuDNN from pip's nvidia packages, when torch did not bring them
    options = _options(ort, threads, profile_to)
    chain = dict.fromkeys([full_name, *(["CUDAExecutionProvider"] if provider == "tensorrt" else []), PROVIDERS["cpu"]])
    start = time.perf_counter()
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, options, providers=list(chain), enable_fallback=0)
    except Exception as error:
        raise InputError(f"{label} cannot be loaded: {_first_line(error)}") from error
    load_ms = (time.perf_counter() - start) * 1e3
    if session.get_providers()[0] != full_name:  # onnxruntime only logs this and goes on with the next provider
        raise MissingDependency(
            f"provider '{provider}' could not be started; onnxruntime would have run on {session.get_providers()[0]}",
            next_step=f"Check the driver and the libraries that {full_name} needs, or choose another provider.",
        )
    return session, load_ms


def _options(ort: Any, threads: int, profile_to: Path | None) -> Any:
    """Return session options that neither print nor disturb other sessions on the same cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # Worker threads keep spinning for a while after run() returns. On 2 cores, with several sessions taking turns,
    # a call takes two to three times as long with the spinning of its neighbours (benchmarks/spinning.py).
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


def _fits(array: Array, spec: TensorSpec) -> bool:
    kind_fits = array.dtype.kind in "OUS" if spec.dtype == "string" else array.dtype.name == spec.dtype
    return (
        kind_fits
        and array.ndim == len(spec.shape)
        and all(size == dim for size, dim in zip(array.shape, spec.shape, strict=True) if isinstance(dim, int))
    )


def _wanted(spec: TensorSpec) -> str:
    return f"{spec.dtype} {_shape(spec.shape)}"


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _first_line(error: Exception) -> str:
    """Return what an ONNX Runtime error says, without its code, source locations and C++ signatures."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
    text = re.sub(r"^Load model from .*? failed:", "", text)
    text = re.sub(r"\S+\.(?:cc|h|cu|cpp):\d+ .*?\)(?: const)? ", "", text)
    lines = text.splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")[:300]
