# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's own quantizers, as its documentation has them; runs in an environment of its own.

    python quantize_onnxruntime.py dynamic|static|static-weights MODEL.onnx CALIBRATION.npz OUT.onnx

(onnxruntime.ai/docs/performance/model-optimizations/quantization.html: pre-processing first; QDQ; on x86-64 with VNNI
unsigned activations and signed weights without reduced range; dynamic for transformers, static for convolutions.)
Where its symbolic shape inference fails it is skipped, as the documentation advises; where a quantizer stumbles over
the shapes in the file it gets one without them, which nobody advises. Prints {"seconds": ..., "note": ...} as its last
line; what it raises is the peer's result.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process


class Samples(CalibrationDataReader):
    """Arrays named `3/input_ids`: the fourth sample's."""

    def __init__(self, file: str) -> None:
        arrays = np.load(file)
        samples: dict[str, dict[str, np.ndarray]] = {}
        for key in arrays.files:
            number, _, name = key.partition("/")
            samples.setdefault(number, {})[name] = arrays[key]
        self.samples: Iterator[dict[str, np.ndarray]] = iter(samples.values())

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


def main(method: str, model: str, calibration: str, out: str) -> None:
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepared = str(Path(folder) / "prepared.onnx")
        try:
            quant_pre_process(model, prepared)
        except Exception as error:  # noqa: BLE001 - it raises plain Exception
            notes.append(f"quant_pre_process fails: {error}; called again with skip_symbolic_shape=True")
            quant_pre_process(model, prepared, skip_symbolic_shape=True)
        try:
            quantize(method, prepared, calibration, out)
        except onnx.shape_inference.InferenceError as error:
            notes.append(f"the quantizer fails: {error}; called again without the shapes in the file")
            bare = onnx.load(prepared)
            del bare.graph.value_info[:]
            onnx.save(bare, prepared)
            quantize(method, prepared, calibration, out)
        print(json.dumps({"seconds": time.perf_counter() - started, "note": ". ".join(notes)}))


def quantize(method: str, model: str, calibration: str, out: str) -> None:
    if method == "dynamic":
        quantize_dynamic(model, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=False)
        return
    chosen: dict[str, list[str]] = {}
    if method == "static-weights":  # MatMulConstBOnly would say it, but QDQ takes no notice of it
        graph = onnx.load(model).graph
        weights = {weight.name for weight in graph.initializer}
        between = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
        chosen = {"op_types_to_quantize": ["MatMul", "Gemm", "Gather"], "nodes_to_exclude": between}
    quantize_static(
        model,
        out,
        Samples(calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=False,
        calibrate_method=CalibrationMethod.MinMax,
        **chosen,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
