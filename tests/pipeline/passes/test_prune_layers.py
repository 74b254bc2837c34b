# SPDX-License-Identifier: Apache-2.0
"""Whole layers out of small networks, held to networks that never had them, and to branches multiplied by zero."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_tools import Array, normal, press, reasons, run, sqnr, to_bytes
from pydantic import ValidationError
from residual_networks import WIDTH, data, transformer
from static_tools import image_network, network

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import PassReport, Plan, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.prune_layers import PruneLayers
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.structure.blocks import find_blocks

FEEDS = {"x": normal(2, 4, WIDTH, seed=7)}
BRANCHES = ["a0", "f0", "a1", "f1", "a2", "f2"]


def pruned(model: ir.Model, calibration: Calibration | None = None, **fields: Any) -> tuple[ir.Model, PassReport]:
    return run_pass(PruneLayers(**fields), model, calibration or data())


def weak(model: ir.Model, *matrices: str, scale: float = 1e-3) -> ir.Model:
    """The same, with matrices that end a branch next to nothing."""
    for name in matrices:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor((value.const_value.numpy() * scale).astype(np.float32), name=name)
    return model


def relative_error(expected: list[Array], got: list[Array]) -> float:
    lost = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(expected, got, strict=True))
    return lost / sum(float(np.square(a.astype(np.float64)).sum()) for a in expected)


def answers(model: ir.Model, calibration: Calibration) -> list[Array]:
    return [next(iter(outputs.values())) for outputs in calibration.run(model)]


# The effect


def test_a_layer_that_adds_little_goes_with_its_nodes_and_bytes() -> None:
    model = weak(transformer("pre"), "l1_o", "l1_down")
    nodes, expected = len(model.graph), run(model, FEEDS)[0]
    pressed, report = pruned(model, layers=1)
    gone = 4 * 4 * WIDTH * WIDTH + 2 * 4 * WIDTH * 16 + 2 * 4 * WIDTH
    assert report.bytes_before - report.bytes_after == gone
    assert nodes - len(pressed.graph) == 15
    assert not [name for name in pressed.graph.initializers if name.startswith("l1_")]
    assert sqnr(expected, run(pressed, FEEDS)[0]) > 40
    assert report.changed == 1


@pytest.mark.parametrize("branches", [("a1", "f1"), ("a1",), ("f1",)], ids="-".join)
def test_a_pre_norm_block_goes_as_if_it_were_multiplied_by_zero(branches: tuple[str, ...]) -> None:
    matrices = ["l1_o" if branch[0] == "a" else "l1_down" for branch in branches]
    model = weak(transformer("pre"), *matrices)
    pressed, _ = pruned(model, layers=1, blocks="layers" if len(branches) == 2 else "parts")
    zero = weak(transformer("pre", zero=branches), *matrices)
    np.testing.assert_array_equal(run(pressed, FEEDS)[0], run(zero, FEEDS)[0])
    assert len(pressed.graph) == len(transformer("pre", without=branches).graph)


def test_a_post_norm_layer_goes_with_its_norms() -> None:
    pressed, report = pruned(transformer("post"), layers=1)
    layer = report.details["removed"][0]["replaced"][-1]["to"][1]
    without = transformer("post", without=(f"a{layer}", f"f{layer}"))
    np.testing.assert_array_equal(run(pressed, FEEDS)[0], run(without, FEEDS)[0])
    assert len(pressed.graph) == len(without.graph)


def test_blocks_of_convolutions_go() -> None:
    body = """
    c0 = Conv<pads = [1, 1, 1, 1]>(x, w0, b0) a = Relu(c0)
    c1 = Conv(a, w1, b1) s1 = Add(c1, a) r1 = Relu(s1)
    c2 = Conv<pads = [1, 1, 1, 1]>(r1, w3, b1) s2 = Add(r1, c2) r2 = Relu(s2)
    p = GlobalAveragePool(r2) y = Conv(p, w2, b2)"""
    model = image_network(body)
    feeds = {"x": normal(2, 3, 12, 12, seed=3)}
    pressed, report = pruned(model, Calibration([feeds], threads=1), layers=1, exclude=("w1",))
    by_hand = image_network(body.replace("GlobalAveragePool(r2)", "GlobalAveragePool(r1)"))
    np.testing.assert_array_equal(run(pressed, feeds)[0], run(by_hand, feeds)[0])
    assert [a["to"] for a in report.details["removed"][0]["replaced"]] == ["r2"]
    assert len(pressed.graph) == 7


@settings(max_examples=12, deadline=None)
@given(st.sets(st.sampled_from(BRANCHES), min_size=1), st.sampled_from(["pre", "post"]), st.randoms())
def test_any_branches_go_in_any_order(branches: set[str], style: str, random: Any) -> None:
    model = transformer(style)
    order = sorted(branches)
    random.shuffle(order)
    named = dict(zip(BRANCHES, find_blocks(model).parts, strict=True))
    actions = [
        {"replaced": [{"from": source, "to": target} for source, target in named[branch].replaced()]}
        for branch in order
    ]
    pressed = PruneLayers(layers=1).apply(model, Plan(actions=actions))
    without = transformer(style, without=branches)
    np.testing.assert_array_equal(run(pressed, FEEDS)[0], run(without, FEEDS)[0])
    assert len(pressed.graph) == len(without.graph)


def test_a_stream_that_the_graph_returns_keeps_its_name_and_shape() -> None:
    """Hidden states after every layer: those after a layer that is gone are those before it."""
    outputs = ", float[n, t, 8] f0_sum, float[n, t, 8] f1_sum"
    model = weak(transformer("pre", outputs=outputs), "l1_o", "l1_down")
    pressed, _ = pruned(model, layers=1)
    assert [value.name for value in pressed.graph.outputs] == ["y", "f0_sum", "f1_sum"]
    _, before, after = run(pressed, FEEDS)
    np.testing.assert_array_equal(before, after)


# The choice


def test_the_layer_that_goes_is_the_one_that_costs_least_and_the_next_is_measured_anew() -> None:
    calibration = data()
    exact = answers(transformer("pre"), calibration)

    def cost(*layers: int) -> float:
        without = [f"{kind}{layer}" for layer in layers for kind in "af"]
        return relative_error(exact, answers(transformer("pre", without=without), calibration))

    first = min(range(3), key=cost)
    second = min({0, 1, 2} - {first}, key=lambda layer: cost(first, layer))
    pressed, report = pruned(transformer("pre"), layers=2)
    removed = report.details["removed"]
    assert [int(entry["replaced"][0]["to"][1]) for entry in removed] == [first, second]
    assert [entry["error"] for entry in removed] == pytest.approx([cost(first), cost(first, second)], rel=1e-3)
    assert report.details["relative_error_at_outputs"] == removed[-1]["error"]
    assert relative_error(exact, answers(pressed, calibration)) == pytest.approx(removed[-1]["error"], rel=1e-3)


def test_the_report_says_what_each_removal_saves() -> None:
    _, report = pruned(transformer("pre"), layers=1)
    (entry,) = report.details["removed"]
    # The largest batch: 2 sequences of 5 tokens
    weights, scores = 10 * (4 * WIDTH * WIDTH + 2 * WIDTH * 16), 2 * 2 * 5 * 5 * WIDTH
    assert entry["multiply_adds"] == weights + scores
    head = 10 * WIDTH * 4
    saved = 100 * entry["multiply_adds"] / (3 * entry["multiply_adds"] + head)
    assert report.details["multiply_adds_saved_percent"] == pytest.approx(saved, abs=0.01)
    assert entry["bytes"] == report.bytes_before - report.bytes_after
    assert {name.split("_")[1] for name in entry["weights"]} == {"q", "k", "v", "o", "up", "down", "g1", "g2"}


def test_similarity_is_the_mean_cosine_of_what_enters_and_leaves() -> None:
    outputs = ", float[n, t, 8] s, float[n, t, 8] f0_sum, float[n, t, 8] f1_sum, float[n, t, 8] f2_sum"
    calibration = data()
    found: list[list[Array]] = [[], [], []]
    for values in calibration.run(transformer("pre", outputs=outputs)):
        streams = [values[name].astype(np.float64) for name in ("s", "f0_sum", "f1_sum", "f2_sum")]
        for layer in range(3):
            a, b = streams[layer], streams[layer + 1]
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            found[layer].append(cosine.reshape(-1))
    means = [float(np.concatenate(many).mean()) for many in found]
    _, report = pruned(transformer("pre"), calibration, layers=2, importance="similarity")
    removed = report.details["removed"]
    order = sorted(range(3), key=lambda layer: -means[layer])[:2]
    assert [int(entry["replaced"][0]["to"][1]) for entry in removed] == order
    assert [entry["similarity"] for entry in removed] == pytest.approx([means[i] for i in order], abs=1e-3)
    assert "similarity" in next(iter(reasons(report).values()))


def test_padding_does_not_count_for_similarity() -> None:
    body = "a = MatMul(x, m0) r = Add(x, a) f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, last) y = Mul(r, u)"
    arrays = {"m0": normal(8, 8, seed=1), "last": np.array([2])}
    model = network("float[n, t, 8] x, int64[n, t] attention_mask", body, "float[n, t, 8] y", arrays)
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    x = normal(2, 4, 8)
    feeds = [{"x": np.where(mask[..., None], x, np.float32(fill)), "attention_mask": mask} for fill in (0, 50)]
    seen = []
    for batch in feeds:
        _, report = pruned(model.clone(), Calibration([batch], threads=1), layers=1, importance="similarity")
        seen.append(report.details["removed"][0]["similarity"])
    assert seen[0] == seen[1]


def test_a_share_of_the_multiply_adds_is_reached_and_not_passed_by_a_block() -> None:
    _, report = pruned(transformer("pre"), multiply_adds=0.4, blocks="parts")
    saved = report.details["multiply_adds_saved_percent"]
    last = report.details["removed"][-1]["multiply_adds"]
    total = sum(e["multiply_adds"] for e in report.details["removed"]) / saved * 100
    assert saved >= 40 > saved - 100 * last / total


def test_blocks_go_until_the_error_would_be_too_large() -> None:
    model = weak(transformer("pre"), "l1_o", "l1_down", "l2_down", scale=1e-2)
    _, report = pruned(model, maximum_error=1e-3, blocks="parts")
    assert {entry["replaced"][0]["to"] for entry in report.details["removed"]} == {"a1_sum", "f1_sum", "f2_sum"}
    assert report.details["relative_error_at_outputs"] <= 1e-3
    left = reasons(report)
    assert len(left) == 3
    assert all("error would be" in reason for reason in left.values())
    with pytest.raises(InputError, match=r"nothing to do .* error would be"):
        pruned(transformer("pre"), maximum_error=1e-9)


def test_parts_and_whole_layers_compete_and_no_part_goes_twice() -> None:
    model = weak(transformer("pre"), "l1_o", "l1_down", scale=1e-2)
    _, report = pruned(model, multiply_adds=0.5, blocks="any")
    targets = [pair["to"] for entry in report.details["removed"] for pair in entry["replaced"]]
    assert len(set(targets)) == len(targets)
    assert report.details["of"] == 9
    assert "a part of it is removed" in reasons(report).values()


def test_the_plan_is_data() -> None:
    model = transformer("post")
    plan = PruneLayers(layers=2).plan(model, data())
    before = to_bytes(model)
    assert before == to_bytes(transformer("post")), "planning changes nothing"
    replayed = Plan(actions=json.loads(json.dumps(plan.actions)))
    one, other = (PruneLayers(layers=2).apply(model.clone(), p) for p in (plan, replayed))
    assert to_bytes(one) == to_bytes(other) != before


def test_the_fused_graph_of_our_own_recipe_is_pruned() -> None:
    model = transformer("post")
    for step in (Clean(), Fuse(optional=True)):
        model, *_ = press(step, model)
    pressed, report = pruned(model, layers=1)
    layer = report.details["removed"][0]["weights"][0][1]
    without = transformer("post", without=(f"a{layer}", f"f{layer}"))
    np.testing.assert_allclose(run(pressed, FEEDS)[0], run(without, FEEDS)[0], rtol=1e-4, atol=1e-5)


# What is refused


def test_blocks_with_caches_and_excluded_ones_are_left() -> None:
    model = transformer("pre", outputs=", float[n, t, 8] a1_k")
    _, report = pruned(model, layers=1, exclude=("*f0_sum", "l1_up"))
    assert report.details["removed"][0]["replaced"][0]["from"] == "f1_sum"
    found = reasons(report)
    assert sorted(found.values()) == ["excluded by name", "the graph returns 'a1_k' from within it"]


def test_a_network_without_residual_branches_is_refused() -> None:
    model = network("float[n, 8] x", "h = MatMul(x, w) y = Relu(h)", "float[n, 8] y", {"w": normal(8, 8)})
    with pytest.raises(InputError, match="nothing to do"):
        pruned(model, Calibration([{"x": normal(2, 8)}], threads=1), layers=1)


def test_a_branch_that_turns_out_to_stretch_the_stream_is_left() -> None:
    """The graph does not tell how many rows there are."""
    body = "f = MatMul(x, w) e = Add(f, rows) y = Add(e, x)"
    model = network("float[n, 8] x", body, "float[m, 8] y", {"w": normal(8, 8), "rows": normal(5, 8)})
    with pytest.raises(InputError, match="changes the shape"):
        pruned(model, Calibration([{"x": normal(1, 8)}], threads=1), layers=1)


def test_shapes_that_are_not_true_are_noticed() -> None:
    body = "a = MatMul(x, w) h = Relu(a) s = Shape(h) f = Cast<to = 1>(s) g = Mul(x, f) y = Add(a, g)"
    model = network("float[n, 2] x", body, "float[n, 2] y", {"w": normal(2, 2)})
    value = next(v for node in model.graph for v in node.outputs if v.name == "h")
    value.shape = ir.Shape(["n", 7])
    with pytest.raises(InputError, match="shapes that its values do not have"):
        pruned(model, Calibration([{"x": normal(3, 2)}], threads=1), layers=1)


def test_asking_for_too_much_says_what_there_is() -> None:
    with pytest.raises(InputError, match="remove 4 blocks: there are 3"):
        pruned(transformer("pre"), layers=4)
    with pytest.raises(InputError, match=r"save 99% of the multiply-adds: all that may go saves 9\d%"):
        pruned(transformer("pre"), multiply_adds=0.99)


def test_outputs_without_floating_point_numbers_are_refused() -> None:
    body = "a = MatMul(x, w) s = Add(a, x) y = ArgMax<axis = 1>(s)"
    model = network("float[n, 8] x", body, "int64[n, 1] y", {"w": normal(8, 8)})
    with pytest.raises(InputError, match="none of which has floating-point numbers"):
        pruned(model, Calibration([{"x": normal(2, 8)}], threads=1), layers=1)


BAD: list[dict[str, Any]] = [
    {},
    {"layers": 1, "multiply_adds": 0.1},
    {"layers": 0},
    {"maximum_error": -1.0},
    {"layers": 1, "blocks": "heads"},
    {"layers": 1, "importance": "magnitude"},
]


@pytest.mark.parametrize("fields", BAD)
def test_settings_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PruneLayers(**fields)


def test_without_data_the_pass_says_what_it_needs() -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        run_pass(PruneLayers(layers=1), transformer("pre"))
