# SPDX-License-Identifier: Apache-2.0
"""Layers as two thin ones: fewer bytes and operations, outputs as near as promised, and reasons for what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import Array, count, model_from, normal, reasons, run, to_bytes, weights_of
from pydantic import ValidationError

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.cost import multiply_adds, values_to_measure
from onnxpress.pipeline.passes import factorize
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.factor_speed import Stopwatch
from onnxpress.pipeline.passes.factorize import Factorize
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.statistics import Calibration

NET = """
<ir_version: 10, opset_import: ["": 18]>
net (float[batch, 48] x, float[48, 64] w1, float[64] b1, float[64, 32] w2, float[32] b2) => (float[batch, 32] y)
{
    hidden = MatMul(x, w1)
    biased = Add(hidden, b1)
    active = Relu(biased)
    y = Gemm(active, w2, b2)
}
"""


def nearly(rows: int, columns: int, rank: int, *, seed: int = 0, noise: float = 0.01) -> Array:
    """A matrix of that rank, and a little noise."""
    exact = normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1) / np.float32(np.sqrt(rank))
    return exact + normal(rows, columns, seed=seed + 2, scale=noise)


def net(**changed: Array) -> ir.Model:
    weights = {
        "w1": nearly(48, 64, 8),
        "b1": normal(64, seed=7),
        "w2": nearly(64, 32, 6, seed=20),
        "b2": normal(32, seed=8),
    }
    return model_from(NET, {**weights, **changed})


def data(seed: int = 0, batches: int = 6, **shapes: tuple[int, ...]) -> Calibration:
    shapes = shapes or {"x": (64, 48)}
    random = np.random.default_rng(seed)
    return Calibration(
        [{k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(batches)],
        threads=1,
    )


def factorized(model: ir.Model, calibration: Calibration | None = None, **settings: Any) -> tuple[ir.Model, PassReport]:
    defaults: dict[str, Any] = {"measure": False, "minimum_elements": 0, "whiten": calibration is not None}
    return run_pass(Factorize(**{**defaults, **settings}), model, calibration)


def off(before: bytes, model: ir.Model, feeds: dict[str, Array]) -> list[float]:
    """The relative error of every output."""
    pairs = zip(run(before, feeds), run(model, feeds), strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs]


def work(model: ir.Model, calibration: Calibration) -> int:
    return sum(multiply_adds(model, calibration.shapes(model, values_to_measure(model))).values())


@pytest.mark.parametrize("whiten", [True, False])
def test_bytes_and_operations_fall_and_the_outputs_stay(whiten: bool) -> None:
    model, calibration = net(), data()
    before, operations = to_bytes(model), work(model, calibration)
    model, report = factorized(model, calibration, whiten=whiten, energy=0.99)
    assert report.changed == 2
    assert report.bytes_after < 0.5 * report.bytes_before
    assert work(model, calibration) < 0.5 * operations
    assert count(model) == {"MatMul": 3, "Add": 1, "Relu": 1, "Gemm": 1}
    assert off(before, model, {"x": normal(32, 48, seed=77)})[0] < 0.05
    assert report.details["parameters_saved_percent"] > 50
    assert report.details["multiply_adds_saved_percent"] > 50
    assert sum(int(np.prod(t.shape.numpy())) for t in weights_of(model).values()) * 4 == report.bytes_after


def test_the_reported_error_is_that_of_the_output_on_the_data() -> None:
    model, calibration = net(w2=normal(64, 32, seed=3)), data()
    feeds = {"x": np.concatenate([batch["x"] for batch in calibration.batches])}
    model.graph.outputs[0] = model.graph[0].outputs[0]
    model.graph.outputs[0].shape = ir.Shape(["batch", 64])
    for node in list(model.graph)[:0:-1]:
        model.graph.remove(node, safe=True)
    before = to_bytes(model)
    model, report = factorized(model, calibration, energy=0.9, multiple=1, maximum_error=0.9, keep_mean=False)
    layer = report.details["layers"]["w1"]
    assert layer["output_error"] == pytest.approx(off(before, model, feeds)[0], abs=2e-3)
    assert layer["rank"] < 9


def test_outputs_are_kept_better_than_by_the_weight_alone() -> None:
    scale = np.exp(normal(48, seed=4) * 1.5)
    batches = [{"x": normal(32, 48, seed=seed) * scale} for seed in range(8)]
    unseen, errors = {"x": normal(64, 48, seed=99) * scale}, []
    for whiten in (True, False):
        model = net(w1=normal(48, 64, seed=1))
        before = to_bytes(model)
        model, _ = factorized(
            model, Calibration(batches, threads=1), whiten=whiten, rank="ratio", maximum_error=9, exclude=("w2",)
        )
        errors += off(before, model, unseen)
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("kind", ["add", "gemm", "conv", "none"])
def test_the_mean_of_the_output_is_kept_by_the_bias(kind: str) -> None:
    bodies = {
        "add": "float[b, 48] x, float[48, 64] w, float[64] c) => (float[b, 64] y) { h = MatMul(x, w) y = Add(h, c) }",
        "gemm": "float[b, 48] x, float[48, 64] w) => (float[b, 64] y) { y = Gemm(x, w) }",
        "conv": "float[b, 48, 1] x, float[64, 48, 1] w, float[64] c) => (float[b, 64, 1] y) { y = Conv(x, w, c) }",
        "none": "float[b, 48] x, float[48, 64] w) => (float[b, 64] y) { y = MatMul(x, w) }",
    }
    weight = normal(48, 64, seed=1, scale=0.2)
    weights = {
        "w": weight.T[:, :, None] if kind == "conv" else weight,
        "c": normal(64) * np.float32("c)" in bodies[kind]),
    }
    weights = {name: array for name, array in weights.items() if name == "w" or array.any()}
    x = normal(400, 48, seed=3) + 5 * normal(48, seed=4)
    feeds, errors = {"x": x[:, :, None] if kind == "conv" else x}, []
    for keep_mean in (True, False):
        model = model_from(f'<ir_version: 10, opset_import: ["": 18]> g ({bodies[kind]}', weights)
        before = to_bytes(model)
        settings = {"rank": "ratio", "maximum_error": 9, "keep_mean": keep_mean}
        model, report = factorized(model, Calibration([feeds], threads=1), **settings)
        exact, found = run(before, feeds)[0], run(model, feeds)[0]
        errors.append(float(np.linalg.norm(exact - found)))
        if keep_mean:
            assert np.allclose(exact.mean(axis=0), found.mean(axis=0), atol=1e-4)
            relative = np.linalg.norm(exact - found) / np.linalg.norm(exact - exact.mean(axis=0))
            assert report.details["layers"]["w"]["output_error"] == pytest.approx(relative, abs=2e-3)
            assert count(model).get("Add", 0) == (kind in ("add", "none"))
    assert errors[0] < errors[1]


GEMMS = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 40] x, float[24, 40] w, float[24] c) => (float[b, 24] y)
{
    y = Gemm<transB = 1, alpha = 0.5, beta = 3.0>(x, w, c)
}
"""


