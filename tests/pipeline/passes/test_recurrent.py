# SPDX-License-Identifier: Apache-2.0
"""`quantize_dynamic` on LSTM: int8 weights in ONNX Runtime's own operator, and reasons for what it does not have."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import Array, count, model_from, normal, press, reasons, run, sqnr

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import weight_bytes
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic

SIZE, HIDDEN = 24, 16
QUANTIZED = "com.microsoft::DynamicQuantizeLSTM"
ALL = QuantizeDynamic(minimum_elements=0)


def lstm(attributes: str = "", directions: int = 1, operator: str = "LSTM", inputs: str = "x, w, r, b") -> ir.Model:
    """One recurrent layer on x [time, batch, SIZE]."""
    gates = {"LSTM": 4, "GRU": 3}[operator] * HIDDEN
    weights = {
        "w": normal(directions, gates, SIZE, seed=1, scale=0.3),
        "r": normal(directions, gates, HIDDEN, seed=2, scale=0.3),
        "b": normal(directions, 2 * gates, seed=3, scale=0.3),
    }
    declared = "".join(f", float[{','.join(map(str, a.shape))}] {n}" for n, a in weights.items())
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[t, n, {SIZE}] x{declared}) => (float[t, d, n, {HIDDEN}] y, float[d, n, {HIDDEN}] last) {{
            y, last = {operator}<hidden_size={HIDDEN}{attributes}>({inputs})
        }}"""
    return model_from(text, weights, infer=False)


def feeds(time: int = 7, rows: int = 3) -> dict[str, Array]:
    return {"x": normal(time, rows, SIZE, seed=9)}


@pytest.mark.parametrize(
    ("attributes", "directions"),
    [
        ("", 1),
        (', direction="reverse"', 1),
        (', direction="bidirectional"', 2),
        (', clip=1.5, input_forget=0, activations=["Sigmoid", "Tanh", "Tanh"]', 1),
    ],
)
def test_weights_become_int8_and_the_outputs_stay_close(attributes: str, directions: int) -> None:
    model, report, before = press(ALL, lstm(attributes, directions))
    assert count(model) == {QUANTIZED: 1}
    assert [v.name for v in model.graph.outputs] == ["y", "last"]
    for wanted, got in zip(run(before, feeds()), run(model, feeds()), strict=True):
        assert 20 < sqnr(wanted, got) < 60, "rounded, and not the identity"
    assert report.changed == 1
    assert report.bytes_after < 0.45 * report.bytes_before
    assert report.details["weights_quantized"] == 2


def test_one_scale_for_each_output_of_each_gate() -> None:
    model = lstm()
    array = np.array(model.graph.initializers["w"].const_value.numpy())  # type: ignore[union-attr]
    array[0, 5] = 0.0
    array[0, 6] *= 1000
    model.graph.initializers["w"].const_value = ir.Tensor(array, name="w")
    model, _, before = press(ALL, model)
    scale = model.graph.initializers["w_scale"].const_value
    assert scale is not None
    assert scale.shape == (1, 4 * HIDDEN)
    assert scale.numpy()[0, 5] == 1.0, "a channel of zeros"
    assert sqnr(run(before, feeds())[0], run(model, feeds())[0]) > 20


def test_initial_states_and_lengths_keep_their_places() -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[t, n, {SIZE}] x, float[1, {4 * HIDDEN}, {SIZE}] w, float[1, {4 * HIDDEN}, {HIDDEN}] r,
           int32[n] lengths, float[1, n, {HIDDEN}] h, float[1, n, {HIDDEN}] c) => (float[t, d, n, {HIDDEN}] y) {{
            y = LSTM<hidden_size={HIDDEN}>(x, w, r, , lengths, h, c)
        }}"""
    weights = {"w": normal(1, 4 * HIDDEN, SIZE, scale=0.3), "r": normal(1, 4 * HIDDEN, HIDDEN, scale=0.3)}
    model, _, before = press(ALL, model_from(text, weights, infer=False))
    given = feeds() | {"lengths": np.array([7, 2, 5], np.int32)}
    given |= {"h": normal(1, 3, HIDDEN, seed=4), "c": normal(1, 3, HIDDEN, seed=5)}
    assert sqnr(run(before, given)[0], run(model, given)[0]) > 20


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (lstm(operator="GRU"), ALL, "no quantized GRU"),
        (lstm(), QuantizeDynamic(minimum_elements=100_000), "fewer than 100000 elements"),
        (lstm(), QuantizeDynamic(minimum_elements=0, exclude=("r",)), "excluded by name"),
        (lstm(), QuantizeDynamic(minimum_elements=0, operators=("MatMul",)), "not among the operators"),
        (lstm(inputs="x, w, w, b"), ALL, "has other readers"),
    ],
)
def test_what_stays_has_a_reason(model: ir.Model, settings: QuantizeDynamic, reason: str) -> None:
    plan = settings.plan(model)
    assert not plan.actions
    assert reason in plan.left[0].reason


def test_nan_weights_stay() -> None:
    model = lstm()
    model.graph.initializers["r"].const_value = ir.Tensor(np.full((1, 4 * HIDDEN, HIDDEN), np.nan, np.float32))
    assert "NaN" in ALL.plan(model).left[0].reason


def test_seven_bits_where_the_processor_saturates() -> None:
    model, _, _ = press(QuantizeDynamic(minimum_elements=0, reduce_range=True), lstm())
    weight = model.graph.initializers["w_int8"].const_value
    assert weight is not None
    assert np.abs(weight.numpy()).max() == 63


def test_convolutions_are_left_with_the_measured_reason() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 8, 6, 6] x, float[8, 8, 3, 3] w, float[32, 16] m) => (float[n, 8, 6, 16] y) {
            c = Conv<pads=[1, 1, 1, 1]>(x, w)  p = Pad(c, pads)  y = MatMul(p, m)
        }"""
    text = text.replace("float[32, 16] m", "float[32, 16] m, int64[8] pads")
    weights = {"w": normal(8, 8, 3, 3), "m": normal(32, 16), "pads": np.array([0, 0, 0, 0, 0, 0, 0, 26], np.int64)}
    model, report, _ = press(ALL, model_from(text, weights))
    assert count(model)["Conv"] == 1
    assert any("quantize_static" in reason for reason in reasons(report).values())


def test_too_small_a_share_is_an_error_that_names_what_stayed() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 8, 6, 8] x, float[8, 8, 3, 3] w, float[8, 16] m) => (float[n, 8, 6, 16] y) {
            c = Conv<pads=[1, 1, 1, 1]>(x, w)  y = MatMul(c, m)
        }"""
    model = model_from(text, {"w": normal(8, 8, 3, 3), "m": normal(8, 16)})
    with pytest.raises(InputError, match=r"only 18\.2 % of the weights to int8 \(.*: int8 as it comes") as caught:
        run_pass(QuantizeDynamic(minimum_elements=0, minimum_share=50), model)
    assert "minimum_share" in str(caught.value.next_step)


def test_bytes_of_a_model_of_lstms_fall_to_about_a_quarter() -> None:
    model = lstm(', direction="bidirectional"', 2)
    before = weight_bytes(model) - 4 * 2 * 8 * HIDDEN
    pressed, _ = run_pass(ALL, model)
    stored = {n: v.const_value for n, v in pressed.graph.initializers.items() if n.endswith("_int8")}
    assert sum(t.nbytes for t in stored.values() if t is not None) == before // 4
