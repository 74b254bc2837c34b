# SPDX-License-Identifier: Apache-2.0
"""Structured pruning makes matrices smaller, refits what reads them, and says what stays and why."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import Array, model_from, normal, reasons, run, to_bytes, weights_of
from pydantic import ValidationError

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.cost import multiply_adds, values_to_measure
from onnxpress.pipeline.passes import prune_structured
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.prune_structured import PruneStructured
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.structure import analyze, mask
from onnxpress.pipeline.structure.timing import speed_up

TWO_LAYERS = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 8] x, float[8, 32] w1, float[32] b1, float[32, 32] w2, float[32] b2, float[32, 3] w3, float[3] b3)
    => (float[b, 3] y)
{
    h = MatMul(x, w1)
    i = Add(h, b1)
    j = Relu(i)
    k = MatMul(j, w2)
    l = Add(k, b2)
    m = Relu(l)
    n = MatMul(m, w3)
    y = Add(n, b3)
}
"""
HEADS = """
<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>
g (float[b, s, 16] x, float[16, 32] w1, float[16, 32] w2, float[16, 32] w3, float[32, 16] w4) => (float[b, s, 16] y)
{
    q = MatMul(x, w1)
    k = MatMul(x, w2)
    v = MatMul(x, w3)
    a = com.microsoft.MultiHeadAttention<num_heads = 8>(q, k, v)
    o = MatMul(a, w4)
    y = Add(o, x)
}
"""
CHANNELS = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 3, 8, 8] x, float[16, 3, 3, 3] w1, float[16] b1, float[4, 16, 3, 3] w2) => (float[b, 4] y)
{
    h = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    i = Relu(h)
    j = Conv<pads = [1, 1, 1, 1]>(i, w2)
    k = GlobalAveragePool(j)
    y = Flatten(k)
}
"""
SHAPES = {
    TWO_LAYERS: {"w1": (8, 32), "b1": (32,), "w2": (32, 32), "b2": (32,), "w3": (32, 3), "b3": (3,)},
    HEADS: {"w1": (16, 32), "w2": (16, 32), "w3": (16, 32), "w4": (32, 16)},
    CHANNELS: {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (4, 16, 3, 3)},
}
INPUTS = {TWO_LAYERS: (64, 8), HEADS: (6, 10, 16), CHANNELS: (8, 3, 8, 8)}
SOME = {"multiple": 1, "channel_multiple": 1}


def model_of(text: str, **changed: Array) -> ir.Model:
    weights = {name: normal(*shape, seed=i, scale=0.5) for i, (name, shape) in enumerate(SHAPES[text].items())}
    return model_from(text, {**weights, **changed})


def data_of(text: str, seed: int = 9) -> Calibration:
    return Calibration([{"x": normal(*INPUTS[text], seed=seed + i)} for i in range(12)], threads=1)


def cost(model: ir.Model, calibration: Calibration) -> int:
    return sum(multiply_adds(model, calibration.shapes(model, values_to_measure(model))).values())


def error(model: ir.Model, other: ir.Model, text: str) -> float:
    x = {"x": normal(*INPUTS[text], seed=77)}
    (before,), (after,) = run(model, x), run(other, x)
    return float(np.square(before - after).sum() / np.square(before).sum())


@pytest.mark.parametrize("text", SHAPES, ids=["neurons", "heads", "channels"])
@pytest.mark.parametrize("importance", ["reconstruction", "activation", "magnitude"])
def test_weights_and_operations_really_fall(text: str, importance: Any) -> None:
    model, calibration = model_of(text), data_of(text)
    before, old = cost(model, calibration), to_bytes(model)
    settings = PruneStructured(multiply_adds=0.3, importance=importance, **SOME)
    pruned, report = run_pass(settings, model.clone(), calibration)
    assert to_bytes(model) == old
    assert cost(pruned, calibration) <= 0.7 * before
    assert report.bytes_after < report.bytes_before
    assert report.changed >= 1
    x = {"x": normal(*INPUTS[text], seed=5)}
    assert run(pruned, x)[0].shape == run(model, x)[0].shape
    assert 0 < error(model, pruned, text) < 1


@pytest.mark.parametrize("text", SHAPES, ids=["neurons", "heads", "channels"])
def test_without_repair_the_cut_is_the_mask(text: str) -> None:
    model, calibration = model_of(text), data_of(text)
    settings = PruneStructured(ratio=0.25, repair=False, **SOME)
    plan = settings.plan(model, calibration)
    removed = {
        a["group"]: np.setdiff1d(np.arange(a["units"]), plan.arrays[f"kept|{a['group']}"]).tolist()
        for a in plan.actions
    }
    assert removed
    assert all(removed.values())
    masked = model.clone()
    mask(analyze(masked), removed)
    pruned = settings.apply(model.clone(), plan)
    x = {"x": normal(*INPUTS[text], seed=5)}
    np.testing.assert_allclose(run(pruned, x)[0], run(masked, x)[0], rtol=1e-4, atol=1e-5)


def _alike(text: str) -> dict[str, Array]:
    """Heads that resemble each other, as trained ones do: random ones cannot make up for each other."""
    if text != HEADS:
        return {}
    halves = {name: normal(16, 16, seed=i) for i, name in enumerate(("w1", "w2", "w3"))}
    return {n: np.concatenate([half, half + normal(16, 16, seed=8, scale=0.1)], axis=1) for n, half in halves.items()}


@pytest.mark.parametrize("text", SHAPES, ids=["neurons", "heads", "channels"])
def test_repair_loses_less(text: str) -> None:
    model = model_of(text, **_alike(text))
    lost = {
        repair: error(model, run_pass(PruneStructured(ratio=0.5, repair=repair, **SOME), model.clone(),
                                      data_of(text))[0], text)
        for repair in (True, False)
    }  # fmt: skip
    assert lost[True] < 0.6 * lost[False]


def test_twins_are_found_and_made_up_for() -> None:
    """Every second neuron repeats another one: half of them are not needed, and with the repair none is missed."""
    w1, b1 = normal(8, 32, seed=1), normal(32, seed=2)
    w1[:, 16:], b1[16:] = w1[:, :16], b1[:16]
    model = model_of(TWO_LAYERS, w1=w1, b1=b1)
    settings = PruneStructured(ratio=0.5, exclude=("w3",), damping=1e-7, **SOME)
    pruned, report = run_pass(settings, model.clone(), data_of(TWO_LAYERS))
    assert weights_of(pruned)["w1"].shape == (8, 16)
    assert weights_of(pruned)["w2"].shape == (16, 32)
    kept = {tuple(column) for column in weights_of(pruned)["w1"].numpy().T}
    assert len(kept) == 16
    assert error(model, pruned, TWO_LAYERS) < 1e-6
    assert reasons(report)["w2:1"] == "excluded by name"


def test_a_bias_takes_up_what_dead_neurons_always_give() -> None:
    """A neuron that is constant on all data costs nothing: its share moves into the bias."""
    w1, b1 = normal(8, 32, seed=1), normal(32, seed=2)
    w1[:, 5], b1[5] = 0, 3.0
    model = model_of(TWO_LAYERS, w1=w1, b1=b1)
    settings = PruneStructured(ratio=1 / 32, minimum=0.5, exclude=("w3",), damping=1e-7, **SOME)
    pruned, _ = run_pass(settings, model.clone(), data_of(TWO_LAYERS))
    assert 5 not in settings.plan(model, data_of(TWO_LAYERS)).arrays["kept|w1:1"]
    assert error(model, pruned, TWO_LAYERS) < 1e-8


def test_heads_are_counted_by_their_attribute() -> None:
    pruned, report = run_pass(PruneStructured(ratio=0.25), model_of(HEADS), data_of(HEADS))
    node = next(n for n in pruned.graph if n.op_type == "MultiHeadAttention")
    assert node.attributes["num_heads"].value == 6
    assert weights_of(pruned)["w4"].shape == (24, 16)
    assert report.details["heads"] == {"groups": 1, "units": 8, "kept": 6}


def test_channels_are_left_in_blocks() -> None:
    """By default 16 channels can be halved and nothing else; of 64, a multiple of 16 is left."""
    (group,) = analyze(model_of(CHANNELS)).groups
    assert PruneStructured(ratio=0.5)._sizes(group) == [0, 8]
    shapes = {"w1": (64, 3, 3, 3), "b1": (64,), "w2": (4, 64, 3, 3)}
    wide = model_from(
        CHANNELS.replace("16", "64"), {n: normal(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    )
    _, report = run_pass(PruneStructured(ratio=0.4), wide, data_of(CHANNELS))
    assert report.details["channels"]["kept"] == 32


def test_bytes_as_a_budget() -> None:
    _, report = run_pass(PruneStructured(bytes=0.4, **SOME), model_of(TWO_LAYERS), data_of(TWO_LAYERS))
    assert report.bytes_after <= 0.6 * report.bytes_before


def test_the_plan_is_data_and_replays() -> None:
    model = model_of(TWO_LAYERS)
    settings = PruneStructured(multiply_adds=0.3, **SOME)
    plan = settings.plan(model, data_of(TWO_LAYERS))
    again = settings.plan(model, data_of(TWO_LAYERS))
    one, other = (to_bytes(settings.apply(model.clone(), p)) for p in (plan, again))
    assert one == other
    assert all(isinstance(action["group"], str) for action in plan.actions)


def test_the_manifest_replays_the_cut() -> None:
    model = model_of(TWO_LAYERS)
    pruned, report = run_pass(PruneStructured(ratio=0.25), model.clone(), data_of(TWO_LAYERS))
    saved = json.loads(json.dumps(report.to_json()))["details"]["cut"]
    again = model.clone()
    analyze(again).cut({entry["group"]: entry["removed"] for entry in saved})
    shapes = [{name: tensor.shape.numpy() for name, tensor in weights_of(m).items()} for m in (pruned, again)]
    assert shapes[0] == shapes[1]
    assert all(entry["error"] <= entry["error_unrepaired"] for entry in saved)
    # What nobody refits is the same to the last bit
    np.testing.assert_array_equal(weights_of(pruned)["w1"].numpy(), weights_of(again)["w1"].numpy())


def test_magnitude_needs_no_data() -> None:
    settings = PruneStructured(ratio=0.25, importance="magnitude", repair=False)
    assert settings.needs == ()
    w1, w2 = normal(8, 32, seed=1), normal(32, 32, seed=3)
    w1[:, :8] *= 1e-3
    w2[:8] *= 1e-3
    pruned, _ = run_pass(settings, model_of(TWO_LAYERS, w1=w1, w2=w2))
    np.testing.assert_array_equal(weights_of(pruned)["w1"].numpy(), w1[:, 8:])


def test_latency_is_measured_until_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts multiply-adds, the budget ends close to what was asked, from the safe side."""
    calibration, model = data_of(TWO_LAYERS), model_of(TWO_LAYERS)
    asked: list[float] = []

    def clock(before: ir.Model, after: ir.Model, data: Calibration) -> float:
        asked.append(cost(before, data) / cost(after, data))
        return asked[-1]

    monkeypatch.setattr(prune_structured, "speed_up", clock)
    settings = PruneStructured(latency=1.5, **SOME)
    pruned, report = run_pass(settings, model.clone(), calibration)
    assert 1.5 <= cost(model, calibration) / cost(pruned, calibration) < 1.75
    assert len(report.details["timed"]) == len(asked) > 2
    with pytest.raises(InputError, match="the smallest form is"):
        run_pass(PruneStructured(latency=1000.0, **SOME), model.clone(), calibration)


