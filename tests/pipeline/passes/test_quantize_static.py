# SPDX-License-Identifier: Apache-2.0
"""`quantize_static`: what becomes int8 on each target and setting, what is left and why, and how exact the rest is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pass_tools import Array, count, model_from, normal, reasons, run, to_bytes, weights_of
from static_tools import IMAGES, convolutions, executed, fan_in, image_network, network, noise, quantize

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.quantize_static import QuantizeStatic
from onnxpress.pipeline.statistics import Calibration

TWO = "c = Conv(x, w0, b0) r = Relu(c) y = Conv(r, w1, b1)"
ROWS = {"x": normal(6, 32)}
MATRICES = {"m": normal(32, 64, seed=1), "t": normal(64, 32, seed=2), "b": normal(64, seed=3)}


def product(body: str = "y = MatMul(x, m)", ends: str = "n, 64", **more: Array) -> ir.Model:
    return network("float[n, 32] x", body, f"float[{ends}] y", {**MATRICES, **more})


def plan_of(model: ir.Model, feeds: Any, **settings: Any) -> Any:
    return QuantizeStatic(minimum_elements=0, **settings).plan(model, Calibration([feeds], threads=1))


def scales_and_zeros(model: ir.Model) -> dict[str, tuple[Array, Array]]:
    """Of every QuantizeLinear, by the name of what it reads."""
    found = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            value, scale, zero = (v for v in node.inputs if v is not None)
            assert scale.const_value is not None
            assert zero.const_value is not None
            found[str(value.name)] = (scale.const_value.numpy(), zero.const_value.numpy())
    return found


def dequantized(model: ir.Model, name: str) -> tuple[Array, Array]:
    """The weight that DequantizeLinear gives back, and its scales, broadcastable."""
    stored = next(
        node for node in model.graph if node.inputs and node.inputs[0] and node.inputs[0].name == f"{name}_int8"
    )
    integers, scale = (v.const_value.numpy() for v in stored.inputs[:2] if v is not None and v.const_value is not None)
    axis = stored.attributes["axis"].as_int()
    if scale.ndim:
        scale = scale.reshape([-1 if a == axis else 1 for a in range(integers.ndim)])
    return integers * scale, scale


# --- the pass itself --------------------------------------------------------------------------------------------------


def test_a_plan_is_data_and_changes_nothing() -> None:
    model = image_network(TWO)
    before = to_bytes(model)
    plan = plan_of(model, IMAGES[0])
    assert to_bytes(model) == before
    assert json.loads(json.dumps(plan.actions)) == plan.actions
    assert [action["value"] for action in plan.actions if "value" in action] == ["r", "y", "x"]
    assert [action["weight"] for action in plan.actions if "node" in action] == ["w0", "w1"]
    assert all(action["low"] <= 0 <= action["high"] for action in plan.actions if "value" in action)


def test_the_same_model_and_data_give_the_same_bytes() -> None:
    first, second = (to_bytes(quantize(image_network(TWO), IMAGES)[0]) for _ in range(2))
    assert first == second
    assert first != to_bytes(quantize(image_network(TWO), IMAGES[:1])[0])


@pytest.mark.parametrize("struck", ["c", "y", "x", "r"])
def test_what_somebody_strikes_from_the_plan_stays_in_floating_point(struck: str) -> None:
    model = image_network(TWO)
    before, settings = to_bytes(model), QuantizeStatic(minimum_elements=0)
    plan = plan_of(model, IMAGES[0])
    plan.actions = [action for action in plan.actions if struck not in (action.get("node"), action.get("value"))]
    model = settings.apply(model, plan)
    left = {"c": "w0", "x": "w0", "y": "w1", "r": None}[struck]
    kept = set(weights_of(model))
    assert (left in kept) if left else {"w0", "w1"} <= kept, "a product needs its input's range, and its output's"
    assert noise(before, model, IMAGES[0]) > 25


def test_calibration_data_is_required() -> None:
    with pytest.raises(InputError, match="pass quantize_static needs calibration data") as caught:
        run_pass(QuantizeStatic(), product())
    assert "--calibration" in caught.value.next_step


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_weights_are_rounded_to_half_a_step(per_channel: bool, reduce_range: bool) -> None:
    model, _, before = quantize(image_network(TWO), IMAGES, per_channel=per_channel, reduce_range=reduce_range)
    top = 63 if reduce_range else 127
    for name in ("w0", "w1"):
        weight, (back, step) = convolutions()[name], dequantized(model, name)
        assert step.size == (8 if per_channel else 1)
        assert (np.abs(back - weight) <= step * 0.5001).all()
        integers = weights_of(model)[f"{name}_int8"].numpy()
        assert integers.dtype == np.int8
        assert np.abs(integers).max() == top
    assert executed(model, IMAGES[0])["QLinearConv"] == 2
    assert noise(before, model, IMAGES[0]) > (25 if reduce_range else 30)


def test_biases_are_int32_on_the_scale_of_the_product() -> None:
    model, _, _ = quantize(image_network(TWO), IMAGES)
    weights = {name: tensor.numpy() for name, tensor in weights_of(model).items()}
    assert weights["b0_int32"].dtype == np.int32
    np.testing.assert_array_equal(weights["b0_scale"], weights["w0_scale"] * weights["x_scale"])
    assert (np.abs(weights["b0_int32"] * weights["b0_scale"] - convolutions()["b0"]) <= weights["b0_scale"]).all()


def test_the_runtime_s_kernels_compute_what_the_pairs_say() -> None:
    """The optimized graph against the very same one with every fusion off."""
    model, _, _ = quantize(image_network(f"{TWO.replace('y =', 'd =')} s = Add(d, r) y = Conv(s, w2)"), IMAGES)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    expected, got = plain.run(None, IMAGES[0])[0], run(model, IMAGES[0])[0]
    step = scales_and_zeros(model)["y_float"][0]
    assert np.abs(expected - got).max() <= 3.01 * step


@pytest.mark.parametrize("ranges", ["minmax", "average", "percentile", "entropy", "mse"])
def test_every_way_to_find_a_range(ranges: str) -> None:
    model, _, before = quantize(image_network(TWO), IMAGES, ranges=ranges, percentile=99.9)
    assert 15 < noise(before, model, IMAGES[0]) < 60
    high = scales_and_zeros(model)["x"][0] * 255
    full = max(f["x"].max() for f in IMAGES) - min(f["x"].min() for f in IMAGES)
    assert high <= full * 1.0001
    if ranges != "entropy":  # which may well keep everything
        assert (high == pytest.approx(full)) == (ranges == "minmax")


@pytest.mark.parametrize("integers", ["uint16", "int16"])
def test_sixteen_bits_are_more_exact_and_raise_the_opset(integers: str) -> None:
    body = f"{TWO} "
    coarse, _, before = quantize(image_network(body), IMAGES)
    fine, _, _ = quantize(image_network(body), IMAGES, activations=integers)
    assert fine.opset_imports[""] == 21
    assert coarse.opset_imports[""] == 17
    assert scales_and_zeros(fine)["x"][1].dtype == np.dtype(integers)
    assert noise(before, fine, IMAGES[0]) > noise(before, coarse, IMAGES[0]) + 2


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_raising_the_opset_converts_what_changed_on_the_way(opset: int) -> None:
    """Softmax flattened before opset 13, and ReduceMean had its axes as an attribute before 18."""
    body = "c = Conv(x, w0, b0) s = Softmax<axis = 1>(c) y = ReduceMean<axes = [3]>(s)"
    for settings in ({}, {"activations": "uint16"}):
        model, _, before = quantize(image_network(body, opset=opset), IMAGES, **settings)
        assert model.opset_imports[""] == (21 if settings else max(opset, 13))
        assert noise(before, model, IMAGES[0]) > 25


# --- targets ----------------------------------------------------------------------------------------------------------


def test_tensorrt_has_pairs_before_products_only() -> None:
    body = f"{TWO.replace('y =', 'd =')} y = Mul(d, d)"
    model, report, before = quantize(image_network(body), IMAGES, target="tensorrt")
    assert set(scales_and_zeros(model)) == {"x", "r"}
    assert {"b0", "b1"} <= set(weights_of(model)), "biases stay in floating point"
    assert report.details["flowing"] == 0
    assert 25 < noise(before, model, IMAGES[0]) < 60
    for scale, zero in scales_and_zeros(model).values():
        assert scale > 0
        assert (zero.dtype, int(zero)) == (np.int8, 0)


def test_convolutions_are_placed_for_openvino_as_for_the_cpu_provider() -> None:
    files = [to_bytes(quantize(image_network(TWO), IMAGES, target=target)[0]) for target in ("cpu", "openvino")]
    assert files[0] == files[1]


def test_transposed_convolutions_have_their_channels_on_the_second_axis() -> None:
    body = "y = ConvTranspose<strides = [2, 2]>(x, u, b2)"
    u = fan_in(3, 4, 2, 2)
    model, _, before = quantize(image_network(body, u=u), IMAGES, target="openvino")
    back, step = dequantized(model, "u")
    assert step.shape == (1, 4, 1, 1)
    assert (np.abs(back - u) <= step * 0.5001).all()
    assert noise(before, model, IMAGES[0]) > 30
    with pytest.raises(InputError, match="no integer kernel for ConvTranspose on the CPU"):
        quantize(image_network(body, u=u), IMAGES)
    grouped = "c = Conv(x, w0) y = ConvTranspose<group = 2>(c, g)"
    _, report, _ = quantize(image_network(grouped, g=fan_in(8, 2, 2, 2)), IMAGES, target="openvino", minimum_share=0.0)
    assert reasons(report) == {"y": "a grouped ConvTranspose has no axis of output channels"}


ATTENTION = """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kt = Transpose<perm = [0, 2, 1]>(k)
    s = MatMul(q, kt) h = Mul(s, half) p = Softmax<axis = -1>(h) y = MatMul(p, v)"""


@pytest.mark.parametrize(
    ("settings", "products"),
    [
        ({}, 3),
        ({"target": "openvino"}, 4),
        ({"target": "tensorrt"}, 5),
        ({"attention": "all"}, 5),
        ({"target": "tensorrt", "attention": "none"}, 3),
    ],
)
def test_products_of_two_activations(settings: dict[str, Any], products: int) -> None:
    weights = {name: fan_in(16, 16, seed=i) for i, name in enumerate(("wq", "wk", "wv"))} | {
        "half": np.array(0.5, np.float32)
    }
    feeds = {"x": normal(2, 5, 16)}
    model, report, before = quantize(
        network("float[n, s, 16] x", ATTENTION, "float[n, s, 16] y", weights), feeds, **settings
    )
    assert report.details["MatMul"] == products
    assert set(reasons(report).values()) <= {"a product of two activations, in fp32 on this target"}
    assert len(report.left) == 5 - products
    assert noise(before, model, feeds) > 25
    rounded = scales_and_zeros(model)
    assert ("p" in rounded) == (products == 5)


# --- matrices and embeddings ------------------------------------------------------------------------------------------


def test_a_transposed_matrix_is_stored_as_the_product_reads_it() -> None:
    for body in ("y = Gemm<transB = 1>(x, t)", "u = Transpose<perm = [1, 0]>(t) y = MatMul(x, u)"):
        model, report, before = quantize(product(body), ROWS)
        assert weights_of(model)["t_int8"].numpy().shape == (32, 64)
        assert not {"Gemm", "Transpose"} & set(count(model))
        assert noise(before, model, ROWS) > 30
        assert report.bytes_before / report.bytes_after > 3.3


@pytest.mark.parametrize("per_channel", [True, False])
def test_an_embedding_is_picked_as_integers(per_channel: bool) -> None:
    e = normal(50, 64) * np.logspace(-3, 3, 50, dtype=np.float32)[:, None]
    feeds = {"ids": np.array([[0, 7, 49], [-1, 3, 3]]), "x": normal(2, 3, 64)}
    body = "g = Gather(e, ids) h = Add(g, x) p = MatMul(h, m) y = Add(p, h)"
    model = network("int64[n, s] ids, float[n, s, 64] x", body, "float[n, s, 64] y", {"e": e, "m": fan_in(64, 64)})
    model, report, before = quantize(model, feeds, per_channel=per_channel)
    assert report.details["Gather"] == report.details["MatMul"] == 1
    assert {t.dtype for n, t in weights_of(model).items() if n.startswith("e_int8")} == {ir.DataType.INT8}
    assert noise(before, model, feeds) > 25


TIED = "g = Gather(e, ids) r = Relu(g) u = Transpose<perm = [1, 0]>(e) y = MatMul(r, u)"


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_tied_embedding_is_stored_once(per_channel: bool) -> None:
    feeds = {"ids": np.arange(6).reshape(2, 3)}
    model = network("int64[n, s] ids", TIED, "float[n, s, 200] y", {"e": normal(200, 64)})
    model, report, before = quantize(run_pass(Clean(), model)[0], feeds, per_channel=per_channel)
    assert [n for n, t in weights_of(model).items() if t.dtype == ir.DataType.INT8 and t.size > 200] == ["e_int8"]
    assert report.bytes_before / report.bytes_after > 3.2
    assert noise(before, model, feeds) > 25
    assert executed(model, feeds)["MatMulIntegerToFloat"] == 1


def test_a_weight_that_two_nodes_read_is_stored_once() -> None:
    body = "a = Conv(x, s, b0) r = Relu(a) c = Conv(r, s2) d = Conv(a, s2, b1) e = Add(c, d) y = Conv(e, s2, b3)"
    more = {"s": fan_in(8, 3, 1, 1), "s2": fan_in(8, 8, 1, 1), "b3": 100 * normal(8, seed=7)}
    model, _, before = quantize(image_network(body, **more), IMAGES)
    stored = [n for n, t in weights_of(model).items() if t.dtype == ir.DataType.INT8 and t.size > 8]
    assert stored == ["s_int8", "s2_int8"]
    assert executed(model, IMAGES[0])["QLinearConv"] == 4
    assert noise(before, model, IMAGES[0]) > 20
    both = "h = MatMul(x, q) r = Tanh(h) y = MatMul(r, q)"
    matrices, _, _ = quantize(network("float[n, 32] x", both, "float[n, 32] y", {"q": fan_in(32, 32)}), ROWS)
    assert [n for n, t in weights_of(matrices).items() if t.dtype == ir.DataType.INT8 and t.size > 32] == ["q_int8"]


# --- what is left -----------------------------------------------------------------------------------------------------


def left_over(model: ir.Model, feeds: Any = ROWS, **settings: Any) -> dict[str, str]:
    """The reasons, of a model in which something else is quantized."""
    model, report, before = quantize(model, feeds, minimum_share=0.0, **settings)
    assert report.changed
    assert run(model, feeds)[0].shape == run(before, feeds)[0].shape
    return reasons(report)


TWICE = "h = MatMul(x, m) r = Tanh(h) y = MatMul(r, bad)"


@pytest.mark.parametrize(
    ("bad", "settings", "reason"),
    [
        (np.full((64, 8), np.nan, np.float32), {}, "the weight holds NaN or infinity"),
        (np.full((64, 8), np.inf, np.float32), {}, "the weight holds NaN or infinity"),
        (normal(64, 8), {"minimum_elements": 1000}, "the weight has fewer than 1000 elements"),
        (normal(64, 8), {"exclude": ("b?d",)}, "excluded by name"),
        (normal(64, 8), {"exclude": ("y",)}, "excluded by name"),
    ],
)
def test_each_matrix_left_has_its_reason(bad: Array, settings: dict[str, Any], reason: str) -> None:
    assert left_over(product(TWICE, "n, 8", bad=bad), **settings) == {"y": reason}


def test_a_pattern_is_about_nodes_and_weights_not_about_activations() -> None:
    assert left_over(product(TWICE, "n, 8", bad=normal(64, 8)), exclude=("h",)) == {"h": "excluded by name"}
    transposed = "h = MatMul(x, m) r = Tanh(h) u = Transpose<perm = [1, 0]>(bad) y = MatMul(r, u)"
    assert left_over(product(transposed, "n, 8", bad=normal(8, 64)), exclude=("bad",)) == {"y": "excluded by name"}


def test_operators_that_were_not_named_are_left() -> None:
    body = "c = Conv(x, w0, b0) p = GlobalAveragePool(c) f = Flatten(p) y = MatMul(f, m)"
    model = image_network(body, outputs="float[n, 4] y", m=normal(8, 4))
    assert left_over(model, IMAGES[0], operators=("Conv",)) == {"y": "MatMul is not among the operators to quantize"}


@pytest.mark.parametrize(
    ("body", "more", "reason"),
    [
        ("d = Conv(r, w1, n) y = Conv(r, w2)", {"n": np.full(8, np.nan, np.float32)}, "the bias holds NaN or infinity"),
        ("v = Abs(b1) d = Conv(r, w1, v) y = Conv(r, w2)", {}, "the bias is not a constant of the graph"),
        ("v = Abs(w1) d = Conv(r, v) y = Conv(r, w2)", {}, "the weight is not a constant of the graph"),
        ("v = Abs(w1) d = Conv(r, w1) y = Mul(v, v)", {}, "the weight is also read by Abs in fp32"),
    ],
)  # fmt: skip
def test_each_convolution_left_has_its_reason(body: str, more: dict[str, Array], reason: str) -> None:
    assert left_over(image_network(f"c = Conv(x, w0, b0) r = Relu(c) {body}", **more), IMAGES[0]) == {"d": reason}


def test_values_without_a_range_stay_in_floating_point() -> None:
    """exp(800) is infinite: the product that reads it is left, and so is a convolution that would be rounded to it."""
    weights = {**MATRICES, "big": np.float32([800])[0], "bad": normal(64, 8)}
    body = "h = MatMul(x, m) a = Abs(h) s = Add(a, big) e = Exp(s) y = MatMul(e, bad)"
    model = network("float[n, 32] x", body, "float[n, 8] y", weights)
    _, report, _ = quantize(model, ROWS, minimum_share=0.0)
    assert reasons(report) == {"y": "'e': reaches infinity on calibration batch 1"}
    body = "c = Conv(x, w0, b0) d = Conv(c, w1, b1) p = Relu(d) q = Conv(p, huge) r = Relu(q) y = Clip(r, zero, six)"
    huge = image_network(body, huge=np.full((4, 8, 1, 1), 3e38, np.float32))
    model, report, _ = quantize(huge, IMAGES, minimum_share=0.0)
    assert reasons(report) == {"q": "'r': reaches infinity on calibration batch 1"}
    assert executed(model, IMAGES[0])["QLinearConv"] == 2


def test_all_readers_of_a_weight_are_left_together() -> None:
    """One reader without a range leaves the weight in fp32, which the other cannot read as integers then."""
    body = "h = MatMul(x, m) g = MatMul(h, q) i = Exp(b9) a = Mul(g, i) z = MatMul(a, q) y = Clip(z, b8, b7)"
    more = {
        "q": fan_in(64, 64),
        "b9": np.full(64, 800, np.float32),
        "b8": np.float32([-1])[0],
        "b7": np.float32([1])[0],
    }
    assert left_over(product(body, **more)) == dict.fromkeys(("g", "z"), "'a': reaches infinity on calibration batch 1")


BRANCHES = """<ir_version: 8, opset_import: ["": 17]> g (bool c, float[n, 32] x, float[32, 64] m, float[64, 64] q)
    => (float[n, 64] y) {
    h = MatMul(x, m)
    y = If(c) <then_branch = t () => (float[n, 64] a) { a = MatMul(h, q) },
               else_branch = e () => (float[n, 64] b) { b = Neg(h) }> }"""


def test_products_in_branches_are_left_and_their_weights_with_them() -> None:
    model = model_from(BRANCHES, {"m": normal(32, 64), "q": normal(64, 64)})
    feeds = {"c": np.array(True), **ROWS}
    assert left_over(model, feeds) == {"a": "inside a subgraph: its values cannot be measured"}
    shared = model_from(BRANCHES.replace("MatMul(x, m)", "MatMul(x, q)").replace("32", "64"),
                        {"m": normal(64, 64), "q": normal(64, 64)})  # fmt: skip
    with pytest.raises(InputError, match=r"nothing to do on this model \(2 candidates: inside a subgraph"):
        quantize(shared, {"c": np.array(True), "x": normal(6, 64)})


def test_a_graph_in_half_precision_has_nothing_to_do() -> None:
    half = network("float16[n, 4] x", "y = MatMul(x, h)", "float16[n, 4] y", {"h": normal(4, 4).astype(np.float16)})
    with pytest.raises(InputError, match=r"nothing to do .*the weight is float16, not fp32"):
        quantize(half, {"x": normal(2, 4).astype(np.float16)})


def test_a_graph_that_is_quantized_already_is_refused() -> None:
    model, _, _ = quantize(product(), ROWS)
    with pytest.raises(InputError, match="the model is already quantized") as caught:
        quantize(model, ROWS)
    assert "fp32" in caught.value.next_step


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_too_few_multiply_adds_name_what_stays_before_anything_is_measured(
    ranges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "collect", lambda *_: pytest.fail("measured"))
    model = product("h = MatMul(x, m) r = Tanh(h) y = MatMul(r, large)", "n, 640", large=normal(64, 640))
    with pytest.raises(
        InputError, match=r"would bring only 4\.8 % of the multiply-adds .*\(y: excluded by name\)"
    ) as caught:
        quantize(model, ROWS, exclude=("large",), ranges=ranges)
    assert "minimum_share (50)" in caught.value.next_step


# --- numbers at the edge ----------------------------------------------------------------------------------------------


def test_channels_and_activations_of_zeros() -> None:
    dead = fan_in(8, 3, 3, 3)
    dead[3] = 0
    body = "z = Mul(x, zero) c = Conv(x, dead, b0) d = Conv(z, w0, b0) s = Add(c, d) r = Relu(s) y = Conv(r, w1)"
    model, _, before = quantize(image_network(body, dead=dead), IMAGES)
    assert scales_and_zeros(model)["z"] == (1.0, 0)
    assert weights_of(model)["dead_scale"].numpy()[3] >= np.finfo(np.float32).tiny
    assert noise(before, model, IMAGES[0]) > 30
    everything = {"x": np.zeros((1, 3, 12, 12), np.float32)}
    model, _, before = quantize(image_network(TWO.replace(", b0", "").replace(", b1", "")), everything)
    assert np.array_equal(run(model, everything)[0], run(before, everything)[0])


@pytest.mark.parametrize("bias", [1e9, -1e12, 1e-9])
def test_a_bias_too_large_for_the_scale_of_its_weights(bias: float) -> None:
    weak = fan_in(8, 3, 3, 3)
    weak[2] *= 1e-9
    offsets = normal(8)
    offsets[2] = bias
    model, _, before = quantize(image_network("y = Conv(x, weak, offsets)", weak=weak, offsets=offsets), IMAGES)
    expected, got = run(before, IMAGES[0])[0], run(model, IMAGES[0])[0]
    step = scales_and_zeros(model)["y_float"][0]
    assert np.abs(expected - got).max() <= 3 * step


def test_numbers_near_the_smallest() -> None:
    """Scale times scale would be no normal number: the bias is zero or tiny, the result too, and nothing is NaN."""
    small = {"x": (IMAGES[0]["x"] * 1e-30).astype(np.float32)}
    more = {"weak": (fan_in(8, 3, 3, 3) * 1e-12).astype(np.float32), "none": np.zeros(8, np.float32)}
    for body in ("y = Conv(x, weak, none)", "y = Conv(x, weak)", "y = Conv(x, w0, none)"):
        model, _, before = quantize(image_network(body, **more), small)
        got = run(model, small)[0]
        assert np.isfinite(got).all()
        assert np.abs(got - run(before, small)[0]).max() < 1e-30
    tiny = {"x": (ROWS["x"] * 1e-30).astype(np.float32)}
    model, _, before = quantize(product("y = Gemm(x, m, b)", m=(MATRICES["m"] * 1e-12).astype(np.float32)), tiny)
    assert noise(before, model, tiny) > 40


def test_a_bias_of_a_matrix_that_does_not_fit_stays_in_floating_point() -> None:
    strong = {"m": (MATRICES["m"] * 1e-9).astype(np.float32), "b": (MATRICES["b"] * 1e6).astype(np.float32)}
    for body in ("y = Gemm(x, m, b)", "h = MatMul(x, m) y = Add(h, b)"):
        model, _, before = quantize(product(body, **strong), ROWS)
        assert executed(model, ROWS) == {"MatMulIntegerToFloat": 1, "QuantizeLinear": 1, "Sum": 1}
        assert noise(before, model, ROWS) > 80


def test_nan_on_calibration_data_is_an_error_that_names_node_and_batch() -> None:
    bad = {"x": np.where(np.arange(32) == 3, np.nan, ROWS["x"]).astype(np.float32)}
    with pytest.raises(InputError, match="is NaN on calibration batch 2"):
        quantize(product(), [ROWS, bad])
