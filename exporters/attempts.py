# SPDX-License-Identifier: Apache-2.0
"""`auto`: export with one backend after the other until the result is proven to be right, and say what was tried."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..contracts.errors import ExportError
from . import sources
from .backends import is_available
from .exported import ExportedModel
from .settings import BackendName, ExportSettings

Check = Callable[[ExportedModel], None]

_MODULE: tuple[BackendName, ...] = ("dynamo", "torchscript", "transformers")

_ORDERS: Mapping[str, tuple[BackendName, ...]] = {
    # dynamo's graphs are the smallest once cleaned (BERT 75 nodes, GPT-2 143; torchscript's 88 and 245) and what `fuse`
    # knows best. The workarounds are written for these very models and give the same graphs, in twice the time or more.
    # optimum knows architectures of its own, in its own environment.
    "transformers": ("dynamo", "transformers", "torchscript", "optimum"),
    # torchscript costs a tenth of a second, keeps branches and loops by scripting, and has operators of its own
    # (cdist); some that both lack are among the workarounds (searchsorted, cummax).
    **dict.fromkeys(("factory", "timm", "timm folder"), _MODULE),
    "torchscript": ("torchscript",),
    "program": ("dynamo",),
}
"""Form of the source (see `sources.form_of`) to backends. The first that proves right is taken, so that the order
decides about time and the graph's form, and never about truth. What is not listed is a graph already."""


def load_proven(
    source: str,
    task: str | None,
    settings: ExportSettings,
    check: Check,
    *,
    progress: Callable[[str, str], None] | None = None,
) -> ExportedModel:
    """Export `source` so that `check` accepts it: with the backend that the settings name, or with each in order.

    What was tried, for how long and why it failed stands in the result's `export_details["attempts"]`.

    Args:
        source: See `sources.load`.
        task: See `sources.load`.
        settings: See `ExportSettings`.
        check: Compares the graph with its original; raises ExportError when they differ.
        progress: Told about each further attempt.

    Raises:
        ExportError: No backend's graph was right; the first one's error, with the others named.
        InputError, MissingDependency: As `sources.load` raises them. Other backends are not asked then, nor when the
            source itself cannot be exported, whatever the backend.
    """
    errors: list[ExportError] = []
    attempts: list[dict[str, Any]] = []
    for name in order(source, settings):
        if attempts and progress is not None:
            progress("export", f"again, with {name}")
        started = time.perf_counter()
        try:
            exported = _attempt(source, task, settings.model_copy(update={"backend": name}), check, errors)
        except ExportError as error:
            if error.backend is None:
                raise
            errors.append(error)
            attempts.append({"backend": error.backend, "seconds": _since(started), "error": error.message})
            continue
        used = exported.export_details.get("backend", name)
        if used != "none":  # a graph that was only read
            last = {"backend": used, "seconds": _since(started), "error": None}
            exported.export_details["attempts"] = [*attempts, last]
        return exported
    raise _all_failed(errors, attempts)


def order(source: str, settings: ExportSettings) -> Sequence[BackendName]:
    """The backends to try for `source`: the one that is asked for, or those that are installed, the first in any case.

    Raises:
        InputError: There is no such source.
    """
    if settings.backend != "auto":
        return (settings.backend,)
    form, _ = sources.form_of(source, settings)
    first, *others = _ORDERS.get(form, ("auto",))
    return [first, *(name for name in others if is_available(name))]


def _attempt(
    source: str, task: str | None, settings: ExportSettings, check: Check, errors: Sequence[ExportError]
) -> ExportedModel:
    exported = sources.load(source, task, settings)
    try:
        if any(error.branches for error in errors) and not _branches(exported):
            raise ExportError("the graph follows one branch only")
        check(exported)
    except ExportError as error:
        error.backend = str(exported.export_details.get("backend", settings.backend))
        raise
    return exported


def _branches(exported: ExportedModel) -> bool:
    return any(node.op_type in ("If", "Loop", "Scan") for node in exported.model.graph.all_nodes())


def _all_failed(errors: Sequence[ExportError], attempts: Sequence[Mapping[str, Any]]) -> ExportError:
    """The first error, whose backend is the one to aim at, with what became of the others."""
    first = errors[0]
    if len(errors) == 1:
        return first
    others = "; ".join(f"{row['backend']}: {str(row['error'])[:160]}" for row in attempts[1:])
    error = ExportError(f"{first.message} (also tried {others})", next_step=first.next_step)
    error.backend = first.backend
    error.__cause__ = first
    return error


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
