# SPDX-License-Identifier: Apache-2.0
"""Every statistic against numpy on all data together, however it was reduced; padding, and faults of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.statistics import Calibration, Statistics, Wanted

from .encoder import (
    NAMES,
    SHAPES,
    batches_of,
    calibration,
    compare,
    encoder,
    everything,
    model_of,
    padded,
    rows_of,
    values,
)

# --- against numpy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("fetch", [True, False], ids=["fetched", "in the graph"])
def test_every_statistic_on_batches_of_different_shapes(opset: int, fetch: bool) -> None:
    model, data = encoder(opset), batches_of(*SHAPES)
    wanted = everything(*NAMES) if fetch else Wanted(NAMES, (), dict.fromkeys(NAMES, -1), NAMES)
    found = calibration(data).collect(model, wanted)
    assert not found.missing
    for name in NAMES:
        arrays = values(model, data, name)
        compare(found, name, arrays, rows_of(arrays, [None] * len(arrays)), wanted)


@pytest.mark.parametrize("opset", [11, 12])
def test_opsets_before_axes_were_inputs(opset: int) -> None:
    model = model_of(
        f'<ir_version: 7, opset_import: ["": {opset}]> g (float[n, 3, 5] x) => (float[n, 3, 5] y) {{ y = Relu(x) }}'
    )
    data = [{"x": np.random.default_rng(i).standard_normal((i + 1, 3, 5)).astype(np.float32)} for i in range(3)]
    for wanted in (Wanted(["x", "y"], (), {"x": 1, "y": 2}, ["y"]), everything("y", axis=1)):
        found = calibration(data).collect(model, wanted)
        arrays = values(model, data, "y")
        axis = wanted.channels["y"]
        only = Wanted(wanted.ranges, wanted.histograms, wanted.channels)
        compare(found, "y", arrays, rows_of(arrays, [None] * 3, axis), only)
        compare(found, "y", arrays, rows_of(arrays, [None] * 3), Wanted((), (), {}, wanted.grams, wanted.rows))


@pytest.mark.parametrize("fetch", [True, False], ids=["fetched", "in the graph"])
def test_channels_and_gram_of_one_value_on_different_axes(fetch: bool) -> None:
    model = model_of(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3, 5, 5] x) => (float[n, 3, 5, 5] y) { y = Relu(x) }'
    )
    data = [{"x": np.random.default_rng(i).standard_normal((i + 1, 3, 5, 5)).astype(np.float32)} for i in range(3)]
    wanted = Wanted((), ["y"] if fetch else (), {"y": 1}, ["y"])
    found = calibration(data).collect(model, wanted)
    arrays = values(model, data, "y")
    compare(found, "y", arrays, rows_of(arrays, [None] * 3, 1), Wanted((), (), {"y": 1}))
    compare(found, "y", arrays, rows_of(arrays, [None] * 3), Wanted((), (), {}, ["y"]))
    assert (found.channels["y"].rows, found.grams["y"].rows) == (6 * 25, 6 * 15)


def test_rows_are_drawn_evenly_and_no_more_than_wanted() -> None:
    model, data = encoder(), batches_of((4, 10), (4, 10), (4, 10))
    found = calibration(data).collect(model, Wanted(rows=["x"], row_count=7))
    assert found.rows["x"].shape == (7, 4)
    owners = [
        next(i for i, f in enumerate(data) if (f["x"].reshape(-1, 4) == row).all(1).any()) for row in found.rows["x"]
    ]
    assert owners == [0, 0, 0, 1, 1, 1, 2]
    assert (found.rows["x"][0] == data[0]["x"][0, 0]).all()
    assert (found.rows["x"][2] == data[0]["x"][3, 9]).all()
    few = calibration(batches_of((1, 2))).collect(model, Wanted(rows=["x"]))
    assert few.rows["x"].shape == (2, 4)


def test_half_precision_scalars_and_vectors() -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["": 17]> g (float16[n] x) => (float16[n] y)
        { y = Mul(x, x) top = ReduceMax<keepdims = 0>(y) wide = Cast<to = 11>(y) }"""
    )
    data = [{"x": np.array([1.5, -3.0, 0.25], np.float16)}, {"x": np.array([200.0, 2.0, 7.0], np.float16)}]
    found = calibration(data).collect(model, Wanted(["x", "y", "top", "wide"], [], {"y": 0, "top": -1}, ["y", "top"]))
    assert (found.ranges["x"].low, found.ranges["x"].high) == (-3.0, 200.0)
    assert found.ranges["y"].high == 40000.0
    assert (found.ranges["wide"].low, found.ranges["wide"].high) == (0.0625, 40000.0)
    assert found.missing == {"top": "a scalar, without channels"}
    assert found.channels["y"].peak.tolist() == [40000.0, 9.0, 49.0]
    assert found.grams["y"].matrix[0, 0] == pytest.approx(2.25**2 + 40000.0**2)
    only = calibration(data).collect(model, Wanted(["top"], ["top"]))
    assert (only.ranges["top"].low, only.ranges["top"].high, only.histograms["top"].total) == (9.0, 40000.0, 2)


