# SPDX-License-Identifier: Apache-2.0
"""`prune_magnitude`: which weights go, by every method and for every kind of layer, and what it costs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_tools import Array, model_from, normal, reasons, run, sqnr
from pydantic import ValidationError

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.graph import initializers_of
from onnxpress.pipeline.passes.prunable import Choice, Measured, Prunable, measured, stages
from onnxpress.pipeline.passes.prune_magnitude import PruneMagnitude
from onnxpress.pipeline.statistics import Calibration

MLP = """
<ir_version: 10, opset_import: ["": 20]>
g (float[b, 32] x, float[32, 48] w1, float[48] b1, float[16, 48] w2, float[16, 8] w3) => (float[b, 8] y)
{
    h = MatMul(x, w1)
    a = Add(h, b1)
    r = Relu(a)
    m = Gemm<transB = 1>(r, w2)
    y = MatMul(m, w3)
}
"""
CNN = """
<ir_version: 10, opset_import: ["": 20]>
g (float[b, 4, 9, 9] x, float[8, 4, 3, 3] c1, float[8, 1, 3, 3] c2, float[16, 8, 3, 3] c3, float[16, 20] w)
    => (float[b, 20] y)
{
    a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, c1)
    r = Relu(a)
    d = Conv<group = 8, pads = [1, 1, 1, 1]>(r, c2)
    e = Conv<pads = [2, 1, 0, 1], dilations = [2, 1]>(d, c3)
    s = GlobalAveragePool(e)
    f = Flatten(s)
    y = MatMul(f, w)
}
"""


def mlp() -> ir.Model:
    shapes = {"w1": (32, 48), "b1": (48,), "w2": (16, 48), "w3": (16, 8)}
    return model_from(MLP, {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())})


def cnn() -> ir.Model:
    shapes = {"c1": (8, 4, 3, 3), "c2": (8, 1, 3, 3), "c3": (16, 8, 3, 3), "w": (16, 20)}
    return model_from(CNN, {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())})


def rows(count: int = 400, seed: int = 7) -> Array:
    """Rows of MLP's input: channels of different sizes that go together."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(0).standard_normal((6, 32)) * np.exp(np.linspace(-2, 1, 32))
    return (random.standard_normal((count, 6)) @ mix + 0.2 * random.standard_normal((count, 32))).astype(np.float32)


def data(x: Array | None = None) -> Calibration:
    return Calibration([{"x": part} for part in np.split(rows() if x is None else x, 4)], threads=1)


def images(count: int = 24, seed: int = 3) -> Array:
    return np.cumsum(normal(count, 4, 9, 9, seed=seed), axis=-1)


def press(model: ir.Model, calibration: Calibration | None = None, **options: Any) -> tuple[ir.Model, PassReport]:
    return run_pass(PruneMagnitude(minimum_elements=0, **options), model, calibration)


def weights(model: ir.Model) -> dict[str, Array]:
    return {key: value.const_value.numpy() for key, value in initializers_of(model).items() if value.const_value}


def outputs_first(name: str, array: Array) -> Array:
    """[outputs, inputs] of a weight of the graphs above; a convolution's kernel positions first, then channels."""
    if array.ndim == 4:
        return np.moveaxis(array, 1, -1).reshape(len(array), -1)
    return array if name == "w2" else array.T


# -------------------------------------------------------------------------------------------------------------- which


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_magnitude_removes_exactly_the_smallest(ratio: float) -> None:
    before, (model, report) = weights(mlp()), press(mlp(), ratio=ratio)
    for name, array in weights(model).items():
        if name == "b1":
            np.testing.assert_array_equal(array, before[name])
            continue
        flat = np.sort(np.abs(before[name]), axis=None)
        limit = flat[round(ratio * flat.size) - 1]
        np.testing.assert_array_equal(array, np.where(np.abs(before[name]) <= limit, 0, before[name]))
    assert report.changed == 3
    assert report.details["sparsity_percent"] == pytest.approx(100 * ratio, abs=0.1)


def test_globally_the_smallest_of_all_layers_go() -> None:
    given_model = mlp()
    scaled = weights(given_model)["w3"] * np.float32(0.01)
    given_model.graph.initializers["w3"].const_value = ir.Tensor(scaled)
    before = weights(given_model.clone())
    model, report = press(given_model, scope="global", ratio=0.4)
    after = weights(model)
    together = np.sort(np.concatenate([np.abs(before[n]).ravel() for n in ("w1", "w2", "w3")]))
    limit = together[round(0.4 * together.size) - 1]
    for name in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(after[name], np.where(np.abs(before[name]) <= limit, 0, before[name]))
    assert not after["w3"].any()
    assert report.details["layers"]["w3"]["sparsity_percent"] == 100


