# SPDX-License-Identifier: Apache-2.0
"""Constants that are nearly neutral stay, those that are quite neutral go."""

from __future__ import annotations

import numpy as np
import pytest
from pass_tools import model_from, run

from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[n, 2] x) => (float[n, 2] y)
<float c = {{{value}}}>
{{
  z = {op} (x, c)
  y = Sqrt (z)
}}
"""


@pytest.mark.parametrize(
    ("op", "value", "kept"),
    [
        ("Add", "1e-8", True),
        ("Add", "1e-12", True),
        ("Sub", "-1e-9", True),
        ("Add", "0", False),
        ("Mul", "1.000005", True),
        ("Div", "0.999995", True),
        ("Mul", "1", False),
        ("Div", "1", False),
        ("Add", "0.5", True),
    ],
)
def test_only_what_changes_nothing_is_removed(op: str, value: str, kept: bool) -> None:
    model = model_from(GRAPH.format(op=op, value=value))
    cleaned, _ = run_pass(Clean(), model.clone())
    assert [node.op_type for node in cleaned.graph] == ([op, "Sqrt"] if kept else ["Sqrt"])
    assert [v.name for v in cleaned.graph.inputs] == ["x"]
    x = np.array([[0.0, 3.0], [2.0, 1.0]], np.float32)
    np.testing.assert_array_equal(run(cleaned, {"x": x})[0], run(model, {"x": x})[0])


ATTRIBUTE = """
<ir_version: 10, opset_import: ["" : 20]>
main (float[n, 2] x) => (float[n, 2] y) {
  c = Constant <value_float = 1e-6> ()
  y = Add (x, c)
}
"""


def test_a_number_in_an_attribute_stays_of_32_bits() -> None:
    cleaned, _ = run_pass(Clean(), model_from(ATTRIBUTE))
    x = np.zeros((1, 2), np.float32)
    np.testing.assert_array_equal(run(cleaned, {"x": x})[0], np.full((1, 2), 1e-6, np.float32))


BRANCH = """
<ir_version: 10, opset_import: ["" : 20]>
main (bool b, float[2] x) => (float[2] y)
<float c = {1e-8}>
{
  y = If (b) <
    then_branch = yes () => (float[2] t) { t = Add (x, c) },
    else_branch = no () => (float[2] e) { e = Neg (x) }
  >
}
"""


def test_within_a_branch() -> None:
    model = model_from(BRANCH)
    cleaned, _ = run_pass(Clean(), model.clone())
    x = np.zeros(2, np.float32)
    [got] = run(cleaned, {"b": np.array(True), "x": x})
    np.testing.assert_array_equal(got, np.full(2, 1e-8, np.float32))
