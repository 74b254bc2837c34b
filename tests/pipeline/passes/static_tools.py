# SPDX-License-Identifier: Apache-2.0
"""Small networks for `quantize_static`, and what ONNX Runtime makes of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
from pass_tools import Array, Feeds, model_from, normal, run, to_bytes

from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.quantize_static import QuantizeStatic
from onnxpress.pipeline.statistics import Calibration
from onnxpress.runtime.profiling import operators_after_optimization

IMAGE = "float[n, 3, 12, 12] x"
IMAGES = [{"x": normal(2, 3, 12, 12, seed=seed)} for seed in range(2)]
_TYPES = {"float32": "float", "int64": "int64", "float16": "float16", "bool": "bool"}


def fan_in(*shape: int, seed: int = 0) -> Array:
    """Weights that keep the size of their inputs."""
    return normal(*shape, seed=seed, scale=float(1 / np.sqrt(np.prod(shape[1:]))))


def convolutions() -> dict[str, Array]:
    """3 -> 8 -> 8 -> 4 channels: w0, w1, w2 with their biases, and constants that layers between them read."""
    return {
        "w0": fan_in(8, 3, 3, 3), "b0": normal(8), "w1": fan_in(8, 8, 1, 1, seed=1), "b1": normal(8, seed=1),
        "w2": fan_in(4, 8, 1, 1, seed=2), "b2": normal(4, seed=2), "w3": fan_in(8, 8, 3, 3, seed=3),
        "dw": fan_in(8, 1, 3, 3, seed=4), "row": normal(8, 1, 1, seed=5), "minus": np.float32([-1])[0],
        "zero": np.float32([0])[0], "unit": np.float32([1])[0], "six": np.float32([6])[0],
        "twice": np.float32([1, 1, 2, 2]),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "start": np.array([1, 1]), "end": np.array([5, 6]),
        "axes": np.array([2, 3]), "groups": np.array([0, 2, 4, 10, 10]), "back": np.array([0, 8, 10, 10]),
        "halves": np.array([4, 4]), "first": np.array(0), "second": np.array(1),
    }  # fmt: skip


def network(inputs: str, body: str, outputs: str, weights: Feeds, *, opset: int = 17) -> ir.Model:
    """`g (inputs) => (outputs) { body }`, where those of `weights` that the body names become initializers."""
    used = set(re.findall(r"\w+", body))
    known = {name: np.asarray(array) for name, array in weights.items() if name in used}
    declared = [
        f"{_TYPES[a.dtype.name]}{'[' + ', '.join(map(str, a.shape)) + ']' if a.ndim else ''} {name}"
        for name, a in known.items()
    ]
    header = f'<ir_version: 8, opset_import: ["": {opset}]>'
    return model_from(f"{header} g ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}", known)


def image_network(body: str, *, opset: int = 17, outputs: str = "float[n, c, h, v] y", **more: Array) -> ir.Model:
    return network(IMAGE, body, outputs, {**convolutions(), **more}, opset=opset)


def quantize(
    model: ir.Model, batches: list[dict[str, Array]] | dict[str, Array], **settings: Any
) -> tuple[ir.Model, PassReport, bytes]:
    """Run the pass on everything however small; returns the model, the report, and the bytes of the model before."""
    before = to_bytes(model)
    batches = batches if isinstance(batches, list) else [batches]
    chosen = QuantizeStatic(**{"minimum_elements": 0, **settings})
    model, report = run_pass(chosen, model, Calibration(batches, threads=1))
    return model, report, before


def executed(model: ir.Model, feeds: Feeds) -> dict[str, int]:
    """What ONNX Runtime runs, without the changes of layout that it makes for its own kernels."""
    found = operators_after_optimization(to_bytes(model), feeds, threads=1)
    return {
        op: count for op, count in sorted(found.items()) if op not in ("Transpose", "ReorderInput", "ReorderOutput")
    }


def noise(before: bytes, model: ir.Model, feeds: Feeds) -> float:
    """Signal to quantization noise of the first output, in dB; infinite where nothing changed."""
    expected, got = run(before, feeds)[0].astype(np.float64), run(model, feeds)[0]
    assert expected.shape == got.shape
    difference = np.square(expected - got).sum()
    return float(10 * np.log10(np.square(expected).sum() / difference)) if difference else np.inf
