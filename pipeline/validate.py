# SPDX-License-Identifier: Apache-2.0
"""Parity: the outputs of two models side by side, at several shapes, under the attention mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..contracts.errors import ExportError
from .inputs import Case
from .metrics import ErrorAccumulator, json_number

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass
class Parity:
    """How far a candidate is from the reference.

    Attributes:
        outputs: Output name to errors over all cases (see `metrics.tensor_errors`), padding left out.
        padding: Output name to the largest absolute error at padded positions, which no consumer reads.
        cases: One row a case: its name, the worst output's SQNR in dB and largest error.
    """

    outputs: dict[str, dict[str, float | None]] = field(default_factory=dict)
    padding: dict[str, float | None] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)

    def worst(self, key: str, *, lowest: bool) -> float | None:
        """The lowest (or highest) value of one error over all outputs, NaN if any is; None where no output has it.

        Outputs without any element count only where there are no others.
        """
        return _worst([errors.get(key) for errors in self.with_elements().values()], lowest=lowest)

    def with_elements(self) -> Mapping[str, Mapping[str, float | None]]:
        """The outputs that have anything to compare; where none has, all."""
        return {n: errors for n, errors in self.outputs.items() if errors.get("elements", 1)} or self.outputs

    def to_json(self) -> dict[str, dict[str, float | None]]:
        return {name: {k: json_number(v) for k, v in errors.items()} for name, errors in self.outputs.items()}


def compare(reference: Run, candidate: Run, cases: Sequence[Case], *, classes: bool = True) -> Parity:
    """Run both on every case and measure the difference of each output.

    Outputs [batch, sequence, ...] are compared where the attention mask is 1; the rest is reported apart. Without
    `classes` the last axis is no choice, as in an embedding, and agreement on its largest element is left out.
    """
    totals: dict[str, ErrorAccumulator] = {}
    hidden: dict[str, ErrorAccumulator] = {}
    parity = Parity()
    for case in cases:
        wanted, got = reference(case.feeds), candidate(case.feeds)
        rows = []
        for name, expected in wanted.items():
            actual = got.get(name)
            if actual is None or actual.shape != expected.shape:
                shape = "nothing" if actual is None else f"shape {list(actual.shape)}"
                raise ExportError(
                    f"output '{name}' is {list(expected.shape)} in the original and {shape} in the graph ({case.name})",
                    next_step="Run again with --debug and report it.",
                )
            mask = case.mask_for(expected.shape)
            one = ErrorAccumulator()
            for accumulator in (totals.setdefault(name, ErrorAccumulator()), one):
                accumulator.add(expected, actual, mask)
            if mask is not None and not mask.all():
                hidden.setdefault(name, ErrorAccumulator()).add(expected, actual, ~mask)
            rows.append(one.result())
        parity.cases.append(_case_row(case.name, rows))
    parity.outputs = {name: accumulator.result() for name, accumulator in totals.items()}
    if not classes:
        parity.outputs = {name: {**errors, "top1_agreement": None} for name, errors in parity.outputs.items()}
    parity.padding = {name: json_number(a.result()["max_abs_error"]) for name, a in hidden.items()}
    return parity


def _case_row(name: str, rows: list[dict[str, float | None]]) -> dict[str, Any]:
    return {
        "case": name,
        "sqnr_db": json_number(_worst([row["sqnr_db"] for row in rows], lowest=True)),
        "max_abs_error": json_number(_worst([row["max_abs_error"] for row in rows], lowest=False)),
    }


def _worst(values: Sequence[float | None], *, lowest: bool) -> float | None:
    """min or max, for which NaN is the worst of all: Python's own keep or drop it depending on the order."""
    numbers = [float(v) for v in values if v is not None]
    if any(map(math.isnan, numbers)):
        return math.nan
    return (min(numbers) if lowest else max(numbers)) if numbers else None


def require_export_parity(parity: Parity, tolerance: float) -> None:
    """Refuse an export that does not compute what the original computes.

    Raises:
        ExportError: An output departs by more than `tolerance` of its own magnitude (relative Frobenius error), or
            nothing could be compared.
    """
    if not parity.outputs:
        raise ExportError("the exported graph could not be compared with the original: no input fits it")
    for name, errors in parity.with_elements().items():
        error = errors["relative_error"]
        if error is None or not error <= tolerance:
            # None stands for an error without bound, see json_number
            worst = max(parity.cases, key=lambda row: math.inf if (e := row["max_abs_error"]) is None else e)
            raise ExportError(
                f"the exported graph is wrong: output '{name}' departs from the original by {_shown(error)} "
                f"(relative; allowed {tolerance:g}), most at: {worst['case']}",
                next_step="Raise validation.export_tolerance only if you know why.",
            )


def _shown(error: float | None) -> str:
    return "an unknown amount" if error is None or math.isnan(error) else f"{error:.2g}"
