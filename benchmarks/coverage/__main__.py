# SPDX-License-Identifier: Apache-2.0
"""Exports every model type of transformers' auto classes from a tiny configuration and holds it to PyTorch.

    .venv/bin/python -m benchmarks.coverage                    # what is missing; then prints how many pass
    .venv/bin/python -m benchmarks.coverage bert gpt2          # these model types only
    .venv/bin/python -m benchmarks.coverage --again --write    # what failed once more; then docs/coverage.md
    .venv/bin/python -m benchmarks.coverage --list             # the trials, without running any

A sweep can be stopped at any time: results are lines of a file, and only what is missing in it runs. All of it takes
hours on two cores; `--minutes` stops starting new trials after that time. The first trials see each model type once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from . import page, results, workers
from .results import PASSES, Result
from .walk import Trial, trials

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
"""A child has one thread, and nothing comes from the network; set before anything that reads it is imported."""

FILE = Path(__file__).parents[2] / "artifacts" / "coverage.jsonl"


def main() -> int:
    options = _parser().parse_args()
    os.environ.update(_ENVIRONMENT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child and no folder of one stays behind
    known = results.read(options.results)
    wanted = [t for t in trials() if _chosen(t, options.types, options.tasks)]
    unknown = set(options.types) - {model_type for model_type, _ in wanted}
    if unknown:
        raise SystemExit(f"no such model type, or not for this task: {', '.join(sorted(unknown))}")
    if options.list:
        for model_type, task in wanted:
            before = known.get((model_type, task))
            print(f"{model_type:40} {task:32} {before.state if before else ''}")
        return 0
    waiting = _waiting(wanted, known, again=options.again, everything=options.force)
    for result in _sweep(waiting, options):
        results.append(options.results, result)
        print(_shown(result), flush=True)
    found = list(results.read(options.results).values())
    print(page.summary(found))
    if options.write:
        page.write(found)
        print(f"written to {page.FILE.name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all, if none is named")
    parser.add_argument("--task", action="append", dest="tasks", default=[], help="only this task; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="children at a time (default: all cores)")
    parser.add_argument("--seconds", type=float, default=300, help="processor time of one trial (default: 300)")
    parser.add_argument("--gib", type=float, default=6, help="limit of one trial's memory")
    parser.add_argument("--minutes", type=float, default=0, help="start no trial after this time; 0: no limit")
    parser.add_argument("--again", action="store_true", help="also what did not pass before")
    parser.add_argument("--force", action="store_true", help="also what passed before")
    parser.add_argument("--results", type=Path, default=FILE, help="the file with one line a trial")
    parser.add_argument("--list", action="store_true", help="print the trials and run none")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md from all results")
    return parser


def _chosen(trial: Trial, types: Sequence[str], tasks: Sequence[str]) -> bool:
    return (not types or trial[0] in types) and (not tasks or trial[1] in tasks)


def _waiting(wanted: Sequence[Trial], known: Mapping[Trial, Result], *, again: bool, everything: bool) -> list[Trial]:
    """What has to run: missing trials, with `again` those that failed too."""
    return [t for t in wanted if everything or t not in known or (again and known[t].state != PASSES)]


def _sweep(waiting: Sequence[Trial], options: argparse.Namespace) -> Iterator[Result]:
    if not waiting:
        return
    from . import trial

    trial.preload()
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    limits = workers.Limits(options.seconds, int(options.gib * 2**30))
    in_time = (t for t in waiting if time.monotonic() < until)
    yield from workers.run_all(in_time, trial.run, jobs=options.jobs, limits=limits)


def _shown(result: Result) -> str:
    error = "" if result.error is None else f"{result.error:.0e}"
    row = f"{result.model_type:32} {result.task:28} {result.state:16} {error:6} {result.seconds:6.1f} s"
    return f"{row}  {result.reason[:150]}"


if __name__ == "__main__":
    sys.exit(main())
