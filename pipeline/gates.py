# SPDX-License-Identifier: Apache-2.0
"""Gates: conditions that a result must meet, such as `accuracy_drop <= 0.3` or `size_ratio >= 3.8`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..contracts.errors import GateFailed, InputError, did_you_mean

_FORM = re.compile(r"^\s*([A-Za-z_]\w*)\s*(<=|>=|<|>|==)\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(%?)\s*$")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}

MEASURED = {
    "size_ratio": "reference bytes / candidate bytes",
    "latency_ratio": "PyTorch eager fp32 / candidate, batch 1 at the data's own lengths (median)",
    "throughput_ratio": "PyTorch eager fp32 / candidate, at the fixed, compute-bound setting (median)",
    "sqnr_db": "lowest signal to quantization noise ratio over all outputs, dB",
    "cosine": "lowest cosine similarity over all outputs",
    "max_abs_error": "largest absolute error over all outputs",
    "relative_error": "largest relative error over all outputs",
    "top1_agreement": "lowest agreement of the largest class over all outputs, percent",
}
"""What every run measures and a gate may name, besides `<metric>` and `<metric>_drop` of the evaluation."""


@dataclass(frozen=True)
class Gate:
    """One condition: `name` `comparison` `bound`."""

    name: str
    comparison: str
    bound: float
    expression: str

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Parse `size_ratio >= 3.8`; raises InputError for anything else."""
        match = _FORM.match(text) if isinstance(text, str) else None
        if match is None:
            raise InputError(f"gate '{text}' is not of the form name <= number", next_step="Example: size_ratio >= 3.8")
        name, comparison, bound, _ = match.groups()
        return cls(name, comparison, float(bound), f"{name} {comparison} {bound}")

    def judge(self, values: Mapping[str, float | None]) -> dict[str, Any]:
        """Return {expression, value, passed} for the manifest; a value that is missing or NaN does not pass."""
        value = values.get(self.name)
        passed = value is not None and not math.isnan(value) and _COMPARE[self.comparison](value, self.bound)
        shown = None if value is None or math.isnan(value) or math.isinf(value) else value
        return {"expression": self.expression, "value": shown, "passed": passed}


def check_names(gates: list[Gate], metrics: list[str]) -> None:
    """Refuse, before any work, a gate on something that this run will not measure.

    Args:
        gates: The gates.
        metrics: Names of the evaluation's metrics; empty when there is no evaluation data.

    Raises:
        InputError: With the closest known name, or the option that is missing.
    """
    known = [*MEASURED, *metrics, *(f"{m}_drop" for m in metrics)]
    for gate in gates:
        if gate.name in known:
            continue
        if not metrics and (gate.name.endswith("_drop") or gate.name in _EVALUATION):
            raise InputError(
                f"gate '{gate.expression}' needs evaluation data", next_step="Add --evaluation DATA, with labels."
            )
        raise InputError(f"gate '{gate.expression}': unknown name", next_step=did_you_mean(gate.name, known))


def require_all(judged: Sequence[Mapping[str, Any]], next_step: str) -> None:
    """Raise GateFailed, naming each gate that did not pass and what was measured."""
    failed = [gate for gate in judged if not gate["passed"]]
    if failed:
        told = "; ".join(f"{gate['expression']} (measured {_shown(gate['value'])})" for gate in failed)
        raise GateFailed(f"refused: {told}", next_step=next_step)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"


_EVALUATION = {"accuracy", "f1", "spearman", "neighbour_accuracy"}
