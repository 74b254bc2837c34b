# SPDX-License-Identifier: Apache-2.0
"""Groups as values: what they print, what they refuse, and what cutting does to the graph and leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file
from onnxpress.pipeline.structure import analyze, masked_weights

from .oracle import check, graph_of, kinds

NET = """
<ir_version: 10, opset_import: ["": 21]>
net (float[N, 10] x, float[10, 12] w1, float[12] b1, float[12, 6] w2, float[6, 4] w3) => (float[N, 4] y)
{
    h = MatMul (x, w1)
    a = Add (h, b1)
    r = Relu (a)
    g = MatMul (r, w2)
    t = Tanh (g)
    y = MatMul (t, w3)
}
"""


def test_a_group_prints_itself() -> None:
    structure = analyze(graph_of(NET))
    assert [str(group) for group in structure.groups] == [
        "neurons of w1:1, 12 units: w1[1], b1[0], w2[0]",
        "neurons of w2:1, 6 units: w2[1], w3[0]",
    ]
    assert structure.groups[1].to_json() == {
        "name": "w2:1",
        "kind": "neurons",
        "units": 6,
        "cuts": [
            {"tensor": "w2", "axis": 1, "positions_a_unit": 1},
            {"tensor": "w3", "axis": 0, "positions_a_unit": 1},
        ],
    }
    assert {(stays.name, stays.units, stays.reason) for stays in structure.stays} == {
        ("w1:0", 10, "it is an input of the graph"),
        ("w3:1", 4, "it is an output of the graph"),
    }


def test_cutting_slices_weights_and_nothing_else(tmp_path: Path) -> None:
    model = graph_of(NET)
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    analyze(model).cut({"w1:1": [0, 3]})
    after = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    stay = [unit for unit in range(12) if unit not in (0, 3)]
    np.testing.assert_array_equal(after["w1"], before["w1"][:, stay])
    np.testing.assert_array_equal(after["b1"], before["b1"][stay])
    np.testing.assert_array_equal(after["w2"], before["w2"][stay])
    assert after["w3"] is before["w3"] or np.array_equal(after["w3"], before["w3"])
    graph_file.write(model, tmp_path / "cut.onnx")


def test_masked_weights_are_named_and_zero_where_the_cut_is() -> None:
    model = graph_of(NET)
    masked = masked_weights(analyze(model), {"w1:1": [0, 3]})
    assert sorted(masked) == ["b1", "w1", "w2"]
    assert not masked["w1"][:, [0, 3]].any()
    assert not masked["b1"][[0, 3]].any()
    assert not masked["w2"][[0, 3]].any()
    assert np.count_nonzero(masked["w1"]) == 100


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"w1:2": [0]}, "no group 'w1:2'"),
        ({"w2:1": [6]}, "units 0 to 5"),
        ({"w2:1": [-1]}, "units 0 to 5"),
        ({"w2:1": range(6)}, "nothing would be left"),
    ],
)
def test_bad_removals_are_refused(removed: dict[str, Sequence[int]], message: str) -> None:
    structure = analyze(graph_of(NET))
    with pytest.raises(InputError, match=message):
        structure.cut(removed)


def test_an_unknown_group_gets_a_suggestion() -> None:
    with pytest.raises(InputError) as caught:
        analyze(graph_of(NET)).group("w2:0")
    assert "w2:1" in str(caught.value.next_step)


def test_removing_nothing_changes_nothing(tmp_path: Path) -> None:
    model = graph_of(NET)
    graph_file.write(model, tmp_path / "before.onnx")
    analyze(model).cut({"w1:1": []})
    graph_file.write(model, tmp_path / "after.onnx")
    assert (tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()


def test_analyzing_leaves_the_graph_as_it_is(tmp_path: Path) -> None:
    model = graph_of(NET)
    graph_file.write(model, tmp_path / "before.onnx")
    analyze(model)
    graph_file.write(model, tmp_path / "after.onnx")
    assert (tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()


def test_an_operator_without_a_rule_is_named() -> None:
    structure = analyze(graph_of(NET.replace("t = Tanh (g)", "t = my.domain.Op (g)").replace(
        '["": 21]', '["": 21, "my.domain": 1]')))  # fmt: skip
    assert structure.unruled == {"my.domain.Op": 1}
    assert ("w2:1", "my.domain.Op has no rule") not in {(s.name, s.reason) for s in structure.stays}
    assert ("w2:1", "Op has no rule") in {(s.name, s.reason) for s in structure.stays}
    assert kinds(structure) == {"neurons": [12]}


def test_weights_inside_an_if_close_what_they_meet() -> None:
    text = NET.replace("float[N, 10] x,", "float[N, 10] x, bool c,").replace(
        "t = Tanh (g)",
        "t = If (c) <then_branch = g1 () => (float[N, 6] o) { o = Relu (g) },"
        " else_branch = g2 () => (float[N, 6] o) { o = Neg (g) }>",
    )
    structure = analyze(graph_of(text))
    assert kinds(structure) == {"neurons": [12]}
    assert ("w2:1", "If has no rule") in {(stays.name, stays.reason) for stays in structure.stays}


CACHED = """
<ir_version: 10, opset_import: ["": 23]>
net (float[N, 4, 10] x, float[N, 3, P, 4] past_key, float[N, 3, P, 4] past_value, float[10, 24] w1, float[10, 12] w2,
     float[10, 12] w3, float[24, 4] w4)
    => (float[N, 4, 4] y, float[N, 3, Q, 4] present_key, float[N, 3, Q, 4] present_value)
{
    q = MatMul (x, w1)
    k = MatMul (x, w2)
    v = MatMul (x, w3)
    m, present_key, present_value = Attention <q_num_heads = 6, kv_num_heads = 3> (q, k, v, , past_key, past_value)
    y = MatMul (m, w4)
}
"""


def test_caches_stay_unless_they_are_opened(tmp_path: Path) -> None:
    assert analyze(graph_of(CACHED)).groups == []
    structure = check(graph_of(CACHED), tmp_path, open_caches=True)
    assert kinds(structure) == {"heads": [3]}


def test_units_of_one_group_lose_the_same_number_of_positions() -> None:
    for group in analyze(graph_of(NET)).groups:
        for cut in group.cuts:
            assert cut.positions.shape[0] == group.size
            assert len(np.unique(cut.positions)) == cut.positions.size
