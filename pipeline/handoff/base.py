# SPDX-License-Identifier: Apache-2.0
"""What a handoff target is, and what it says of its check.

A target is a sub-package here: `Target` in its `__init__.py`, the consumer's files beside it. It writes a folder that
stands alone (no Python, no onnxpress), and checks it by running the consumer in it on the golden samples.

A consumer's check is a program that prints one line an output and exits with 0 if each is within its tolerance:

    OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON

where both differences are the largest absolute ones over all golden samples (`golden.write_golden` has the format).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...contracts.errors import MissingDependency
from ...runtime.opened import Bundle

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
_LINE = re.compile(r"^(\S+) (\S+) (\S+) (\S+)$")


@dataclass(frozen=True)
class Check:
    """What became of a handoff when its consumer was run on the golden samples.

    Attributes:
        status: `passed`, `failed`, or `not run`: then `reason` says what is missing, and `done` how far it went.
        reason: One line; empty where it passed.
        done: What was done, in order: `generated`, `parsed`, `compiled`, `run`.
        command: How a user runs the same check in the folder.
        worst: Output name to the largest absolute difference from the original over all golden samples.
        from_python: The same from what ONNX Runtime in Python answers with this model.
        versions: Of the tools and runtimes that took part.
    """

    status: str
    reason: str = ""
    done: tuple[str, ...] = ("generated",)
    command: str = ""
    worst: Mapping[str, float] = field(default_factory=dict)
    from_python: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields, for handoff.json; a difference that is no number is written as a string."""
        data = dict(vars(self))
        for key in ("worst", "from_python"):
            data[key] = {n: d if math.isfinite(d) else str(d) for n, d in data[key].items()}
        return data | {"done": list(self.done), "versions": dict(self.versions)}


class Target(ABC):
    """One consumer.

    Attributes:
        name: What `--to` takes.
        summary: One line for `--help` and for the list of targets.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def write(self, bundle: Bundle, folder: Path) -> None:
        """Fill an empty folder with everything that the consumer needs.

        Raises:
            InputError: The bundle is nothing that this consumer could run; says why.
        """

    @abstractmethod
    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        """Run the consumer on the golden samples, in a copy in `scratch` where building leaves files."""


class MissingTool(MissingDependency):
    """A check cannot go on, since a program or library is not on this machine."""


def render(package: str, template: str, **values: Any) -> str:
    """Render a `.j2` file that lies in a target's sub-package (`__name__` of the target)."""
    environment = Environment(
        loader=PackageLoader(package, "."),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # source code, not HTML
    )
    return environment.get_template(template).render(**values)


def write_json(value: Any, path: Path, indent: int | None = None) -> None:
    """UTF-8, one newline at the end."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", "utf-8", newline="\n")


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy files of a target's sub-package into a handoff, folders made as needed."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def require_tool(name: str, step: str) -> Path:
    """The path of a program, or MissingTool with what to install."""
    found = shutil.which(name)
    if found is None:
        raise MissingTool(f"{name} is not installed", next_step=step)
    return Path(found)


def run_tool(
    command: Sequence[str | Path], folder: Path, *, seconds: float = 300, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder and return what it printed, whatever its exit code; 124 where it took too long."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(
            words,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(more or {})},
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"{words[0]} took more than {seconds:.0f} seconds")


def judge(
    done: subprocess.CompletedProcess[str],
    outputs: Sequence[str],
    *,
    command: str,
    stages: tuple[str, ...],
    versions: Mapping[str, str],
) -> Check:
    """Read what a consumer's check printed: it passed only with a line for each output and exit code 0."""
    worst, from_python, within = {}, {}, True
    for line in done.stdout.splitlines():
        match = _LINE.match(line)
        if match is None or match[1] not in outputs:
            continue
        try:
            difference, tolerance, other = (float(match[i]) for i in (2, 3, 4))
        except ValueError:
            continue
        worst[match[1]], from_python[match[1]] = difference, other
        within = within and difference <= tolerance
    missing = [name for name in outputs if name not in worst]
    passed = done.returncode == 0 and within and not missing
    told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    reason = "" if passed else f"no result for {missing[0]}: {told}" if missing else told
    status = PASSED if passed else FAILED
    return Check(status, reason, stages, command, worst, from_python, versions)


def not_run(reason: str, done: tuple[str, ...] = ("generated",), command: str = "", **versions: str) -> Check:
    """A check that could not run, with the reason."""
    return Check(NOT_RUN, reason, done, command, versions=versions)
