# SPDX-License-Identifier: Apache-2.0
"""Every rule against the oracle, and no rule forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.pipeline.structure import analyze
from onnxpress.pipeline.structure.walk import RULES

from .movement_cases import movement_cases
from .operator_cases import operator_cases
from .oracle import check, graph_of, kinds
from .refusal_cases import REFUSED

CASES = {**operator_cases(), **movement_cases()}


@pytest.mark.parametrize("name", CASES)
def test_a_cut_is_what_its_mask_is(name: str, tmp_path: Path) -> None:
    structure = check(graph_of(CASES[name].text), tmp_path, inert=CASES[name].inert)
    assert kinds(structure) == CASES[name].groups
    assert structure.unruled == {}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_stays_with_its_reason(name: str) -> None:
    _, text, reason = REFUSED[name]
    structure = analyze(graph_of(text))
    assert structure.groups == []
    assert reason in {stays.reason for stays in structure.stays}


def test_every_rule_is_covered() -> None:
    covered = {pair for case in CASES.values() for pair in case.covers}
    refused = {pair for pair, _, _ in REFUSED.values() if pair is not None}
    assert set(RULES) - covered - refused == set()
    assert covered & refused == set()