def test_wanda_weighs_by_the_norm_of_the_input_output_by_output() -> None:
    before, (model, _) = weights(mlp()), press(mlp(), data(), method="wanda", ratio=0.5)
    scores = np.abs(before["w1"].T) * np.linalg.norm(rows().astype(np.float64), axis=0)
    limit = np.sort(scores, axis=1)[:, 15:16]
    np.testing.assert_array_equal(weights(model)["w1"].T, np.where(scores <= limit, 0, before["w1"].T))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("make", [mlp, cnn])
@settings(max_examples=5, deadline=None)
@given(pattern=st.sampled_from(["2:4", "1:4", "1:2", "3:4", "4:8"]))
def test_no_group_along_the_inputs_has_more_than_n(method: str, make: Any, pattern: str) -> None:
    kept, group = map(int, pattern.split(":"))
    calibration = data() if make is mlp else Calibration([{"x": images(4)}], threads=1)
    model, report = press(make(), calibration, method=method, pattern=pattern)
    for name, array in weights(model).items():
        if name in report.details["layers"]:
            groups = outputs_first(name, array).reshape(-1, group)
            assert (np.count_nonzero(groups, axis=1) == kept).all()
    if make is cnn:
        no_multiple = "its 1 inputs are no multiple of" if group == 4 or group == 8 else "its 1 inputs"
        assert reasons(report)["d"].startswith(no_multiple)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": 0.75}, {"pattern": "2:4"}], ids=str)
def test_the_more_a_method_knows_the_less_it_costs(options: dict[str, Any]) -> None:
    """The outputs of the first layer, whose inputs differ in size, and of the model, on data not calibrated on."""
    x = rows(200, seed=8)
    expected, w1, outputs, first = run(mlp(), {"x": x})[0], weights(mlp())["w1"], [], []
    for method in ("magnitude", "wanda", "sparsegpt"):
        model, report = press(mlp(), data(), method=method, **options)
        outputs.append(sqnr(expected, run(model, {"x": x})[0]))
        first.append(sqnr(x @ w1, x @ weights(model)["w1"]))
    assert first[0] < first[1] < first[2]
    assert outputs[2] > max(outputs[:2])
    layers = report.details["layers"]
    assert all(layer["output_error_percent"] < layer["without_update_percent"] for layer in layers.values())


def test_the_error_reported_is_that_of_the_outputs() -> None:
    before, x = weights(mlp())["w1"], rows()
    model, report = press(mlp(), data(), method="sparsegpt")
    after = weights(model)["w1"]
    masked = np.where(after != 0, before, 0)
    layer = report.details["layers"]["w1"]
    for changed, percent in ((after, layer["output_error_percent"]), (masked, layer["without_update_percent"])):
        expected = 100 * np.linalg.norm(x @ changed - x @ before) / np.linalg.norm(x @ before)
        assert percent == pytest.approx(expected, abs=0.02)


def test_front_to_back_each_layer_meets_what_the_pruned_ones_give() -> None:
    found = {}
    for sequential in (True, False):
        model, _ = press(mlp(), data(), method="wanda", ratio=0.5, sequential=sequential)
        first = mlp()
        if sequential:
            first.graph.initializers["w1"].const_value = ir.Tensor(weights(model)["w1"])
        w = weights(first)
        hidden = np.maximum(rows() @ w["w1"] + w["b1"], 0)
        scores = np.abs(w["w2"]) * np.linalg.norm(hidden.astype(np.float64), axis=0)
        limit = np.sort(scores, axis=1)[:, 23:24]
        np.testing.assert_array_equal(weights(model)["w2"] == 0, scores <= limit)
        found[sequential] = weights(model)["w2"]
    assert not np.array_equal(found[True], found[False])


# ------------------------------------------------------------------------------------------------------ convolutions


def test_the_gram_matrix_of_patches_is_exact() -> None:
    model, x = cnn(), images(6)
    layers = [found for found in Choice(("Conv",), (), 0).find(model) if isinstance(found, Prunable)]
    calibration = Calibration([{"x": part} for part in np.split(x, 2)], threads=1)
    found = dict(measured(model, layers, calibration, 0.01))
    by_name = {layer.key: known for layer, known in found.items()}
    first, depthwise = by_name["c1"], by_name["c2"]
    assert isinstance(first, Measured)
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    patches = windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, 36)
    np.testing.assert_allclose(first.gram, patches.T @ patches, rtol=1e-4, atol=1e-2)
    # and the products of patches with the matrix are the convolution's outputs
    outputs = patches @ layers[0].matrix().T.astype(np.float64)
    probe = cnn()
    probe.graph.outputs[0] = next(v for n in probe.graph for v in n.outputs if v.name == "a")
    np.testing.assert_allclose(outputs, run(probe, {"x": x})[0].transpose(0, 2, 3, 1).reshape(-1, 8), atol=1e-3)
    assert isinstance(depthwise, Measured)
    assert (depthwise.whole, depthwise.gram.shape) == (False, (8, 8))
    assert depthwise.norms(layers[1]).shape == (8, 9)


