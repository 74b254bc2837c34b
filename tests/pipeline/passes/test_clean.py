# SPDX-License-Identifier: Apache-2.0
"""`clean`: the same numbers from fewer nodes, and nothing of the build machine left in the file."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from pass_tools import count, model_from, normal, press, run, session, to_bytes, weights_of

from onnxpress.pipeline.passes.clean import Clean

HEAD = '<ir_version: 10, opset_import: ["": 20]>'


def same(before: bytes, after: ir.Model, feeds: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    for one, other in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance)


def test_a_transposed_weight_is_folded_and_keeps_its_name() -> None:
    w = normal(3, 4)
    model = model_from(
        f"{HEAD} g (float[batch, 4] x, float[3, 4] w) => (float[batch, 3] y) {{ t = Transpose<perm = [1, 0]>(w) "
        "y = MatMul(x, t) }",
        {"w": w},
    )
    model, report, before = press(Clean(), model)
    assert count(model) == {"MatMul": 1}
    assert list(model.graph.initializers) == ["w.T"]
    np.testing.assert_array_equal(weights_of(model)["w.T"].numpy(), w.T)
    assert report.details["transposes_folded_into_weights"] == 1
    assert report.bytes_after == report.bytes_before
    same(before, model, {"x": normal(2, 4)})


@pytest.mark.parametrize("rows", [5, 600])  # small weights are folded by onnxscript unless it is told not to
def test_a_tied_weight_is_kept_once(rows: int) -> None:
    model = model_from(
        f"{HEAD} g (int64[batch, s] ids, float[{rows}, 4] e) => (float[batch, s, {rows}] y) "
        "{ h = Gather(e, ids) t = Transpose<perm = [1, 0]>(e) y = MatMul(h, t) }",
        {"e": normal(rows, 4)},
    )
    model, report, before = press(Clean(), model)
    assert report.bytes_after == rows * 4 * 4
    assert list(model.graph.initializers) == ["e"]
    assert count(model)["Transpose"] == 1
    same(before, model, {"ids": np.array([[0, 1, 4]])})


@pytest.mark.parametrize("size", [3, 40])  # below and above the size up to which onnxscript merges by itself
def test_equal_weights_are_merged_and_named(size: int) -> None:
    w = normal(size, size)
    model = model_from(
        f"{HEAD} g (float[b, {size}] x, float[{size}, {size}] first, float[{size}, {size}] second, "
        f"float[{size}, {size}] other) => (float[b, {size}] y) "
        "{ h = MatMul(x, first) i = MatMul(h, second) y = MatMul(i, other) }",
        {"first": w, "second": w.copy(), "other": w + 1},
    )
    model, report, before = press(Clean(), model)
    assert report.details["merged_into"] == {"second": "first"}
    assert set(model.graph.initializers) == {"first", "other"}
    assert report.bytes_after == 2 * w.nbytes
    same(before, model, {"x": normal(2, size)}, 1e-4)


def test_equal_transposed_weights_are_merged_then_folded() -> None:
    w = normal(4, 4)
    model = model_from(
        f"{HEAD} g (float[b, 4] x, float[4, 4] u, float[4, 4] v) => (float[b, 4] y) "
        "{ s = Transpose<perm = [1, 0]>(u) t = Transpose<perm = [1, 0]>(v) h = MatMul(x, s) y = MatMul(h, t) }",
        {"u": w, "v": w.copy()},
    )
    model, _, before = press(Clean(), model)
    assert count(model) == {"MatMul": 2}
    assert list(model.graph.initializers) == ["u.T"]
    same(before, model, {"x": normal(2, 4)})


def test_bits_that_compare_equal_but_differ_are_not_merged() -> None:
    model = model_from(
        f"{HEAD} g (float[2] x, float[2] zero, float[2] minus) => (float[2] y, float[2] z) "
        "{ y = Div(x, zero) z = Div(x, minus) }",
        {"zero": np.zeros(2, np.float32), "minus": -np.zeros(2, np.float32)},
    )
    model, report, before = press(Clean(), model)
    assert report.details["merged_into"] == {}
    same(before, model, {"x": np.ones(2, np.float32)})


def test_dead_code_and_constants_go() -> None:
    model = model_from(
        f"{HEAD} g (float[b, 2] x, float[500] unused) => (float[b, 2] y) {{"
        "two = Constant<value_float = 2.0>() three = Constant<value_float = 3.0>() six = Mul(two, three)"
        "dead = Exp(x) deader = Log(dead)"
        "once = Sigmoid(x) twice = Sigmoid(x) same = Identity(once) sum = Add(same, twice) y = Mul(sum, six) }",
        {"unused": normal(500)},
    )
    model, report, before = press(Clean(), model)
    assert count(model) == {"Add": 1, "Mul": 1, "Sigmoid": 1}
    assert [t.numpy().item() for t in weights_of(model).values()] == [6.0]
    assert report.bytes_after == 4
    assert report.details["nodes_removed"] == report.nodes_before - report.nodes_after == 7
    same(before, model, {"x": normal(3, 2)})


def test_stale_shapes_are_dropped_and_symbols_survive() -> None:
    model = model_from(
        f"{HEAD} g (float[batch, sequence, 4] x, float[3, 4] w) => (float[batch, sequence, 3] y) "
        "{ t = Transpose<perm = [1, 0]>(w) h = MatMul(x, t) y = Relu(h) }",
        {"w": normal(3, 4)},
        infer=False,
    )
    hidden = next(n.outputs[0] for n in model.graph if n.op_type == "MatMul")
    hidden.shape, hidden.type = ir.Shape(["batch", "sequence", 4]), ir.TensorType(ir.DataType.FLOAT)  # 4 is wrong
    model, report, _ = press(Clean(), model)
    assert report.details["stale_shapes_dropped"] == 1
    proto = ir.to_proto(model)
    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info
    }
    assert shapes["h"] == ["batch", "sequence", 3]
    ends = [*proto.graph.input, *proto.graph.output]
    assert [[d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in ends] == [
        ["batch", "sequence", 4],
        ["batch", "sequence", 3],
    ]
    session(model)  # checks that declared and inferred shapes agree


def test_nothing_of_the_build_machine_is_left() -> None:
    secret = "/home/somebody/project/model.py"
    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[b, 2] x) => (float[b, 2] y) <float[2] w = {{1, 2}}> {{"
        "c = Constant<value = float[2] {3.0, 4.0}>() h = Add(x, w) y = Mul(h, c) }"
    )
    proto.doc_string = proto.graph.doc_string = proto.producer_version = secret
    proto.producer_name = secret
    for owner in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.input):
        owner.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=f'File "{secret}", line 3')
    for owner in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        owner.doc_string = secret
    proto.graph.node[0].attribute[0].doc_string = secret
    proto.graph.node[0].attribute[0].t.doc_string = secret
    hidden = proto.graph.value_info.add(name="h", doc_string=secret)
    hidden.CopyFrom(onnx.ValueInfoProto(name="h", type=proto.graph.input[0].type, doc_string=secret))
    proto.metadata_props.add(key="names", value="{0: 'cat', 1: 'person/dog'}")
    before = proto.SerializeToString()
    assert before.count(b"somebody") > 15
    model, _, _ = press(Clean(), ir.from_proto(proto))
    after = to_bytes(model)
    assert b"somebody" not in after
    assert b"stack_trace" not in after
    assert model.metadata_props == {"names": "{0: 'cat', 1: 'person/dog'}"}, "what a consumer reads stays"
    assert model.producer_name == "onnxpress"
    same(before, model, {"x": normal(3, 2)})


def test_initializers_that_are_also_inputs_become_constants() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["": 13]> g (float[b, 2] x, float[2, 2] w) => (float[b, 2] y) '
        "<float[2, 2] w = {1, 2, 3, 4}> { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }"
    )
    model, _, before = press(Clean(), ir.from_proto(proto))
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert count(model) == {"MatMul": 1}
    x = normal(2, 2)
    np.testing.assert_allclose(run(model, {"x": x})[0], run(before, {"x": x})[0], rtol=1e-6)


def test_branches_survive() -> None:
    model = model_from(
        f"{HEAD} g (bool c, float[b, 4] x, float[4, 4] w) => (float[b, 4] y, float[b, 4] z) {{"
        "h = Identity(x) z = Relu(h)"
        "y = If (c) <then_branch = a () => (float[b, 4] p) { t = Transpose<perm = [1, 0]>(w) p = MatMul(h, t) },"
        "else_branch = b () => (float[b, 4] q) { i = Identity(h) k = Constant<value_float = 2.0>() q = Mul(i, k) }> }",
        {"w": normal(4, 4)},
    )
    model, _, before = press(Clean(), model)
    assert "Identity" not in count(model)
    assert "Transpose" not in count(model)
    for c in (True, False):
        same(before, model, {"c": np.array(c), "x": normal(2, 4)})


def test_a_branch_that_returns_a_value_from_outside_survives() -> None:
    model = model_from(
        f"{HEAD} g (bool c, float[b] x) => (float[b] y) {{ h = Relu(x)"
        "y = If (c) <then_branch = a () => (float[b] p) { p = Identity(h) },"
        "else_branch = b () => (float[b] q) { q = Neg(h) }> }"
    )
    model, _, before = press(Clean(), model)
    for c in (True, False):
        same(before, model, {"c": np.array(c), "x": normal(5)})


def test_loops_survive() -> None:
    model = model_from(
        f"{HEAD} g (int64 n, float[2] x, float[2, 2] w) => (float[2] y, float[m, 2] all) {{"
        "go = Constant<value = bool {1}>() y, all = Loop (n, go, x) <body = step "
        "(int64 i, bool c, float[2] v) => (bool d, float[2] u, float[2] seen) "
        "{ d = Identity(c) t = Transpose<perm = [1, 0]>(w) m = MatMul(v, t) u = Tanh(m) seen = Identity(u) }> }",
        {"w": normal(2, 2)},
    )
    model, _, before = press(Clean(), model)
    assert "Transpose" not in count(model)
    same(before, model, {"n": np.array(4), "x": normal(2)})


def test_functions_are_inlined() -> None:
    model = model_from(
        '<ir_version: 10, opset_import: ["": 20, "local": 1]>'
        "g (float[b, 2] x) => (float[b, 2] y) { h = local.twice(x) y = local.twice(h) }"
        '<domain: "local", opset_import: ["": 20]> twice (a) => (c) { c = Add(a, a) }'
    )
    model, _, before = press(Clean(), model)
    assert not model.functions
    assert count(model) == {"Add": 2}
    assert set(model.opset_imports) == {""}
    same(before, model, {"x": normal(3, 2)})


def test_random_operators_are_not_made_one() -> None:
    model = model_from(
        f"{HEAD} g (float[64] x) => (float[64] y) {{ a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }}"
    )
    model, _, _ = press(Clean(), model)
    assert count(model)["RandomNormalLike"] == 2


def test_an_output_that_is_a_weight_or_an_input_stays() -> None:
    model = model_from(
        f"{HEAD} g (float[2, 2] x, float[2, 2] w) => (float[2, 2] y, float[2, 2] t, float[2, 2] z) "
        "{ y = MatMul(x, w) t = Transpose<perm = [1, 0]>(w) z = Identity(x) }",
        {"w": normal(2, 2)},
    )
    model, _, before = press(Clean(), model)
    assert [v.name for v in model.graph.outputs] == ["y", "t", "z"]
    same(before, model, {"x": normal(2, 2)})


MANY = f"""{HEAD} g (float[batch, sequence, 4] x, bool c, float[4, 4] w, float[4, 4] v) => (float[batch, sequence, 4] y)
{{  s = Transpose<perm = [1, 0]>(w) t = Transpose<perm = [1, 0]>(v) h = MatMul(x, s) i = MatMul(h, t)
    dims = Shape(i) two = Constant<value_int = 2>() width = Gather(dims, two) axes = Constant<value_ints = [0]>()
    column = Unsqueeze(width, axes) minus = Constant<value_ints = [-1]>() shape = Concat<axis = 0>(minus, column)
    flat = Reshape(i, shape) back = Reshape(flat, dims) j = Relu(back)
    y = If (c)
        <then_branch = a () => (float[batch, sequence, 4] p) {{ k = Constant<value_float = 2.0>() p = Mul(j, k) }},
         else_branch = b () => (float[batch, sequence, 4] q) {{ k = Constant<value_float = 3.0>() q = Mul(j, k) }}> }}
