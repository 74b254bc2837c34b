# SPDX-License-Identifier: Apache-2.0
"""A model loaded into OpenVINO's own runtime, which reads the same `.onnx` file.

Not the OpenVINO provider of ONNX Runtime: that is a wheel of its own, which replaces onnxruntime and lags behind it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import InputError, MissingDependency, OnnxpressError
from ..contracts.signature import Dim, Signature, TensorSpec
from .engine import Array, model_label
from .onnx_file import OnnxFile, read_onnx

_INSTALL = 'pip install "onnxpress[openvino]"'
_TELEMETRY = "openvino_telemetry"
_EXCHANGED = frozenset(
    ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
)  # strings end the whole process (2026.4.1: free(): invalid pointer); numpy has no bfloat16
"""Element types that inputs and outputs may have."""


def is_installed() -> bool:
    """Whether there is an OpenVINO to import, without importing it."""
    return importlib.util.find_spec("openvino") is not None


def openvino() -> Any:
    """Return the openvino module, imported so that it reports to nobody.

    Importing openvino sends an event to Google Analytics through the package openvino_telemetry, which it depends on,
    and writes an identifier into the user's home, unless the user has opted out in a file there. Where that package
    is missing openvino uses an empty stand-in of its own; so it is made to look missing during the import.

    Raises:
        MissingDependency: It is not installed.
    """
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == _TELEMETRY}
    hidden = "openvino" not in sys.modules  # else the user has imported it, with what the user decided about it
    try:
        if hidden:
            sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
        return importlib.import_module("openvino")
    except ImportError as error:
        problem = f"cannot be imported: {error}" if is_installed() else "is not installed"
        raise MissingDependency(f"openvino {problem}", next_step=_INSTALL) from None
    finally:
        if hidden:
            sys.modules.pop(_TELEMETRY, None)
            sys.modules.update(known)


def settings(threads: int, *, timed: bool = False) -> dict[str, Any]:
    """What a model is compiled with, so that it computes what the file says, on as many threads as were asked for.

    By default OpenVINO computes float32 graphs in bfloat16 where the processor has it (3 digits instead of 7), and
    quantizes the activations of products with integer weights on its own; both are switched off. Float64 is computed
    in float32 all the same, and indices out of range are not noticed: Gather returns zeros.

    Worker threads are not tied to cores, as ONNX Runtime's are not: several engines take turns on the same ones. They
    need no option to go idle: TBB burns 1 ms of processor time after a run (benchmarks/idle_threads.py).
    """
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": timed,
    }


class OpenVinoEngine:
    """One model compiled for the CPU, one infer request; attributes as in `Engine`.

    Kernels are made for the shapes they meet: the first run at each new shape takes longer than those that follow.

    Args:
        model: Path of an `.onnx` file (its external data is found beside it), or the bytes of one.
        threads: Threads that one operator may use; OpenVINO takes no more than there are cores.
        profile_to: Prefix of the trace file that `end_profiling` writes; None records nothing.

    Raises:
        InputError: It is no ONNX model, holds an operator that OpenVINO does not know, or takes or returns what
            cannot be exchanged.
        MissingDependency: OpenVINO is not installed.
    """

    def __init__(self, model: str | Path | bytes, *, threads: int, profile_to: Path | None = None) -> None:
        openvino()
        file = read_onnx(model)
        _require_exchangeable(file.signature)
        self._model, self._settings = model, settings(threads, timed=profile_to is not None)
        start = time.perf_counter()
        self.compiled, self._request = self._compile()
        self.load_ms = (time.perf_counter() - start) * 1e3
        self.threads = int(self.compiled.get_property("INFERENCE_NUM_THREADS"))
        self.signature = _signature(file, self.compiled)
        self._inputs = [name for port in self.compiled.inputs for name in port.get_names()]
        self._outputs = {name: i for i, port in enumerate(self.compiled.outputs) for name in port.get_names()}
        self._lock = threading.Lock()  # an infer request belongs to one run at a time
        self._trace = None if profile_to is None else _Trace(profile_to)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        """See `Engine.run`."""
        # Inputs are read where they lie and outputs copied once, as ONNX Runtime does on the CPU
        given = {name: np.asarray(feeds[name], order="C") for name in self._inputs if name in feeds}
        with self._lock:
            if self._request is None:
                self.compiled, self._request = self._compile()
            try:
                # Not infer(): on one thread it loses the errors of shape inference and returns what lay in the
                # outputs before, or ends the process (2026.4.1). This costs 10 microseconds more.
                self._request.start_async(given, share_inputs=True)
                self._request.wait()
            except RuntimeError as error:
                self._request = None  # after an error it refuses the inputs that it took before
                raise OnnxpressError(f"the model failed: {reason(error)}") from error
            if self._trace is not None:
                self._trace.add(self._request.get_profiling_info())
            return [np.array(self._request.get_output_tensor(self._outputs[name]).data) for name in outputs]

    def _compile(self) -> tuple[Any, Any]:
        compiled = compile_model(self._model, self._settings)[1]
        return compiled, compiled.create_infer_request()

    def end_profiling(self) -> Path:
        """See `Engine.end_profiling`."""
        if self._trace is None:
            raise OnnxpressError("this session records no trace")
        return self._trace.write()


def compile_model(model: str | Path | bytes, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the `openvino.Model` that the file holds and the `openvino.CompiledModel` made of it.

    Raises:
        InputError: OpenVINO cannot read or convert it.
    """
    try:
        source = core().read_model(model if isinstance(model, bytes) else str(model))
        return source, core().compile_model(source, "CPU", dict(options))
    except RuntimeError as error:
        raise InputError(
            f"{model_label(model)} cannot be loaded: {reason(error)}", next_step="Try another provider, such as cpu."
        ) from error


