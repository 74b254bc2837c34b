# SPDX-License-Identifier: Apache-2.0
"""What watching costs the server: requests a second and CPU time a request without and with each part of it.

    .venv/bin/python -m benchmarks.serving.watching [--quick] [--write] [--bundle B] [--shadow FP32-BUNDLE]

The same server, model and client as `benchmarks.serving.compare`; rounds are interleaved. CPU time a request is the
steadier figure of the two: the client and other processes do not count in it.

Prediction: the event loop pays 1 us a request, the thread about 15 us for the figures and 30 us more for both logs, of
1 to 3 ms that a request costs here; so below 2 % for the figures and below 5 % with everything but the shadow, which
runs the fp32 model for its share of the requests and takes what CPU time is left over.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine

from ..markdown import environment, table, write_section
from .client import http, load
from .servers import CONTENDERS, MODEL_NAME, Contender, Running, Way, running
from .workload import ARTIFACTS, bundle_of, workload

_UNWATCHED = """
import sys
from onnxpress.runtime.serving.app import create_app
from onnxpress.runtime.serving.serve import serve
from onnxpress.runtime.serving.settings import Settings
serve(create_app({sys.argv[1]: sys.argv[2]}, Settings(max_batch=int(sys.argv[3]))), port=int(sys.argv[4]))
"""


def unwatched(way: Way, port: int, folder: Path) -> list[str]:
    """The server with no observer, no figures and no page."""
    return [sys.executable, "-c", _UNWATCHED, MODEL_NAME, str(way.bundle), str(way.max_batch), str(port)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of one second each: shows that it runs")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.05, help="of the requests that are replayed")
    parser.add_argument("--bundle", type=Path, help="a bundle of a text classifier")
    parser.add_argument("--shadow", type=Path, help="what its requests are replayed on")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 1, 1
    work = workload(bundle_of("int8-dynamic", options.bundle))
    way = Way(work.bundle.folder, work.bundle.model_file(), 16, 0.0, ARTIFACTS)
    ours = CONTENDERS[0]
    shadow = ("--shadow", str(bundle_of("fp32", options.shadow).folder), "--shadow-share", str(options.share))
    logs = ("--log", "log.jsonl", "--audit", "audit.jsonl")
    parts = {
        "nothing": (Contender("nothing", unwatched, ours.path, ours.ready), ()),
        "figures and drift": (ours, ("--shadow-share", "0")),
        "and both logs": (ours, logs),
        f"and {options.share:.0%} replayed on fp32": (ours, (*logs, *shadow)),
    }
    requests = [http(ours.path, ours.body(row, str(i))) for i, row in enumerate(work.rows)]
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for number in range(options.rounds):
        turn = number % len(parts)
        for name in [*parts][turn:] + [*parts][:turn]:
            contender, more = parts[name]
            with running(contender, way, more=more) as server:
                found[name].append(measure(server, requests, options.clients, options.seconds))
            rate, p99, cpu = found[name][-1]
            print(f"... {name}: {rate:.0f}/s, p99 {p99:.1f} ms, {cpu:.3f} ms CPU", file=sys.stderr, flush=True)
    title = (
        f"**What watching costs** ({options.clients} clients, median of {options.rounds} interleaved rounds of "
        f"{options.seconds:g} s)"
    )
    columns = ("watched", "req/s", "x nothing", "p99 ms", "CPU ms a request", "x nothing")
    text = f"{table(title, columns, rows_of(found))}\n\n{environment(machine(), versions(), ('onnxruntime',))}"
    print(text)
    if options.write:
        write_section("watching", text)


def measure(server: Running, requests: list[bytes], clients: int, seconds: float) -> tuple[float, float, float]:
    """Requests a second, p99 in ms, and the server's CPU milliseconds a request."""
    load(server.port, requests, clients=clients, seconds=0.1, warm_up=min(2.0, seconds))
    before = server.cpu_seconds()
    result = load(server.port, requests, clients=clients, seconds=seconds, warm_up=0)
    return result.rate, result.p99, (server.cpu_seconds() - before) * 1e3 / max(result.rate * seconds, 1)


def rows_of(found: dict[str, list[tuple[float, float, float]]]) -> list[tuple[object, ...]]:
    """A row for each part, with ratios inside a round."""
    rows: list[tuple[object, ...]] = []
    for name, results in found.items():
        pairs = list(zip(results, found["nothing"], strict=True))
        rate, p99, cpu = (statistics.median(column) for column in zip(*results, strict=True))
        faster = statistics.median(one[0] / other[0] for one, other in pairs)
        dearer = statistics.median(one[2] / other[2] for one, other in pairs)
        rows.append((name, f"{rate:.0f}", f"{faster:.3f}", f"{p99:.1f}", f"{cpu:.3f}", f"{dearer:.3f}"))
    return rows


if __name__ == "__main__":
    main()
