# SPDX-License-Identifier: Apache-2.0
"""`cast`: fp16 inside, fp32 at the ends, no infinity made and no guard lost."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pass_tools import Array, count, model_from, normal, press, reasons, run, sqnr, to_bytes, weights_of

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.low_precision import round_to
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
CAST = CastPass()
W = {"w": normal(8, 8, scale=0.3)}


def ends(model: ir.Model) -> list[tuple[str | None, ir.DataType | None]]:
    return [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]


def close(before: bytes, after: ir.Model, feeds: dict[str, Array], tolerance: float = 5e-3) -> None:
    for one, other in zip(run(before, feeds), run(after, feeds), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.isfinite(other).all() if other.dtype.kind == "f" else True
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance)


def body(text: str, weights: dict[str, Array] | None = None) -> ir.Model:
    """y [b, 8] from x [b, 8] and a weight w [8, 8]."""
    given_weights = W if weights is None else weights
    declared = "".join(f", float[{','.join(map(str, a.shape))}] {n}" for n, a in given_weights.items())
    return model_from(f"{HEAD} g (float[b, 8] x{declared}) => (float[b, 8] y) {{ {text} }}", given_weights)


def test_weights_halve_and_the_ends_stay_fp32() -> None:
    model = body("h = MatMul(x, w) i = Gelu(h) y = LayerNormalization(i, s)", W | {"s": normal(8)})
    names = ends(model)
    model, report, before = press(CAST, model)
    assert report.bytes_after * 2 == report.bytes_before
    assert ends(model) == names
    assert {t.dtype for t in weights_of(model).values()} == {ir.DataType.FLOAT16}
    assert count(model)["Cast"] == 2
    assert report.changed == report.details["weights_cast"] == 2
    close(before, model, {"x": normal(4, 8)}, 2e-2)


def test_symbolic_sizes_and_types_are_kept() -> None:
    model, _, _ = press(CAST, body("h = MatMul(x, w) y = Relu(h)"))
    inner = next(n.outputs[0] for n in model.graph if n.op_type == "MatMul")
    assert inner.dtype == ir.DataType.FLOAT16
    assert str(model.graph.inputs[0].shape) == str(inner.shape) == "[b,8]"


def test_a_mask_constant_is_brought_to_the_end_of_fp16() -> None:
    text = f"""{HEAD} g (float[b, 8] x, int64[b, 8] mask, float[8, 8] w) => (float[b, 8] y) {{ h = MatMul(x, w)
        keep = Cast<to = 1>(mask) one = Constant<value_float = 1.0>() off = Sub(one, keep)
        lowest = Constant<value_float = -3.4028234e38>() bias = Mul(off, lowest) a = Add(h, bias) y = Softmax(a) }}"""
    for clean in (True, False):  # as an initializer, and as a Constant node
        model = model_from(text, W)
        model = press(Clean(), model)[0] if clean else model
        model, report, before = press(CAST, model)
        assert report.details["clamped"] == 1
        assert -65504.0 in [float(t.numpy()) for t in weights_of(model).values() if t.size == 1]
        assert [n.attributes["to"].as_int() for n in model.graph if n.op_type == "Cast"].count(10) == 2
        close(before, model, {"x": normal(3, 8), "mask": np.array([[1] * 5 + [0] * 3] * 3)})


@pytest.mark.parametrize("guard", [1e-12, -1e-12])
def test_a_guard_stays_nonzero(guard: float) -> None:
    op = "Max" if guard > 0 else "Min"
    model = body(
        f"z = Sub(x, x) m = {op}(z, e) r = Div(z, m) i = MatMul(r, w) y = Relu(i)", W | {"e": np.float32([guard])}
    )
    model, report, before = press(CAST, model)
    assert report.details["raised_to_smallest"] == 1
    assert weights_of(model)["e"].numpy()[0] == np.sign(guard) * np.finfo(np.float16).smallest_subnormal
    close(before, model, {"x": normal(2, 8)})


def test_tiny_weights_of_a_matrix_become_zero_also_beside_huge_ones() -> None:
    w = np.full((8, 8), 1e-12, np.float32)
    w[0, 0] = 1e9
    model, report, _ = press(CAST, body("y = MatMul(x, w)", {"w": w}))
    stored = weights_of(model)["w"].numpy()
    assert stored[0, 0] == 65504
    assert np.count_nonzero(stored) == 1
    assert (report.details["clamped"], report.details["raised_to_smallest"]) == (1, 0)


def test_constants_of_every_form() -> None:
    model = body(
        "a = Constant<value_float = 0.5>() b0 = Constant<value_floats = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]>() "
        "c = Constant<value = float[1] {3.0}>() d = Constant<value_ints = [-1, 8]>() h = MatMul(x, w) i = Mul(h, a) "
        "j = Add(i, b0) k = Div(j, c) y = Reshape(k, d)"
    )
    model, report, before = press(CAST, model)
    assert report.changed == 4
    close(before, model, {"x": normal(2, 8)})


def test_a_model_with_nothing_but_constants_is_cast() -> None:
    model, report, before = press(CAST, body("a = Constant<value_float = 0.5>() y = Mul(x, a)", {}))
    assert report.changed == 1
    close(before, model, {"x": normal(2, 8)})


def test_resize_keeps_its_scales() -> None:
    text = f"""{HEAD} g (float[1, 1, 9, 9] x, float[4] scales, float[1] half) => (float[1, 1, h, v] y) {{
        u = Mul(x, half) r = Resize<mode = "linear">(u, "", scales) y = Mul(r, half) }}"""
    weights = {"scales": np.array([1, 1, 1.3334, 2.0001], np.float32), "half": np.float32([0.5])}
    model, report, before = press(CAST, model_from(text, weights))
    np.testing.assert_array_equal(weights_of(model)["scales"].numpy(), weights["scales"])
    assert "fp32 only" in reasons(report)["scales"]
    close(before, model, {"x": normal(1, 1, 9, 9)})


def test_a_constant_that_resize_and_others_read_serves_both() -> None:
    text = f"""{HEAD} g (float[1, 4, 9, 1] x, float[4] shared, float[4, 4] w) => (float[1, c, h, u] y) {{
        r = Resize<mode = "nearest">(x, "", shared) a = MatMul(r, w) y = Add(a, shared) }}"""
    weights = {"shared": np.array([1, 1, 1.3334, 4], np.float32), "w": normal(4, 4)}
    model, _, before = press(CAST, model_from(text, weights))
    assert weights_of(model)["shared"].dtype == ir.DataType.FLOAT
    assert weights_of(model)["w"].dtype == ir.DataType.FLOAT16
    close(before, model, {"x": normal(1, 4, 9, 1)}, 1e-2)


def test_resize_scales_in_a_constant_node() -> None:
    text = f"""{HEAD} g (float[1, 1, 9, 9] x, float[1] half) => (float[1, 1, h, v] y) {{ u = Mul(x, half)
        s = Constant<value_floats = [1.0, 1.0, 1.3334, 2.0001]>() y = Resize<mode = "nearest">(u, "", s) }}"""
    model, _, before = press(CAST, model_from(text, {"half": np.float32([0.5])}))
    close(before, model, {"x": normal(1, 1, 9, 9)})


def test_constant_of_shape_with_and_without_a_value() -> None:
    model = body(
        "n = Shape(x) z = ConstantOfShape(n) o = ConstantOfShape<value = float[1] {0.7}>(n) h = MatMul(x, w) "
        "i = Add(h, z) y = Add(i, o)"
    )
    model, _, before = press(CAST, model)
    close(before, model, {"x": normal(2, 8)})


@pytest.mark.parametrize("infer", [True, False])
def test_ranges(infer: bool) -> None:
    """Positions in fp32 steps of 0.1 would drift in fp16; positions in integers have nothing to do with it."""
    text = f"""{HEAD} g (float[b, 8] x, float[8, 8] w, float start, float stop, float step) => (float[b, 8] y) {{
        r = Range(start, stop, step) nil = Constant<value_int = 0>() eight = Constant<value_int = 8>()
        one = Constant<value_int = 1>() ints = Range(nil, eight, one) f = Cast<to = 1>(ints)
        h = MatMul(x, w) i = Add(h, r) y = Add(i, f) }}"""
    weights = W | {"start": np.float32(0), "stop": np.float32(0.8), "step": np.float32(0.1)}
    model, report, before = press(CAST, model_from(text, weights, infer=infer))
    assert weights_of(model)["step"].numpy() == np.float32(0.1)
    assert [r for r in reasons(report).values() if "Range" in r]
    close(before, model, {"x": normal(2, 8)})


@pytest.mark.parametrize(
    "operator",
    ['ScatterND<reduction = "add">(n, i, h)', 'ScatterElements<axis = 0, reduction = "add">(n, e, h)'],
)
def test_sums_of_what_meets_in_one_place_keep_fp32(operator: str) -> None:
    """The messages of a graph network; ONNX Runtime's CPU kernels refuse them in fp16."""
    text = f"""{HEAD} g (float[4, 8] x, float[8, 8] w, float[2, 8] n, int64[4, 1] i, int64[4, 8] e) =>
        (float[2, 8] y) {{ h = MatMul(x, w) s = {operator} y = MatMul(s, w) }}"""
    weights = W | {
        "n": np.zeros((2, 8), np.float32),
        "i": np.array([[0], [1], [1], [1]]),
        "e": np.repeat([[0], [1], [1], [1]], 8, 1),
    }
    model, report, before = press(CAST, model_from(text, weights))
    assert weights_of(model)["w"].dtype == ir.DataType.FLOAT16
    assert [reason for reason in reasons(report).values() if "sums in fp32" in reason]
    close(before, model, {"x": normal(4, 8)}, 2e-2)


