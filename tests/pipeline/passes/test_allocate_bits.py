# SPDX-License-Identifier: Apache-2.0
"""`allocate_bits`: the fragile layer stays fp32, the others do not, and the budget is kept by measurement."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import Array, count, model_from, normal, run, sqnr, to_bytes

from onnxpress.contracts.errors import GateFailed, InputError
from onnxpress.exporters.graph_file import weight_bytes
from onnxpress.pipeline.passes.allocate_bits import AllocateBits
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.recipe import load_recipe
from onnxpress.pipeline.statistics import Calibration

SIZE = 32
SMALL = {"int8-static": {"minimum_elements": 0}, "int8-dynamic": {"minimum_elements": 0}}


def mlp() -> ir.Model:
    """Three layers; one channel that only the second reads is a thousand times larger, and is hardly weighed."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[n, {SIZE}] x, float[{SIZE}, {SIZE}] w0, float[{SIZE}, {SIZE}] w1, float[{SIZE}, {SIZE}] w2,
           float[{SIZE}] spike) => (float[n, {SIZE}] y) {{
            a = MatMul(x, w0)
            b = Tanh(a)
            s = Mul(b, spike)
            c = MatMul(s, w1)
            d = Tanh(c)
            y = MatMul(d, w2)
        }}"""
    spike = np.ones(SIZE, np.float32)
    spike[3] = 1000.0
    weights = {f"w{i}": normal(SIZE, SIZE, seed=i, scale=0.2) for i in range(3)}
    weights["w1"][3] /= 1000.0
    return model_from(text, weights | {"spike": spike})


def data() -> Calibration:
    return Calibration([{"x": normal(n, SIZE, seed=n)} for n in (5, 9, 16, 7)], threads=1)


def allocate(model: ir.Model, **settings: Any) -> tuple[ir.Model, PassReport]:
    return run_pass(AllocateBits(settings=SMALL, **settings), model, data())


def outputs(model: ir.Model) -> Array:
    return np.concatenate([run(model, batch)[0] for batch in data().batches])


def forms(report: PassReport) -> dict[str, str]:
    return {row["layer"]: row["form"] for row in report.details["sensitivity"]}


def test_the_fragile_layer_stays_in_floating_point() -> None:
    before = mlp()
    model, report = allocate(before.clone(), minimum_sqnr_db=30.0)
    assert forms(report) == {"w0": "int8-static", "w1": "float", "w2": "int8-static"}
    assert report.changed == 2
    assert [left.node for left in report.left] == ["c"]
    assert "dB" in report.left[0].reason
    assert sqnr(outputs(before), outputs(model)) >= 30.0
    assert weight_bytes(model) < 0.6 * weight_bytes(before)


def test_the_map_shows_which_layer_is_fragile() -> None:
    _, report = allocate(mlp(), minimum_sqnr_db=30.0)
    alone = {row["layer"]: row["alone_db"]["int8-static"] for row in report.details["sensitivity"]}
    assert alone["w1"] < 20 < 35 < min(alone["w0"], alone["w2"])


def test_measured_end_to_end_and_not_only_predicted() -> None:
    _, report = allocate(mlp(), minimum_sqnr_db=30.0)
    before = mlp()
    model, _ = allocate(before.clone(), minimum_sqnr_db=30.0)
    assert report.details["sqnr_db"] == pytest.approx(sqnr(outputs(before), outputs(model)), abs=0.02)


def test_a_mild_budget_quantizes_everything() -> None:
    model, report = allocate(mlp(), minimum_sqnr_db=-20.0)
    assert set(forms(report).values()) == {"int8-static"}
    assert not report.left
    assert count(model)["DequantizeLinear"] == 6


@pytest.mark.parametrize("minimize", ["size", "latency"])
def test_a_size_budget_is_kept_with_the_least_error(minimize: str) -> None:
    before = mlp()
    model, report = allocate(before.clone(), size_ratio=1.8, minimize=minimize)
    assert weight_bytes(before) / weight_bytes(model) >= 1.8
    assert forms(report)["w1"] == "float", "two of three layers are enough for the budget"


def test_a_size_that_cannot_be_reached_names_what_can() -> None:
    with pytest.raises(InputError, match=r"size ratio of 3\.\d\d at most, not 9"):
        allocate(mlp(), size_ratio=9.0)


def test_an_accuracy_that_no_layer_survives_is_a_failed_gate() -> None:
    with pytest.raises(GateFailed, match="no layer can leave floating point at 200 dB"):
        allocate(mlp(), minimum_sqnr_db=200.0)


def test_the_better_of_two_forms_is_taken_for_each_layer() -> None:
    """Narrower weights save more bytes; where they cost too much, the layer gets the wider form."""
    settings = {"int8-weights": {"minimum_elements": 0}, "int4-weights": {"minimum_elements": 0, "group_size": 16}}
    choices = ("int8-weights", "int4-weights")
    found = {}
    before = mlp()
    for budget in (4.5, 18.0, 24.0):
        chosen = AllocateBits(choices=choices, settings=settings, minimize="size", minimum_sqnr_db=budget)
        model, report = run_pass(chosen, before.clone(), data())
        assert sqnr(outputs(before), outputs(model)) >= budget
        found[budget] = weight_bytes(model), list(forms(report).values())
    assert found[4.5][0] < found[18.0][0] < found[24.0][0], "a stricter budget costs bytes"
    assert found[4.5][1].count("int4-weights") > found[18.0][1].count("int4-weights")
    assert "int8-weights" in found[24.0][1]


def test_a_veto_on_the_plan_keeps_a_layer_in_floating_point() -> None:
    settings, model, calibration = AllocateBits(settings=SMALL, minimum_sqnr_db=5.0), mlp(), data()
    plan = settings.plan(model, calibration)
    plan.actions = [action for action in plan.actions if action["layer"] != "w2"]
    pressed = settings.apply(model, plan)
    assert "w2" in pressed.graph.initializers
    assert "w0_int8" in pressed.graph.initializers


def test_planning_changes_nothing() -> None:
    model = mlp()
    before = to_bytes(model)
    AllocateBits(settings=SMALL, minimum_sqnr_db=30.0).plan(model, data())
    assert to_bytes(model) == before


def test_divergence_of_the_softmax_measures_as_well() -> None:
    _, report = allocate(mlp(), minimum_sqnr_db=20.0, measure="kl")
    alone = {row["layer"]: row["alone_db"]["int8-static"] for row in report.details["sensitivity"]}
    assert min(alone, key=lambda layer: alone[layer]) == "w1"


@pytest.mark.parametrize(
    "settings",
    [{}, {"minimum_sqnr_db": 20.0, "size_ratio": 2.0}, {"minimum_sqnr_db": 20.0, "settings": {"int9": {}}}],
)
def test_one_budget_and_known_choices(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give one of|unknown choices"):
        AllocateBits(**settings)


def test_without_calibration_data_it_says_so() -> None:
    with pytest.raises(InputError, match="allocate_bits needs calibration data"):
        run_pass(AllocateBits(minimum_sqnr_db=20.0), mlp())


def test_a_recipe_can_name_it(tmp_path: Any) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text("name: mixed\nvariant: quantized\npasses:\n  - {pass: allocate_bits, minimum_sqnr_db: 30.0}\n")
    assert load_recipe(str(file)).built_passes()[0].needs == ("outputs", "ranges")
