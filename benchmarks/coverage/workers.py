# SPDX-License-Identifier: Apache-2.0
"""Runs trials in child processes with a limit of time and of memory each; a child that dies is a result too.

Children are forked from a process that has imported everything and run nothing: that saves each of them the 5 to 10
seconds that the imports take.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from .results import DIED, TOO_LARGE, TOO_LONG, Result
from .walk import Trial

Run = Callable[[str, str, Path], Result]
_ANSWER = "result.json"


@dataclass(frozen=True)
class Limits:
    """What one child may use.

    Attributes:
        seconds: Of processor time, which a busy machine does not stretch; of time by the clock, four times that.
        bytes: Memory of its own, beyond what it shares with its parent.
    """

    seconds: float = 300.0
    bytes: int = 6 << 30


@dataclass
class _Child:
    trial: Trial
    process: BaseProcess
    folder: Path
    started: float


def run_all(trials: Iterable[Trial], run: Run, *, jobs: int, limits: Limits) -> Iterator[Result]:
    """Yield the result of each trial as it comes, `jobs` at a time; the next trial is asked for when one is free."""
    waiting = iter(trials)
    running: list[_Child] = []
    more = True
    try:
        while more or running:
            while more and len(running) < jobs:
                trial = next(waiting, None)
                more = trial is not None
                if trial is not None:
                    running.append(_start(trial, run))
            for child in list(running):
                result = _result(child, limits)
                if result is not None:
                    running.remove(child)
                    _remove(child)
                    yield result
            time.sleep(0.05)
    finally:
        for child in running:
            _remove(child)


def _start(trial: Trial, run: Run) -> _Child:
    folder = Path(tempfile.mkdtemp(prefix="coverage-"))
    process = multiprocessing.get_context("fork").Process(target=_work, args=(trial, run, folder))
    process.start()
    return _Child(trial, process, folder, time.monotonic())


def _work(trial: Trial, run: Run, folder: Path) -> None:
    """In the child: what it prints is of no interest, what it found goes into a file that appears whole."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    result = run(*trial, folder / "work")
    half = folder / "half.json"
    half.write_text(json.dumps(result.to_json()), "utf-8")
    half.replace(folder / _ANSWER)


def _result(child: _Child, limits: Limits) -> Result | None:
    """What came of a child, or None while it is at work."""
    seconds, memory = _used(child.process.pid)
    if child.process.is_alive():
        if seconds > limits.seconds or time.monotonic() - child.started > 4 * limits.seconds:
            return Result(*child.trial, TOO_LONG, f"more than {limits.seconds:g} s", seconds=seconds)
        if memory > limits.bytes:
            return Result(*child.trial, TOO_LARGE, f"more than {limits.bytes / 2**30:.3g} GiB", seconds=seconds)
        return None
    child.process.join()
    answer = child.folder / _ANSWER
    if answer.exists():
        return Result.from_json(json.loads(answer.read_text("utf-8")))
    code = child.process.exitcode or 0
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Result(*child.trial, DIED, how, seconds=seconds)


def _used(pid: int | None) -> tuple[float, int]:
    """Processor time in seconds and bytes of a child's own memory; zeros when it has just ended.

    Its own (USS): what it still shares with the process that it was forked from is not its doing, and may be much.
    """
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return round(times.user + times.system, 1), int(process.memory_full_info().uss)
    except psutil.Error:
        return 0.0, 0


def _remove(child: _Child) -> None:
    if child.process.is_alive():
        child.process.kill()
        child.process.join()
    shutil.rmtree(child.folder, ignore_errors=True)