def test_what_is_scattered_without_a_sum_is_cast() -> None:
    text = f"""{HEAD} g (float[2, 8] x, float[8, 8] w, float[4, 8] n, int64[2, 1] i) => (float[4, 8] y) {{
        h = MatMul(x, w) s = ScatterND(n, i, h) y = Relu(s) }}"""
    weights = W | {"n": np.zeros((4, 8), np.float32), "i": np.array([[0], [2]])}
    model, report, _ = press(CAST, model_from(text, weights))
    assert not [name for name in reasons(report) if "Scatter" in name]
    assert count(model)["Cast"] == 2


def test_non_max_suppression_keeps_fp32() -> None:
    text = f"""{HEAD} g (float[1, 6, 4] boxes, float[1, 2, 6] scores, float[1] half) => (int64[n, 3] y) {{
        b = Mul(boxes, half) s = Sigmoid(scores) m = Constant<value_ints = [3]>() i = Constant<value_floats = [0.45]>()
        t = Constant<value_floats = [0.3]>() y = NonMaxSuppression(b, s, m, i, t) }}"""
    model, _, before = press(CAST, model_from(text, {"half": np.float32([0.5])}))
    low = np.random.default_rng(0).random((1, 6, 2), np.float32)
    feeds = {"boxes": np.concatenate([low, low + 1], -1), "scores": normal(1, 2, 6)}
    np.testing.assert_array_equal(run(before, feeds)[0], run(model, feeds)[0])


