# SPDX-License-Identifier: Apache-2.0
"""Correcting biases brings the means of a roughly rounded model back."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_tools import Array, count, model_from, normal, reasons, run, to_bytes, weights_of

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.correct_bias import CorrectBias
from onnxpress.pipeline.passes.graph import add_weight, make_node
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.passes.quantize_static import QuantizeStatic
from onnxpress.pipeline.passes.smooth import Smooth
from onnxpress.pipeline.statistics import Calibration

NET = """
<ir_version: 10, opset_import: ["": 18]>
g (float[n, 3, 6, 6] x, float[8, 3, 3, 3] w1, float[8] b1, float[8, 8, 3, 3] w2, float[8] b2,
   float[10, 32] w3, float[10] b3, float[10, 5] w4, float[5] b4) => (float[n, 5] y)
{
    c1 = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<strides = [2, 2]>(r1, w2, b2)
    r2 = Relu(c2)
    f = Flatten(r2)
    g1 = Gemm<transB = 1>(f, w3, b3)
    r3 = Relu(g1)
    m = MatMul(r3, w4)
    y = Add(m, b4)
}
"""
WEIGHTS = ("w1", "w2", "w3", "w4")


def net() -> ir.Model:
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (10, 32), "b3": (10,)}
    shapes |= {"w4": (10, 5), "b4": (5,)}
    return model_from(NET, {n: normal(*shape, seed=i, scale=0.3) for i, (n, shape) in enumerate(shapes.items())})


BATCHES = [{"x": normal(8, 3, 6, 6, seed=20 + i) + 1} for i in range(3)]


def calibration(reference: ir.Model | None, batches: list[dict[str, Array]] | None = None) -> Calibration:
    return Calibration(batches or BATCHES, threads=1, reference=reference)


def roughly_rounded(model: ir.Model, levels: float = 3, names: tuple[str, ...] = WEIGHTS) -> ir.Model:
    """Weights as int8 codes -levels..levels behind a DequantizeLinear."""
    for name in names:
        weight = model.graph.initializers[name]
        array = weight.const_value.numpy()
        step = np.float32(np.abs(array).max() / levels)
        codes = add_weight(model, model.graph, f"{name}_int8", np.rint(array / step).astype(np.int8))
        scale = add_weight(model, model.graph, f"{name}_scale", step)
        back = make_node("DequantizeLinear", [codes, scale], [f"{name}_dequantized"])
        model.graph.insert_before(model.graph[0], back)
        weight.replace_all_uses_with(back.outputs[0])
        del model.graph.initializers[name]
    return model


def means(model: ir.Model, names: tuple[str, ...], batches: list[dict[str, Array]] | None = None) -> list[Array]:
    """Mean of each channel (axis 1 of images, the last of rows) over the calibration data."""
    probe = model.clone()
    values = {v.name: v for n in probe.graph for v in n.outputs}
    probe.graph.outputs.clear()
    for name in names:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        probe.graph.outputs.append(values[name])
    found = [run(probe, batch) for batch in batches or BATCHES]
    joined = [np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True)]
    return [a.mean(axis=(0, 2, 3) if a.ndim == 4 else tuple(range(a.ndim - 1))) for a in joined]


def correct(model: ir.Model, data: Calibration, **options: object) -> tuple[ir.Model, PassReport]:
    return run_pass(CorrectBias.model_validate(options), model, data)


OUTPUTS = ("c1", "c2", "g1", "y")


def test_every_mean_comes_back() -> None:
    """Also those behind a corrected layer, which a correction of all layers at once would overshoot."""
    exact, rough = means(net(), OUTPUTS), roughly_rounded(net())
    before = means(rough, OUTPUTS)
    old = {name: tensor.numpy() for name, tensor in weights_of(rough).items()}
    rough, report = correct(rough, calibration(net()))
    for true, moved, back in zip(exact, before, means(rough, OUTPUTS), strict=True):
        assert np.abs(back - true).max() < 1e-4
        assert np.abs(moved - true).max() > 0.01
    new = {name: tensor.numpy() for name, tensor in weights_of(rough).items()}
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {"b1", "b2", "b3", "b4"}
    assert (report.seen, report.changed, report.left) == (4, 4, ())
    assert report.nodes_after == report.nodes_before
    assert report.details["outputs_corrected"] == 4


@settings(max_examples=10, deadline=None)
@given(levels=st.floats(1.0, 40.0), names=st.sets(st.sampled_from(WEIGHTS), min_size=1))
def test_the_error_of_the_means_falls(levels: float, names: set[str]) -> None:
    rough = roughly_rounded(net(), levels, tuple(sorted(names)))
    exact, before = means(net(), OUTPUTS), means(rough, OUTPUTS)
    after = means(correct(rough, calibration(net()))[0], OUTPUTS)
    for true, moved, back in zip(exact, before, after, strict=True):
        assert np.abs(back - true).max() <= max(np.abs(moved - true).max(), 1e-4)
    assert np.abs(after[-1] - exact[-1]).max() < np.abs(before[-1] - exact[-1]).max()


def test_planning_changes_nothing_and_is_json() -> None:
    rough, reference = roughly_rounded(net()), net()
    before = to_bytes(rough), to_bytes(reference)
    plan = CorrectBias().plan(rough, calibration(reference))
    assert (to_bytes(rough), to_bytes(reference)) == before
    json.dumps([plan.actions, plan.details])
    assert set(plan.arrays) == set(OUTPUTS)


def test_biases_of_integer_convolutions_stay_integers() -> None:
    reference = net()
    data = calibration(reference)
    static, _ = run_pass(QuantizeStatic(minimum_elements=0, per_channel=False, reduce_range=True), net(), data)
    codes = {name: t.numpy().copy() for name, t in weights_of(static).items() if name.endswith("_int32")}
    steps = {name: weights_of(static)[f"{name}_scale"].numpy() for name in ("b1", "b2")}
    assert set(codes) == {"b1_int32", "b2_int32", "b3_int32", "b4_int32"}, "convolutions, and the Gemms behind them"
    exact, before = means(reference, ("c1", "c2")), means(static, ("c1", "c2"))
    static, report = correct(static, data)
    assert report.changed == 4
    for name, old in codes.items():
        new = weights_of(static)[name].numpy()
        assert new.dtype == np.int32
        assert not np.array_equal(new, old)
    after = means(static, ("c1", "c2"))
    for name, true, moved, back in zip(("b1", "b2"), exact, before, after, strict=True):
        assert np.abs(back - true).max() <= 0.51 * steps[name].max() + 1e-6
        assert np.abs(back - true).max() < np.abs(moved - true).max()


MATRICES = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 16] x, float[16, 12] w1, float[12] b1, float[12, 8] w2, float[8] b2) => (float[b, 8] y)
{
    m = MatMul(x, w1)
    a = Add(b1, m)
    t = Tanh(a)
    h = Gemm(t, w2, b2)
    y = Relu(h)
}
"""
ROWS = [{"x": normal(40, 16, seed=30 + i) + 2} for i in range(2)]


