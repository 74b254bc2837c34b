# SPDX-License-Identifier: Apache-2.0
"""A model loaded into an engine: checked inputs, named outputs, never another provider than the one asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..contracts.errors import InputError, MissingDependency, did_you_mean
from ..contracts.signature import TensorSpec
from . import openvino_engine
from .engine import Array as Array
from .engine import Engine
from .machine import default_threads
from .onnxruntime_engine import OnnxRuntimeEngine, onnxruntime
from .packing.reader import is_packed, unpack_to_memory

OPENVINO = "openvino"

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    OPENVINO: "OpenVINO",
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
"""The word that a user writes -> ONNX Runtime's name of the execution provider; OpenVINO is an engine of its own."""

_INSTALL = {
    "cpu": 'pip install "onnxpress[cpu]"',
    "cuda": 'pip uninstall -y onnxruntime && pip install "onnxpress[gpu]"',
    "tensorrt": 'pip uninstall -y onnxruntime && pip install "onnxpress[gpu]"',
    OPENVINO: 'pip install "onnxpress[openvino]"',
    "directml": "pip uninstall -y onnxruntime && pip install onnxruntime-directml",
}
"""The command that installs a provider. The wheels of ONNX Runtime share one folder, so the plain one goes first."""


def available_providers() -> list[str]:
    """Return the short names of the providers that can be used here, in the order of `PROVIDERS`.

    Raises:
        MissingDependency: Neither onnxruntime nor openvino is installed.
    """
    try:
        offered = set(onnxruntime().get_available_providers())
    except MissingDependency:
        if not openvino_engine.is_installed():
            raise
        offered = set()
    offered.discard("OpenVINOExecutionProvider")
    if openvino_engine.is_installed():
        offered.add(PROVIDERS[OPENVINO])
    return [name for name, full in PROVIDERS.items() if full in offered]


def require_provider(name: str) -> str:
    """Return the full name of a provider: ONNX Runtime's, or `OpenVINO`.

    Raises:
        InputError: No provider has that name.
        MissingDependency: The installed onnxruntime was built without it, or OpenVINO is not installed.
    """
    if name not in PROVIDERS:
        raise InputError(f"unknown provider '{name}'", next_step=did_you_mean(name, PROVIDERS))
    if name == OPENVINO:
        if not openvino_engine.is_installed():
            raise MissingDependency("openvino is not installed", next_step=_INSTALL[OPENVINO])
        return PROVIDERS[name]
    onnxruntime()
    offered = [other for other in available_providers() if other != OPENVINO]
    if name not in offered:
        raise MissingDependency(
            f"the installed onnxruntime has no provider '{name}' (it has: {', '.join(offered)})",
            next_step=_INSTALL.get(name, f"Install a build of onnxruntime with the {PROVIDERS[name]}."),
        )
    return PROVIDERS[name]


class Session:
    """One model, loaded once, run many times.

    Args:
        model: Path of an `.onnx` file (its external data is found beside it) or of a packed one (`runtime.packing`),
            which is unpacked in memory, or the bytes of an `.onnx` file.
        provider: A key of `PROVIDERS`.
        threads: Threads that one operator may use; by default one a usable physical core.
        profile_to: Prefix of the trace file that `end_profiling` finishes; None records nothing.
        in_place: Leave the weights in their file and read them from there in each run: for a model that is larger than
            memory. ONNX Runtime only, and slow: nothing is fused, folded or prepacked.
        spinning: Keep worker threads awake between runs: for a decoder that is alone on its cores, whose steps follow
            one another at once, some 5 % a token. Every other session on these cores is slowed down. ONNX Runtime
            only.

    Attributes:
        provider: The provider that runs the model, as asked for.
        threads: As above, resolved.
        signature: Inputs and outputs; dynamic axes keep the names they have in the graph.
        load_ms: Milliseconds from the file (or bytes) to a session ready to run, without importing the engine.

    Raises:
        InputError: There is no such file, it is no ONNX model, the provider is unknown, or it cannot run this model.
        MissingDependency: The provider is not installed, or could not be started.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        profile_to: Path | None = None,
        in_place: bool = False,
        spinning: bool = False,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, not {threads}")
        self.provider = provider
        self._engine, unpacking_ms = _engine(
            model, provider, threads or default_threads(), profile_to, in_place=in_place, spinning=spinning
        )
        self.threads, self.load_ms = self._engine.threads, self._engine.load_ms + unpacking_ms
        self.signature = self._engine.signature
        self._inputs = {spec.name: spec for spec in self.signature.inputs}
        self._outputs = [spec.name for spec in self.signature.outputs]

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
        return dict(zip(names, self._engine.run(names, feeds), strict=True))

    @property
    def engine(self) -> Engine:
        """What runs the model, for a caller that binds buffers of its own."""
        return self._engine

    def end_profiling(self) -> Path:
        """Finish the trace that `profile_to` asked for and return its path, which begins with that prefix."""
        return self._engine.end_profiling()

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


def _engine(
    model: str | Path | bytes, provider: str, threads: int, profile_to: Path | None, *, in_place: bool, spinning: bool
) -> tuple[Engine, float]:
    """Load the model into the engine that the provider belongs to; return it and the milliseconds of unpacking."""
    full_name = require_provider(provider)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"there is no model file {model}")
    started, external = time.perf_counter(), dict[str, Array]()
    if not isinstance(model, bytes) and is_packed(model):
        unpacked = unpack_to_memory(model, threads=threads)
        if unpacked.external and provider == OPENVINO:
            raise InputError(
                f"OpenVINO takes no external data from memory, and {Path(model).name} holds some",
                next_step=f"Unpack it first: onnxpress unpack {Path(model).name}",
            )
        model, external = unpacked.model.tobytes(), unpacked.external
    unpacking_ms = (time.perf_counter() - started) * 1e3
    if provider == OPENVINO:
        if in_place:
            raise InputError("OpenVINO cannot leave weights in their file", next_step="Use --provider cpu.")
        return openvino_engine.OpenVinoEngine(model, threads=threads, profile_to=profile_to), unpacking_ms
    engine = OnnxRuntimeEngine(
        model,
        provider=provider,
        full_name=full_name,
        threads=threads,
        profile_to=profile_to,
        external=external,
        in_place=in_place,
        spinning=spinning,
    )
    return engine, unpacking_ms


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
