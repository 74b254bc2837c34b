# SPDX-License-Identifier: Apache-2.0
"""`quantize_dynamic`: which weights become int8, how exactly, and that ONNX Runtime then computes in int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pass_tools import Array, count, model_from, normal, press, reasons, run, sqnr, to_bytes, weights_of

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.matrix_weights import quantize_symmetric
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.runtime.profiling import operators_after_optimization

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
ALL = QuantizeDynamic(minimum_elements=0)


def one(body: str, shape: tuple[int, ...], out: int, **more: Array) -> ir.Model:
    """y = body(x, w, ...) for x [batch, sequence, 64] (or the first axis of w) and y [..., out]."""
    weights = {"w": normal(*shape), **more}
    declared = "".join(f", float[{','.join(map(str, a.shape))}] {n}" for n, a in weights.items())
    return model_from(
        f"{HEAD} g (float[batch, 64] x{declared}) => (float[batch, {out}] y) {{ {body} }}",
        weights,
    )


FORMS = {
    "matmul": ("y = MatMul(x, w)", (64, 96)),
    "transposed": ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", (96, 64)),
    "gemm": ("y = Gemm(x, w)", (64, 96)),
    "gemm_bias": ("y = Gemm(x, w, b)", (64, 96)),
    "gemm_transposed": ("y = Gemm<transB = 1>(x, w, b)", (96, 64)),
    "gemm_twice_transposed": ("t = Transpose<perm = [1, 0]>(w) y = Gemm<transB = 1>(x, t)", (64, 96)),
    "gemm_column_bias": ("y = Gemm(x, w, c)", (64, 96)),
    "relu_before": ("h = Relu(x) y = MatMul(h, w)", (64, 96)),
}


def form(name: str) -> ir.Model:
    body, shape = FORMS[name]
    return one(body, shape, 96, b=normal(96, seed=5), c=normal(1, 1, seed=6))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_product(name: str, per_channel: bool) -> None:
    model, report, before = press(QuantizeDynamic(minimum_elements=100, per_channel=per_channel), form(name))
    operators = count(model)
    assert report.changed == 1
    assert operators["MatMulInteger"] == operators["DynamicQuantizeLinear"] == 1
    assert not {"MatMul", "Gemm", "Transpose"} & set(operators)
    stored = weights_of(model)["w_int8"].numpy()
    assert stored.dtype == np.int8
    assert stored.shape == (64, 96), "stored as the product reads it"
    assert weights_of(model)["w_scale"].numpy().shape == ((96,) if per_channel else ())
    feeds = {"x": normal(16, 64, seed=9)}
    expected, got = run(before, feeds)[0], run(model, feeds)[0]
    assert expected.shape == got.shape
    assert sqnr(expected, got) > 25
    assert [v.name for v in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("name", ["matmul", "gemm_bias", "relu_before"])
def test_the_runtime_computes_in_int8(name: str) -> None:
    model, _, before = press(ALL, form(name))
    feeds = {"x": normal(4, 64)}
    assert {"MatMul", "Gemm"} & set(operators_after_optimization(before, feeds))
    executed = operators_after_optimization(to_bytes(model), feeds)
    assert {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"} & set(executed)
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(executed)


def test_the_error_is_that_of_rounding_and_no_more() -> None:
    """|y - y'| <= half a step of each weight times |x'|, plus half a step of each activation times |w|."""
    w = normal(64, 96)
    model, _, _ = press(ALL, one("y = MatMul(x, w)", (64, 96), 96))
    scale = weights_of(model)["w_scale"].numpy().astype(np.float64)
    integers = weights_of(model)["w_int8"].numpy().astype(np.float64)
    assert (np.abs(integers * scale - w) <= scale * (0.5 + 1e-4)).all()
    x = normal(8, 64, seed=3)
    step = (np.maximum(x.max(), 0) - np.minimum(x.min(), 0)).astype(np.float64) / 255
    exact = x.astype(np.float64) @ w
    bound = (np.abs(x) + step).sum(1, keepdims=True) * scale / 2 + step * np.abs(w).sum(0)
    error = np.abs(run(model, {"x": x})[0] - exact)
    assert (error <= bound * 1.001).all()
    assert error.max() > 0


def test_leading_axes_and_vectors() -> None:
    for shape in ((3, 5, 64), (2, 3, 5, 64), (64,)):
        dims = ", ".join(map(str, shape))
        ends = ", ".join(map(str, (*shape[:-1], 32)))
        model = model_from(
            f"{HEAD} g (float[{dims}] x, float[64, 32] w) => (float[{ends}] y) {{ y = MatMul(x, w) }}",
            {"w": normal(64, 32)},
        )
        model, _, before = press(ALL, model)
        feeds = {"x": normal(*shape)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


EMBEDDING = (
    f"{HEAD} g (int64[batch, sequence] ids, float[50, 64] e) => (float[batch, sequence, 64] y) {{ y = Gather(e, ids) }}"
)


@pytest.mark.parametrize("per_channel", [True, False])
def test_an_embedding_has_a_scale_for_each_row(per_channel: bool) -> None:
    e = normal(50, 64) * np.logspace(-3, 3, 50, dtype=np.float32)[:, None]
    model, _, before = press(
        QuantizeDynamic(minimum_elements=0, per_channel=per_channel), model_from(EMBEDDING, {"e": e})
    )
    scale = weights_of(model)["e_scale"].numpy()
    assert scale.shape == ((50, 1) if per_channel else ())
    feeds = {"ids": np.array([[0, 7, 49], [-1, 3, 3]])}
    expected, got = run(before, feeds)[0], run(model, feeds)[0]
    steps = scale[feeds["ids"]] if per_channel else scale
    assert (np.abs(expected - got) <= steps * 0.5001).all()
    assert weights_of(model)["e_int8"].numpy().nbytes * 4 == e.nbytes
    assert "e" not in model.graph.initializers


def test_an_embedding_read_by_a_single_index() -> None:
    model = model_from(
        f"{HEAD} g (int64 i, float[50, 64] e) => (float[64] y) {{ y = Gather<axis = -2>(e, i) }}", {"e": normal(50, 64)}
    )
    model, _, before = press(ALL, model)
    assert sqnr(run(before, {"i": np.array(4)})[0], run(model, {"i": np.array(4)})[0]) > 25


TIED = f"""{HEAD} g (int64[batch, sequence] ids, float[200, 64] e) => (float[batch, sequence, 200] y) {{
    h = Gather(e, ids) i = Relu(h) t = Transpose<perm = [1, 0]>(e) y = MatMul(i, t) }}"""


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_tied_embedding_is_stored_once(per_channel: bool) -> None:
    e = normal(200, 64)
    model, report, before = press(
        QuantizeDynamic(minimum_elements=0, per_channel=per_channel), press(Clean(), model_from(TIED, {"e": e}))[0]
    )
    int8 = [t for t in weights_of(model).values() if t.dtype == ir.DataType.INT8]
    assert [t.size for t in int8] == [e.size]
    assert report.bytes_after <= e.nbytes / 4 + 2 * 4 * 200
    feeds = {"ids": np.array([[0, 7, 199], [5, 3, 3]])}
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25
    assert "MatMul" not in operators_after_optimization(to_bytes(model), feeds)


def test_a_head_before_its_embedding_gets_unique_names() -> None:
    """The weights are met in another order than the values are made: names are derived from both."""
    text = f"""{HEAD} g (float[b, 64] x, float[64, 64] w, float[64, 64] v) => (float[b, 64] y) {{
        h = MatMul(x, w) i = MatMul(h, v) y = MatMul(i, w) }}"""
    model, _, before = press(ALL, model_from(text, {"w": normal(64, 64), "v": normal(64, 64, seed=1)}))
    names = [str(v.name) for n in model.graph for v in n.outputs] + list(model.graph.initializers)
    assert len(names) == len(set(names))
    feeds = {"x": normal(3, 64)}
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def test_products_of_one_activation_quantize_it_once() -> None:
    text = f"""{HEAD} g (float[b, 64] x, float[64, 32] q, float[64, 32] k, float[64, 32] v, float[64, 64] w)
        => (float[b, 32] y) {{ h = MatMul(x, w) a = MatMul(h, q) b1 = MatMul(h, k) c = MatMul(h, v)
        d = Add(a, b1) y = Add(d, c) }}"""
    weights = {n: normal(64, 32, seed=i) for i, n in enumerate("qkv")} | {"w": normal(64, 64)}
    model, _, before = press(ALL, model_from(text, weights))
    assert count(model)["DynamicQuantizeLinear"] == 2
    assert count(model)["MatMulInteger"] == 4
    feeds = {"x": normal(3, 64)}
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def test_a_weight_read_at_both_ends_keeps_sharing_activations() -> None:
    text = f"""{HEAD} g (float[b, 64] x, float[64, 64] w, float[64, 64] q, float[64, 64] k) => (float[b, 64] y) {{
        h = MatMul(x, w) i = MatMul(h, q) a = MatMul(i, w) c = MatMul(i, k) y = Add(a, c) }}"""
    weights = {n: normal(64, 64, seed=s) for s, n in enumerate("wqk")}
    model, _, _ = press(ALL, model_from(text, weights))
    assert count(model)["DynamicQuantizeLinear"] == 3  # x, h, i


BRANCHES = f"""{HEAD} g (bool c, float[b, 64] x, float[64, 64] w) => (float[b, 64] y) {{ h = Relu(x)
    y = If (c) <then_branch = f () => (float[b, 64] p) {{ p = MatMul(h, w) }},
                else_branch = d () => (float[b, 64] q) {{ r = Tanh(h) s = MatMul(r, w) q = Relu(s) }}> }}"""


def test_weights_read_in_branches() -> None:
    model, report, before = press(ALL, model_from(BRANCHES, {"w": normal(64, 64)}))
    assert report.changed == 1
    assert "w" not in model.graph.initializers
    for c in (True, False):
        feeds = {"c": np.array(c), "x": normal(4, 64)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def test_a_transposed_and_tied_weight_read_in_branches() -> None:
    text = f"""{HEAD} g (bool c, int64[b] ids, float[64, 64] e) => (float[b, 64] y) {{ h = Gather(e, ids)
        y = If (c) <
          then_branch = f () => (float[b, 64] p) {{ t = Transpose<perm = [1, 0]>(e) p = MatMul(h, t) }},
          else_branch = d () => (float[b, 64] q) {{ u = Transpose<perm = [1, 0]>(e) q = MatMul(h, u) }}> }}"""
    model, report, before = press(ALL, model_from(text, {"e": normal(64, 64)}))
    assert report.changed == 1
    assert count(model)["Transpose"] == 1
    for c in (True, False):
        feeds = {"c": np.array(c), "ids": np.arange(5)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def test_weights_of_the_same_name_in_two_branches() -> None:
    model = model_from(BRANCHES, {"w": normal(64, 64)})
    shared = model.graph.initializers["w"]
    for seed, use in enumerate(list(shared.uses())):
        own = ir.Value(name="w", const_value=ir.Tensor(normal(64, 64, seed=seed), name="w"))
        own.shape, own.type = shared.shape, shared.type
        use.node.graph.register_initializer(own)  # type: ignore[union-attr]
        use.node.replace_input_with(use.idx, own)
    del model.graph.initializers["w"]
    model, report, before = press(ALL, model)
    assert report.changed == 2
    assert report.bytes_after < 0.27 * report.bytes_before
    for c in (True, False):
        feeds = {"c": np.array(c), "x": normal(4, 64)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def test_a_tied_weight_that_lives_in_a_branch() -> None:
    text = f"""{HEAD} g (bool c, int64[b] ids, float[64, 64] e, float[64, 64] r) => (float[b, 64] y) {{ y = If (c) <
        then_branch = f () => (float[b, m] p) {{ h = Gather(e, ids) t = Transpose<perm = [1, 0]>(e) p = MatMul(h, t) }},
        else_branch = d () => (float[b, 64] q) {{ q = Gather(r, ids) }}> }}"""
    model = model_from(text, {"e": normal(64, 64), "r": normal(64, 64, seed=1)})
    outer = model.graph.initializers["e"]
    branch = next(use.node.graph for use in outer.uses())
    own = ir.Value(name="e", const_value=outer.const_value, shape=outer.shape, type=outer.type)
    assert isinstance(branch, ir.Graph)
    branch.register_initializer(own)
    outer.replace_all_uses_with(own)
    del model.graph.initializers["e"]
    model, report, before = press(ALL, model)
    assert report.changed == 2
    for c in (True, False):
        feeds = {"c": np.array(c), "ids": np.arange(5)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def assert_left(report: PassReport, reason: str) -> None:
    assert reason in " / ".join(sorted(set(reasons(report).values())))


def two(more: str, w: Array | None = None) -> ir.Model:
    """A product that is always quantized, and one about which `more` decides."""
    outputs, _, body = more.rpartition("|")
    return model_from(
        f"{HEAD} g (float[b, 64] x, float[64, 64] v, float[64, 64] w) => (float[b, 64] y{outputs}) "
        f"{{ h = MatMul(x, v) {body} }}",
        {"v": normal(64, 64), "w": normal(64, 64, seed=1) if w is None else w},
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("i = MatMul(h, w) j = MatMul(x, w) k = Relu(w) l = MatMul(j, k) y = Add(i, l)", "also read by Relu in fp32"),
        ("y = MatMul(h, w) ", "excluded by name"),
        (", float[64, 64] w|y = MatMul(h, w)", "the weight is an output of the graph"),
        (", float[64, 64] t|t = Transpose<perm = [1, 0]>(w) y = MatMul(h, t)", "transposed, is an output"),
        ("t = Transpose(h) u = MatMul(w, t) y = Transpose(u)", "the weight is the left factor"),
        ("y = Gemm<alpha = 2.0>(h, w)", "alpha"),
        ("t = Transpose(h) y = Gemm<transA = 1>(t, w)", "transA"),
        ("i = MatMul(h, w) z = Constant<value_ints = [0]>() r = Gather(w, z) y = Add(i, r)", "different axes"),
        ("i = MatMul(h, w) z = Constant<value_ints = [0]>() r = Gather<axis = 1>(w, z) y = Add(i, r)", "pick rows"),
    ],
)
def test_what_stays_says_why(more: str, reason: str) -> None:
    exclude = ("w",) if reason == "excluded by name" else ()
    model, report, before = press(QuantizeDynamic(minimum_elements=0, exclude=exclude), two(more))
    assert report.changed == 1
    assert_left(report, reason)
    assert weights_of(model)["w"].dtype == ir.DataType.FLOAT
    assert "w_int8" not in model.graph.initializers
    assert report.details["weights_quantized"] == 1
    feeds = {"x": normal(64, 64)}
    for one_, other in zip(run(before, feeds), run(model, feeds), strict=True):
        assert one_.shape == other.shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_with_nan_or_infinity_stays(bad: float) -> None:
    w = normal(64, 64)
    w[3, 4] = bad
    _, report, _ = press(ALL, two("y = MatMul(h, w)", w))
    assert_left(report, "NaN or infinity")


def test_fp16_weights_stay() -> None:
    model = model_from(
        f"{HEAD} g (float16[b, 64] x, float16[64, 64] w) => (float16[b, 64] y) {{ y = MatMul(x, w) }}",
        {"w": normal(64, 64).astype(np.float16)},
    )
    with pytest.raises(InputError, match="float16, not fp32"):
        run_pass(ALL, model)


def test_a_channel_of_zeros_stays_zero() -> None:
    w = normal(64, 64)
    w[:, 5] = 0
    model, _, before = press(ALL, one("y = MatMul(x, w)", (64, 64), 64, w=w))
    feeds = {"x": normal(4, 64)}
    got = run(model, feeds)[0]
    assert (got[:, 5] == 0).all()
    assert sqnr(run(before, feeds)[0], got) > 25


def test_exclude_takes_patterns_of_nodes_and_weights() -> None:
    model = two("y = MatMul(h, w)")
    for index, node in enumerate(model.graph):
        node.name = f"/encoder/layer.{index}/MatMul"
    _, report, _ = press(QuantizeDynamic(minimum_elements=0, exclude=("*layer.1*",)), model)
    assert reasons(report) == {"/encoder/layer.1/MatMul": "excluded by name"}


def test_small_weights_stay() -> None:
    model = one("h = MatMul(x, w) y = MatMul(h, v)", (64, 96), 2, v=normal(96, 2))
    model, report, _ = press(QuantizeDynamic(), model)
    assert_left(report, "fewer than 4096 elements")
    assert (report.seen, report.changed) == (2, 1)
    assert report.details["elements_quantized_percent"] == pytest.approx(100 * 6144 / (6144 + 192), abs=0.01)


def test_products_of_activations_stay() -> None:
    model = two("t = Transpose(h) s = MatMul(h, t) u = MatMul(s, h) y = MatMul(u, w)")
    _, report, _ = press(ALL, model)
    assert list(reasons(report).values()) == ["both inputs are activations"] * 2
    assert (report.seen, report.changed) == (4, 2)


def test_weights_that_are_no_matrix_and_constants_are_told_apart() -> None:
    model = model_from(
        f"{HEAD} g (float[2, b, 64] x, float[64, 64] w, float[2, 64, 4] z) => (float[2, b, 4] y) {{ h = MatMul(x, w) "
        "c = Constant<value = float[1, 1] {2.0}>() t = Transpose(h) u = Transpose<perm = [2, 1, 0]>(t) "
        "i = MatMul(u, z) y = Mul(i, c) }",
        {"w": normal(64, 64), "z": normal(2, 64, 4)},
    )
    _, report, _ = press(ALL, model)
    assert_left(report, "not a matrix")
    constant = f"""{HEAD} g (float[b, 1] x) => (float[b, 1] y) {{
        c = Constant<value = float[1, 1] {{2.0}}>() y = MatMul(x, c) }}"""
    with pytest.raises(InputError, match="put the clean pass before"):
        run_pass(ALL, model_from(constant))


def test_an_overridable_weight_stays() -> None:
    model = one("y = MatMul(x, w)", (64, 96), 96)
    model.graph.inputs.append(model.graph.initializers["w"])
    with pytest.raises(InputError, match="also an input"):
        run_pass(ALL, model)


def test_operators_can_be_chosen() -> None:
    model, report, _ = press(
        QuantizeDynamic(operators=("Gather",), minimum_elements=0),
        model_from(
            f"{HEAD} g (int64[b] ids, float[50, 64] e, float[64, 64] w) => (float[b, 64] y) "
            "{ h = Gather(e, ids) y = MatMul(h, w) }",
            {"e": normal(50, 64), "w": normal(64, 64)},
        ),
    )
    assert set(weights_of(model)) == {"e_int8", "e_scale", "w"}
    assert_left(report, "MatMul is not among the operators")


def test_a_bias_with_two_axes_is_no_candidate() -> None:
    model = one("y = Gemm(x, w, b)", (64, 96), 96, b=normal(1, 96))
    model, report, _ = press(ALL, model)
    assert (report.seen, report.changed, report.left) == (1, 1, ())
    assert weights_of(model)["b"].dtype == ir.DataType.FLOAT


def test_seven_bits() -> None:
    model, _, before = press(QuantizeDynamic(minimum_elements=0, reduce_range=True), form("matmul"))
    codes = weights_of(model)["w_int8"].numpy()
    assert np.abs(codes.astype(int)).max() == 63
    feeds = {"x": normal(4, 64)}
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def test_the_weights_shrink_to_a_quarter_and_no_fp32_copy_is_left() -> None:
    text = f"""{HEAD} g (int64[b] ids, float[300, 256] e, float[256, 256] w, float[256, 256] v) => (float[b, 300] y) {{
        h = Gather(e, ids) i = MatMul(h, w) t = Transpose<perm = [1, 0]>(v) j = Gemm<transB = 1>(i, v)
        k = MatMul(j, t) f = Transpose<perm = [1, 0]>(e) y = MatMul(k, f) }}"""
    weights = {"e": normal(300, 256), "w": normal(256, 256), "v": normal(256, 256, seed=2)}
    model, report, before = press(QuantizeDynamic(), model_from(text, weights))
    assert report.bytes_after < 0.27 * report.bytes_before
    assert len(to_bytes(model)) < 0.28 * len(before)
    assert all(t.size <= 300 for t in weights_of(model).values() if t.dtype == ir.DataType.FLOAT)
    assert report.details["elements_quantized_percent"] == 100
    feeds = {"ids": np.arange(9)}
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 25


def test_the_bytes_are_the_same_every_time() -> None:
    weights = {"e": normal(200, 64)}
    assert len({to_bytes(press(ALL, model_from(TIED, weights))[0]) for _ in range(2)}) == 1


def test_quantizing_twice_has_nothing_to_do() -> None:
    model, _, _ = press(ALL, form("gemm_bias"))
    with pytest.raises(InputError, match="nothing to do") as caught:
        run_pass(ALL, model)
    assert caught.value.exit_code == 2


def test_an_activation_that_was_quantized_already_is_not_quantized_again() -> None:
    text = f"""{HEAD} g (float[b, 64] x, float[64, 64] w) => (float[b, 64] y, uint8[b, 64] codes) {{
        h = Relu(x) y = MatMul(h, w) codes, s, z = DynamicQuantizeLinear(h) }}"""
    model, _, before = press(ALL, model_from(text, {"w": normal(64, 64)}))
    assert count(model)["DynamicQuantizeLinear"] == 1
    feeds = {"x": normal(3, 64)}
    np.testing.assert_array_equal(run(before, feeds)[1], run(model, feeds)[1])


def test_an_empty_weight_stays() -> None:
    model = one("h = MatMul(x, w) e = MatMul(x, v) y = Concat<axis = 1>(h, e)", (64, 96), 96, v=normal(64, 0))
    _, report, _ = press(ALL, model)
    assert_left(report, "empty")


def test_vetoing_an_action_leaves_that_weight() -> None:
    model = two("y = MatMul(h, w)")
    plan = ALL.plan(model)
    plan.actions = [a for a in plan.actions if a["weight"] != "w"]
    model = ALL.apply(model, plan)
    assert set(weights_of(model)) == {"v_int8", "v_scale", "w"}


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
LARGEST = float(np.finfo(np.float32).max)
SPECIAL = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, LARGEST, -LARGEST, LARGEST / 2, 1e-30, 1.0])
MATRICES = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.one_of(FLOATS, SPECIAL.map(np.float32))
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrix=MATRICES, axis=st.sampled_from([0, 1, None]), bits=st.sampled_from([7, 8]))
def test_rounding_is_within_half_a_step(matrix: Array, axis: int | None, bits: int) -> None:
    codes, scale = quantize_symmetric(matrix, axis=axis, bits=bits)
    top = 2 ** (bits - 1) - 1
    assert codes.dtype == np.int8
    assert codes.shape == matrix.shape
    assert scale.dtype == np.float32
    assert scale.shape == (() if axis is None else (matrix.shape[axis],))
    assert np.abs(codes.astype(int)).max() <= top
    assert (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all()
    steps = scale if axis is None else np.expand_dims(scale, 1 - axis)
    with np.errstate(all="raise", under="ignore"):
        restored = codes.astype(np.float32) * steps  # as a runtime does it: an overflow raises here
    error = np.abs(restored.astype(np.float64) - matrix.astype(np.float64))
    assert (error <= steps.astype(np.float64) * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("axis", [0, 1, None])
def test_rounding_in_blocks_is_rounding_at_once(axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(37, 11)
    whole = quantize_symmetric(w, axis=axis)
    monkeypatch.setattr("onnxpress.pipeline.passes.matrix_weights._BLOCK", 40)
    for one_, other in zip(whole, quantize_symmetric(w, axis=axis), strict=True):
        np.testing.assert_array_equal(one_, other)