def test_convolutions_are_pruned_by_every_method() -> None:
    x, expected = images(8, seed=9), run(cnn(), {"x": images(8, seed=9)})[0]
    found = {}
    for method in ("magnitude", "sparsegpt"):
        model, report = press(cnn(), Calibration([{"x": images()}], threads=1), method=method, exclude=("c2",))
        assert set(report.details["layers"]) == {"c1", "c3", "w"}
        assert reasons(report) == {"d": "excluded by name"}
        found[method] = sqnr(expected, run(model, {"x": x})[0])
    assert found["sparsegpt"] > found["magnitude"] + 1


def test_grouped_convolutions_are_weighed_by_their_channels() -> None:
    model, report = press(cnn(), Calibration([{"x": images()}], threads=1), method="sparsegpt")
    layer = report.details["layers"]["c2"]
    assert layer["method"] == "wanda"
    assert "patches" in layer["instead_of"]
    assert (np.count_nonzero(weights(model)["c2"].reshape(8, 9), axis=1) == 5).all()


# ------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("ratio", "storage", "form"), [
    (0.5, "auto", "bitmap"), (0.5, "sparse", "dense"), (0.8, "sparse", "sparse"), (0.99, "auto", "sparse"),
])  # fmt: skip
def test_bytes_fall_and_outputs_do_not_change(ratio: float, storage: str, form: str) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[b, 64] x, float[64, 250] w) => (float[b, 250] y)
        { y = MatMul(x, w) }"""
    x, w = {"x": normal(3, 64)}, {"w": normal(64, 250, seed=1)}
    plain, _ = press(model_from(text, w), ratio=ratio)
    model, report = press(model_from(text, w), ratio=ratio, storage=storage)
    assert report.details["bytes"] == {"dense": "dense, as many as before: packing, or store_sparse, makes the file "
                                       "smaller"}.get(form, f"1 {form}")  # fmt: skip
    assert report.bytes_after < (0.75 if form != "dense" else 1.01) * report.bytes_before
    np.testing.assert_array_equal(run(plain, x)[0], run(model, x)[0])
    assert "no speed-up" in report.details["speed"]


def test_the_pass_is_not_the_identity() -> None:
    model, report = press(mlp())
    zeros = sum(int(np.count_nonzero(a == 0)) for a in weights(model).values())
    assert zeros == (32 * 48 + 16 * 48 + 16 * 8) // 2
    assert report.details["nonzeros"] == zeros
    assert json.loads(json.dumps(report.to_json()))["details"]["layers"]["w1"]["weight_error_percent"] > 1


# --------------------------------------------------------------------------------------------------------------- left


def one(body: str, declared: str, made: dict[str, Array], output: str = "float[b, 16] y", **kwargs: Any) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["": 20]> g (float[b, 16] x, {declared}) => ({output}) {{ {body} }}'
    return model_from(text, made, **kwargs)


def test_what_stays_as_it_is_has_a_reason() -> None:
    square, half = normal(16, 16), normal(16, 16).astype(np.float16)
    cases = {
        "shared": one("h = MatMul(x, w) y = Add(h, w)", "float[16, 16] w", {"w": square}, "float[16, 16] y"),
        "left factor": one("y = MatMul(w, x)", "float[16, 16] w", {"w": square}, "float[16, 16] y", infer=False),
        "fp16": one("c = Cast<to = 10>(x) h = MatMul(c, w) y = Cast<to = 1>(h)", "float16[16, 16] w", {"w": half}),
        "alpha": one("y = Gemm<alpha = 2.0>(x, w)", "float[16, 16] w", {"w": square}),
        "nan": one("y = MatMul(x, w)", "float[16, 16] w", {"w": np.full((16, 16), np.nan, np.float32)}),
        "no weight": one("y = MatMul(x, w)", "float[16, 16] w", {}),
        "excluded": one("y = MatMul(x, skip)", "float[16, 16] skip", {"skip": square}),
        "zero": one("y = MatMul(x, w)", "float[16, 16] w", {"w": np.zeros((16, 16), np.float32)}),
    }
    found = {}
    for name, model in cases.items():
        _, report = press(model, exclude=("skip",), optional=True)
        assert report.changed == 0
        found[name] = sorted(reasons(report).values())
    assert found == {
        "shared": ["the weight is also read by Add in fp32"],
        "left factor": ["the weight is the left factor"],
        "fp16": ["the weight is float16, not fp32"],
        "alpha": ["Gemm with transA, alpha or beta"],
        "nan": ["the weight holds NaN or infinity"],
        "no weight": ["both inputs are activations"],
        "excluded": ["excluded by name"],
        "zero": ["it is as sparse already"],
    }


def test_a_weight_that_the_graph_returns_stays() -> None:
    model = one("y = MatMul(x, w)", "float[16, 16] w", {"w": normal(16, 16)})
    model.graph.outputs.append(model.graph.initializers["w"])
    with pytest.raises(InputError, match="output of the graph"):
        press(model)


def test_embeddings_only_where_asked_for() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (int64[b, s] ids, float[40, 16] e, float[16, 40] w)
        => (float[b, s, 40] y) { h = Gather(e, ids) y = MatMul(h, w) }"""
    made = {"e": normal(40, 16), "w": normal(16, 40)}
    calibration = Calibration([{"ids": np.arange(40).reshape(4, 10)}], threads=1)
    _, report = press(model_from(text, made), calibration, method="sparsegpt")
    assert reasons(report) == {"h": "Gather is not among the operators to prune"}
    operators = ("MatMul", "Gather")
    model, report = press(model_from(text, made), calibration, method="sparsegpt", operators=operators)
    assert report.details["layers"]["e"]["method"] == "magnitude"
    assert np.count_nonzero(weights(model)["e"]) == 320