@cache
def core() -> Any:
    """The one `openvino.Core` of this process."""
    return openvino().Core()


def reason(error: Exception) -> str:
    """Return what an OpenVINO error says: the operators it does not know, or its last line without source locations."""
    text = str(error)
    unknown = re.search(r"No conversion rule found for operations: (.+)", text)
    if unknown:
        return f"OpenVINO has no operator {unknown[1].strip()}"
    refused = re.search(r"-- (\S+) with a message:\n(.+?)(?:\n\n|\Z)", text, re.DOTALL)
    if refused:
        return f"OpenVINO refuses {refused[1]}: {refused[2].strip().splitlines()[-1].rstrip('.')}"[:300]
    node = re.search(r"\[CPU\] (\w+ node with name '[^']*')", text)
    said = [line for line in map(str.strip, text.splitlines()) if line and not _LOCATION.search(line)]
    last = said[-1] if said else type(error).__name__
    return re.sub(r'"?(?<!\w)/\S+/', "", f"{node[1]}: {last}" if node else last).rstrip('."')[:300]


_LOCATION = re.compile(r"\S+\.(?:cpp|hpp|h):\d+|^FrontEnd API failed|^https?://")
"""Lines of an OpenVINO error that say where in its source it was noticed."""


class _Trace:
    """Node times of every run, written as ONNX Runtime writes its traces (microseconds)."""

    def __init__(self, prefix: Path) -> None:
        self._file = prefix.with_name(f"{prefix.name}_openvino.json")
        self._events: list[dict[str, Any]] = []
        self._clock = 0.0

    def add(self, nodes: Sequence[Any]) -> None:
        start = self._clock
        for index, node in enumerate(nodes):
            if not str(node.status).endswith(".EXECUTED"):
                continue
            micros = node.real_time / timedelta(microseconds=1)
            args = {"op_name": node.node_type, "provider": "OpenVINO", "node_index": str(index)}
            args["kernel"] = node.exec_type.lower()
            label = f"{node.node_name}_kernel_time"
            self._events.append({"cat": "Node", "name": label, "ts": self._clock, "dur": micros, "args": args})
            self._clock += micros
        run = {"cat": "Session", "name": "model_run", "ts": start, "dur": self._clock - start, "args": {}}
        self._events.append(run)
        self._clock += 1.0

    def write(self) -> Path:
        self._file.write_text(json.dumps(self._events), encoding="utf-8")
        return self._file


def _require_exchangeable(signature: Signature) -> None:
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.dtype not in _EXCHANGED:
                raise InputError(
                    f"{kind} '{spec.name}' is {spec.dtype}, which cannot be exchanged with OpenVINO",
                    next_step="Try another provider, such as cpu.",
                )


def _signature(file: OnnxFile, compiled: Any) -> Signature:
    """The file's signature; where it leaves the shape of an output out, the one that OpenVINO has inferred."""
    inferred = {name: port.partial_shape for port in compiled.outputs for name in port.get_names()}

    def dims(name: str) -> tuple[Dim, ...]:
        shape = inferred.get(name)
        if shape is None or shape.rank.is_dynamic:
            return ()
        return tuple(None if dim.is_dynamic else dim.get_length() for dim in shape)

    outputs = [
        TensorSpec(spec.name, spec.dtype, dims(spec.name)) if spec.name in file.unshaped else spec
        for spec in file.signature.outputs
    ]
    return Signature(file.signature.inputs, tuple(outputs))
