# SPDX-License-Identifier: Apache-2.0
"""Gates: what is a condition, when it holds, and which names a run can measure."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.contracts.errors import GateFailed, InputError
from onnxpress.pipeline.gates import MEASURED, Gate, check_names, require_all


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("size_ratio >= 3.8", ("size_ratio", ">=", 3.8, "size_ratio >= 3.8")),
        ("accuracy_drop<=0.3", ("accuracy_drop", "<=", 0.3, "accuracy_drop <= 0.3")),
        ("  cosine  >  -1 ", ("cosine", ">", -1.0, "cosine > -1")),
        ("accuracy_drop <= 0.3 %", ("accuracy_drop", "<=", 0.3, "accuracy_drop <= 0.3")),
        ("max_abs_error < 1e-3", ("max_abs_error", "<", 1e-3, "max_abs_error < 1e-3")),
        ("max_abs_error < 1E+3", ("max_abs_error", "<", 1e3, "max_abs_error < 1E+3")),
        ("top1_agreement == 100", ("top1_agreement", "==", 100.0, "top1_agreement == 100")),
    ],
)
def test_a_condition_is_parsed_and_written_in_one_way(text: str, parsed: tuple[str, str, float, str]) -> None:
    gate = Gate.parse(text)
    assert (gate.name, gate.comparison, gate.bound, gate.expression) == parsed
    assert Gate.parse(gate.expression) == gate


@pytest.mark.parametrize(
    "text",
    ["", "size_ratio", "size_ratio >=", ">= 3", "3 <= size_ratio", "size_ratio => 3", "size_ratio >= three",
     "size ratio >= 3", "a <= 1 and b >= 2", "cosine >= nan", "cosine >= inf", "cosine != 1", "cosine >= 1\ncosine"],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="is not of the form name <= number") as caught:
        Gate.parse(text)
    assert caught.value.next_step == "Example: size_ratio >= 3.8"


@pytest.mark.parametrize(
    ("comparison", "below", "equal", "above"),
    [("<=", True, True, False), ("<", True, False, False), (">=", False, True, True), (">", False, False, True),
     ("==", False, True, False)],
)  # fmt: skip
def test_every_comparison_on_both_sides_of_its_bound(comparison: str, below: bool, equal: bool, above: bool) -> None:
    gate = Gate.parse(f"x {comparison} 2")
    assert [gate.judge({"x": value})["passed"] for value in (1.5, 2.0, 2.5)] == [below, equal, above]
    assert gate.judge({"x": 2.0}) == {"expression": f"x {comparison} 2", "value": 2.0, "passed": equal}


@pytest.mark.parametrize("comparison", ["<=", "<", ">=", ">", "=="])
@pytest.mark.parametrize("values", [{}, {"x": None}, {"x": math.nan}])
def test_what_was_not_measured_passes_nothing(comparison: str, values: dict[str, float | None]) -> None:
    assert Gate.parse(f"x {comparison} 0").judge(values) == {
        "expression": f"x {comparison} 0",
        "value": None,
        "passed": False,
    }


def test_an_error_without_bound_passes_no_upper_bound() -> None:
    assert not Gate.parse("max_abs_error <= 1e30").judge({"max_abs_error": math.inf})["passed"]
    assert not Gate.parse("sqnr_db >= -1e30").judge({"sqnr_db": -math.inf})["passed"]


def test_an_exact_result_passes_a_lower_bound_on_its_signal_to_noise_ratio() -> None:
    assert Gate.parse("sqnr_db >= 40").judge({"sqnr_db": math.inf}) == {
        "expression": "sqnr_db >= 40",
        "value": None,
        "passed": True,
    }


@given(st.floats(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["<=", "<", ">=", ">", "=="]))
def test_a_judgement_is_always_json(value: float, bound: float, comparison: str) -> None:
    judged = Gate("x", comparison, bound, "x").judge({"x": value})
    assert isinstance(judged["passed"], bool)
    json.dumps(judged, allow_nan=False)


def test_names_that_the_run_measures_are_accepted() -> None:
    names = [*MEASURED, "accuracy", "accuracy_drop"]
    check_names([Gate.parse(f"{name} >= 0") for name in names], ["accuracy"])


@pytest.mark.parametrize("name", ["accuracy", "accuracy_drop", "f1", "f1_drop", "spearman", "neighbour_accuracy_drop"])
def test_a_gate_on_a_metric_without_data_names_the_option_that_is_missing(name: str) -> None:
    with pytest.raises(InputError, match=f"gate '{name} <= 1' needs evaluation data") as caught:
        check_names([Gate.parse(f"{name} <= 1")], [])
    assert caught.value.next_step == "Add --evaluation DATA, with labels."


def test_an_unknown_name_comes_with_the_closest_known_one() -> None:
    with pytest.raises(InputError, match="gate 'size_rato >= 2': unknown name") as caught:
        check_names([Gate.parse("size_rato >= 2")], [])
    assert caught.value.next_step == "Did you mean 'size_ratio'?"
    with pytest.raises(InputError, match="unknown name") as caught:
        check_names([Gate.parse("acuracy_drop <= 1")], ["accuracy"])
    assert caught.value.next_step == "Did you mean 'accuracy_drop'?"


def test_the_refusal_names_every_failed_gate_with_its_value_and_no_other() -> None:
    judged = [
        {"expression": "cosine >= 0.9", "value": 0.95, "passed": True},
        {"expression": "size_ratio >= 4", "value": 3.14159, "passed": False},
        {"expression": "accuracy_drop <= 1", "value": None, "passed": False},
    ]
    with pytest.raises(GateFailed) as caught:
        require_all(judged, "Choose a milder recipe.")
    assert caught.value.message == "refused: size_ratio >= 4 (measured 3.142); accuracy_drop <= 1 (measured nothing)"
    assert caught.value.exit_code == 3
    require_all(judged[:1], "")