"""


def test_the_bytes_are_the_same_every_time_and_cleaning_twice_changes_nothing() -> None:
    weights = {"w": normal(4, 4), "v": normal(4, 4, seed=1)}
    first, _, before = press(Clean(), model_from(MANY, weights))
    second, _, _ = press(Clean(), model_from(MANY, weights))
    assert to_bytes(first) == to_bytes(second)
    once = to_bytes(first)
    again, report, _ = press(Clean(), ir.from_proto(onnx.ModelProto.FromString(once)))
    assert to_bytes(again) == once
    assert report.details["nodes_removed"] == 0
    for c in (True, False):
        same(before, again, {"x": normal(2, 3, 4), "c": np.array(c)})


def test_a_step_of_a_library_that_breaks_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ir.Model) -> None:
        model.graph.remove(model.graph[-1], safe=False)
        raise RuntimeError("no")

    monkeypatch.setattr("onnxpress.pipeline.passes.clean._fold_constants", broken)
    model = model_from(f"{HEAD} g (float[2] x) => (float[2] y) {{ h = Neg(x) i = Identity(h) y = Relu(i) }}")
    model, report, before = press(Clean(), model)
    assert [(left.node, left.reason) for left in report.left] == [("broken", "RuntimeError: no")]
    assert count(model) == {"Neg": 1, "Relu": 1}
    session(model)
    same(before, model, {"x": normal(2)})