def test_a_weight_of_two_products_is_pruned_for_both_inputs() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[b, 16] x, float[b, 16] z, float[16, 40] w)
        => (float[b, 40] y, float[b, 40] v) { y = MatMul(x, w) v = MatMul(z, w) }"""
    w = normal(16, 40)
    x, z = normal(50, 16, seed=1), normal(50, 16, seed=2) * np.linspace(0.1, 3, 16, dtype=np.float32)
    model, report = press(model_from(text, {"w": w}), Calibration([{"x": x, "z": z}], threads=1), method="wanda")
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(0) + (z.astype(np.float64) ** 2).sum(0))
    scores = np.abs(w.T) * norms
    np.testing.assert_array_equal(weights(model)["w"].T == 0, scores <= np.sort(scores, axis=1)[:, 7:8])
    assert (report.seen, report.changed) == (2, 1)


def test_inputs_that_cannot_be_measured_leave_magnitude() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[b, 16] x, bool c, float[16, 16] w) => (float[b, 16] y)
        { y = If (c) <then_branch = t () => (float[b, 16] p) { p = MatMul(x, w) },
                      else_branch = e () => (float[b, 16] q) { q = Identity(x) }> }"""
    calibration = Calibration([{"x": normal(4, 16), "c": np.array(True)}], threads=1)
    _, report = press(model_from(text, {"w": normal(16, 16)}, infer=False), calibration, method="sparsegpt")
    assert report.details["layers"]["w"]["method"] == "magnitude"
    assert "subgraph" in report.details["layers"]["w"]["instead_of"]


def test_an_input_that_is_always_zero_leaves_magnitude() -> None:
    calibration = data(np.zeros((8, 32), np.float32))
    _, report = press(mlp(), calibration, method="sparsegpt")
    assert "zero on all calibration data" in report.details["layers"]["w1"]["instead_of"]


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("options", [
    {"ratio": 0.0}, {"ratio": 1.0}, {"pattern": "4:2"}, {"pattern": "half"}, {"pattern": "2:4", "ratio": 0.5},
    {"scope": "global", "method": "wanda"}, {"scope": "global", "pattern": "2:4"}, {"storage": "zip"}, {"bits": 4},
], ids=str)  # fmt: skip
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PruneMagnitude(**options)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_methods_that_measure_need_data(method: str) -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        press(mlp(), method=method)


def test_the_plan_changes_nothing_and_repeats_itself() -> None:
    model = mlp()
    before = {name: array.copy() for name, array in weights(model).items()}
    settings_ = PruneMagnitude(minimum_elements=0, method="sparsegpt")
    plans = [settings_.plan(model, data()) for _ in range(2)]
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, before[name])
    assert json.dumps(plans[0].actions) == json.dumps(plans[1].actions)
    for name in plans[0].arrays:
        np.testing.assert_array_equal(plans[0].arrays[name], plans[1].arrays[name])
    assert [action["weight"] for action in plans[0].actions] == ["w1", "w2", "w3"]


def test_stages_stand_behind_each_other() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
        g (float[b, 16] x, float[16, 16] w1, float[16, 16] w2, float[16, 16] w3, float[16, 16] w4) => (float[b, 16] y)
        { q = MatMul(x, w1) k = MatMul(x, w2) s = Add(q, k) o = MatMul(s, w3) t = MatMul(x, w4) y = Add(o, t) }"""
    model = model_from(text, {f"w{i}": normal(16, 16, seed=i) for i in range(1, 5)})
    layers = [found for found in Choice(("MatMul",), (), 0).find(model) if isinstance(found, Prunable)]
    assert [[layer.key for layer in stage] for stage in stages(model, layers)] == [["w1", "w2"], ["w3", "w4"]]