def test_the_clock_takes_turns_and_says_a_ratio() -> None:
    calibration, model = data_of(TWO_LAYERS), model_of(TWO_LAYERS)
    assert 0.01 < speed_up(model, model.clone(), calibration, seconds=0.2) < 100


@pytest.mark.parametrize(
    "settings",
    [{}, {"ratio": 0.5, "bytes": 0.5}, {"ratio": 1.0}, {"latency": 0.5}, {"ratio": 0.5, "kinds": ("cells",)},
     {"ratio": 0.5, "importance": "luck"}],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PruneStructured(**settings)


def test_too_much_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot save 99% of the multiply-adds: cutting all it may saves \d+%"):
        run_pass(PruneStructured(multiply_adds=0.99, **SOME), model_of(TWO_LAYERS), data_of(TWO_LAYERS))


def test_nothing_to_cut_is_an_error_with_the_reason() -> None:
    one_layer = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[b, 8] x, float[8, 4] w1) => (float[b, 4] y) { y = MatMul(x, w1) }
    """
    with pytest.raises(InputError, match="nothing to do"):
        run_pass(PruneStructured(ratio=0.5, importance="magnitude", repair=False),
                 model_from(one_layer, {"w1": normal(8, 4)}))  # fmt: skip


def test_what_stays_is_named() -> None:
    _, report = run_pass(PruneStructured(ratio=0.25), model_of(TWO_LAYERS), data_of(TWO_LAYERS))
    assert reasons(report)["w3:1"] == "it is an output of the graph (y)"
    assert reasons(report)["w1:0"].startswith("it is an input of the graph")