def matrices() -> ir.Model:
    shapes = {"w1": (16, 12), "b1": (12,), "w2": (12, 8), "b2": (8,)}
    return model_from(MATRICES, {n: normal(*shape, seed=i, scale=0.3) for i, (n, shape) in enumerate(shapes.items())})


def test_products_that_a_quantizer_replaced() -> None:
    """MatMul -> MatMulInteger with the Add behind it; Gemm -> MatMulInteger with an Add of its own."""
    dynamic, _ = run_pass(QuantizeDynamic(minimum_elements=0, per_channel=False, reduce_range=True), matrices())
    exact = means(matrices(), ("a", "h"), ROWS)
    before = means(dynamic, ("a", "h"), ROWS)
    dynamic, report = correct(dynamic, calibration(matrices(), ROWS))
    assert (report.seen, report.changed) == (2, 2)
    for true, moved, back in zip(exact, before, means(dynamic, ("a", "h"), ROWS), strict=True):
        assert np.abs(back - true).max() < 0.1 * np.abs(moved - true).max()


def test_a_bias_that_gemm_multiplies() -> None:
    text = MATRICES.replace("Gemm(t, w2, b2)", "Gemm<beta = 0.25>(t, w2, b2)")
    weights = {name: tensor.numpy() for name, tensor in weights_of(matrices()).items()}
    rough = roughly_rounded(model_from(text, weights), names=("w1", "w2"))
    rough, _ = correct(rough, calibration(model_from(text, weights), ROWS))
    (true,), (back,) = means(model_from(text, weights), ("h",), ROWS), means(rough, ("h",), ROWS)
    np.testing.assert_allclose(back, true, atol=1e-4)


BARE = """
<ir_version: 10, opset_import: ["": 18]>
g (float[n, 3, 6, 6] x, float[4, 3, 3, 3] w1, float[144, 5] w2) => (float[n, 5] y)
{
    c = Conv<pads = [1, 1, 1, 1]>(x, w1)
    f = Flatten(c)
    y = MatMul(f, w2)
}
"""


def bare() -> ir.Model:
    return model_from(BARE, {"w1": normal(4, 3, 3, 3, seed=1), "w2": normal(144, 5, seed=2)})


def test_layers_without_a_bias_are_left() -> None:
    with pytest.raises(InputError, match=r"nothing to do .*\(2 candidates: it has no bias, and insert_bias is off"):
        correct(roughly_rounded(bare(), names=("w1", "w2")), calibration(bare()))


def test_layers_without_a_bias_can_get_one() -> None:
    rough, exact = roughly_rounded(bare(), names=("w1", "w2")), means(bare(), ("c", "y"))
    before = means(rough, ("c", "y"))
    rough, report = correct(rough, calibration(bare()), insert_bias=True)
    assert (report.changed, report.nodes_after - report.nodes_before) == (2, 1)
    assert count(rough)["Add"] == 1
    assert [value.name for value in rough.graph.outputs] == ["y"]
    for true, moved, back in zip(exact, before, means(rough, ("c", "y")), strict=True):
        # ONNX Runtime makes MatMulNBits of the second layer, which rounds its input as well
        assert np.abs(back - true).max() < 0.001 * np.abs(moved - true).max()


