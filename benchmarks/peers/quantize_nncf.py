# SPDX-License-Identifier: Apache-2.0
"""NNCF's post-training quantization on its ONNX backend; runs in an environment of its own.

    python quantize_nncf.py transformer|convolution MODEL.onnx CALIBRATION.npz OUT.onnx

(docs.openvino.ai, "Basic Quantization Flow": preset MIXED for asymmetric activations, model_type TRANSFORMER for
transformers, 300 samples, fast bias correction.) Prints {"seconds": ...} as its last line; what it raises is the peer's
result.
"""

import json
import sys
import time

import nncf
import numpy as np
import onnx


def main(kind: str, model: str, calibration: str, out: str) -> None:
    arrays = np.load(calibration)
    samples: dict[str, dict[str, np.ndarray]] = {}
    for key in arrays.files:
        number, _, name = key.partition("/")
        samples.setdefault(number, {})[name] = arrays[key]
    started = time.perf_counter()
    quantized = nncf.quantize(
        onnx.load(model),
        nncf.Dataset(list(samples.values())),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=300,
        fast_bias_correction=True,
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    onnx.save(quantized, out)
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