def test_a_dynamically_quantized_product_is_scaled_in_fp32() -> None:
    """Sums of int8 products exceed 65504: cast to fp16 before they are scaled, they would be infinite."""
    text = f"""{HEAD} g (int64[b] ids, float[9, 512] e, float[512, 16] w, float[16] c) => (float[b, 16] y) {{
        h = Gather(e, ids) i = Abs(h) j = MatMul(i, w) y = Add(j, c) }}"""
    weights = {"e": normal(9, 512) * 1e-3, "w": np.abs(normal(512, 16, seed=1)), "c": normal(16)}
    model, _, original = press(QuantizeDynamic(minimum_elements=100), model_from(text, weights))
    model, report, before = press(CAST, model)
    feeds = {"ids": np.arange(9)}
    expected, got = run(original, feeds)[0], run(model, feeds)[0]
    assert sqnr(expected, got) > 25
    assert sqnr(run(before, feeds)[0], got) > 45, "fp16 adds next to nothing to the error of int8"
    kept = {n for n, t in weights_of(model).items() if t.dtype == ir.DataType.FLOAT}
    assert kept == {"e_scale", "w_scale"}
    assert weights_of(model)["c"].dtype == ir.DataType.FLOAT16
    assert report.changed == 1


def test_branches_and_loops() -> None:
    text = f"""{HEAD} g (bool c, int64 n, float[b, 8] x, float[8, 8] w) => (float[b, 8] y, float[m, b, 8] all) {{
        k = Constant<value_float = 0.5>()
        h = If (c) <then_branch = f () => (float[b, 8] p) {{ i = MatMul(x, w) p = Mul(i, k) }},
                    else_branch = d () => (float[b, 8] q) {{ two = Constant<value_float = 2.0>() q = Mul(x, two) }}>
        go = Constant<value = bool {{1}}>()
        y, all = Loop (n, go, h) <body = step (int64 i, bool e, float[b, 8] v) => (bool o, float[b, 8] u, float[b, 8] s)
        {{ o = Identity(e) t = MatMul(v, w) u = Tanh(t) s = Mul(u, k) }}> }}"""
    model, _, before = press(CAST, model_from(text, W))
    assert count(model)["Cast"] <= 4
    for c in (True, False):
        close(before, model, {"c": np.array(c), "n": np.array(3), "x": normal(2, 8)}, 2e-2)


