# SPDX-License-Identifier: Apache-2.0
"""docs/coverage.md: what was exported and held to PyTorch, what fails and why; nothing that did not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .results import NOT_BUILT, PASSES, Result, by_task

FILE = Path(__file__).parents[2] / "docs" / "coverage.md"
COMMAND = ".venv/bin/python -m benchmarks.coverage --write"

_HEAD = """# Which models can be exported

Written by `{command}`; do not edit. {versions}.

Every model type of transformers' auto classes is built from its own configuration, made tiny: about two layers, a width
of 64, one layer of each kind that the type has, random weights in which every bias and norm counts. It is saved as a
folder, exported as `onnxpress press FOLDER --task TASK` does, cleaned, and its outputs are compared with PyTorch's at
several batch sizes and lengths. It passes when no output departs by more than 1e-3 of its magnitude (relative error
in the Frobenius norm); `worst` is the largest error among those that pass.

What this does not show: a tiny model proves the code path, not a checkpoint. Your own model is compared again, every
time, when you press it.

**{passing} of {types} model types pass for at least one task**; {pairs_passing} of {pairs} pairs of a model type and
a task."""


def write(results: Iterable[Result], file: Path = FILE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(list(results)), "utf-8")


def page(results: Sequence[Result]) -> str:
    """The whole page in Markdown."""
    passing = [r for r in results if r.state == PASSES]
    head = _HEAD.format(
        command=COMMAND,
        versions=_versions(results),
        passing=len({r.model_type for r in passing}),
        types=len({r.model_type for r in results}),
        pairs_passing=len(passing),
        pairs=len(results),
    )
    parts = [head, "## By task", _tasks(results), "## What passes", *_passing(results), "## What fails"]
    parts += ["A type that transformers itself cannot build or run here stands apart, below.", *_failing(results)]
    parts += ["## What could not be tried", *_not_tried(results)]
    return "\n\n".join(parts) + "\n"


def summary(results: Sequence[Result]) -> str:
    """Two lines for the terminal."""
    states = Counter(r.state for r in results)
    types = {r.model_type for r in results if r.state == PASSES}
    counted = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{len(results)} trials: {counted}\n{len(types)} of {len({r.model_type for r in results})} model types pass"


def _versions(results: Iterable[Result]) -> str:
    found: dict[str, set[str]] = {}
    for result in results:
        for name, number in result.versions.items():
            found.setdefault(name, set()).add(number)
    return (
        ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in found.items()) or "Nothing has run yet"
    )


def _tasks(results: Iterable[Result]) -> str:
    rows = []
    for task, found in by_task(results):
        ran = [r for r in found if r.state != NOT_BUILT]
        passed = [r for r in found if r.state == PASSES]
        worst = max((r.error for r in passed if r.error is not None), default=None)
        shown = "" if worst is None else f"{worst:.0e}"
        rows.append(f"| {task} | {len(passed)} | {len(ran) - len(passed)} | {len(found) - len(ran)} | {shown} |")
    return "\n".join(["| task | passes | fails | not built | worst |", "|---|---|---|---|---|", *rows])


def _passing(results: Iterable[Result]) -> Iterable[str]:
    for task, found in by_task(results):
        passed = [r for r in found if r.state == PASSES]
        if passed:
            yield f"**{task}** ({len(passed)}): {', '.join(map(_name, passed))}."


def _name(result: Result) -> str:
    return result.model_type if result.backend in ("", "dynamo") else f"{result.model_type} ({result.backend})"


def _failing(results: Iterable[Result]) -> Iterable[str]:
    for task, found in by_task(results):
        failed = [r for r in found if r.state not in (PASSES, NOT_BUILT)]
        if failed:
            yield f"### {task}"
            yield _table(failed)


def _not_tried(results: Iterable[Result]) -> Iterable[str]:
    """A type that cannot be built for one task as a rule cannot for the others: one row for all of them."""
    alike: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.state == NOT_BUILT:
            alike.setdefault((result.model_type, result.reason), []).append(result.task)
    rows = [f"| {kind} | {', '.join(tasks)} | {_cell(why)} |" for (kind, why), tasks in sorted(alike.items())]
    yield "\n".join(["| model type | tasks | reason |", "|---|---|---|", *rows])


def _table(failed: Iterable[Result]) -> str:
    rows = [f"| {r.model_type} | {r.state} | {_cell(r.reason)} |" for r in failed]
    return "\n".join(["| model type | | reason |", "|---|---|---|", *rows])


def _cell(text: str, longest: int = 200) -> str:
    """Text that stays in its cell: one line, no bars, no tags."""
    flat = " ".join(text.split())
    flat = flat if len(flat) <= longest else flat[: longest - 1] + "…"
    marks: Mapping[str, str] = {"|": "\\|", "<": "&lt;", ">": "&gt;"}
    return "".join(marks.get(letter, letter) for letter in flat)
