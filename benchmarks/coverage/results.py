# SPDX-License-Identifier: Apache-2.0
"""What came of each model type and task, a line of JSON each: a sweep that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSES = "passes"
NOT_BUILT = "not built"
NOT_RUN = "fails in PyTorch"
NOT_EXPORTED = "not exported"
DIFFERS = "differs"
DIED, TOO_LONG, TOO_LARGE = "died", "too long", "too large"
STATES = (PASSES, DIFFERS, NOT_EXPORTED, NOT_RUN, NOT_BUILT, TOO_LONG, TOO_LARGE, DIED)
"""From the best that can be said to the worst."""


@dataclass(frozen=True)
class Result:
    """One trial.

    Attributes:
        model_type: As config.json writes it.
        task: A name from `contracts.tasks`.
        state: One of `STATES`.
        reason: Why it does not pass, in one line; empty where it does.
        model_class: The PyTorch class, once it was built.
        parameters: How many it has.
        backend: Which exporter made the graph.
        nodes: In the graph, after cleaning.
        cases: The shapes that were compared.
        error: The largest relative error of an output (Frobenius norm); None before anything was compared.
        seconds: Of processor time, of the whole trial.
        versions: Of torch, transformers and onnxruntime.
    """

    model_type: str
    task: str
    state: str
    reason: str = ""
    model_class: str = ""
    parameters: int = 0
    backend: str = ""
    nodes: int = 0
    cases: list[str] = field(default_factory=list)
    error: float | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return (self.model_type, self.task)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        return cls(**data)


def read(file: Path) -> dict[tuple[str, str], Result]:
    """The last result of each trial; a line that was cut off when the sweep was stopped does not count."""
    found: dict[tuple[str, str], Result] = {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        try:
            result = Result.from_json(json.loads(line))
        except (ValueError, TypeError):
            continue
        found[result.key] = result
    return found


def append(file: Path, result: Result) -> None:
    """Write one line, after one that was cut off too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_bytes()[-1:] if file.exists() else b"\n"
    with file.open("a", encoding="utf-8") as lines:
        lines.write(("" if before in (b"\n", b"") else "\n") + json.dumps(result.to_json()) + "\n")


def by_task(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The results of each task, tasks in order of appearance in `contracts.tasks`."""
    from onnxpress.contracts.tasks import TASKS

    listed = list(results)
    for task in TASKS:
        chosen = sorted((r for r in listed if r.task == task), key=lambda r: r.model_type)
        if chosen:
            yield task, chosen