def test_a_branch_that_returns_what_stays_fp32() -> None:
    text = f"""{HEAD} g (bool c, float[8] x, float start, float stop, float step) => (float[n] y) {{
        h = If (c) <then_branch = f () => (float[k] p) {{ p = Range(start, stop, step) }},
                    else_branch = d () => (float[m] q) {{ q = Neg(x) }}>
        y = Exp(h) }}"""
    weights = {"start": np.float32(0), "stop": np.float32(0.8), "step": np.float32(0.1)}
    model = model_from(text, weights)
    plan = CAST.plan(model)
    assert plan.actions == []  # nothing to cast here but activations: press() would refuse
    before = to_bytes(model)
    model = CAST.apply(model, plan)
    for c in (True, False):
        close(before, model, {"c": np.array(c), "x": normal(8)})


def test_outputs_that_are_inputs_weights_or_read_on() -> None:
    text = f"""{HEAD} g (float[b, 8] x, float[8, 8] w, float[8] v) =>
        (float[b, 8] h, float[b, 8] y, float[b, 8] z, float[8] v) {{
        z = Identity(x) h = MatMul(x, w) i = Add(h, v) y = Relu(i) }}"""
    model, report, before = press(CAST, model_from(text, W | {"v": normal(8)}))
    assert weights_of(model)["v"].dtype == ir.DataType.FLOAT
    assert report.changed == 1
    assert [v.name for v in model.graph.outputs] == ["h", "y", "z", "v"]
    close(before, model, {"x": normal(2, 8)})


def test_an_overridable_weight_stays_an_fp32_input() -> None:
    model = body("h = MatMul(x, w) y = Add(h, v)", W | {"v": normal(8)})
    model.graph.inputs.append(model.graph.initializers["v"])
    model, _, before = press(CAST, model)
    assert [(v.name, v.dtype) for v in model.graph.inputs] == [("x", ir.DataType.FLOAT), ("v", ir.DataType.FLOAT)]
    close(before, model, {"x": normal(2, 8), "v": normal(8, seed=4)})


@pytest.mark.parametrize(
    "maker",
    [
        "RandomNormal<shape = [8]>()",
        "RandomUniform<shape = [8], dtype = 1>()",
        "RandomNormalLike(h)",
        "RandomUniformLike(h)",
        "EyeLike(h)",
        "EyeLike<dtype = 1>(m)",
        "HannWindow(n)",
        "BlackmanWindow<output_datatype = 1>(n)",
        "Bernoulli(v)",
    ],
)
def test_random_numbers_and_windows(maker: str) -> None:
    model = body(
        f"n = Constant<value_int = 8>() h = MatMul(x, w) v = Sigmoid(h) m = Cast<to = 7>(h) r = {maker} z = Mul(r, k) "
        "y = Add(h, z)",
        W | {"k": np.full(1, 0 if "Random" in maker or "Bern" in maker else 0.5, np.float32)},
    )
    model, _, before = press(CAST, model)
    close(before, model, {"x": normal(2, 8)})


