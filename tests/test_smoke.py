# SPDX-License-Identifier: Apache-2.0
"""Read this first: a model goes in, a verified bundle comes out, a quarter of the size."""

import json
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir

from onnxpress.exporters import graph_file
from onnxpress.pipeline.pressing import press
from onnxpress.pipeline.recipe import load_recipe
from onnxpress.runtime import Session, verify

CLASSIFIER = """
<ir_version: 10, opset_import: ["": 20]>
classifier (float[batch, 128] x, float[128, 256] w1, float[256, 128] w2) => (float[batch, 128] y)
{
    hidden = MatMul(x, w1)
    active = Relu(hidden)
    y = MatMul(active, w2)
}
"""


def test_a_model_is_pressed_to_a_verified_bundle(tmp_path: Path) -> None:
    source, bundle = tmp_path / "classifier.onnx", tmp_path / "bundle"
    model = ir.from_proto(onnx.parser.parse_model(CLASSIFIER))
    for weight in model.graph.inputs[1:]:
        assert weight.shape is not None
        values = np.random.default_rng(0).standard_normal(weight.shape.numpy()).astype(np.float32) / 16
        weight.const_value = ir.tensor(values, name=weight.name)
        model.graph.inputs.remove(weight)
        model.graph.initializers.add(weight)
    graph_file.write(model, source)

    recipe = load_recipe("int8-dynamic", ["benchmark.rounds=5"], ["size_ratio >= 3.5", "cosine >= 0.99"])
    outcome = press(str(source), recipe, bundle)

    assert outcome.accepted
    assert verify(bundle).samples_run == 2
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    assert all(gate["passed"] for gate in manifest["gates"])
    x = np.ones((3, 128), np.float32)
    wanted = Session(source).run({"x": x})["y"]
    got = Session(bundle / "onnx" / "model_quantized.onnx").run({"x": x})["y"]
    assert np.abs(wanted - got).max() < 0.05 * np.abs(wanted).max()
