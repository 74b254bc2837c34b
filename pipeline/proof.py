# SPDX-License-Identifier: Apache-2.0
"""Whether an exported graph is the original: it loads, runs at every shape and gives the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..contracts.errors import ExportError, MissingDependency, OnnxpressError
from ..contracts.tasks import FEATURES
from ..exporters.exported import ExportedModel
from ..runtime.session import Session
from .inputs import Case
from .validate import Parity, Run, compare, require_export_parity

_WITHOUT_KERNEL = (
    "The runtime has no kernel for this operator in this type, such as float64: return module.float() and float32 "
    "inputs, or try another --provider."
)


def prove_export(
    exported: ExportedModel,
    file: Path,
    reference: Run,
    cases: Sequence[Case],
    tolerance: float,
    *,
    provider: str = "cpu",
    threads: int | None = None,
) -> Parity:
    """Compare the graph in `file` with the original.

    Raises:
        ExportError: It departs by more than `tolerance`, or the runtime refuses a graph that we made: it does not load,
            or fails at a shape that the original takes.
    """
    try:
        session = Session(file, provider=provider, threads=threads)
        parity = compare(reference, session.run, cases, classes=exported.task != FEATURES)
    except (ExportError, MissingDependency):
        raise
    except OnnxpressError as error:
        if exported.reference is None:
            raise  # the graph is the user's own
        advice = _WITHOUT_KERNEL if "Could not find an implementation" in error.message else error.next_step
        raise ExportError(f"the exported graph cannot be run: {error.message}", next_step=advice) from error
    require_export_parity(parity, tolerance)
    return parity