def test_operators_of_other_domains_keep_fp32() -> None:
    text = """<ir_version: 10, opset_import: ["": 20, "ai.onnx.ml": 3, "com.microsoft": 1]>
        g (float[b, 8] x, float[8, 8] w) => (float[b, 8] y) <float[b, 8] i> { h = MatMul(x, w)
        i = ai.onnx.ml.Scaler<offset = [0.5], scale = [2.0]>(h) j = com.microsoft.FastGelu(i) y = Relu(j) }"""
    model, report, before = press(CAST, model_from(text, W))
    assert [r for r in reasons(report).values()] == ["Scaler stays in fp32"]
    close(before, model, {"x": normal(2, 8)}, 2e-2)
    with pytest.raises(InputError, match=r"does not know whether 'i' at ai\.onnx\.ml::Scaler"):
        run_pass(CAST, model_from(text.replace("<float[b, 8] i>", ""), W))


def test_static_quantization_keeps_its_scales() -> None:
    model = body(
        "h = MatMul(x, w) z = Constant<value = int8 {0}>() q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) "
        "y = Relu(d)",
        W | {"s": np.float32(0.02)},
    )
    model, _, before = press(CAST, model)
    assert weights_of(model)["s"].numpy() == np.float32(0.02)
    close(before, model, {"x": normal(2, 8)}, 2.1e-2)


def test_local_functions_are_refused_with_the_next_step() -> None:
    model = model_from(
        '<ir_version: 10, opset_import: ["": 20, "local": 1]> g (float[b, 2] x) => (float[b, 2] y) '
        '{ y = local.twice(x) } <domain: "local", opset_import: ["": 20]> twice (a) => (c) { c = Add(a, a) }'
    )
    with pytest.raises(InputError) as caught:
        run_pass(CAST, model)
    assert "clean" in caught.value.next_step


def test_casting_twice_has_nothing_to_do_and_bytes_do_not_change() -> None:
    text = "h = MatMul(x, w) i = Mul(h, k) y = Relu(i)"
    weights = W | {"k": np.float32([1e-9])}
    first, second = (press(CAST, body(text, weights))[0] for _ in range(2))
    assert to_bytes(first) == to_bytes(second)
    with pytest.raises(InputError, match="nothing to do"):
        run_pass(CAST, first)


def test_vetoing_a_weight_leaves_it_fp32() -> None:
    model = body("h = MatMul(x, w) y = Add(h, v)", W | {"v": normal(8)})
    before, plan = to_bytes(model), CAST.plan(model)
    plan.actions = [a for a in plan.actions if a != {"weight": "v"}]
    model = CAST.apply(model, plan)
    assert weights_of(model)["v"].dtype == ir.DataType.FLOAT
    close(before, model, {"x": normal(2, 8)})


FLOATS = hnp.arrays(np.float32, st.integers(1, 8), elements=st.floats(width=32))
HALVES = hnp.arrays(np.float16, st.integers(1, 8), elements=st.floats(width=16))


@settings(max_examples=300, deadline=None)
@given(array=FLOATS, keep=st.booleans())
@example(np.float32([65504, 65519.996, 65520, 3.4e38, 1e-45, 2**-25, 2**-24, np.inf, np.nan]), True)
def test_rounding_to_fp16(array: Array, keep: bool) -> None:
    result, clamped, raised = round_to(array, "float16", keep_nonzero=keep)
    assert result.dtype == np.float16
    finite = np.isfinite(array)
    assert (np.isfinite(result) == finite).all()
    assert (np.isnan(result) == np.isnan(array)).all()
    number = ~np.isnan(array)
    assert (np.signbit(result) == np.signbit(array))[number].all()
    with np.errstate(over="ignore"):
        plain = array.astype(np.float16)
    over, under = finite & (np.abs(array) > 65504), (plain == 0) & (array != 0)
    assert (clamped, raised) == (over.sum(), under.sum() if keep else 0)
    assert (np.abs(result[over]) == 65504).all()
    assert (np.abs(result[under]) == (np.finfo(np.float16).smallest_subnormal if keep else 0)).all()
    same = number & ~over & ~under
    np.testing.assert_array_equal(result[same], plain[same])


@settings(max_examples=200, deadline=None)
@given(HALVES)
def test_what_fp16_can_say_is_kept_exactly(array: Array) -> None:
    result, clamped, raised = round_to(array.astype(np.float32), "float16")
    np.testing.assert_array_equal(result, array)
    assert clamped == raised == 0


def test_rounding_a_scalar_keeps_its_rank() -> None:
    assert (
        round_to(np.float32(1e-9), "float16")[0].shape
        == round_to(np.asarray(np.float32(9e9)), "float16")[0].shape
        == ()
    )
