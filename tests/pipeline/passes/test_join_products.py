# SPDX-License-Identifier: Apache-2.0
"""`join_products`: one product in place of several, every number where it was said to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import count, model_from, normal, run, to_bytes

from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.join_products import JoinProducts
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights

WIDTHS = {"q": 96, "k": 32, "v": 32}
X = {"x": normal(2, 3, 64)}


def quantized(body: str = "", **settings: Any) -> ir.Model:
    """Three products of one input, in few bits; `body` may add to them."""
    weights = {name: normal(64, width) for name, width in WIDTHS.items()}
    declared = "".join(f", float[64,{width}] {name}" for name, width in WIDTHS.items())
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[batch, length, 64] x{declared}) => (float[batch, length, n] a, float[batch, length, n] b,
            float[batch, length, n] c) {{ a = MatMul(x, q) {body or "b = MatMul(x, k)"} c = MatMul(x, v) }}"""
    given = {"minimum_elements": 0, "group_size": 32, **settings}
    return run_pass(QuantizeWeights(**given), model_from(text, weights))[0]


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"bits": 8}, {"accuracy_level": 0}])
def test_one_product_gives_the_same_numbers(settings: dict[str, Any]) -> None:
    before = quantized(**settings)
    after, report = run_pass(JoinProducts(), before.clone())
    assert count(before).get("com.microsoft::MatMulNBits", 0) == 3
    assert (count(after).get("com.microsoft::MatMulNBits", 0), count(after).get("Split", 0)) == (1, 1)
    for wanted, got in zip(run(before, X), run(after, X), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert report.details["products"] == 3
    assert report.bytes_after <= report.bytes_before + 24  # the three widths
    assert len(to_bytes(after)) < len(to_bytes(before)) + 200


def test_the_report_says_where_each_row_went() -> None:
    before = quantized()
    after, report = run_pass(JoinProducts(), before.clone())
    assert set(report.details["joined"]) >= {"q_packed", "k_packed", "v_scale", "v_zero_point"}
    for name, (whole, first) in report.details["joined"].items():
        old, new = (m.graph.initializers[n].const_value for m, n in ((before, name), (after, whole)))
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(new.numpy()[first : first + len(old.numpy())], old.numpy())


def test_arrays_of_one_weight_are_asked_for_together_and_once() -> None:
    model, asked = quantized(), list[str]()
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)

        def read(name: str = name, array: np.ndarray = array) -> ir.Tensor:
            asked.append(name)
            return ir.Tensor(array)

        value.const_value = ir.LazyTensor(read, dtype=ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape))
    after, _ = run_pass(JoinProducts(), model)
    asked.clear()
    for value in after.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()
    weights = [name.partition("_")[0] for name in asked if "_" in name]
    assert weights == sorted(weights, key=list(WIDTHS).index)  # q's arrays, then k's, then v's: each rounded once


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: quantized(mixed={"k": 8}), "nothing else like it"),
        (lambda: quantized("r = Relu(x) b = MatMul(r, k)"), "nothing else like it"),
        (lambda: quantized("n = MatMul(x, k) b = Relu(n)", exclude=("k",)), None),
    ],
    ids=["other bits", "other input", "not quantized"],
)
def test_what_is_different_stays(model: Any, reason: str | None) -> None:
    before = model()
    after, report = run_pass(JoinProducts(), before.clone())
    assert (
        count(after).get("com.microsoft::MatMulNBits", 0) == count(before).get("com.microsoft::MatMulNBits", 0) - 1
    )  # the other two are joined
    assert [left.reason.startswith(reason or "-") for left in report.left] == ([True] if reason else [])
    for wanted, got in zip(run(before, X), run(after, X), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_weight_with_other_readers_stays() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (int64[b, s] ids, float[96, 64] e, float[64, 32] w)
        => (float[b, s, 96] y, float[b, s, 32] z) {
        h = Gather(e, ids) t = Transpose<perm = [1, 0]>(e) y = MatMul(h, t) z = MatMul(h, w) }"""
    model = model_from(text, {"e": normal(96, 64), "w": normal(64, 32)})
    model, _ = run_pass(QuantizeWeights(minimum_elements=0), model)
    _, report = run_pass(JoinProducts(), model)
    assert "its weight has other readers" in {left.reason for left in report.left}
    assert report.details["products"] == 0


def test_a_model_without_such_products_is_left() -> None:
    model = model_from('<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) { y = Relu(x) }')
    assert run_pass(JoinProducts(), model)[1].changed == 0
