# SPDX-License-Identifier: Apache-2.0
"""Smoothing keeps what the model computes and makes int8 activations cost less."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pass_tools import Array, count, model_from, normal, reasons, run, sqnr, to_bytes, weights_of

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import read, signature_of
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.graph import add_weight, make_node
from onnxpress.pipeline.passes.smooth import Smooth, smoothing_scale
from onnxpress.pipeline.statistics import Calibration

WIDTH, INNER = 16, 24
# As in a transformer: a normalization with some large channels, projections, a nonlinear function, a second layer
BLOCK = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, s, 16] x, float[16] gamma, float[16] beta, float[16, 24] w1, float[12, 16] w2, float[24, 16] w3)
    => (float[b, s, 16] y, float[b, s, 12] z)
{
    h = LayerNormalization<axis = -1>(x, gamma, beta)
    a = MatMul(h, w1)
    t = Transpose<perm = [1, 0]>(w2)
    z = MatMul(h, t)
    n = Tanh(a)
    y = MatMul(n, w3)
}
"""


def weights() -> dict[str, Array]:
    gamma = np.exp(normal(WIDTH, seed=1, scale=0.3))
    gamma[[3, 11]] *= 40
    return {
        "gamma": gamma,
        "beta": normal(WIDTH, seed=2),
        "w1": normal(WIDTH, INNER, seed=3, scale=0.2),
        "w2": normal(12, WIDTH, seed=4, scale=0.2),
        "w3": normal(INNER, WIDTH, seed=5) * np.exp2(np.linspace(-4, 4, INNER)).astype(np.float32)[:, None],
    }


def block(**changed: Array) -> ir.Model:
    return model_from(BLOCK, {**weights(), **changed})


X = {"x": normal(4, 8, WIDTH, seed=6)}


def calibration(*names: str, batches: int = 4) -> Calibration:
    shapes = {name: (2, 8, WIDTH) for name in names or ("x",)}
    return Calibration([{n: normal(*s, seed=10 + i) for n, s in shapes.items()} for i in range(batches)], threads=1)


def smooth(model: ir.Model, **settings: object) -> tuple[ir.Model, PassReport]:
    return run_pass(Smooth.model_validate(settings), model, calibration())


def rounded(model: ir.Model, feeds: dict[str, Array]) -> list[Array]:
    """Outputs with every layer's input rounded to uint8 (range from `feeds`) and its weight to int8 by column."""
    inner = [n for n in model.graph if n.op_type == "MatMul"]
    copy = model.clone()
    for node in [n for n in copy.graph if n.op_type == "MatMul"]:
        value = node.inputs[0]
        probe = model.clone()
        probe.graph.outputs.append(next(v for n in probe.graph for v in n.outputs if v.name == value.name))
        probe.graph.outputs[-1].type = ir.TensorType(ir.DataType.FLOAT)
        seen = run(probe, feeds)[-1]
        low, high = min(seen.min(), 0), max(seen.max(), 0)
        step = add_weight(copy, copy.graph, "step", np.float32((high - low) / 255))
        zero = add_weight(copy, copy.graph, "zero", np.uint8(round(-low / ((high - low) / 255))))
        pair = make_node("QuantizeLinear", [value, step, zero], [f"{node.outputs[0].name}_q"])
        back = make_node("DequantizeLinear", [pair.outputs[0], step, zero], [f"{node.outputs[0].name}_dq"])
        copy.graph.insert_before(node, [pair, back])
        node.replace_input_with(0, back.outputs[0])
        stored = node.inputs[1]
        axis = 0
        if not stored.is_initializer():
            stored, axis = stored.producer().inputs[0], 1
        weight = stored.const_value.numpy()
        scale = np.abs(weight).max(axis=axis, keepdims=True) / 127
        stored.const_value = ir.Tensor((np.rint(weight / scale) * scale).astype(np.float32), name=stored.name)
    assert inner
    return run(copy, feeds)


def test_outputs_stay_and_int8_gets_better() -> None:
    model = block()
    exact, before = run(model, X), [sqnr(a, b) for a, b in zip(run(model, X), rounded(model, X), strict=True)]
    model, report = smooth(model)
    for old, new in zip(exact, run(model, X), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=2e-5 * float(np.abs(old).max()))
    after = [sqnr(a, b) for a, b in zip(exact, rounded(model, X), strict=True)]
    assert after[0] > before[0] + 1
    assert after[1] > before[1] + 6
    assert (report.seen, report.changed, report.left) == (3, 2, ())


def test_what_is_folded_costs_no_node_and_the_rest_one_mul() -> None:
    old = weights()
    model, report = smooth(block())
    new = {name: tensor.numpy() for name, tensor in weights_of(model).items()}
    assert count(model) == {"MatMul": 3, "LayerNormalization": 1, "Transpose": 1, "Tanh": 1, "Mul": 1}
    scale = old["gamma"] / new["gamma"]
    assert scale.max() / scale.min() > 5
    np.testing.assert_allclose(old["beta"] / new["beta"], scale, rtol=1e-5)
    np.testing.assert_allclose(new["w1"], old["w1"] * scale[:, None], rtol=1e-5)
    np.testing.assert_allclose(new["w2"], old["w2"] * scale, rtol=1e-5)
    np.testing.assert_allclose(new["w3"], old["w3"] / new["n_inverse_scale"][:, None], rtol=1e-5)
    assert (report.details["inputs_smoothed"], report.details["multiplications_inserted"]) == (2, 1)
    assert "into norm" in report.details["inputs"]["h"]
    assert "into a Mul" in report.details["inputs"]["n"]