def test_a_gemm_keeps_its_bias_alpha_and_beta() -> None:
    model = model_from(GEMMS, {"w": nearly(24, 40, 5), "c": normal(24)})
    before = to_bytes(model)
    model, _ = factorized(model, energy=0.99)
    assert count(model) == {"MatMul": 1, "Gemm": 1}
    assert off(before, model, {"x": normal(9, 40, seed=5)})[0] < 0.05


def test_a_gemm_of_a_transposed_input_stays() -> None:
    text = GEMMS.replace("float[b, 40] x", "float[40, b] x").replace("transB = 1", "transA = 1, transB = 1")
    model = model_from(text, {"w": nearly(24, 40, 5), "c": normal(24)})
    with pytest.raises(InputError, match="Gemm with transA"):
        factorized(model)


def test_a_weight_behind_a_transpose_is_stored_as_it_is_read() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[b, 5, 40] x, float[24, 40] w) => (float[b, 5, 24] y) { t = Transpose(w) y = MatMul(x, t) }
    """
    model = model_from(text, {"w": nearly(24, 40, 5)})
    before = to_bytes(model)
    model, _ = factorized(model, data(x=(20, 5, 40)), energy=0.99)
    assert count(model) == {"MatMul": 2}
    assert off(before, model, {"x": normal(2, 5, 40)})[0] < 0.05


CONVOLUTIONS = {
    "plain": ("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", (24, 6, 3, 3), (2, 6, 9, 9)),
    "strided": ("strides = [2, 1], dilations = [1, 2], pads = [0, 1, 2, 3]", (24, 6, 3, 3), (2, 6, 12, 12)),
    "same": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (24, 6, 3, 3), (2, 6, 9, 9)),
    "pointwise": ("group = 1", (24, 36, 1, 1), (2, 36, 5, 5)),
    "one axis": ("pads = [2, 2]", (24, 6, 5), (2, 6, 20)),
    "three axes": ("dilations = [1, 2, 1]", (24, 4, 2, 2, 2), (2, 4, 6, 6, 6)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("whiten", [True, False])
def test_convolutions_are_split_into_a_thin_and_a_pointwise_one(kind: str, whiten: bool) -> None:
    attributes, size, shape = CONVOLUTIONS[kind]
    sizes, dims = ", ".join(map(str, size)), ", ".join(["n", *map(str, shape[1:])])
    free = ", ".join(["n", str(size[0]), *(f"d{i}" for i in range(len(size) - 2))])
    text = f"""
    <ir_version: 10, opset_import: ["": 18]>
    g (float[{dims}] x, float[{sizes}] w, float[{size[0]}] c) => (float[{free}] y) {{ y = Conv<{attributes}>(x, w, c) }}
    """
    model = model_from(text, {"w": nearly(size[0], int(np.prod(size[1:])), 4).reshape(size), "c": normal(size[0])})
    before, calibration = to_bytes(model), data(x=shape)
    operations = work(model, calibration)
    model, report = factorized(model, calibration, whiten=whiten, energy=0.99)
    assert count(model) == {"Conv": 2}
    assert report.details["chosen_by_weight_alone"] == {}
    assert work(model, calibration) < 0.7 * operations
    feeds = {"x": np.random.default_rng(5).standard_normal(shape).astype(np.float32)}
    assert off(before, model, feeds)[0] < 0.05


def test_the_error_of_a_convolution_is_that_of_its_output() -> None:
    """Its patches are measured: with inputs of very different channels the right filters are kept."""
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[n, 6, 9, 9] x, float[24, 6, 3, 3] w) => (float[n, 24, 9, 9] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }
    """
    scale = np.exp(2 * normal(6, seed=3)).reshape(1, 6, 1, 1)
    batches = [{"x": normal(4, 6, 9, 9, seed=seed) * scale} for seed in range(4)]
    errors = []
    for whiten in (True, False):
        model = model_from(text, {"w": normal(24, 6, 3, 3, seed=1)})
        before = to_bytes(model)
        settings = {"whiten": whiten, "rank": "ratio", "maximum_error": 9}
        model, report = factorized(model, Calibration(batches, threads=1), **settings)
        errors += off(before, model, {"x": np.concatenate([batch["x"] for batch in batches])})
        if whiten:
            assert report.details["layers"]["w"]["output_error"] == pytest.approx(errors[0], abs=2e-3)
    assert errors[0] < 0.7 * errors[1]


