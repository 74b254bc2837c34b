# SPDX-License-Identifier: Apache-2.0
"""`onnxpress serve` at twice its capacity for ten minutes, with clients and then the server killed under load.

    .venv/bin/python -m benchmarks.serving.soak [--quick] [--write] [--seconds 600]

1. Its capacity: 32 clients, each with one request in flight.
2. Twice that many requests a second arrive (Poisson) for --seconds, over more connections than its queue has places.
   Each has its own id; an answer has to bear it and to be its own row's (MiniLM, fp32, sentences of their own lengths:
   rows differ by more than the tolerance); a refusal has to be a 503 with Retry-After. At a third of the time a second
   client with 64 requests in flight is killed (SIGKILL), at two thirds another.
3. The server is killed (SIGKILL) under the same load, started again on the same port, loaded again and stopped.
4. The audit log: its chain holds, and every id that was answered with 200 stands in it exactly once, but for those that
   the killed server had answered and not yet written.

Resident memory is read once a second in step 2; its slope in the second half has a 95 % interval. With the defaults it
takes 11 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine
from onnxpress.runtime.serving.audit import AuditResult, check_audit

from ..markdown import environment, table, write_section
from .client import http, load
from .memory import Watch, slope
from .open_loop import Book, Requests, arrive
from .servers import CONTENDERS, Running, Way, free_port, running
from .workload import ARTIFACTS, Workload, bundle_of, v2_body, workload

OURS = CONTENDERS[0]
QUEUE, CONNECTIONS = 64, 256


@dataclass
class Killed:
    """What the kills came to: seconds until the restarted server was ready, and the books around it."""

    ready_seconds: float
    during: Book
    after: Book


def main() -> None:
    options = arguments()
    work = workload(bundle_of("fp32", options.bundle), tokens=None)
    if options.client is not None:
        asyncio.run(endless_client(options.client, work))
        return
    way = Way(work.bundle.folder, work.bundle.model_file(), 16, 0, ARTIFACTS)
    port, seconds = free_port(), options.seconds
    with tempfile.TemporaryDirectory() as scratch:
        audit = Path(scratch) / "audit.jsonl"
        more = ("--queue", str(QUEUE), "--audit", str(audit))
        with running(OURS, way, port=port, more=more) as server:
            requests = [http(OURS.path, v2_body(row, str(i))) for i, row in enumerate(work.rows)]
            capacity = load(port, requests, clients=32, seconds=min(10, seconds / 4), warm_up=2).rate
            print(f"... capacity {capacity:.0f}/s", file=sys.stderr, flush=True)
            book = Book()
            with Watch(server, min(1.0, seconds / 60)) as watch, killed_clients(options, port):
                arriving = arrive(
                    port, Requests(work, OURS.path, "soak-"), book,
                    rate=2 * capacity, seconds=seconds, connections=CONNECTIONS,
                )  # fmt: skip
                asyncio.run(arriving)
            during = kill_server(server, work, 2 * capacity)
        started = time.perf_counter()
        with running(OURS, way, port=port, more=more) as server:
            ready, after = time.perf_counter() - started, Book()
            arriving = arrive(
                port, Requests(work, OURS.path, "after-"), after, rate=capacity / 2, seconds=3, connections=CONNECTIONS
            )
            asyncio.run(arriving)
        chain, times = check_audit(audit), answered_ids(audit)
    text = report(options, capacity, book, watch, Killed(ready, during, after), chain, times)
    print(text)
    if options.write:
        write_section("soak", text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 seconds: shows that it runs")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    parser.add_argument("--seconds", type=float, default=600, help="of load at twice the capacity")
    parser.add_argument("--bundle", type=Path, help="a bundle of a text classifier, fp32")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.seconds = 20
    return options


async def endless_client(port: int, work: Workload) -> None:
    """The client that is killed: 64 requests in flight, for ever."""
    requests = Requests(work, OURS.path, f"killed-{os.getpid()}-")
    await arrive(port, requests, Book(), rate=500, seconds=3600, connections=64)


@contextlib.contextmanager
def killed_clients(options: argparse.Namespace, port: int) -> Iterator[None]:
    """Start a client of its own at a third and at two thirds of the time, and kill each three seconds later."""
    words = [sys.executable, "-m", "benchmarks.serving.soak", "--client", str(port)]
    words += ["--bundle", str(options.bundle)] if options.bundle else []
    code = (
        "import subprocess, sys, time\n"
        "wait, words = float(sys.argv[1]), sys.argv[2:]\n"
        "for _ in range(2):\n"
        "    time.sleep(wait)\n"
        "    client = subprocess.Popen(words)\n"
        "    time.sleep(6)\n"  # it loads its model first
        "    client.kill()\n"
        "    client.wait()\n"
    )
    killer = subprocess.Popen([sys.executable, "-c", code, str(max(1.0, options.seconds / 3 - 6)), *words])
    try:
        yield
    finally:
        killer.wait(options.seconds + 60)


def kill_server(server: Running, work: Workload, rate: float) -> Book:
    """SIGKILL in the middle of two seconds of load."""
    book = Book()

    async def both() -> None:
        requests = Requests(work, OURS.path, "kill-")
        arriving = asyncio.create_task(
            arrive(server.port, requests, book, rate=rate, seconds=2, connections=CONNECTIONS)
        )
        await asyncio.sleep(1)
        for process in server.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        await arriving

    asyncio.run(both())
    return book


def answered_ids(audit: Path) -> Counter[str]:
    """How often each id stands in the log as answered with 200."""
    lines = (json.loads(line) for line in audit.read_bytes().splitlines())
    return Counter(line["request"] for line in lines if line.get("event") == "answered" and line["status"] == 200)


def report(
    options: argparse.Namespace,
    capacity: float,
    book: Book,
    watch: Watch,
    killed: Killed,
    chain: AuditResult,
    times: Counter[str],
) -> str:
    accepted = [*book.accepted, *killed.after.accepted]
    missing = [identity for identity in accepted if times[identity] != 1]
    unwritten = sum(1 for identity in killed.during.accepted if times[identity] == 0)
    steep, low, high = slope(watch.seconds, watch.mib)
    p50, p99 = np.percentile(book.milliseconds or [np.nan], (50, 99))
    rows = [
        ("capacity", f"{capacity:.0f} requests a second"),
        ("load", f"{2 * capacity:.0f} a second for {options.seconds:g} s: {book.sent:,} requests"),
        ("answered right, once", f"{book.right:,}, p50 {p50:.0f} ms, p99 {p99:.0f} ms"),
        ("refused: 503 with Retry-After", f"{book.refused:,}"),
        ("answered wrongly", _first(book.wrong)),
        ("other statuses", dict(book.other) or 0),
        ("no answer", book.sent - book.answered),
        ("connection broken", book.broken),
        ("resident memory, MiB, at each tenth of the time", " ".join(f"{mib:.0f}" for mib in watch.tenths())),
        ("its slope in the second half (95 %)", f"{steep:+.1f} MiB an hour ({low:+.1f} to {high:+.1f})"),
        ("clients killed with 64 requests in flight", "2; nobody else noticed" if not book.broken else "2"),
        ("server killed", f"{killed.during.broken} connections broke, ready again after {killed.ready_seconds:.1f} s"),
        ("after the restart", f"{killed.after.right} of {killed.after.sent} right"),
        ("audit log", f"chain of {chain.lines:,} lines holds, {chain.repairs} torn line repaired"),
        ("accepted ids that are not in it exactly once", len(missing)),
        ("answered before the kill, not yet written", unwritten),
    ]
    if book.unsent:
        rows.append(("arrivals without a free connection", book.unsent))
    text = table(f"**Soak** (queue of {QUEUE}, largest batch 16, {CONNECTIONS} connections)", ("", ""), rows)
    return "\n\n".join((text, environment(machine(), versions(), ("onnxruntime", "numpy"))))


def _first(wrong: list[str]) -> str:
    return f"{len(wrong)}: {wrong[0]}" if wrong else "0"


if __name__ == "__main__":
    main()