# --- what does not count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_padding_does_not_count(side: str) -> None:
    model, data = encoder(), padded(side)
    wanted = everything(*NAMES, "turned", "flat", "scores", "heads")
    wanted = Wanted(wanted.ranges, wanted.histograms, {"turned": 1} | dict.fromkeys(NAMES, -1), NAMES, NAMES)
    found = calibration(data).collect(model, wanted)
    masks = [feeds["attention_mask"].astype(bool) for feeds in data]
    for name in NAMES:
        arrays = values(model, data, name)
        cut = [array[mask] for array, mask in zip(arrays, masks, strict=True)]
        compare(found, name, cut, rows_of(arrays, masks), wanted)
    both = [(m[:, :, None] & m[:, None, :]) for m in masks]
    keeps = {
        "turned": [np.broadcast_to(m[:, None], (len(m), 6, m.shape[1])) for m in masks],
        "flat": [m.reshape(-1) for m in masks],
        "scores": both,
        "heads": [keep[:, None] for keep in both],
    }
    for name, kept in keeps.items():
        cut = [array[keep] for array, keep in zip(values(model, data, name), kept, strict=True)]
        compare(found, name, cut, np.zeros((1, 1)), Wanted([name], [name]))
    turned = np.concatenate(
        [v.transpose(0, 2, 1)[m] for v, m in zip(values(model, data, "turned"), masks, strict=True)]
    )
    assert found.channels["turned"].rows == len(turned)
    np.testing.assert_allclose(found.channels["turned"].peak, np.abs(turned).max(0))


def test_both_paths_agree() -> None:
    """One padded batch sends all batches the way of numpy."""
    model, data = encoder(), batches_of(*SHAPES)
    wanted = Wanted(NAMES, (), dict.fromkeys(NAMES, -1), NAMES)
    inside = calibration(data).collect(model, wanted)
    data[0]["attention_mask"] = data[0]["attention_mask"].copy()
    extra = {"x": np.zeros((1, 2, 4), np.float32), "attention_mask": np.array([[1, 0]])}
    outside = calibration([*data, extra]).collect(model, Wanted(["x"], (), {"x": -1}, ["x"]))
    assert outside.ranges["x"].batches == 5
    assert outside.ranges["x"].low == inside.ranges["x"].low
    assert outside.channels["x"].rows == inside.channels["x"].rows + 1
    np.testing.assert_allclose(outside.grams["x"].matrix, inside.grams["x"].matrix, rtol=1e-5, atol=1e-5)


def test_a_width_equal_to_the_length_is_not_taken_for_it() -> None:
    """[batch, 6] is no sequence of six tokens where the graph says that the axis is 6 wide."""
    data = padded("right", [(3, 6)])
    model = encoder()
    found = calibration(data).collect(model, Wanted(["kept"]))
    (array,) = values(model, data, "kept")
    assert array.shape == (3, 6)
    assert (found.ranges["kept"].low, found.ranges["kept"].high) == (array.min(), array.max())