def test_without_mul_the_rest_is_left_with_its_reason() -> None:
    model, report = smooth(block(), insert_mul=False)
    assert "Mul" not in count(model)
    assert report.changed == 1
    assert reasons(report) == {"y": "the scale does not fold, and insert_mul is off: a scale does not pass Tanh (n)"}
    np.testing.assert_array_equal(weights_of(model)["w3"].numpy(), weights()["w3"])


def test_the_scale_is_the_papers_with_the_largest_weight_of_all_readers() -> None:
    model, data = block(), calibration()
    plan = Smooth(alpha=0.6, insert_mul=False).plan(model, data)
    probe = model.clone()
    probe.graph.outputs.append(next(v for n in probe.graph for v in n.outputs if v.name == "h"))
    probe.graph.outputs[-1].type = ir.TensorType(ir.DataType.FLOAT)
    peak = np.max([np.abs(run(probe, batch)[-1]).max(axis=(0, 1)) for batch in data.batches], axis=0)
    both = np.maximum(np.abs(weights()["w1"]).max(axis=1), np.abs(weights()["w2"]).max(axis=0))
    np.testing.assert_allclose(plan.arrays["h"], peak**0.6 / both**0.4, rtol=1e-5)
    assert plan.actions[0]["alpha"] == 0.6


def test_the_search_is_as_good_as_each_alpha_of_its_grid() -> None:
    def after(alpha: float | str) -> float:
        plan = Smooth(alpha=alpha, insert_mul=False).plan(block(), calibration())  # type: ignore[arg-type]
        (action,) = plan.actions
        assert action["sqnr_after"] > action["sqnr_before"] + 0.5
        return float(action["sqnr_after"])

    assert after("search") == max(after(round(0.3 + 0.05 * step, 2)) for step in range(14))


def test_planning_changes_nothing_and_is_json() -> None:
    model = block()
    before = to_bytes(model)
    plan = Smooth().plan(model, calibration())
    assert to_bytes(model) == before
    json.dumps([plan.actions, plan.details])
    assert set(plan.arrays) == {action["value"] for action in plan.actions}


positive = st.floats(2.0**-10, 2.0**10, width=32)


@given(npst.arrays(np.float32, 5, elements=positive), npst.arrays(np.float32, 5, elements=positive))
def test_alpha_moves_all_of_the_difficulty_to_either_side(peak: Array, weight_peak: Array) -> None:
    np.testing.assert_allclose(peak / smoothing_scale(peak, weight_peak, 1.0), 1, rtol=1e-5)
    np.testing.assert_allclose(weight_peak * smoothing_scale(peak, weight_peak, 0.0), 1, rtol=1e-5)


def test_channels_without_signal() -> None:
    scale = smoothing_scale(np.array([0, 1e-30, 4.0, 4.0]), np.array([1.0, 1.0, 0.0, 1.0]), 0.5)
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale, [1, 1e-5, 2 / np.sqrt(1e-5), 2])


def test_a_channel_that_is_always_zero_keeps_its_weights() -> None:
    old = weights()
    old["gamma"][5] = old["beta"][5] = 0
    model, _ = smooth(block(**old), insert_mul=False)
    np.testing.assert_array_equal(weights_of(model)["w1"].numpy()[5], old["w1"][5])


ATTENTION = """
<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>
g (float[b, s, 16] x, float[16, 16] wq, float[16, 16] wv, float[16] bv, float[16, 16] wo) => (float[b, s, 16] y)
{
    q = MatMul(x, wq)
    p = MatMul(x, wv)
    v = Add(p, bv)
    h = com.microsoft.MultiHeadAttention<num_heads = 4>(q, q, v)
    y = MatMul(h, wo)
}
"""


def test_values_take_the_scale_of_the_output_projection() -> None:
    old = {n: normal(16, 16, seed=i) for i, n in enumerate(("wq", "wv", "wo"))}
    old |= {"bv": normal(16, seed=7)}
    old["wv"][:, 6] *= 50
    model = model_from(ATTENTION, old)
    exact = run(model, X)[0]
    model, report = smooth(model, insert_mul=False)
    new = {name: tensor.numpy() for name, tensor in weights_of(model).items()}
    assert report.changed == 1
    assert set(reasons(report)) == {"q", "p"}
    ratio = (new["wo"] / old["wo"])[:, 0]
    np.testing.assert_allclose(old["wv"] / new["wv"], np.broadcast_to(ratio, (16, 16)), rtol=1e-5)
    np.testing.assert_allclose(old["bv"] / new["bv"], ratio, rtol=1e-5)
    np.testing.assert_allclose(run(model, X)[0], exact, rtol=0, atol=2e-5 * float(np.abs(exact).max()))


