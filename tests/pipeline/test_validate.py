# SPDX-License-Identifier: Apache-2.0
"""Parity: what is compared, what is left out, and when an export is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import pytest

from onnxpress.contracts.errors import ExportError
from onnxpress.pipeline.inputs import Case
from onnxpress.pipeline.validate import Parity, Run, compare, require_export_parity


def _constant(**outputs: np.ndarray) -> Run:
    return lambda feeds: outputs


def _case(name: str = "case", **feeds: np.ndarray) -> Case:
    return Case(name, feeds)


X = _case(x=np.zeros((2, 3), np.float32))
MASK = np.array([[1, 1, 0], [1, 0, 0]])
PADDED = _case(input_ids=np.zeros((2, 3), np.int64), attention_mask=MASK)


def test_equal_outputs_are_exact_and_the_json_of_it_is_json() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    parity = compare(_constant(y=values), _constant(y=values), [X])
    assert parity.outputs["y"]["sqnr_db"] == math.inf
    assert parity.worst("max_abs_error", lowest=False) == 0
    assert parity.worst("cosine", lowest=True) == 1
    assert parity.cases == [{"case": "case", "sqnr_db": None, "max_abs_error": 0.0}]
    assert parity.to_json()["y"]["sqnr_db"] is None
    json.dumps(parity.to_json(), allow_nan=False)


def test_errors_by_hand() -> None:
    wanted = np.array([[3.0, 4.0], [0.0, 0.0]])
    got = np.array([[3.0, 4.5], [0.0, 0.0]])
    errors = compare(_constant(y=wanted), _constant(y=got), [X]).outputs["y"]
    assert errors["max_abs_error"] == 0.5
    assert errors["mean_abs_error"] == 0.125
    assert errors["relative_error"] == pytest.approx(0.1)
    assert errors["sqnr_db"] == pytest.approx(20.0)
    assert errors["cosine"] == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert errors["top1_agreement"] == 100


def test_token_outputs_are_compared_under_the_mask_and_padding_is_reported_apart() -> None:
    wanted = np.ones((2, 3, 4))
    got = wanted.copy()
    got[0, 2], got[1, 1:], got[0, 0, 0] = 9.0, -6.0, 1.25
    parity = compare(_constant(y=wanted), _constant(y=got), [PADDED])
    assert parity.outputs["y"]["max_abs_error"] == 0.25
    assert parity.outputs["y"]["elements"] == 3 * 4
    assert parity.padding == {"y": 8.0}
    assert parity.cases[0]["max_abs_error"] == 0.25


def test_an_output_without_a_sequence_axis_is_compared_as_a_whole() -> None:
    parity = compare(_constant(y=np.zeros((2, 4))), _constant(y=np.ones((2, 4))), [PADDED])
    assert parity.outputs["y"]["elements"] == 8
    assert parity.padding == {}


def test_without_padding_nothing_is_reported_as_padding() -> None:
    whole = _case(attention_mask=np.ones((2, 3), np.int64))
    parity = compare(_constant(y=np.zeros((2, 3, 4))), _constant(y=np.ones((2, 3, 4))), [whole])
    assert parity.outputs["y"]["elements"] == 24
    assert parity.padding == {}


def test_every_output_is_accumulated_over_all_cases_and_each_case_has_its_worst() -> None:
    def candidate(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        step = float(feeds["x"][0, 0])
        return {"a": np.full((1, 2), 1 + step), "b": np.full((1, 2), 1 - 2 * step)}

    cases = [_case(f"step {s}", x=np.full((1, 1), s)) for s in (0.25, 0.5, 0.0)]
    parity = compare(_constant(a=np.ones((1, 2)), b=np.ones((1, 2))), candidate, cases)
    assert parity.outputs["a"]["max_abs_error"] == 0.5
    assert parity.outputs["b"]["max_abs_error"] == 1.0
    assert [row["max_abs_error"] for row in parity.cases] == [0.5, 1.0, 0.0]
    assert parity.worst("max_abs_error", lowest=False) == 1.0
    assert parity.worst("cosine", lowest=True) == parity.outputs["b"]["cosine"]


def test_vectors_have_no_largest_class() -> None:
    run = _constant(y=np.eye(2))
    assert compare(run, run, [X], classes=False).outputs["y"]["top1_agreement"] is None
    assert compare(run, run, [X], classes=True).outputs["y"]["top1_agreement"] == 100


@pytest.mark.parametrize(
    ("got", "told"),
    [({"y": np.zeros((2, 4))}, r"output 'y' is \[2, 3\] in the original and shape \[2, 4\] in the graph \(case\)"),
     ({"z": np.zeros((2, 3))}, r"output 'y' is \[2, 3\] in the original and nothing in the graph \(case\)")],
)  # fmt: skip
def test_an_output_of_another_shape_or_none_is_an_export_error(got: dict[str, np.ndarray], told: str) -> None:
    with pytest.raises(ExportError, match=told):
        compare(_constant(y=np.zeros((2, 3))), _constant(**got), [X])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_one_broken_output_is_the_worst_wherever_it_stands(bad: float, first: bool) -> None:
    good = ("a", np.ones((1, 2)))
    broken = ("b", np.array([[1.0, bad]]))
    outputs = dict([broken, good] if first else [good, broken])
    parity = compare(_constant(a=np.ones((1, 2)), b=np.ones((1, 2))), _constant(**outputs), [X])
    assert parity.worst("max_abs_error", lowest=False) == math.inf
    assert parity.worst("cosine", lowest=True) == -1
    assert parity.worst("sqnr_db", lowest=True) == -math.inf
    assert parity.outputs["b"]["candidate_nonfinite"] == 1
    json.dumps(parity.to_json(), allow_nan=False)
    json.dumps(parity.cases, allow_nan=False)
    with pytest.raises(ExportError, match=r"output 'b' departs from the original by inf"):
        require_export_parity(parity, 1e-3)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_an_output_of_which_nothing_was_compared_hides_behind_no_other(order: tuple[str, str]) -> None:
    errors = {"a": {"cosine": 0.9, "max_abs_error": 0.1}, "b": {"cosine": math.nan, "max_abs_error": math.nan}}
    parity = Parity(outputs={name: dict(errors[name]) for name in order})
    for lowest in (True, False):
        worst = parity.worst("cosine", lowest=lowest)
        assert worst is not None
        assert math.isnan(worst)
    assert parity.worst("absent", lowest=True) is None


def _parity(error: float | None, **cases: float | None) -> Parity:
    rows = [{"case": name, "sqnr_db": None, "max_abs_error": value} for name, value in cases.items()]
    return Parity(outputs={"y": {"relative_error": error}}, cases=rows or [{"case": "only", "max_abs_error": 1.0}])


def test_the_tolerance_of_an_export_is_inclusive() -> None:
    require_export_parity(_parity(1e-3), 1e-3)
    with pytest.raises(ExportError, match=r"departs from the original by 0.001 \(relative; allowed 0.001\)"):
        require_export_parity(_parity(math.nextafter(1e-3, 1)), 1e-3)


@pytest.mark.parametrize("error", [math.nan, None])
def test_an_error_that_is_no_number_is_refused(error: float | None) -> None:
    with pytest.raises(ExportError, match="departs from the original by an unknown amount"):
        require_export_parity(_parity(error), 1e-3)


def test_the_refusal_names_the_case_with_the_largest_error_and_one_without_bound_is_the_largest() -> None:
    with pytest.raises(ExportError, match=r"most at: long$"):
        require_export_parity(_parity(0.5, short=0.1, long=0.7, other=0.2), 1e-3)
    with pytest.raises(ExportError, match=r"most at: broken$"):
        require_export_parity(_parity(math.inf, short=0.1, broken=None, long=0.7), 1e-3)


def test_nothing_compared_is_nothing_proven() -> None:
    with pytest.raises(ExportError, match="could not be compared"):
        require_export_parity(compare(_constant(), _constant(), []), 1e-3)


def test_a_mask_is_read_from_the_case() -> None:
    assert X.mask is None
    assert PADDED.mask is not None
    assert PADDED.mask.dtype == bool
    assert _case(attention_mask=np.ones((2, 1, 1, 3))).mask is None


def test_outputs_without_elements_count_only_where_there_are_no_others() -> None:
    some, none = np.ones((2, 3), np.float32), np.ones((0, 3), np.float32)
    parity = compare(lambda _: {"y": some, "z": none}, lambda _: {"y": some, "z": none}, [Case("only", {})])
    assert parity.worst("relative_error", lowest=False) == 0
    require_export_parity(parity, 1e-3)
    parity = compare(lambda _: {"z": none}, lambda _: {"z": none}, [Case("only", {})])
    with pytest.raises(ExportError, match="'z' departs"):
        require_export_parity(parity, 1e-3)
