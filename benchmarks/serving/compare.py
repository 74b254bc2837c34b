# SPDX-License-Identifier: Apache-2.0
"""Requests a second and latencies of `onnxpress serve` beside MLServer, LitServe and BentoML.

    .venv/bin/python -m benchmarks.serving.compare [--recipe fp32] [--quick] [--write] [--seconds 4] [--rounds 3]

One model (MiniLM fine-tuned on SST-2; int8 with dynamic ranges, or pressed with another --recipe, or --bundle), one
machine, the same version of ONNX Runtime with the same session options, the same largest batch, rows of 32 tokens as
JSON, each server as its own documentation recommends. Rounds are interleaved: each starts every server once, one at a
time, in another order. onnxpress has its defaults, which are to join only what changes no answer; of dynamic int8 it is
there once more, joining within the bundle's tolerance as the peers do. It never waits for a batch. The peers wait
--wait-ms, and have the cores in both ways, as one batch at a time on all of them and as a batch on each (MLServer runs
batches beside each other anyway). The client runs on the same cores and costs all of them the same. Processor time a
request is what a busy machine disturbs least.

About 500 answers of each measurement are compared with what the model answers to the row alone: the table says which
share is the same up to the rounding of floats, and which is within the bundle's tolerance. With int8 of dynamic ranges
a row is rounded by the largest activation of its batch, whoever serves it. All of onnxpress' answers by default have to
be the same. With the defaults it takes 9 minutes; the first time the environments of the peers (900 MB) are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import default_threads, machine

from ..markdown import environment, table, write_section
from .client import Measured, http, load
from .environments import PACKAGES
from .servers import CONTENDERS, Contender, Way, running
from .workload import ARTIFACTS, Workload, bundle_of, workload

CLIENTS = (1, 8, 64)
WARM_UP, START = 1, 7
"""Seconds before each measurement, and those that a server takes from its start to its end beside the measurements."""

SENSIBLE = 0.5
"""Of answers that were mixed up, a third would be within the tolerance."""

DEFAULT_RECIPE = "int8-dynamic"


def main() -> None:
    options = arguments()
    require_fast_parts()
    work = workload(bundle_of(options.recipe, options.bundle), tokens=options.tokens)
    chosen = entries(work, options)
    seconds = options.rounds * len(chosen) * (len(CLIENTS) * (options.seconds + WARM_UP) + START)
    print(f"... {len(chosen)} servers, {options.rounds} rounds: about {seconds / 60:.0f} minutes", file=sys.stderr)
    found: Found = defaultdict(list)
    for number in range(options.rounds):
        turn = number % len(chosen)
        for entry in chosen[turn:] + chosen[:turn]:
            measure(entry, work, options, found)
    text = report(chosen, found, options)
    print(text)
    if options.write:
        write_section("serving" if options.recipe == DEFAULT_RECIPE else f"serving-{options.recipe}", text)


def require_fast_parts() -> None:
    """End the program where the extra `serve` is there in part: the server would run, and be slower."""
    missing = [name for name in ("httptools", "orjson", "uvloop") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} missing: pip install '.[serve]'")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of one second each: shows that it runs")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="of the model; each has its own section in README.md")
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CONTENDERS])
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--wait-ms", type=float, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bundle", type=Path, help="a bundle of a text classifier")
    parser.add_argument("--environments", type=Path, default=ARTIFACTS / "environments")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 1, 1
    return options


@dataclass(frozen=True)
class Entry:
    """A row of the table: a server in one layout.

    Attributes:
        name: In the table.
        contender, way: The server.
        more: Further words that start it.
        alone: Every answer has to be what its row gets alone.
    """

    name: str
    contender: Contender
    way: Way
    more: tuple[str, ...] = ()
    alone: bool = False


@dataclass(frozen=True)
class Turn:
    """One measurement: the load, the server's processor milliseconds a request, its MiB, and the shares of answers."""

    load: Measured
    cpu: float
    mib: float
    alone: float
    right: float


Found = dict[tuple[str, int], list[Turn]]


def entries(work: Workload, options: argparse.Namespace) -> list[Entry]:
    """Ours by default and joining as the peers do; the peers with one batch on all cores and with a batch on each."""
    cores = default_threads()
    way = Way(work.bundle.folder, work.bundle.model_file(), options.max_batch, options.wait_ms, options.environments)
    found = []
    for contender in CONTENDERS:
        if contender.name == "onnxpress":
            ours = replace(way, wait_ms=0)
            found.append(Entry("onnxpress", contender, ours, alone=True))
            if options.recipe == DEFAULT_RECIPE:  # others are joined anyway
                found.append(Entry("onnxpress, `--join tolerance`", contender, ours, ("--join", "tolerance")))
        else:
            for workers, threads in ((1, cores), (cores, 1)):
                name = f"{contender.name}, {workers} x {threads} thread{'s' * (threads > 1)}"
                found.append(Entry(name, contender, replace(way, workers=workers, threads=threads)))
    return [entry for entry in found if not options.only or entry.contender.name in options.only]


