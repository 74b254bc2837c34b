# SPDX-License-Identifier: Apache-2.0
"""Where the time of one run goes: the nodes that the engine really executes, after its own optimizations."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ..contracts.errors import InputError
from .session import PROVIDERS, Array, Session


@dataclass(frozen=True)
class NodeTime:
    """One executed node.

    Attributes:
        op: Operator type as the engine runs it (`MatMul`, `QAttention`, `MemcpyToHost`; `FullyConnected`, `Subgraph`
            for what OpenVINO has fused).
        name: The node's name; the engine invents one (`MatMul_0`) where the graph has none.
        provider: Short name of the provider that ran it, which may be `cpu` although another one was asked for.
        ms_per_run: Median over the runs, in milliseconds. A node in a loop counts all its executions.
        share: Part of the time of all nodes, 0 to 1.
        kernel: OpenVINO's name of the implementation, which ends in the type that it computes in
            (`brgemm_avx512_i8`); empty with ONNX Runtime, whose operator types say it.
    """

    op: str
    name: str
    provider: str
    ms_per_run: float
    share: float
    kernel: str = ""


@dataclass(frozen=True)
class OperatorTime:
    """All executed nodes of one operator type on one provider; times as in `NodeTime`, summed."""

    op: str
    provider: str
    nodes: int
    ms_per_run: float
    share: float


def profile(
    model: str | Path | bytes,
    feeds: Mapping[str, Array],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    runs: int = 5,
) -> list[NodeTime]:
    """Time every node that the engine executes for these inputs, slowest first.

    Profiling itself costs some microseconds a node, so these times explain a latency; they do not replace measuring it.

    Raises:
        InputError: `runs` is below 1, or as `Session` and `Session.run`.
    """
    if runs < 1:
        raise InputError(f"runs must be 1 or more, not {runs}")
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        session = Session(model, provider=provider, threads=threads, profile_to=Path(folder) / "trace")
        try:
            for _ in range(runs + 1):  # the first one warms up
                session.run(feeds)
        finally:
            trace = session.end_profiling()
        events = json.loads(trace.read_text(encoding="utf-8"))
    return _node_times(events, runs)


def by_operator(times: list[NodeTime]) -> list[OperatorTime]:
    """Sum node times by operator type and provider, slowest first."""
    groups: dict[tuple[str, str], list[NodeTime]] = defaultdict(list)
    for time in times:
        groups[time.op, time.provider].append(time)
    rows = [
        OperatorTime(op, provider, len(group), sum(t.ms_per_run for t in group), sum(t.share for t in group))
        for (op, provider), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.ms_per_run, row.op, row.provider))


def operators_after_optimization(
    model: str | Path | bytes,
    feeds: Mapping[str, Array],
    *,
    provider: str = "cpu",
    threads: int | None = None,
) -> dict[str, int]:
    """Count the nodes that the engine executes for these inputs, by operator type, most frequent first.

    Fusions that the engine makes by itself are counted as what they became, and the branch of an `If` that these
    inputs do not take is not counted.
    """
    times = profile(model, feeds, provider=provider, threads=threads, runs=1)
    counts = Counter(time.op for time in times)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _node_times(events: list[dict[str, object]], runs: int) -> list[NodeTime]:
    """Turn the events of a trace (microseconds) into times a node; the first run in it is left out."""
    starts = sorted(_number(e["ts"]) for e in events if e["name"] == "model_run")
    short = {full: name for name, full in PROVIDERS.items()}
    spent: dict[tuple[str, str, str, str, str], list[float]] = defaultdict(lambda: [0.0] * runs)
    for event in events:
        label, args = str(event["name"]), event.get("args")
        if event["cat"] != "Node" or not label.endswith("_kernel_time") or not isinstance(args, dict):
            continue
        run = bisect_right(starts, _number(event["ts"])) - 2
        if run < 0:
            continue
        ran_on = str(args.get("provider", ""))
        key = (
            str(args["op_name"]),
            label.removesuffix("_kernel_time"),
            short.get(ran_on, ran_on),
            str(args.get("kernel", "")),
            str(args.get("node_index")),
        )
        spent[key][run] += _number(event["dur"]) / 1e3
    medians = {key: median(values) for key, values in spent.items()}
    total = sum(medians.values()) or 1.0
    times = [
        NodeTime(op, name, ran_on, ms, ms / total, kernel) for (op, name, ran_on, kernel, _), ms in medians.items()
    ]
    return sorted(times, key=lambda time: (-time.ms_per_run, time.name))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
