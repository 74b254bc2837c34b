# SPDX-License-Identifier: Apache-2.0
"""`narrow`: the same outputs from fewer multiply-adds, or the reason why a selection stays where it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_tools import Array, Feeds, count, model_from, normal, press, reasons, run, session, to_bytes

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.cost import multiply_adds, values_to_measure
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.narrow import Narrow
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.statistics import Calibration

HEADS, SIZE, WIDTH, INNER = 2, 4, 8, 32
LOWEST = float(np.finfo(np.float32).min)
SHAPES = [(1, 1), (2, 1), (1, 5), (3, 7)]

PROJECTED = "q{i} = MatMul(h{i}, wq{i}) k{i} = MatMul(h{i}, wk{i}) v{i} = MatMul(h{i}, wv{i})"
HEADED = """
    qs{i} = Reshape(q{i}, split) ks{i} = Reshape(k{i}, split) vs{i} = Reshape(v{i}, split)
    qh{i} = Transpose<perm = [0, 2, 1, 3]>(qs{i}) vh{i} = Transpose<perm = [0, 2, 1, 3]>(vs{i})
"""
MERGED = "ot{i} = Transpose<perm = [0, 2, 1, 3]>(oh{i}) o{i} = Reshape(ot{i}, join)"
FORMS = {
    "decomposed": f"""{HEADED}
        kt{{i}} = Transpose<perm = [0, 2, 3, 1]>(ks{{i}}) m{{i}} = MatMul(qh{{i}}, kt{{i}}) n{{i}} = Mul(m{{i}}, half)
        a{{i}} = Add(n{{i}}, mask) p{{i}} = Softmax<axis = -1>(a{{i}}) oh{{i}} = MatMul(p{{i}}, vh{{i}}) {MERGED}""",
    "multi_head": """
        o{i} = com.microsoft.MultiHeadAttention<num_heads = 2>(q{i}, k{i}, v{i}, bias, "", mask)""",
    "standard": f"""{HEADED} kh{{i}} = Transpose<perm = [0, 2, 1, 3]>(ks{{i}})
        oh{{i}} = Attention(qh{{i}}, kh{{i}}, vh{{i}}, mask) {MERGED}""",
}
PRODUCTS = {"decomposed": 6, "multi_head": 5, "standard": 5}
"""Of the last layer: query, output, two of the network, and the kernel or its two products."""
REST = """
    d{i} = MatMul(o{i}, wo{i}) r{i} = Sum(d{i}, h{i}) l{i} = LayerNormalization(r{i}, scale)
    u{i} = MatMul(l{i}, wu{i}) g{i} = Gelu(u{i}) f{i} = MatMul(g{i}, wd{i}) s{i} = Sum(f{i}, l{i})
    h{j} = LayerNormalization(s{i}, scale)