def measure(entry: Entry, work: Workload, options: argparse.Namespace, found: Found) -> None:
    """Start one server and load it with every number of clients."""
    contender = entry.contender
    requests = [http(contender.path, contender.body(row, str(i))) for i, row in enumerate(work.rows)]
    with running(contender, entry.way, more=entry.more) as server:
        load(server.port, requests, clients=8, seconds=0.1, warm_up=min(2.0, options.seconds))
        for clients in CLIENTS:
            before = server.cpu_seconds()
            result = load(server.port, requests, clients=clients, seconds=options.seconds, warm_up=WARM_UP)
            spent = (server.cpu_seconds() - before) * 1e3 / max(1, result.answers)
            alone, right = shares(entry, work, result)
            found[entry.name, clients].append(Turn(result, spent, server.rss_mib(), alone, right))
            times = f"p50 {result.p50:.1f}, p99 {result.p99:.1f}, processors {spent:.2f} ms a request"
            print(f"... {entry.name}, {clients} clients: {result.rate:.0f}/s, {times}", file=sys.stderr, flush=True)


def shares(entry: Entry, work: Workload, result: Measured) -> tuple[float, float]:
    """The shares of answers that are as alone, and within the tolerance.

    Ends the program where ours are not all as alone, or where answers belong to other rows.
    """
    if not result.sampled:
        raise SystemExit(f"{entry.name} answered nothing ({result.failed} failed)")
    answers = [(answer.number, entry.contender.logits(json.loads(answer.body))) for answer in result.sampled]
    alone = statistics.mean(work.is_alone(*answer) for answer in answers)
    right = statistics.mean(work.is_right(*answer) for answer in answers)
    if right < SENSIBLE or (entry.alone and alone < 1):
        raise SystemExit(f"{entry.name}: {alone:.1%} of answers are as alone, {right:.1%} within the tolerance")
    return alone, right


def report(chosen: Sequence[Entry], found: Found, options: argparse.Namespace) -> str:
    columns, rows = [""], []
    for clients in CLIENTS:
        columns += [f"{clients} client{'s' * (clients > 1)}: req/s", "p50 ms", "p99 ms"]
    for entry in chosen:
        cells = [entry.name]
        for clients in CLIENTS:
            loads = [turn.load for turn in found[entry.name, clients]]
            cells.append(_spread([one.rate for one in loads], 0))
            cells += [_spread([one.p50 for one in loads], 1), _spread([one.p99 for one in loads], 1)]
        last, turns = found[entry.name, CLIENTS[-1]], [t for clients in CLIENTS for t in found[entry.name, clients]]
        cells += [_spread([turn.cpu for turn in last], 2), f"{statistics.median(turn.mib for turn in last):.0f}"]
        cells += [f"{min(turn.alone for turn in last):.1%}", f"{min(turn.right for turn in last):.1%}"]
        rows.append((*cells, sum(turn.load.failed for turn in turns)))
    columns += [f"processor ms a request, {CLIENTS[-1]} clients", "MiB", "as alone", "right", "failed"]
    what = options.bundle.name if options.bundle else options.recipe
    title = (
        f"**Requests a second and latency, {what}** ({options.tokens} tokens a request, largest batch "
        f"{options.max_batch}, the peers wait {options.wait_ms:g} ms; median of {options.rounds} interleaved rounds "
        f"of {options.seconds:g} s, lowest and highest in brackets)"
    )
    share = max(turn.load.client_share for turns in found.values() for turn in turns)
    peers = ", ".join(PACKAGES[name][0].replace("==", " ") for name in ("mlserver", "litserve", "bentoml"))
    note = (
        f"{peers}. The client took up to {share:.0%} of a core. MiB and processor time: all of a server's. As alone, "
        f"right: answers to {CLIENTS[-1]} clients that are what the row gets alone up to 0.01 %, and that are within "
        "the bundle's tolerance; in the worst round."
    )
    text = table(title, columns, rows)
    return "\n\n".join((text, note, environment(machine(), versions(), ("onnxruntime", "numpy"))))


def _spread(values: Sequence[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