def test_convolutions_in_groups_stay() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[n, 6, 9, 9] x, float[24, 2, 3, 3] w) => (float[n, 24, 7, 7] y) { y = Conv<group = 3>(x, w) }
    """
    with pytest.raises(InputError, match="in 3 groups"):
        factorized(model_from(text, {"w": normal(24, 2, 3, 3)}))


EMBEDDING = """
<ir_version: 10, opset_import: ["": 18]>
g (int64[b, s] ids, float[90, 40] w) => (float[b, s, 40] y) { y = Gather(w, ids) }
"""


def test_an_embedding_becomes_a_thin_table_when_asked_for() -> None:
    model = model_from(EMBEDDING, {"w": nearly(90, 40, 6)})
    before = to_bytes(model)
    with pytest.raises(InputError, match="nothing to do"):
        factorized(model)
    model, report = factorized(model, operators=("Gather",), energy=0.99, measure=True)
    assert count(model) == {"Gather": 1, "MatMul": 1}
    assert report.bytes_after < 0.5 * report.bytes_before
    assert off(before, model, {"ids": np.arange(12).reshape(3, 4)})[0] < 0.05
    assert "weight_error" in report.details["layers"]["w"]


def test_a_shared_weight_is_factorized_once() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[b, 40] x, float[b, 40] z, float[40, 32] w) => (float[b, 32] y, float[b, 32] v)
    { y = MatMul(x, w) v = MatMul(z, w) }
    """
    model = model_from(text, {"w": nearly(40, 32, 5)})
    before = to_bytes(model)
    model, report = factorized(model, data(x=(90, 40), z=(90, 40)), energy=0.99)
    assert report.changed == 1
    assert count(model) == {"MatMul": 4}
    assert len(weights_of(model)) == 2
    assert report.details["chosen_by_weight_alone"] == {}
    assert report.details["layers"]["w"]["output_error"] < 0.1
    assert max(off(before, model, {"x": normal(4, 40), "z": normal(4, 40, seed=2)})) < 0.05


