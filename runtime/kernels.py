# SPDX-License-Identifier: Apache-2.0
"""What an engine executes for a model, after its own optimizations: which nodes it made, and which of them compute in
8-bit integers.

`profiling.profile` says where the time goes for given inputs; this needs no inputs and runs nothing.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contracts.errors import InputError
from .machine import default_threads
from .onnx_file import FileNode, read_onnx
from .onnxruntime_engine import optimized_graph
from .openvino_engine import compile_model, settings
from .session import OPENVINO, require_provider

_INTEGER_OPERATORS = frozenset(
    ("QGemm", "QAttention", "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "ConvInteger",
     "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QEmbedLayerNormalization", "QOrderedMatMul", "QOrderedAttention")
)  # fmt: skip
"""ONNX Runtime's operators that compute in integers, besides `QLinear…`."""

_INTEGER_TYPES = frozenset(("i8", "u8", "i4", "u4"))
"""OpenVINO's names of the types that count as 8-bit integer arithmetic or narrower."""

_INT8_ACCURACY = 4
"""The `accuracy_level` of MatMulNBits at which activations are rounded to int8 (ONNX Runtime, ContribOperators.md)."""


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that the engine executes.

    Attributes:
        op: Its operator type, with the domain if that is not ONNX's own (`com.microsoft.FusedMatMul`,
            `FullyConnected`).
        name: Its name.
        outputs: Names of values of the `.onnx` file that it makes. What the engine has fused into it counts with
            OpenVINO as far as OpenVINO says so; ONNX Runtime keeps the name of the last value alone.
        integer: Whether it works on integers of 8 bits or fewer, which a Transpose may as well: ask for the products.
            A fused attention of OpenVINO (`Subgraph`) does if one of its two products does.
    """

    op: str
    name: str
    outputs: tuple[str, ...]
    integer: bool


def executed_kernels(model: str | Path | bytes, provider: str = "cpu", threads: int | None = None) -> list[Kernel]:
    """Return the nodes that the engine would execute, in its own order.

    Args:
        model: Path of an `.onnx` file, or the bytes of one.
        provider: `cpu` (ONNX Runtime) or `openvino`.
        threads: As `Session`.

    Raises:
        InputError: Another provider, no such file, or a model that the engine cannot load.
        MissingDependency: The engine is not installed.
    """
    if provider not in ("cpu", OPENVINO):
        raise InputError(f"what '{provider}' executes is not known", next_step="Ask for cpu or openvino.")
    require_provider(provider)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"there is no model file {model}")
    threads = threads or default_threads()
    return _openvino_kernels(model, threads) if provider == OPENVINO else _onnxruntime_kernels(model, threads)


def _onnxruntime_kernels(model: str | Path | bytes, threads: int) -> list[Kernel]:
    """The nodes of the graph that ONNX Runtime saves when it has optimized it."""
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        nodes = read_onnx(optimized_graph(model, Path(folder) / "optimized.onnx", threads)).nodes
    return [
        Kernel(
            f"{node.domain}.{node.op}" if node.domain not in ("", "ai.onnx") else node.op,
            node.name,
            tuple(name for name in node.outputs if name),
            _computes_in_integers(node),
        )
        for node in nodes
    ]


def _computes_in_integers(node: FileNode) -> bool:
    if node.op == "MatMulNBits":
        return node.integers.get("accuracy_level") == _INT8_ACCURACY
    return node.op in _INTEGER_OPERATORS or node.op.startswith("QLinear")


def _openvino_kernels(model: str | Path | bytes, threads: int) -> list[Kernel]:
    """The operations of OpenVINO's runtime model, with the names of the file's values that they stand for."""
    read_onnx(model)  # for the error that is the same as with the other engine
    source, compiled = compile_model(model, settings(threads))
    values = {op.get_friendly_name(): _value_names(op) for op in source.get_ops()}
    found = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: str(value.astype(str)) for key, value in op.get_rt_info().items()}
        if facts["layerType"] in ("Input", "Output", "Const"):
            continue
        originals = dict.fromkeys([*facts.get("originalLayersNames", "").split(","), op.get_friendly_name()])
        outputs = dict.fromkeys(name for original in originals for name in values.get(original, ()))
        integer = facts.get("runtimePrecision", "") in _INTEGER_TYPES
        found.append(Kernel(facts["layerType"], op.get_friendly_name(), tuple(outputs), integer))
    return found


def _value_names(op: Any) -> list[str]:
    return sorted(name for output in op.outputs() for name in output.get_names())
