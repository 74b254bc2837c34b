# SPDX-License-Identifier: Apache-2.0
"""`cast` to bf16, and to weights that are only stored in 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator
from pass_tools import Array, Feeds, count, model_from, normal, press, reasons, run, sqnr, to_bytes, weights_of

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import read
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.low_precision import Precision, limits, round_to

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
BFLOAT16 = CastPass(to="bfloat16")
TYPES: tuple[Precision, ...] = ("float16", "bfloat16")
W = {"w": normal(64, 64, scale=0.1), "v": normal(64, 64, seed=3, scale=0.1), "s": np.ones(64, np.float32)}
TEXT = "a = MatMul(x, w) h = Gelu(a) i = Add(h, x) l = LayerNormalization(i, s) y = MatMul(l, v)"
X = {"x": normal(16, 64, seed=1)}


def net(text: str = TEXT, weights: Feeds = W, head: str = HEAD) -> ir.Model:
    """y [b, 64] from x [b, 64] and weights by name."""
    declared = "".join(f", float[{','.join(map(str, a.shape))}] {n}" for n, a in weights.items())
    return model_from(f"{head} g (float[b, 64] x{declared}) => (float[b, 64] y) {{ {text} }}", weights)


def assert_refused_by_the_cpu(model: ir.Model) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])


def test_bf16_halves_the_bytes_and_computes_in_bf16() -> None:
    model, report, before = press(BFLOAT16, net())
    assert report.bytes_after * 2 == report.bytes_before
    assert {t.dtype for t in weights_of(model).values()} == {ir.DataType.BFLOAT16}
    assert {v.dtype for n in model.graph for v in n.outputs[:1]} == {ir.DataType.BFLOAT16, ir.DataType.FLOAT}
    assert count(model)["Cast"] == 2
    proto = onnx.ModelProto.FromString(to_bytes(model))
    onnx.checker.check_model(proto, full_check=True)
    assert 25 < sqnr(run(before, X)[0], ReferenceEvaluator(proto).run(None, X)[0]) < 60


def test_the_report_says_which_operators_have_no_bf16_kernel_on_the_cpu() -> None:
    model, report, _ = press(BFLOAT16, net())
    assert report.details["no_cpu_kernel"] == ["Add", "Gelu", "MatMul"]
    assert_refused_by_the_cpu(model)


@pytest.mark.parametrize(
    ("op", "loads"), [("Flatten(q)", True), ("Concat<axis = 0>(q)", True), ("Relu(q)", False), ("Mul(q, c)", False)]
)
def test_the_list_of_kernels_is_that_of_onnx_runtime(op: str, loads: bool) -> None:
    model, report, before = press(BFLOAT16, net(f"q = LayerNormalization(x, c) y = {op}", {"c": normal(64)}))
    assert bool(report.details["no_cpu_kernel"]) != loads
    if not loads:
        assert_refused_by_the_cpu(model)
    else:
        assert sqnr(run(before, X)[0], run(model, X)[0]) > 40


def test_operators_that_learn_bf16_in_a_later_opset_stay_fp32() -> None:
    text = "<ir_version: 10, opset_import: ['': {opset}]> g (float[1, 2, 8] x, float[4, 2, 3] w, float[4] k) => "
    text = (
        text.replace("'", '"')
        + "(float[1, 4, 6] y) {{ a = Conv(x, w) b = Relu(a) t = Unsqueeze(k, one) y = Mul(b, t) }}"
    )
    text = text.replace("{{ a", "{{ one = Constant<value_ints = [1]>() a")
    weights = {"w": normal(4, 2, 3), "k": normal(4)}
    old, report, _ = press(BFLOAT16, model_from(text.format(opset=20), weights))
    assert reasons(report)["a"] == "Conv takes bfloat16 from opset 22 on, and this is 20"
    assert weights_of(old)["w"].dtype == ir.DataType.FLOAT
    assert weights_of(old)["k"].dtype == ir.DataType.BFLOAT16
    new, _, _ = press(BFLOAT16, model_from(text.format(opset=22), weights))
    assert weights_of(new)["w"].dtype == ir.DataType.BFLOAT16
    for model in (old, new):
        onnx.checker.check_model(onnx.ModelProto.FromString(to_bytes(model)), full_check=True)


def test_an_operator_that_never_takes_bf16() -> None:
    _, report, _ = press(BFLOAT16, net("a = MatMul(x, w) y = Shrink(a)", {"w": W["w"]}))
    assert reasons(report)["y"] == "Shrink takes no bfloat16"


@pytest.mark.parametrize("to", TYPES)
def test_stored_weights_take_half_the_bytes_and_compute_in_fp32(to: Precision) -> None:
    model, report, before = press(CastPass(to=to, storage_only=True), net())
    assert report.bytes_after < 0.51 * report.bytes_before
    assert report.details == {"weights_cast": 2, "casts_inserted": 2}
    assert weights_of(model)["s"].dtype == ir.DataType.FLOAT
    assert "not worth a Cast" in reasons(report)["s"]
    rounded = {name: round_to(W[name], to)[0].astype(np.float32) for name in ("w", "v")}
    np.testing.assert_array_equal(run(model, X)[0], run(net(weights=W | rounded), X)[0])
    assert not np.array_equal(run(model, X)[0], run(before, X)[0])


def test_onnx_runtime_folds_the_casts_when_it_loads_stored_weights(tmp_path: Path) -> None:
    model, _, _ = press(CastPass(storage_only=True), net())
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    assert "Cast" not in count(read(tmp_path / "loaded.onnx"))


def test_weights_that_were_bf16_are_stored_without_loss() -> None:
    exact = {name: round_to(array, "bfloat16")[0].astype(np.float32) for name, array in W.items()}
    model, report, before = press(CastPass(to="bfloat16", storage_only=True), net(weights=exact))
    assert report.bytes_after < 0.51 * report.bytes_before
    np.testing.assert_array_equal(run(model, X)[0], run(before, X)[0])


def test_weights_that_are_not_stored_in_16_bits() -> None:
    text = f"""{HEAD} g (float[b, 64] x, float[64, 64] w, float[64, 64] huge, float[64, 64] mine, float[64, 64] out)
        => (float[b, 64] y, float[64, 64] out) {{ a = MatMul(x, w) c = MatMul(a, huge) d = MatMul(c, mine)
        y = MatMul(d, out) }}"""
    weights = {"w": W["w"], "huge": W["w"] * np.float32(1e7), "mine": W["v"], "out": W["v"]}
    model, report, before = press(CastPass(storage_only=True, keep=("mine",)), model_from(text, weights))
    why = reasons(report)
    assert why["huge"].startswith("reaches ")
    assert why["huge"].endswith("and float16 ends at 65504")
    assert why["mine"] == "kept by name"
    assert "output of the graph" in why["out"]
    assert sqnr(run(before, X)[0], run(model, X)[0]) > 50


def test_stored_weights_of_a_branch() -> None:
    text = f"""{HEAD} g (float[b, 64] x, bool c, float[64, 64] w) => (float[b, 64] y) {{
        y = If (c) <then_branch = f () => (float[b, 64] p) {{ p = MatMul(x, w) }},
                    else_branch = d () => (float[b, 64] q) {{ q = MatMul(w, w) }}> }}"""
    model, report, before = press(CastPass(storage_only=True), model_from(text, {"w": W["w"]}))
    assert report.details["casts_inserted"] == 1
    for c in (True, False):
        feeds = X | {"c": np.array(c)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 50


@pytest.mark.parametrize("to", TYPES)
def test_a_second_time_there_is_nothing_to_do(to: Precision) -> None:
    for cast in (CastPass(to=to), CastPass(to=to, storage_only=True)):
        model, _, _ = press(cast, net())
        with pytest.raises(InputError, match="nothing to do"):
            run_pass(cast, model)


FLOATS = hnp.arrays(np.float32, st.integers(1, 8), elements=st.floats(width=32))


def by_bits(array: Array) -> Array:
    """bf16 is the upper half of fp32: add half a step, less one where the step below is even, and cut."""
    bits = array.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


@settings(max_examples=300, deadline=None)
@given(array=FLOATS, keep=st.booleans())
@example(np.float32([1 + 2**-8, 1 + 3 * 2**-8, 3.3961775e38, 3.4028235e38, 1e-45, 4.6e-41, -0.0, np.inf, np.nan]), True)
def test_rounding_to_bf16(array: Array, keep: bool) -> None:
    largest, smallest = limits("bfloat16")
    result, clamped, raised = round_to(array, "bfloat16", keep_nonzero=keep)
    got = result.astype(np.float32)
    assert result.dtype == ir.DataType.BFLOAT16.numpy()
    assert (np.isnan(got) == np.isnan(array)).all()
    assert (np.isinf(got) == np.isinf(array)).all()
    finite = np.isfinite(array)
    over = finite & (np.abs(array) > largest)
    under = finite & (by_bits(array) == 0) & (array != 0)
    assert (clamped, raised) == (over.sum(), under.sum() if keep else 0)
    assert (np.abs(got[over]) == largest).all()
    assert (np.abs(got[under]) == (np.float32(smallest) if keep else 0)).all()
    same = finite & ~over & ~under
    np.testing.assert_array_equal(got[same], by_bits(array)[same])
    assert (np.signbit(got) == np.signbit(array))[finite].all()


@settings(max_examples=200, deadline=None)
@given(array=FLOATS, to=st.sampled_from(TYPES))
def test_rounding_twice_is_rounding_once_and_keeps_the_order(array: Array, to: Precision) -> None:
    once, _, _ = round_to(array, to)
    twice, clamped, raised = round_to(once.astype(np.float32), to)
    np.testing.assert_array_equal(once.astype(np.float32), twice.astype(np.float32))
    assert clamped == raised == 0
    numbers = np.sort(array[~np.isnan(array)])
    ordered = round_to(numbers, to)[0].astype(np.float32)
    assert (ordered[1:] >= ordered[:-1]).all()


def test_what_storage_and_names_cannot_be_together() -> None:
    with pytest.raises(InputError, match="no node is named like keep 'nothing'"):
        run_pass(CastPass(storage_only=True, keep=("nothing",)), net())