def test_a_graph_of_fixed_length_is_masked_along_its_second_axis() -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 3, 4] x, int64[2, 3] attention_mask) => (float[2, 3, 4] y) { y = Relu(x) }"""
    )
    feeds = {"x": np.ones((2, 3, 4), np.float32), "attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    feeds["x"][feeds["attention_mask"] == 0] = 99
    found = calibration([feeds]).collect(model, Wanted(["y"], (), {"y": -1}))
    assert (found.ranges["y"].high, found.channels["y"].rows) == (1.0, 3)


def test_a_mask_of_another_name_and_a_batch_without_one() -> None:
    model = model_of(
        '<ir_version: 8, opset_import: ["": 17]> g (float[b, s] x, int64[b, s] m) => (float[b, s] y) { y = Relu(x) }'
    )
    feeds = {"x": np.array([[1, 50]], np.float32), "m": np.array([[1, 0]])}
    assert calibration([feeds]).collect(model, Wanted(["y"])).ranges["y"].high == 50
    assert calibration([feeds], mask="m").collect(model, Wanted(["y"])).ranges["y"].high == 1


def test_a_batch_of_padding_only_changes_nothing() -> None:
    model, data = encoder(), batches_of((2, 3))
    empty = {"x": np.full((1, 3, 4), 9e9, np.float32), "attention_mask": np.zeros((1, 3), np.int64)}
    wanted = everything("x", "y")
    alone, both = (calibration(d).collect(model, wanted) for d in (data, [*data, empty]))
    assert vars(alone.ranges["y"]) == vars(both.ranges["y"])
    assert alone.channels["y"].rows == both.channels["y"].rows
    assert alone.histograms["y"].total == both.histograms["y"].total
    nothing = calibration([empty]).collect(model, wanted)
    assert nothing.missing == dict.fromkeys(["x", "y"], "empty on every calibration batch")
    assert nothing == Statistics(missing=nothing.missing)


@pytest.mark.parametrize("fetch", [True, False], ids=["fetched", "in the graph"])
def test_a_value_without_elements_on_some_batch(fetch: bool) -> None:
    model = model_of('<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }')
    empty, some = {"x": np.zeros((0, 3), np.float32)}, {"x": np.ones((2, 3), np.float32)}
    wanted = everything("y") if fetch else Wanted(["y"], (), {"y": -1}, ["y"])
    found = calibration([empty, some, empty]).collect(model, wanted)
    assert not found.missing
    assert (found.ranges["y"].batches, found.channels["y"].rows, found.grams["y"].rows) == (1, 2, 2)
    nothing = calibration([empty]).collect(model, wanted)
    assert nothing.missing == {"y": "empty on every calibration batch"}
    assert not nothing.ranges


BRANCHES = """
<ir_version: 8, opset_import: ["": 17]> g (bool c, float[n, 3] x) => (float[n, 3] y)
{ y = If(c) <then_branch = t () => (float[n, 3] inner) { inner = Relu(x) },
             else_branch = e () => (float[n, 3] other) { other = Neg(x) }> }
"""


def test_what_cannot_be_measured_says_why() -> None:
    found = calibration(batches_of((1, 2))).collect(
        encoder(), Wanted(["whole", "yes", "w1", "nowhere", "attention_mask"])
    )
    assert found.missing == {
        "whole": "int64, not floating point", "yes": "bool, not floating point", "w1": "a constant",
        "nowhere": "not in the graph", "attention_mask": "int64, not floating point",
    }  # fmt: skip
    data = [{"c": np.array(True), "x": np.ones((2, 3), np.float32)}]
    branches = calibration(data).collect(model_of(BRANCHES), Wanted(["inner", "y"]))
    assert branches.missing == {"inner": "inside a subgraph"}
    assert branches.ranges["y"].high == 1


def test_channels_need_an_axis_that_exists_and_keeps_its_size() -> None:
    model, data = encoder(), batches_of((2, 5), (1, 3))
    found = calibration(data).collect(model, Wanted((), (), {"x": 3, "y": 1}, ["turned"], ["scores"]))
    assert found.missing == {
        "x": "it has no axis 3",
        "y": "its axis 1 changes in size from batch to batch",
        "turned": "its last axis changes in size from batch to batch",
        "scores": "its last axis changes in size from batch to batch",
    }
    assert found == Statistics(missing=found.missing)
    bare = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float y) { y = Relu(x) z = Abs(y) }'
        )
    )
    named = calibration([{"x": np.ones((2, 3), np.float32)}]).collect(bare, Wanted((), (), {"z": 1, "y": -1}))
    assert named.missing == {"z": "its rank is unknown, so axis 1 cannot be found", "y": "a scalar, without channels"}


def test_a_sequence_is_no_tensor() -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float[m, 3] y)
        { s = SequenceConstruct(x, x) y = ConcatFromSequence<axis = 0>(s) }"""
    )
    data = [{"x": np.ones((2, 3), np.float32)}]
    found = calibration(data).collect(model, Wanted(["s", "y"]))
    assert found.missing == {"s": "not a tensor"}
    assert calibration(data).shapes(model, ["y", "x"]) == {"y": (4, 3), "x": (2, 3)}