def smoothed_beside(model: ir.Model, node: str, reason: str, **settings: object) -> None:
    """`node` is left; the other layer with the same input is smoothed all the same, behind a Mul."""
    old = {name: tensor.numpy().copy() for name, tensor in weights_of(model).items()}
    model, report = smooth(model, **settings)
    assert reasons(report)[node] == reason
    assert report.details["inputs"]["h"].startswith("alpha")
    changed = {n for n, array in old.items() if array.tobytes() != weights_of(model)[n].numpy().tobytes()}
    assert changed == {"w1", "w2", "w3"} - {{"a": "w1", "e": "w1", "z": "w2"}[node]}


def test_half_precision_weights_stay() -> None:
    text = BLOCK.replace("float[16, 24] w1", "float16[16, 24] w1")
    text = text.replace("a = MatMul(h, w1)", "c = Cast<to = 10>(h) e = MatMul(c, w1) a = Cast<to = 1>(e)")
    half = {**weights(), "w1": weights()["w1"].astype(np.float16)}
    smoothed_beside(model_from(text, half), "e", "the weight is float16, not fp32")


def test_weights_that_are_no_numbers_stay() -> None:
    smoothed_beside(block(w2=np.full((12, WIDTH), np.nan, np.float32)), "z", "the weight holds NaN or infinity")


@pytest.mark.parametrize("pattern", ["w1", "a"])
def test_layers_that_are_excluded(pattern: str) -> None:
    smoothed_beside(block(), "a", "excluded by name", exclude=(pattern,))


def test_a_weight_with_readers_of_another_input_is_not_copied() -> None:
    text = BLOCK.replace("n = Tanh(a)", "n = Tanh(a) k = MatMul(x, w1) l = Add(k, n)").replace("MatMul(n,", "MatMul(l,")
    _, report = smooth(model_from(text, weights()))
    assert reasons(report)["a"] == "the weight would have to be copied: it is also read by k (MatMul)"
    assert reasons(report)["k"] == "the weight would have to be copied: it is also read by a (MatMul)"
    assert report.bytes_after <= report.bytes_before + 4 * (WIDTH + INNER)


def test_gains_below_the_minimum_are_not_taken() -> None:
    with pytest.raises(InputError, match=r"nothing to do on this model \(3 candidates: smoothing is predicted to win"):
        smooth(block(), minimum_gain=60.0)


def test_products_of_activations_are_left() -> None:
    text = BLOCK.replace("n = Tanh(a)", "u = Transpose<perm = [0, 2, 1]>(a) m = MatMul(u, a) n = MatMul(a, m)")
    _, report = smooth(model_from(text, weights()))
    assert reasons(report)["m"] == reasons(report)["n"] == "the right factor is no constant"


def test_layers_in_a_branch_cannot_be_measured() -> None:
    model = model_from(
        """
        <ir_version: 10, opset_import: ["": 18]>
        g (float[b, s, 16] x, bool c, float[16, 4] w) => (float[b, s, 4] y) {
            y = If (c) <
                then_branch = t () => (float[b, s, 4] p) { r = Relu(x) p = MatMul(r, w) },
                else_branch = e () => (float[b, s, 4] q) { q = MatMul(x, w) }
            >
        }""",
        {"w": normal(16, 4)},
    )
    plan = Smooth().plan(model, Calibration([{**X, "c": np.array(True)}], threads=1))
    assert {left.node: left.reason for left in plan.left}["p"] == "inside a subgraph: its values cannot be measured"


def test_calibration_data_is_required() -> None:
    with pytest.raises(InputError, match="smooth needs calibration data"):
        run_pass(Smooth(), block())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "guess"])
def test_alpha_is_checked(alpha: object) -> None:
    with pytest.raises(ValueError):
        Smooth.model_validate({"alpha": alpha})


ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[4] / "shared" / "assets"))
FILES = [file for file in sorted(ASSETS.rglob("*.onnx")) if "vad" not in file.name] if ASSETS.is_dir() else []
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"no .onnx files under {ASSETS}"))


@pytest.mark.parametrize("path", FILES or [ABSENT], ids=lambda p: p.name if p else "absent")
def test_real_models_compute_the_same(path: Path) -> None:
    random, feeds = np.random.default_rng(0), {}
    for spec in signature_of(read(path)).inputs:
        shape = [d if isinstance(d, int) else 1 for d in spec.shape]
        large = random.integers(0, 256, shape).astype(spec.dtype)
        feeds[spec.name] = random.standard_normal(shape).astype(np.float32) if spec.dtype == "float32" else large
    model, _ = run_pass(Clean(), read(path))
    exact = run(model, feeds)
    settings, data = Smooth(minimum_gain=-100.0), Calibration([feeds], threads=1)
    if not settings.plan(model, data).actions:
        with pytest.raises(InputError, match="nothing to do"):
            run_pass(settings, model, data)
        return
    model, _ = run_pass(settings, model, data)
    for old, new in zip(exact, run(model, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-4 * float(np.abs(old).max()))
