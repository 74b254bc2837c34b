# SPDX-License-Identifier: Apache-2.0
"""Random cuts of graphs in which many rules meet, and the same cut in the PyTorch module that a graph came from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress.exporters import sources
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.structure import analyze, masked_weights

from ...exporters.tiny_models import batch, build, distance
from .oracle import check_cut, graph_of, kinds, runner, some

TRANSFORMER = """
<ir_version: 10, opset_import: ["": 21]>
net (int64[N, T] x, float[9, 12] w1, float[12] w2, float[12] b1, float[12, 36] w3, float[36] b2, float[12, 12] w4,
     float[12] w5, float[12] b3, float[12, 40] w6, float[20, 12] w7, float[12, 4] w8) => (float[N, T, 4] y)
<int64 feature = {2}, int64 three = {3}, int64[1] last = {-1}, int64[1] zero = {0}, int64[1] two = {2}>
{
    e = Gather (w1, x)
    n = LayerNormalization <axis = -1> (e, w2, b1)
    qkv0 = MatMul (n, w3)
    qkv = Add (qkv0, b2)
    q0, k0, v0 = Split <axis = -1, num_outputs = 3> (qkv)
    shape = Shape (e)
    lead = Slice (shape, zero, two)
    width = Gather (shape, feature)
    size = Div (width, three)
    size1 = Unsqueeze (size, zero)
    three1 = Unsqueeze (three, zero)
    heads = Concat <axis = 0> (lead, three1, size1)
    q1 = Reshape (q0, heads)
    k1 = Reshape (k0, heads)
    v1 = Reshape (v0, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    scores = MatMul (q, k)
    weights = Softmax <axis = -1> (scores)
    mixed = MatMul (weights, v)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    flat = Concat <axis = 0> (lead, last)
    rows = Reshape (back, flat)
    out = MatMul (rows, w4)
    r1 = Add (e, out)
    n2 = LayerNormalization <axis = -1> (r1, w5, b3)
    up = MatMul (n2, w6)
    gate, value = Split <axis = -1, num_outputs = 2> (up)
    active = Sigmoid (gate)
    inner = Mul (active, value)
    down = MatMul (inner, w7)
    r2 = Add (r1, down)
    y = MatMul (r2, w8)
}
"""
CONVOLUTIONAL = """
<ir_version: 10, opset_import: ["": 21]>
net (float[N, 3, 8, 8] x, float[12, 3, 3, 3] w1, float[12] b1, float[12, 1, 3, 3] w2, float[12, 12, 1, 1] w3,
     float[8, 12, 1, 1] w4, float[20, 6] w5, float[6, 20] w6, float[720, 4] w7) => (float[N, 4] y)
<int64[5] two = {0, 2, 10, 6, 6}, int64[4] twenty = {0, 20, 6, 6}, int64[4] tall = {0, 0, 1, 1}>
{
    a = Conv (x, w1, b1)
    b = Relu (a)
    c = Conv <group = 12, pads = [1, 1, 1, 1]> (b, w2)
    d = Conv (c, w3)
    e = Add (b, d)
    f = Conv (e, w4)
    g = Concat <axis = 1> (e, f)
    s = Reshape (g, two)
    t = Transpose <perm = [0, 2, 1, 3, 4]> (s)
    u = Reshape (t, twenty)
    m = GlobalAveragePool (u)
    m2 = Flatten (m)
    p = MatMul (m2, w5)
    q = Relu (p)
    r0 = MatMul (q, w6)
    r1 = Sigmoid (r0)
    tallr = Unsqueeze <axes = [2, 3]> (r1)
    v = Mul (u, tallr)
    z = Flatten (v)
    y = MatMul (z, w7)
}
"""
GRAPHS = {
    "transformer": (TRANSFORMER, {"heads": [3], "hidden": [12], "neurons": [20]}),
    "convolutional": (CONVOLUTIONAL.replace("Unsqueeze <axes = [2, 3]> (r1)", "Unsqueeze (r1, space)").replace(
        "int64[4] tall = {0, 0, 1, 1}", "int64[2] space = {2, 3}"), {"channels": [2, 8], "neurons": [6]}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_what_can_be_cut(name: str) -> None:
    text, groups = GRAPHS[name]
    assert kinds(analyze(graph_of(text))) == groups


@pytest.mark.parametrize("name", GRAPHS)
@given(st.integers(0, 2**31), st.floats(0.05, 0.8))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_is_what_its_mask_is(name: str, seed: int, share: float) -> None:
    model = graph_of(GRAPHS[name][0])
    with tempfile.TemporaryDirectory() as folder:
        whole = runner(model, Path(folder) / "whole.onnx")
        check_cut(model, whole, some(analyze(model), seed, share), Path(folder))


def test_a_second_cut_goes_on_from_the_first(tmp_path: Path) -> None:
    model = graph_of(TRANSFORMER)
    for _ in range(2):
        analyze(model).cut({group.name: [0] for group in analyze(model).groups})
    # Of three heads one is left, so that its own features can be cut
    assert kinds(analyze(model)) == {"hidden": [10], "neurons": [4, 4, 18]}
    whole = runner(model, tmp_path / "whole.onnx")
    check_cut(model, whole, some(analyze(model), 1), tmp_path)


def test_the_module_with_masked_parameters_answers_as_the_cut_graph(tmp_path: Path) -> None:
    """The plan replayed on both sides: zeros in the module's own parameters, and slices in the graph."""
    import torch
    import transformers

    folder = build(tmp_path / "bert", "bert", "AutoModelForSequenceClassification")
    exported = sources.load(str(folder))
    model, _ = run_pass(Clean(), exported.model)
    structure = analyze(model)
    removed = {name: units for name, units in some(structure, 3).items() if structure.group(name).kind != "hidden"}
    assert {structure.group(name).kind for name in removed} == {"heads", "neurons"}
    module = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, array in masked_weights(structure, removed).items():
            own = parameters[name.removesuffix(".T").removeprefix("model.")]
            own.copy_(torch.from_numpy(np.array(array.T if name.endswith(".T") else array)))
    feeds = batch(exported, 3, 9, padding="right")
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).logits.numpy()
    before = answers(runner(model, tmp_path / "whole.onnx"), feeds)
    structure.cut(removed)
    got = answers(runner(model, tmp_path / "cut.onnx"), feeds)
    assert distance(wanted, got) < 1e-4
    assert distance(wanted, before) > 1e-2


def answers(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(session.run(None, feeds)[0])