def test_a_weight_that_is_read_in_two_ways_stays() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (int64[b] ids, float[b, 40] x, float[90, 40] w) => (float[b, 40] e, float[b, 90] y)
    { e = Gather(w, ids) t = Transpose(w) y = MatMul(x, t) }
    """
    for operators in (("MatMul",), ("MatMul", "Gather")):
        with pytest.raises(InputError, match="the weight is also read by"):
            factorized(model_from(text, {"w": nearly(90, 40, 5)}), operators=operators)


def test_what_stays_has_a_reason() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[b, 40] x, float[40, 40] w1, float[40, 40] w2, float[40, 40] w3, float[40, 4] w4, float[40, 40] w5,
       float[40, 40] w6) => (float[b, 4] y, float[b, 40] z, float[40, 40] w6t)
    {
        a = MatMul(x, w1)
        b1 = MatMul(a, w2)
        c = MatMul(b1, w3)
        y = MatMul(c, w4)
        d = MatMul(x, w5)
        z = MatMul(d, x)
        w6t = Transpose(w6)
        e = MatMul(x, w6t)
    }
    """
    text = text.replace("z = MatMul(d, x)", "dt = Transpose(d) dd = MatMul(d, dt) z = MatMul(dd, x)")
    broken = nearly(40, 40, 4)
    broken[3, 3] = np.nan
    weights = {
        "w1": nearly(40, 40, 4),
        "w2": normal(40, 40),
        "w3": broken,
        "w4": normal(40, 4),
        "w5": nearly(40, 40, 4, seed=9),
        "w6": nearly(40, 40, 4, seed=30),
    }
    _, report = factorized(model_from(text, weights), exclude=("w5",))
    assert report.changed == 1
    found = reasons(report)
    assert "it needs rank" in found["b1"]
    assert "NaN" in found["c"]
    assert "two factors save nothing from rank 4 on" in found["y"]
    assert found["d"] == "excluded by name"
    assert found["dd"] == "the right factor is no constant"
    assert found["e"] == "the weight is an output of the graph"
    assert report.seen == 8


def test_what_was_quantized_stays() -> None:
    model, _ = run_pass(QuantizeDynamic(minimum_elements=0), net())
    with pytest.raises(InputError, match="nothing to do"):
        factorized(model)


def test_a_weight_in_fp16_stays() -> None:
    text = NET.replace("float[", "float16[")
    halves = {name: tensor.numpy().astype(np.float16) for name, tensor in weights_of(net()).items()}
    with pytest.raises(InputError, match="float16, not fp32"):
        factorized(model_from(text, halves))


def test_a_layer_whose_output_would_be_too_far_off_stays() -> None:
    model = net(w2=normal(64, 32, seed=3))
    model, report = factorized(model, rank="ratio", ratio=0.4, maximum_error=0.2)
    assert report.changed == 1
    assert "its weight would be off by" in reasons(report)["y"]


def test_the_ratio_is_that_of_the_elements() -> None:
    _, report = factorized(net(), rank="ratio", ratio=0.7, multiple=2, maximum_error=9)
    for layer in report.details["layers"].values():
        assert 55 < layer["elements_left_percent"] <= 70
        assert layer["rank"] % 2 == 0