# --- what is wrong ---------------------------------------------------------------------------------------------------

QUESTIONS = {
    "range": Wanted(["y"]), "histogram": Wanted((), ["y"]), "channels": Wanted((), (), {"y": -1}),
    "gram": Wanted((), (), {}, ["y"]), "rows": Wanted((), (), {}, (), ["y"]),
}  # fmt: skip
ROOT = '<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float[n, 3] y) { t = Neg(x) y = Neg(t) }'


@pytest.mark.parametrize("question", QUESTIONS)
def test_nan_names_node_and_batch(question: str) -> None:
    bad = np.ones((2, 3), np.float32)
    bad[1, 1] = np.nan
    model = model_of(ROOT)
    next(node for node in model.graph if node.outputs[0].name == "y").name = "root"
    with pytest.raises(InputError, match=r"'y' \(made by root\) is NaN on calibration batch 2") as caught:
        calibration([{"x": np.ones((2, 3), np.float32)}, {"x": bad}]).collect(model, QUESTIONS[question])
    assert "\n" not in str(caught.value)
    assert caught.value.next_step
    with pytest.raises(InputError, match=r"'x' \(made by input x\) is NaN on calibration batch 1"):
        calibration([{"x": bad}]).collect(model, Wanted(["x"]))


@pytest.mark.parametrize("both", [True, False], ids=["both signs", "one sign"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_infinity_is_a_reason_to_leave_a_value_alone(question: str, both: bool) -> None:
    bad = np.ones((2, 3), np.float32)
    bad[0, 0], bad[1, 0] = -np.inf, np.inf if both else 1
    data = [{"x": np.ones((2, 3), np.float32)}, {"x": bad}, {"x": bad}]
    found = calibration(data).collect(model_of(ROOT), QUESTIONS[question])
    assert found.missing == {"y": "reaches infinity on calibration batch 2"}
    assert found == Statistics(missing=found.missing)


def test_the_largest_numbers_are_neither() -> None:
    top = np.finfo(np.float32).max
    data = [{"x": np.array([[top, -top, top], [-top, top, -top]], np.float32)}]
    found = calibration(data).collect(model_of(ROOT), Wanted(["y"]))
    assert not found.missing
    assert (found.ranges["y"].low, found.ranges["y"].high) == (-top, top)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("x"), "input 'x' is missing"),
        (lambda f: f.update(x=f["x"].astype(np.float64)), "input 'x' is float64"),
        (lambda f: f.update(x=f["x"][..., :3]), "input 'x' is float32"),
        (lambda f: f.update(z=f["x"]), "the model has no input 'z'"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(change: Any, message: str) -> None:
    data = batches_of((1, 2), (1, 2), (2, 2))
    change(data[1])
    for run in (lambda c: c.collect(encoder(), Wanted(["y"])), lambda c: list(c.run(encoder()))):
        with pytest.raises(InputError, match=f"calibration batch 2: {message}") as caught:
            run(calibration(data))
        assert "\n" not in str(caught.value)


def test_no_batches_at_all() -> None:
    with pytest.raises(InputError, match="the calibration data is empty"):
        Calibration([])
    assert calibration(batches_of((1, 2))).collect(encoder(), Wanted()) == Statistics()