def test_an_integer_convolution_gets_an_integer_bias() -> None:
    data = calibration(bare())
    static, _ = run_pass(QuantizeStatic(minimum_elements=0, operators=("Conv",), reduce_range=True), bare(), data)
    exact, before = means(bare(), ("c",)), means(static, ("c",))
    static, report = correct(static, data, insert_bias=True)
    assert report.changed == 2
    assert weights_of(static)["c_bias_int32"].numpy().dtype == np.int32
    (true,), (moved,), (back,) = exact, before, means(static, ("c",))
    assert np.abs(back - true).max() < np.abs(moved - true).max()


def test_a_bias_of_others_is_copied() -> None:
    text = MATRICES.replace("float[12] b1, ", "").replace("float[12, 8] w2", "float[12, 12] w2")
    text = text.replace("float[8] b2", "float[12] b2").replace("b1", "b2").replace("float[b, 8]", "float[b, 12]")
    weights = {"w1": normal(16, 12), "w2": normal(12, 12), "b2": normal(12)}
    rough = roughly_rounded(model_from(text, weights), names=("w1", "w2"))
    rough, report = correct(rough, calibration(model_from(text, weights), ROWS))
    assert report.changed == 2
    exact = means(model_from(text, weights), ("a", "h"), ROWS)
    for true, back in zip(exact, means(rough, ("a", "h"), ROWS), strict=True):
        np.testing.assert_allclose(back, true, atol=1e-3)


def test_an_unchanged_model_has_nothing_to_correct() -> None:
    with pytest.raises(InputError, match=r"nothing to do .*its mean has not moved"):
        correct(net(), calibration(net()))


def test_the_graph_before_quantizing_is_required() -> None:
    with pytest.raises(InputError, match="compares with the graph before quantizing") as caught:
        correct(roughly_rounded(net()), calibration(None))
    assert caught.value.next_step
    with pytest.raises(InputError, match="needs calibration data"):
        run_pass(CorrectBias(), net())


def test_values_that_smoothing_scaled_are_not_compared() -> None:
    text = MATRICES.replace("Tanh", "Relu")
    weights = {name: tensor.numpy().copy() for name, tensor in weights_of(matrices()).items()}
    weights["w1"][:, 3] *= 60
    reference = model_from(text, weights)
    smoothed, _ = run_pass(
        Smooth(minimum_gain=-100.0, insert_mul=False), model_from(text, weights), calibration(None, ROWS)
    )
    rough = roughly_rounded(smoothed, names=("w1", "w2"))
    (true,), (moved,) = means(reference, ("h",), ROWS), means(rough, ("h",), ROWS)
    rough, report = correct(rough, calibration(reference, ROWS))
    assert reasons(report) == {"node": "'a_scaled' is not in the graph before quantizing"}
    (back,) = means(rough, ("h",), ROWS)
    assert np.abs(back - true).max() < 1e-3 < np.abs(moved - true).max()


@pytest.mark.parametrize("pattern", ["c1", "c?"])
def test_layers_that_are_excluded(pattern: str) -> None:
    _, report = correct(roughly_rounded(net()), calibration(net()), exclude=(pattern,))
    assert set(reasons(report).values()) == {"excluded by name"}
    assert "c1" in reasons(report)
    assert report.changed == (3 if pattern == "c1" else 2)


def test_other_reasons() -> None:
    model = model_from(
        """
        <ir_version: 10, opset_import: ["": 18]>
        g (float[b, 8] x, bool c, float[8, 4] w, float[4] e) => (float[b, 4] y, float[b, b] z, float[b, 4] v) {
            y = If (c) <
                then_branch = t () => (float[b, 4] p) { q = MatMul(x, w) p = Add(q, e) },
                else_branch = f () => (float[b, 4] r) { r = MatMul(x, w) }
            >
            u = Transpose<perm = [1, 0]>(x)
            z = MatMul(x, u)
            d = Gemm(x, w, y)
            v = Relu(d)
        }""",
        {"w": normal(8, 4), "e": normal(4)},
    )
    plan = CorrectBias().plan(model, Calibration([{"x": normal(3, 8), "c": np.array(True)}], reference=model.clone()))
    assert {left.node: left.reason for left in plan.left} == {
        "q": "inside a subgraph: its values cannot be measured",
        "r": "inside a subgraph: its values cannot be measured",
        "z": "both factors are activations",
        "d": "its bias is no constant",
    }


def test_channels_that_went_are_left() -> None:
    narrow = matrices()
    for name in ("w2", "b2"):
        tensor = narrow.graph.initializers[name].const_value.numpy()
        narrow.graph.initializers[name].const_value = ir.Tensor(np.ascontiguousarray(tensor[..., :6]), name=name)
        narrow.graph.initializers[name].shape = ir.Shape(tensor[..., :6].shape)
    for node in narrow.graph:
        node.outputs[0].shape = None
    narrow.graph.outputs[0].shape = ir.Shape(["b", 6])
    _, report = correct(roughly_rounded(narrow, names=("w1", "w2")), calibration(matrices(), ROWS))
    assert reasons(report) == {"h": "its channels are not those before quantizing"}