@pytest.mark.parametrize("unit", ["parameters", "multiply_adds"])
def test_a_budget_takes_from_the_layers_that_can_spare_it(unit: str) -> None:
    model = net(w2=normal(64, 32, seed=3))
    model, report = factorized(model, data(), rank="budget", budget=0.3, budget_of=unit, multiple=2, maximum_error=0.9)
    assert list(report.details["layers"]) == ["w1"]
    assert 30 <= report.details[f"{unit}_saved_percent"] < 35
    assert "budget" in reasons(report)["y"]


def test_a_budget_out_of_reach_is_no_reason_to_break_the_limit() -> None:
    _, report = factorized(net(w2=normal(64, 32)), rank="budget", budget=0.95, maximum_error=0.3)
    assert all(layer["weight_error"] <= 0.3 for layer in report.details["layers"].values())
    assert report.details["parameters_saved_percent"] < 95


def test_a_layer_inside_a_branch_is_chosen_by_its_weight() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (bool c, float[b, 40] x, float[40, 32] w) => (float[b, 32] y)
    {
        y = If (c) <
            then_branch = t () => (float[b, 32] p) { p = MatMul(x, w) },
            else_branch = e () => (float[b, 32] q) { n = Neg(x) q = MatMul(n, w) }
        >
    }
    """
    model = model_from(text, {"w": nearly(40, 32, 5)}, infer=False)
    before = to_bytes(model)
    model, report = factorized(model, energy=0.99)
    assert report.changed == 1
    for branch in (True, False):
        assert off(before, model, {"c": np.asarray(branch), "x": normal(4, 40)})[0] < 0.05


def test_only_what_is_faster_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, tuple[int, ...]]] = []

    def ratio(self: Stopwatch, layer: factorize.Layer, rank: int, shape: tuple[int, ...]) -> float:
        asked.append((layer.key, rank, shape))
        return 0.8 if layer.key == "w1" else 1.6

    monkeypatch.setattr(Stopwatch, "ratio", ratio)
    _, report = factorized(net(), data(), measure=True, energy=0.99)
    assert asked == [("w1", 8, (64, 48)), ("w2", 8, (64, 64))]
    assert list(report.details["layers"]) == ["w2"]
    assert report.details["layers"]["w2"]["times_as_fast"] == 1.6
    assert "it was 0.80 x as fast" in reasons(report)["hidden"]


def test_without_data_products_are_timed_with_some_rows_and_convolutions_as_declared() -> None:
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[n, 6, 9, 9] x, float[n, 6, h, 9] z, float[24, 6, 3, 3] w1, float[24, 6, 3, 3] w2)
        => (float[n, 24, 7, 7] y, float[n, 24, k, 7] v)
    { y = Conv(x, w1) v = Conv(z, w2) }
    """
    weights = {name: nearly(24, 54, 4, seed=i * 10).reshape(24, 6, 3, 3) for i, name in enumerate(("w1", "w2"))}
    _, report = factorized(model_from(text, weights), measure=True, minimum_gain=1e-6)
    assert list(report.details["layers"]) == ["w1"]
    assert report.details["layers"]["w1"]["times_as_fast"] > 0
    assert "the shape of its input is not known" in reasons(report)["v"]
    assert Factorize()._shape(factorize.find_layers(net(), factorize.Plan(), **FIND)[0], {}) == (128, 48)


FIND: dict[str, Any] = {"operators": ("MatMul",), "minimum_elements": 0, "exclude": ()}


def test_each_size_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(Stopwatch, "_measured", lambda self, layer, rank, shape: made.append(rank) or 1.0)
    layer = factorize.find_layers(net(), factorize.Plan(), **FIND)[0]
    watch = Stopwatch()
    for rank in (8, 8, 16):
        watch.ratio(layer, rank, (4, 48))
    assert made == [8, 16]


def test_data_is_asked_for_where_it_is_needed() -> None:
    assert Factorize().needs == ("grams",)
    assert Factorize(whiten=False).needs == ()
    assert Factorize(whiten=False, rank="budget", budget_of="multiply_adds").needs == ("shapes",)
    with pytest.raises(InputError, match="needs calibration data"):
        run_pass(Factorize(), net())


BAD: list[dict[str, Any]] = [{"energy": 0}, {"ratio": 1.0}, {"multiple": 0}, {"rank": "all"}, {"operators": ("LSTM",)}]


@pytest.mark.parametrize("settings", BAD)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Factorize(**settings)
