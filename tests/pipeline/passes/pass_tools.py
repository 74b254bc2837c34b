# SPDX-License-Identifier: Apache-2.0
"""Tiny models in ONNX's text form, run by ONNX Runtime before and after a pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.exporters.graph_file import operator_counts
from onnxpress.pipeline.passes.base import Pass, PassReport, run_pass

Array = np.ndarray
Feeds = Mapping[str, Array]


def model_from(text: str, weights: Feeds | None = None, *, infer: bool = True) -> ir.Model:
    """Parse a model; the inputs that `weights` names become initializers, and shapes are inferred as exporters do."""
    proto = onnx.parser.parse_model(text)
    model = ir.from_proto(proto)
    for name, array in (weights or {}).items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(array, name=name)
        model.graph.register_initializer(value)
    if infer:
        model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    return model


def to_bytes(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def session(model: ir.Model | bytes) -> ort.InferenceSession:
    data = model if isinstance(model, bytes) else to_bytes(model)
    onnx.checker.check_model(onnx.ModelProto.FromString(data), full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model | bytes, feeds: Feeds) -> list[Array]:
    return list(session(model).run(None, dict(feeds)))


def press(settings: Pass, model: ir.Model) -> tuple[ir.Model, PassReport, bytes]:
    """Run one pass; returns the model, the report, and the bytes of the model as it was."""
    before = to_bytes(model)
    model, report = run_pass(settings, model)
    return model, report, before


def count(model: ir.Model) -> dict[str, int]:
    return operator_counts(model)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def sqnr(reference: Array, other: Array) -> float:
    """Signal to quantization noise, in dB."""
    noise = np.square(reference.astype(np.float64) - other).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise))


def reasons(report: PassReport) -> dict[str, str]:
    return {left.node: left.reason for left in report.left}


def weights_of(model: ir.Model) -> dict[str, Any]:
    return {name: value.const_value for name, value in model.graph.initializers.items()}