"""
KEYS, PAIRS = "float[batch, 1, 1, sequence] mask", "float[batch, 1, sequence, sequence] mask"
HEAD = "first = Constant<value = int64 {0}>() y0 = Gather<axis = 1>(h2, first) y1 = MatMul(y0, wp) y = Tanh(y1)"


def encoder(form: str, mask: str = PAIRS, head: str = HEAD, outputs: str = "float[batch, 8] y") -> ir.Model:
    """Two layers in the manner of BERT, and a head that reads one token."""
    layers = [f"{PROJECTED} {FORMS[form]} {REST}".replace("{j}", str(i + 1)).replace("{i}", str(i)) for i in (0, 1)]
    sizes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "u": (WIDTH, INNER), "d": (INNER, WIDTH)}
    shapes = {f"w{name}{i}": size for name, size in sizes.items() for i in (0, 1)} | {"wp": (8, 8), "bias": (24,)}
    weights = {name: normal(*size, seed=n, scale=0.5) for n, (name, size) in enumerate(shapes.items())}
    weights["scale"] = np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)
    declared = ", ".join(f"float[{', '.join(map(str, a.shape))}] {name}" for name, a in weights.items())
    text = f"""<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>
        g (float[batch, sequence, 8] h0, {mask}, {declared}) => ({outputs}) {{
        split = Constant<value = int64[4] {{0, 0, 2, 4}}>() join = Constant<value = int64[3] {{0, 0, 8}}>()
        half = Constant<value_float = 0.5>() {" ".join(layers)} {head} }}"""
    return press(Clean(), model_from(text, weights))[0]


def feeds_for(model: ir.Model | bytes, batch: int, length: int) -> Feeds:
    """Random tokens, of which row i has i masked ones behind."""
    feeds = {"h0": normal(batch, length, WIDTH, seed=length)}
    for value in session(model).get_inputs():
        if value.name == "mask":
            mask = np.zeros((batch, 1, 1 if value.shape[2] == 1 else length, length), np.float32)
            for row in range(batch):
                mask[row, ..., max(1, length - row) :] = LOWEST
            feeds["mask"] = mask
    return feeds


def assert_same(before: bytes, model: ir.Model) -> None:
    for batch, length in SHAPES:
        feeds = feeds_for(before, batch, length)
        for expected, got in zip(run(before, feeds), run(model, feeds), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
            assert got.dtype == expected.dtype


def cost(model: ir.Model, feeds: Feeds) -> int:
    """Multiply-adds of all products in front of and behind the attention kernels."""
    shapes = Calibration([feeds], threads=1).shapes(model, values_to_measure(model))
    return sum(multiply_adds(model, shapes).values())


@pytest.mark.parametrize(
    ("form", "mask"),
    [("decomposed", KEYS), ("decomposed", PAIRS), ("multi_head", PAIRS), ("standard", PAIRS)],
    ids=["decomposed", "decomposed with a mask of pairs", "multi_head", "standard"],
)
def test_the_last_layer_is_computed_for_one_token(form: str, mask: str) -> None:
    model, report, before = press(Narrow(), encoder(form, mask))
    assert_same(before, model)
    assert (report.seen, report.changed, report.left) == (1, 1, ())
    assert report.details["products_narrowed"] == PRODUCTS[form]
    batch, length = 3, 7
    feeds = feeds_for(before, batch, length)
    within = 2 * WIDTH * length if form == "decomposed" else 0  # scores and weighted values of one token
    token = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER + within
    kept = 2 * WIDTH * WIDTH  # keys and values
    head = batch * WIDTH * WIDTH
    assert cost(ir.from_proto(ir.to_proto(encoder(form, mask))), feeds) == 2 * batch * length * token + head
    assert cost(model, feeds) == batch * (length * token + length * kept + token - kept) + head


@pytest.mark.parametrize("form", FORMS)
def test_one_layer_less_where_all_tokens_are_read(form: str) -> None:
    """The first layer is read as a whole: by keys and values of the second."""
    model, report, _ = press(Narrow(), encoder(form))
    assert "MatMul reads all positions" in report.details["stopped_by"]
    names = {str(value.name) for node in model.graph for value in node.outputs}
    assert {"h2_narrow", "l1_narrow", "q1_narrow", "h1", "k1", "v1"} <= names
    assert not {"h2", "l1", "q1", "k1_narrow", "v1_narrow", "l0_narrow"} & names


@pytest.mark.parametrize("mask", [KEYS, PAIRS], ids=["keys", "pairs"])
def test_after_fuse_and_before_quantizing(mask: str) -> None:
    fused, report, before = press(Fuse(), encoder("decomposed", mask))
    assert report.details["attention"] == 2
    model, report, _ = press(Narrow(), fused)
    assert report.details["products_narrowed"] == 5
    assert_same(before, model)
    model, report, _ = press(QuantizeDynamic(minimum_elements=0), model)
    assert count(model)["MatMulInteger"] == report.changed == 13
    feeds = feeds_for(before, 3, 7)
    np.testing.assert_allclose(run(model, feeds)[0], run(before, feeds)[0], atol=0.2)


SELECTIONS = {
    "last": "i = Constant<value = int64 {-1}>() y = Gather<axis = 1>(h2, i)",
    "sliced": "a = Constant<value_ints = [0]>() e = Constant<value_ints = [1]>() "
    "x = Constant<value_ints = [1]>() y = Slice(h2, a, e, x)",
    "two from the end": "a = Constant<value_ints = [-2]>() e = Constant<value_ints = [9223372036854775807]>() "
    "x = Constant<value_ints = [-2]>() y = Slice(h2, a, e, x)",
    "listed": "i = Constant<value_ints = [0, 0]>() y = Gather<axis = -2>(h2, i)",
    "used": "i = Constant<value_ints = [-1]>() y0 = Gather<axis = 1>(h2, i) y = Relu(y0)",
    "twice": "i = Constant<value = int64 {0}>() y0 = Gather<axis = 1>(h2, i) a = Constant<value_ints = [0]>() "
    "e = Constant<value_ints = [1]>() x = Constant<value_ints = [1]>() y1 = Slice(h2, a, e, x) "
    "y2 = Squeeze(y1, x) y = Add(y0, y2)",
    "axis 0": "i = Constant<value = int64 {0}>() y = Gather<axis = 0>(h2, i)",
}


def test_a_file_that_onnx_runtime_has_fused_for_queries_keys_and_values_at_once() -> None:
    """One product makes all three, which stays; what stands behind the attention does not."""
    text = """<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
        g (float[batch, sequence, 8] h0, float[8, 24] wa, float[24] ba, float[8, 8] wo, float[8] t)
        => (float[batch, 8] y) { a = com.microsoft.Attention<num_heads = 2>(h0, wa, ba) d = MatMul(a, wo)
        n = com.microsoft.SkipLayerNormalization(d, h0, t, t) i = Constant<value = int64 {0}>()
        y = Gather<axis = 1>(n, i) }"""
    weights = {"wa": normal(8, 24), "ba": normal(24), "wo": normal(8, 8), "t": normal(8)}
    fused, _, before = press(Fuse(), press(Clean(), model_from(text, weights))[0])
    model, report, _ = press(Narrow(), fused)
    assert report.details["products_narrowed"] == 2
    assert set(report.details["stopped_by"]) == {"an input of the graph", "MultiHeadAttention reads all positions"}
    assert_same(before, model)


@pytest.mark.parametrize("case", SELECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_other_ways_to_select(form: str, case: str) -> None:
    rank = 2 if case in ("last", "twice", "axis 0") else 3
    made = encoder(form, head=SELECTIONS[case], outputs=f"float[{', '.join('abc'[:rank])}] y")
    feeds = feeds_for(made, 3, 7)
    work = cost(made, feeds)
    model, report, before = press(Narrow(), made)
    assert report.changed == (2 if case == "twice" else 1)
    # The kernels of attention are not passed along the batch
    whole = case == "axis 0" and form != "decomposed"
    assert report.details["products_narrowed"] == (3 if whole else 16 if case == "axis 0" else PRODUCTS[form])
    assert cost(model, feeds) < work
    for batch, length in [shape for shape in SHAPES if case != "two from the end" or shape[1] > 1]:
        feeds = feeds_for(before, batch, length)
        np.testing.assert_allclose(run(model, feeds)[0], run(before, feeds)[0], rtol=1e-4, atol=1e-5)
    assert [output.name for output in model.graph.outputs] == ["y"]


def test_what_others_return_is_not_touched() -> None:
    made = encoder("multi_head", outputs="float[batch, 8] y, float[batch, sequence, 8] h2")
    before = to_bytes(made)
    with pytest.raises(InputError, match=r"nothing to do on this model .* the graph returns what is selected from"):
        press(Narrow(), made)
    model, report, _ = press(Narrow(optional=True), made)
    assert report.changed == 0
    assert to_bytes(model) == before


def test_the_bytes_are_the_same_every_time() -> None:
    assert len({to_bytes(press(Narrow(), encoder("decomposed"))[0]) for _ in range(2)}) == 1


# ------------------------------------------------------------------------------------------------------ what may stay

ONE = "i = Constant<value = int64 {0}>() a = Constant<value_ints = [1]>() e = Constant<value_ints = [-1]>()"
FIRST = f"{ONE} y = Gather<axis = 1>"
STAYS = {
    "all tokens": ("y = MatMul(m, w)", "nothing selects positions"),
    "mixed": (f"s = Softmax<axis = 1>(m) {FIRST}(s, i)", "Softmax mixes the positions"),
    "columns": (f"{ONE} y = Gather<axis = 2>(m, i)", "from the columns of its right factor"),
    "read elsewhere": (f"{FIRST}(m, i) z = Relu(m)", "Relu reads all positions"),
    "size read": (f"{FIRST}(m, i) s = Shape(m) z = Cast<to = 1>(s)", "Shape reads all positions"),
    "two choices": (f"{FIRST}(m, i) z = Gather<axis = 1>(m, a)", "different positions are read"),
    "an input": (f"{FIRST}(x, i)", "an input of the graph"),
    "no product": (f"r = Relu(x) {FIRST}(r, i)", "an input of the graph"),
    "all of it": (f"{ONE} r = ReduceMean(m, a) y = Gather<axis = 1>(r, i)", "takes every position"),
    "joined": (f"c = Concat<axis = 1>(m, m) {FIRST}(c, i)", "Concat joins inputs along the axis"),
    "unknown": (f"{ONE} c = CumSum(m, i) y = Gather<axis = 1>(c, i)", "CumSum may mix positions"),
    "computed": ("c = ArgMax<axis = 0>(n) y = Gather<axis = 1>(m, c)", "its positions are computed"),
    "open": (f"{ONE} y = Slice(m, a, e, a)", "depends on the size of the axis"),
    "open behind": (f"{FIRST}(s, i) s = Slice(m, a, e, a)", "Slice may cut along the axis"),
    "in steps": (f"{ONE} y = Slice(m, a, e, a, a2) a2 = Constant<value_ints = [2]>()", "slices in steps"),
    "a table": ("t = Constant<value = int64[1, 1] {0}>() y = Gather<axis = 1>(m, t)", "no list"),
    "cut": ("cut = Constant<value_ints = [-1, 8]>() r = Reshape(m, cut) i = Constant<value = int64 {0}>() "
            "y = Gather<axis = 0>(r, i)", "Reshape joins or cuts the axis"),
    "causal": (f"c = com.microsoft.MultiHeadAttention<num_heads = 2, unidirectional = 1>(m, m, m) {FIRST}(c, i)",
               "causal"),
    "causal standard": (f"c = Attention<is_causal = 1, q_num_heads = 2, kv_num_heads = 2>(m, m, m) {FIRST}(c, i)",
                        "causal"),
}  # fmt: skip


def small(body: str) -> ir.Model:
    """A product, and what is done with it."""
    returned = "float[a, b] y" + (", float[c, d, e] z" if " z =" in body else "")
    text = f"""<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>
        g (float[batch, sequence, 8] x, float[5] n, float[8, 8] w) => ({returned}) {{ m = MatMul(x, w) {body} }}"""
    model = model_from(text, {"w": normal(8, 8)})
    model.graph.sort()
    return model


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_says_why(case: str) -> None:
    body, reason = STAYS[case]
    model = small(body)
    before = to_bytes(model)
    plan = Narrow().plan(model)
    assert to_bytes(model) == before
    assert not plan.actions
    assert any(reason in left.reason for left in plan.left), plan.left
    with pytest.raises(InputError, match="nothing to do"):
        press(Narrow(), model)


def test_a_size_of_another_axis_may_be_read() -> None:
    sizes = "s = Shape<start = 0, end = 1>(m) t = Shape(m) r = Constant<value_ints = [-1]>() u = Gather(t, r)"
    model = small(f"{FIRST}(m, i) {sizes} v = Concat<axis = 0>(s, u) z = Cast<to = 1>(v)")
    _, report, _ = press(Narrow(), model)
    assert report.details["products_narrowed"] == 1


# ------------------------------------------------------------------------------------------------------------ the law

OPERATORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "add": ("y = Add(m, t)", (2, 2, 3, 4)),
    "where": ("b = Less(m, t) y = Where(b, t, m)", (2, 2, 3, 4)),
    "norm": ("y = LayerNormalization<axis = -2>(m, t)", (2, 2, 3, 4)),
    "softmax": ("y = Softmax<axis = 1>(m)", (2, 2, 3, 4)),
    "transpose": ("y = Transpose<perm = [3, 1, 0, 2]>(m)", (4, 2, 2, 3)),
    "mean": ("a = Constant<value_ints = [1]>() y = ReduceMean<keepdims = 0>(m, a)", (2, 3, 4)),
    "kept mean": ("a = Constant<value_ints = [-2]>() y = ReduceMean(m, a)", (2, 2, 1, 4)),
    "unsqueeze": ("a = Constant<value_ints = [1, -1]>() y = Unsqueeze(m, a)", (2, 1, 2, 3, 4, 1)),
    "squeeze": ("a = Constant<value_ints = [3]>() b = Unsqueeze(m, a) y = Squeeze(b, a)", (2, 2, 3, 4)),
    "concat": ("y = Concat<axis = 2>(m, m)", (2, 2, 6, 4)),
    "split": ("y, z = Split<axis = 1, num_outputs = 2>(m)", (2, 1, 3, 4)),
    "slice": ("a = Constant<value_ints = [1]>() b = Constant<value_ints = [3]>() y = Slice(m, a, b, b)", (2, 2, 3, 2)),
    "gather": ("a = Constant<value = int64[2, 2] {1, 0, 0, 1}>() y = Gather<axis = 1>(m, a)", (2, 2, 2, 3, 4)),
    "embed": ("a = ArgMax<axis = 3, keepdims = 0>(m) y = Gather(v, a)", (2, 2, 3, 4)),
    "product": ("a = Transpose<perm = [0, 1, 3, 2]>(m) y = MatMul(m, a)", (2, 2, 3, 3)),
    "broadcast product": ("y = MatMul(m, v)", (2, 2, 3, 4)),
    "flatten": ("y = Flatten(m)", (2, 24)),
    "merge": ("a = Constant<value_ints = [0, -1, 4]>() y = Reshape(m, a)", (2, 6, 4)),
    "merge front": ("a = Constant<value_ints = [-1, 3, 4]>() y = Reshape(m, a)", (4, 3, 4)),
    "swap sizes": ("a = Constant<value_ints = [2, 2, 4, 3]>() y = Reshape(m, a)", (2, 2, 4, 3)),
    "cut": ("a = Constant<value_ints = [2, 2, 3, 2, -1]>() y = Reshape(m, a)", (2, 2, 3, 2, 2)),
    "computed": ("a = Shape(x) b = Identity(a) y = Reshape(m, b)", (2, 2, 3, 4)),
    "all": ("a = Constant<value_ints = [-1]>() y = Reshape(m, a)", (48,)),
}
"""What is done with m [2, 2, 3, 4], t [3, 4] and v [4, 4], and the shape that it has then."""
PASSING = {
    "add": (0, 1, 2), "where": (0, 1, 2), "norm": (0, 1), "softmax": (0, 2), "transpose": (1, 2, 3),
    "mean": (0, 1), "unsqueeze": (0, 2, 3), "squeeze": (0, 1, 2), "concat": (0, 1), "split": (0, 2),
    "slice": (0, 1, 2), "gather": (0, 3), "broadcast product": (0, 1, 2), "flatten": (0,), "merge": (0,),
    "merge front": (1,), "swap sizes": (0, 1), "cut": (0, 1, 2), "product": (0, 1, 2), "kept mean": (0, 1),
}  # fmt: skip
"""Axes along which a selection must get through to the product that makes m."""


def selecting(name: str, axis: int, indices: Array, symbolic: bool) -> ir.Model:
    body, shape = OPERATORS[name]
    sizes = "first, second, third, 4" if symbolic else "2, 2, 3, 4"
    result = ", ".join(f"r{n}" for n in range(len(shape) - 1 + indices.ndim))
    places = f"int64[{len(indices)}] i" if indices.ndim else "int64 i"
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[{sizes}] x, float[3, 4] t, float[4, 4] w, float[4, 4] v, {places})
        => (float[{result}] r) {{ m = MatMul(x, w) {body} s = Gather<axis = {axis}>(y, i) r = Relu(s) }}"""
    weights = {"t": normal(3, 4), "w": normal(4, 4), "v": normal(4, 4, seed=2), "i": indices}
    return model_from(text, weights)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(OPERATORS)), st.booleans(), st.data())
def test_selecting_first_is_selecting_last(name: str, symbolic: bool, data: st.DataObject) -> None:
    """f(m)[selection] = f(m[selection]), or the selection stays."""
    shape = OPERATORS[name][1]
    axis = data.draw(st.integers(0, len(shape) - 1))
    places = data.draw(st.lists(st.integers(-shape[axis], shape[axis] - 1), min_size=1, max_size=2))
    single = len(places) == 1 and data.draw(st.booleans())
    made = selecting(name, axis, np.asarray(places[0] if single else places, np.int64), symbolic)
    feeds = {"x": normal(2, 2, 3, 4, seed=1)}
    model, _, before = press(Narrow(optional=True), made)
    np.testing.assert_allclose(run(model, feeds)[0], run(before, feeds)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PASSING)
def test_every_axis_that_survives_is_found(name: str) -> None:
    for axis in range(len(OPERATORS[name][1])):
        _, report, _ = press(Narrow(optional=True), selecting(name, axis, np.asarray(0, np.int64), symbolic=False))
        assert report.changed == (axis in PASSING[name]), (axis, reasons(report))
