# SPDX-License-Identifier: Apache-2.0
"""`cast` with `mixed` and `keep`: fp32 where values overflow or lose their accuracy, 16 bits everywhere else.

Figures come from ONNX's reference evaluator, which computes each operator in fp16; ONNX Runtime on a CPU takes whole
chains of fp16 operators to fp32, and hides what is looked for here.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from pass_tools import Array, Feeds, count, model_from, normal, reasons, run, sqnr, to_bytes, weights_of

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import read, signature_of
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.low_precision import Precision, held_by_kind, round_to
from onnxpress.pipeline.passes.mixed_precision import _Bisection, _Noise, bring_in, rounding_points, simulate
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.statistics import Calibration

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
MIXED = CastPass(mixed=True)
W = {"w": normal(64, 64, scale=0.1), "v": normal(64, 64, seed=3, scale=0.1)}
X = {"x": normal(16, 64, seed=1)}

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[4] / "shared" / "assets"))
FILES = sorted(ASSETS.rglob("*.onnx")) if ASSETS.is_dir() else []
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"no .onnx files under {ASSETS}"))


def net(text: str, **weights: Array | float) -> ir.Model:
    """y [b, 64] from x [b, 64] and two matrices w, v; further weights by name."""
    arrays = W | {name: np.asarray(value, np.float32) for name, value in weights.items()}
    declared = "".join(f", float[{','.join(map(str, a.shape))}] {n}" for n, a in arrays.items())
    declared = declared.replace("float[]", "float")
    return model_from(f"{HEAD} g (float[b, 64] x{declared}) => (float[b, 64] y) {{ {text} }}", arrays)


def calibration(*batches: Feeds) -> Calibration:
    return Calibration(batches or [X], threads=1)


def press(cast: CastPass, model: ir.Model, data: Calibration | None = None) -> tuple[ir.Model, PassReport, bytes]:
    before = to_bytes(model)
    model, report = run_pass(cast, model, data or calibration())
    low = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    casts = [
        n for n in model.graph.all_nodes() if n.op_type == "Cast" and {n.inputs[0].dtype, n.outputs[0].dtype} & {*low}
    ]
    assert not [n for n in casts if n.inputs[0] and n.inputs[0].producer() in casts], "a pair of casts"
    return model, report, before


def in_fp16(model: ir.Model | bytes, feeds: Feeds) -> Array:
    """The first output, each operator computed in the type that its inputs have."""
    data = model if isinstance(model, bytes) else to_bytes(model)
    with np.errstate(all="ignore"):
        result: Array = ReferenceEvaluator(onnx.ModelProto.FromString(data)).run(None, dict(feeds))[0]
    return result


def kept(report: PassReport) -> set[str]:
    return {left.node for left in report.left if not left.reason.startswith("read by")}


OVERFLOW = "a = MatMul(x, w) h = Mul(a, k) i = Div(h, k2) y = MatMul(i, v)"


def test_a_layer_that_overflows_stays_fp32_and_nothing_else() -> None:
    model = net(OVERFLOW, k=3e4, k2=3e4)
    plain, _, _ = press(CastPass(), net(OVERFLOW, k=3e4, k2=3e4))
    assert not np.isfinite(in_fp16(plain, X)).all()
    model, report, before = press(MIXED, model)
    assert kept(report) == {"h", "i"}
    peak = np.abs(X["x"] @ W["w"]).max() * 3e4
    assert reasons(report)["h"] == f"writes 'h', which reaches {peak:.4g} (float16 ends at 65504, headroom 2)"
    assert reasons(report)["i"].startswith("reads 'h', which reaches")
    assert report.details["worst_sqnr_db_before"] is None
    assert report.details["worst_sqnr_db_after"] > 60
    assert (report.details["nodes_kept_fp32"], report.details["weights_cast"]) == (2, 2)
    assert report.details["casts_inserted"] == count(model)["Cast"] == 4
    assert report.bytes_after < 0.51 * report.bytes_before
    expected = run(before, X)[0]
    for got in (in_fp16(model, X), run(model, X)[0]):
        assert sqnr(expected, got) > 55


@pytest.mark.parametrize(("headroom", "nodes"), [(1.0, set()), (2.0, {"h", "i"})])
def test_headroom(headroom: float, nodes: set[str]) -> None:
    """Values up to 4e4 fit, and up to twice that do not."""
    factor = float(4e4 / np.abs(X["x"] @ W["w"]).max())
    _, report, _ = press(CastPass(mixed=True, headroom=headroom), net(OVERFLOW, k=factor, k2=factor))
    assert kept(report) == nodes


def test_a_sum_that_loses_its_small_part_is_found_by_the_error_of_the_output() -> None:
    text = "a = MatMul(x, w) h = Add(a, k) t = Concat<axis = 0>(h) i = Sub(t, k) y = MatMul(i, v)"
    plain, _, before = press(CastPass(), net(text, k=4096))
    expected = run(before, X)[0]
    assert sqnr(expected, in_fp16(plain, X)) < 10
    model, report, _ = press(MIXED, net(text, k=4096))
    assert kept(report) == {"h", "t", "i"}
    assert "rounding 'h' alone leaves an output at" in reasons(report)["h"]
    assert report.details["worst_sqnr_db_before"] < 10
    assert report.details["worst_sqnr_db_after"] > 40
    assert sqnr(expected, in_fp16(model, X)) > 40
    assert report.bytes_after < 0.51 * report.bytes_before


def test_a_weight_whose_rounding_costs_too_much_stays_fp32() -> None:
    """x w - x w', where w' differs from w by less than fp16 can say."""
    near = W["w"] * np.float32(1 + 2**-13)
    text = "a = MatMul(x, w) c = MatMul(x, near) d = Sub(c, a) y = MatMul(d, v)"
    model, report, before = press(MIXED, net(text, near=near))
    assert kept(report) == {"a", "c", "d"}
    types = {name: tensor.dtype for name, tensor in weights_of(model).items()}
    assert types["v"] == ir.DataType.FLOAT16
    assert types["w"] == types["near"] == ir.DataType.FLOAT
    assert sqnr(run(before, X)[0], in_fp16(model, X)) > 40


def test_a_model_that_holds_in_fp16_is_cast_throughout() -> None:
    text = "a = MatMul(x, w) b0 = Gelu(a) y = MatMul(b0, v)"
    model, report, _ = press(MIXED, net(text))
    plain, _, _ = press(CastPass(), net(text))
    assert to_bytes(model) == to_bytes(plain)
    assert report.details["nodes_kept_fp32"] == 0
    assert report.details["worst_sqnr_db_before"] == report.details["worst_sqnr_db_after"] > 60


@pytest.mark.parametrize("lowest", [-3.4028234e38, -1e9, -65504.0])
def test_a_mask_stands_for_infinity_and_keeps_nothing_in_fp32(lowest: float) -> None:
    text = f"""{HEAD} g (float[b, 64] x, int64[b, 64] mask, float[64, 64] w, float[64, 64] v, float one, float lowest)
        => (float[b, 64] y) {{ h = MatMul(x, w) keep = Cast<to = 1>(mask) off = Sub(one, keep) bias = Mul(off, lowest)
        a = Add(h, bias) p = Softmax(a) y = MatMul(p, v) }}"""
    weights = W | {"one": np.float32(1), "lowest": np.float32(lowest)}
    mask = np.ones((16, 64), np.int64)
    mask[:, 40:] = 0
    feeds = X | {"mask": mask}
    model, report, before = press(MIXED, model_from(text, weights), calibration(feeds))
    assert kept(report) == set()
    assert report.details["brought_in"] == ["lowest"]
    assert weights_of(model)["lowest"].numpy() == np.float16(-65504 / 4)
    assert sqnr(run(before, feeds)[0], in_fp16(model, feeds)) > 50
    nothing = X | {"mask": np.zeros_like(mask)}
    assert np.isfinite(in_fp16(model, nothing)).all(), "no room left beside the mask"


def test_a_factor_beyond_fp16_is_no_mask() -> None:
    text = "a = MatMul(x, w) s = Mul(a, tiny) h = Mul(s, k) y = MatMul(h, v)"
    model, report, before = press(MIXED, net(text, tiny=1e-3, k=1e5))
    assert reasons(report)["h"].startswith("reads the weight 'k', which reaches 1e+05 (float16 ends at 65504")
    assert weights_of(model)["k"].numpy() == np.float32(1e5)
    assert sqnr(run(before, X)[0], in_fp16(model, X)) > 50


def test_the_ends_of_a_range_may_be_those_of_fp16() -> None:
    text = "a = MatMul(x, w) c = Clip(a, low, high) y = MatMul(c, v)"
    _, report, _ = press(MIXED, net(text, low=-3.4e38, high=3.4e38))
    assert "brought_in" not in report.details
    assert kept(report) == set()


def test_an_input_that_does_not_fit() -> None:
    feeds = {"x": X["x"] * np.float32(1e5)}
    text = "a = Mul(x, s) b0 = MatMul(a, w) y = MatMul(b0, v)"
    model, report, before = press(MIXED, net(text, s=1e-5), calibration(feeds))
    assert kept(report) == {"a"}
    assert reasons(report)["a"].startswith("reads 'x', which reaches")
    assert sqnr(run(before, feeds)[0], in_fp16(model, feeds)) > 50


def test_what_is_inside_a_subgraph_is_not_measured() -> None:
    text = f"""{HEAD} g (float[b, 64] x, bool c, float[64, 64] w, float[64, 64] v) => (float[b, 64] y) {{
        a = MatMul(x, w)
        h = If (c) <then_branch = f () => (float[b, 64] p) {{ k = Constant<value_float = 1e5>() i = Mul(a, k)
                    p = Div(i, k) }}, else_branch = d () => (float[b, 64] q) {{ q = Identity(a) }}>
        y = MatMul(h, v) }}"""
    feeds = [X | {"c": np.array(c)} for c in (True, False)]
    model, report, before = press(MIXED, model_from(text, W), calibration(*feeds))
    assert reasons(report)["h"] == "what is inside its subgraphs cannot be measured"
    assert report.details["weights_cast"] == 2
    for one in feeds:
        assert sqnr(run(before, one)[0], run(model, one)[0]) > 50


def test_a_loop_that_stays_fp32() -> None:
    text = f"""{HEAD}
        g (float[b, 64] x, int64 n, float[64, 64] w, float[64, 64] v, int64[1] zero) => (float[b, 64] y) {{
        a = MatMul(x, w) go = Constant<value = bool {{1}}>()
        h, all = Loop (n, go, a) <body =
            step (int64 i, bool e, float[b, 64] s) => (bool o, float[b, 64] u, float[b, 64] t)
            {{ o = Identity(e) r = Add(s, a) u = Tanh(r) t = Identity(a) }}>
        z = ReduceSum<keepdims = 0>(all, zero) q = Add(h, z) y = MatMul(q, v) }}"""
    feeds = X | {"n": np.array(3)}
    model = model_from(text, W | {"zero": np.zeros(1, np.int64)})
    model, report, before = press(MIXED, model, calibration(feeds))
    assert kept(report) == {"h"}
    assert report.details["weights_cast"] == 2
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 50


def test_nan_on_the_data_names_the_node() -> None:
    with pytest.raises(InputError, match=r"'a' \(made by .*\) is NaN on calibration batch 1"):
        press(MIXED, net("a = Sqrt(x) y = MatMul(a, w)"))


def test_infinity_in_the_model_itself_is_not_held_against_it() -> None:
    text = "a = MatMul(x, w) m = Greater(a, zero) b0 = Where(m, a, lowest) p = Softmax(b0) y = MatMul(p, v)"
    _, report, _ = press(MIXED, net(text, zero=0.0, lowest=-np.inf))
    assert kept(report) == set()


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("a = MatMul(x, w) y = MatMul(a, v)", {"minimum_sqnr_db": 120.0}, "finds no weight that could be float16"),
        ("a = MatMul(x, w) y = MatMul(a, v)", {"minimum_sqnr_db": 120.0, "to": "bfloat16"}, "rounding .* alone leaves"),
        ("a = MatMul(x, w) y = MatMul(a, v)", {"keep": ("mat",)}, "no node is named like keep 'mat'"),
    ],
)
def test_what_cannot_be_met_is_said(text: str, changes: dict[str, object], message: str) -> None:
    cast = CastPass.model_validate({"mixed": True, **changes})
    with pytest.raises(InputError, match=message) as caught:
        press(cast, net(text))
    assert caught.value.next_step


def test_a_model_that_returns_no_floating_point_numbers() -> None:
    text = (
        f"{HEAD} g (float[b, 64] x, float[64, 64] w) => (int64[b, 1] y) {{ a = MatMul(x, w) y = ArgMax<axis = 1>(a) }}"
    )
    with pytest.raises(InputError, match="returns no floating point numbers"):
        press(MIXED, model_from(text, {"w": W["w"]}))


def test_mixed_asks_for_calibration_data() -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        run_pass(MIXED, net("y = MatMul(x, w)"))
    with pytest.raises(ValueError, match="computes in fp32 throughout"):
        CastPass(mixed=True, storage_only=True)


def test_a_model_in_fp16_has_nothing_to_do() -> None:
    model, _, _ = press(CastPass(), net("a = MatMul(x, w) y = MatMul(a, v)"))
    text = f"{HEAD} g (float16[b, 64] x) => (float16[b, 64] y) {{ y = Relu(x) }}"
    for each, feeds in ((model, X), (model_from(text), {"x": X["x"].astype(np.float16)})):
        with pytest.raises(InputError, match="nothing to do"):
            press(MIXED, each, calibration(feeds))


def test_a_model_whose_operators_do_not_take_bf16_says_so() -> None:
    text = f"{HEAD} g (float[1, 2, 8] x, float[4, 2, 3] w) => (float[1, 4, 6] y) {{ y = Conv(x, w) }}"
    with pytest.raises(InputError, match=r"nothing to do .* Conv takes bfloat16 from opset 22 on"):
        press(CastPass(mixed=True, to="bfloat16"), model_from(text, {"w": normal(4, 2, 3)}))


def test_planning_changes_nothing_and_is_the_same_every_time() -> None:
    model = net(OVERFLOW, k=1e5, k2=3.4e38)
    before = to_bytes(model)
    plans = [MIXED.plan(model, calibration()) for _ in range(2)]
    assert to_bytes(model) == before
    assert plans[0] == plans[1]


def test_nodes_kept_by_name_are_not_torn_apart_by_casts() -> None:
    text = """a = MatMul(x, w) h = Softmax(a) t = Neg(h) u = Reshape(t, s) i = LayerNormalization(u, g) e = Add(i, a)
        y = MatMul(e, v)"""
    text = f"s = Constant<value_ints = [-1, 64]>() {text}"
    model, report, before = press(CastPass(keep=("h", "i")), net(text, g=np.ones(64)))
    assert {n: r.split(" (")[0] for n, r in reasons(report).items() if "read by" not in r} == {
        "h": "kept by name",
        "t": "saves casts between nodes that stay fp32",
        "u": "saves casts between nodes that stay fp32",
        "i": "kept by name",
    }
    assert count(model)["Cast"] == 4
    assert weights_of(model)["g"].dtype == ir.DataType.FLOAT
    assert sqnr(run(before, X)[0], in_fp16(model, X)) > 50


def test_keep_by_the_name_of_a_weight() -> None:
    model, report, _ = press(CastPass(keep=("v",)), net("a = MatMul(x, w) y = MatMul(a, v)"))
    assert weights_of(model)["v"].dtype == ir.DataType.FLOAT
    assert kept(report) == {"y"}


def test_a_guard_that_others_need_in_fp32_stays_a_guard() -> None:
    text = "a = MatMul(x, w) z = Sub(a, a) m = Max(z, e) r = Div(z, m) h = Add(x, e) i = Add(h, r) y = MatMul(i, v)"
    model, report, before = press(CastPass(keep=("h",)), net(text, e=1e-12))
    assert report.details["raised_to_smallest"] == 1
    assert np.isfinite(in_fp16(model, X)).all()
    assert sqnr(run(before, X)[0], in_fp16(model, X)) > 50


def test_after_int8_quantization() -> None:
    text = "a = MatMul(x, w) h = Mul(a, k) i = Div(h, k2) y = MatMul(i, v)"
    model, _ = run_pass(QuantizeDynamic(minimum_elements=100, exclude=("v",)), net(text, k=3e4, k2=3e4))
    model, report, before = press(CastPass(mixed=True, minimum_sqnr_db=30.0), model)
    assert report.details["nodes_kept_fp32"] == 2
    assert weights_of(model)["v"].dtype == ir.DataType.FLOAT16
    assert sqnr(run(before, X)[0], run(model, X)[0]) > 30


def test_the_simulation_is_what_an_operator_in_fp16_computes() -> None:
    text = "a = Mul(x, k) h = Gelu(a) i = Sub(h, x) p = Softmax(i) y = Sqrt(p)"
    model = net(text, k=normal(64, seed=5))
    held = held_by_kind(model, "float16")
    points = rounding_points(model, held)
    assert points == ["x", "k", "a", "h", "i", "p", "y"]
    expected = run(to_bytes(model), X)[0]
    simulated = run(simulate(model, held, "float16", points), X)[0]
    gated = simulate(model, held, "float16", points, gated=True)
    for gates, answer in ((np.ones(7, bool), simulated), (np.zeros(7, bool), expected)):
        np.testing.assert_allclose(run(gated, X | {"onnxpress_rounded": gates})[0], answer, rtol=1e-6)
    plain, _, _ = press(CastPass(), model)
    # The evaluator also rounds between the steps of Gelu and Softmax
    assert sqnr(expected, simulated) == pytest.approx(sqnr(expected, in_fp16(plain, X)), abs=6)
    assert sqnr(simulated, run(plain, X)[0]) < 90, "this is why the simulation is there"


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_rounding_one_value_alone(to: Precision) -> None:
    model = net("a = Mul(x, k) y = Exp(a)", k=normal(64, seed=5))
    got = run(simulate(model, held_by_kind(model, to), to, ["a"]), X)[0]
    rounded, _, _ = round_to(X["x"] * normal(64, seed=5), to, keep_nonzero=False)
    np.testing.assert_allclose(got, np.exp(rounded.astype(np.float32)), rtol=1e-6)


def test_noise_of_what_is_no_number() -> None:
    noise = _Noise()
    noise.add({"y": np.float32([1, np.inf, 2])}, {"y": np.float32([1, np.nan, 2])})
    assert noise.ratio == 0
    noise.add({"y": np.float32([1])}, {"y": np.float32([np.nan])})
    assert noise.ratio == math.inf
    other = _Noise()
    other.add({"ids": np.array([1]), "y": np.zeros((2, 3), np.float32)}, {"ids": np.array([2]), "y": np.zeros((3, 3))})
    assert other.ratio == math.inf


class Additive(_Bisection):
    """A model whose errors add up."""

    def __init__(self, noise: list[float]) -> None:
        self.points, self.noise, self.own = [f"v{i}" for i in range(len(noise))], {}, noise

    def _measure(self, sets: list[tuple[int, int]]) -> None:
        self.noise.update({(a, b): math.fsum(self.own[a:b]) for a, b in sets})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 10) | st.just(math.inf), min_size=1, max_size=200), st.floats(1e-3, 20))
def test_the_search_gives_back_what_exceeds_the_budget(noise: list[float], budget: float) -> None:
    search = Additive(noise)
    given_back = search.worst(budget)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(given_back)), "sets overlap"
    gone = {i for first, last in given_back for i in range(first, last)}
    assert math.fsum(n for i, n in enumerate(noise) if i not in gone) <= budget * (1 + 1e-9)
    if math.fsum(noise) <= budget:
        assert not gone


def test_the_search_finds_one_among_many_in_few_runs() -> None:
    search = Additive([1e-6] * 1000)
    search.own[700] = 1.0
    assert search.worst(0.01) == [(700, 701)]
    assert len(search.noise) <= 2 * 11


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.floats(1, 1e30))
def test_bringing_in(values: list[float], threshold: float) -> None:
    array = np.float32(values)
    got = bring_in(array, threshold)
    assert got.dtype == np.float32
    beyond = np.isfinite(array) & (np.abs(array) > threshold)
    np.testing.assert_array_equal(got[~beyond], array[~beyond])
    np.testing.assert_allclose(got[beyond], np.sign(array[beyond]) * threshold / 2, rtol=1e-6)


def feeds_for(path: Path) -> Feeds:
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in signature_of(read(path)).inputs:
        shape = [d if isinstance(d, int) else 1 for d in spec.shape]
        if spec.dtype == "float32":
            feeds[spec.name] = random.standard_normal(shape).astype(np.float32)
        else:
            feeds[spec.name] = random.integers(0, 256, shape).astype(spec.dtype)
    return feeds


@pytest.mark.parametrize("path", FILES or [ABSENT], ids=lambda p: p.name if p else "absent")
def test_on_real_models(path: Path) -> None:
    model, _ = run_pass(Clean(), read(path))
    if path.name == "silero_vad.onnx":  # all of it is inside an If
        feeds = {"input": normal(1, 576), "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
        with pytest.raises(InputError, match="inside its subgraphs cannot be measured"):
            press(MIXED, model, calibration(feeds))
        return
    model, report, before = press(MIXED, model, calibration(feeds_for(path)))
    assert report.bytes_after < 0.6 * report.bytes_before
    assert report.details["worst_sqnr_db_after"] >= 40
    for expected, got in zip(run(before, feeds_for(path)), run(model, feeds_for(path)), strict=True):
        assert sqnr(expected, got) > 40
