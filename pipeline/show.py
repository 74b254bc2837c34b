# SPDX-License-Identifier: Apache-2.0
"""What the command line prints: tables for people on a terminal, plain text in a pipe, JSON when asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .pressing import Outcome
from .report import headline

_WIDTH = 110


def _console() -> Console:
    # Names and paths are data: `[0]` in one is no markup, `:cat:` no emoji
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a pipe has no width of its own; tables folded to 80 columns are hard to read in a log
        console = Console(width=_WIDTH, highlight=False, markup=False, emoji=False, color_system=None)
    return console


def _json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))  # noqa: T201 - this file prints


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """The result of a press: what it is, how it compares, which gates passed, where it lies."""
    manifest = outcome.manifest
    if as_json:
        _json(manifest)
        return
    console = _console()
    console.print()
    console.print("".join(text for text, _ in headline(manifest)).replace("\N{NO-BREAK SPACE}", " "))
    console.print()
    console.print(_benchmark_table(manifest["benchmarks"]))
    console.print(_quality_table(manifest))
    console.print(_pass_table(manifest["passes"]))
    if manifest["gates"]:
        console.print(_gate_table(manifest["gates"]))
    for warning in manifest["warnings"]:
        console.print(f"Note: {warning}")
    if outcome.folder is not None:
        shown = outcome.folder
        told = f"\nBundle:  {shown}\nReport:  {shown / 'report.html'}\nCheck:   onnxpress verify {shown}"
        console.print(told, soft_wrap=True)  # a path cut in two cannot be copied


def _benchmark_table(rows: Sequence[dict[str, Any]]) -> Table:
    cells: list[tuple[str, ...]] = []
    for row in rows:
        ratio, latency = row["ratio_to_reference"], row["latency_ms"]
        cells.append(
            (
                row["shape"],
                row["variant"],
                _number(latency["p50"]),
                _number(latency["p95"]),
                _number(latency["min"]),
                f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
                _number(row["throughput_per_s"]),
                _number(row["load_ms"]),
                _number(row["peak_rss_mb"]),
            )
        )
    threads = rows[0]["threads"] if rows else 0
    return _table(
        f"Speed, {threads} threads, interleaved (x: times as fast as the first, median and 95 % interval)",
        ("input", "variant", "p50 ms", "p95 ms", "min ms", "x", "per s", "load ms", "peak MiB"),
        _blank_repeats(cells),
    )


def _blank_repeats(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Print a group's name once."""
    return [row if i == 0 or rows[i - 1][0] != row[0] else ("", *row[1:]) for i, row in enumerate(rows)]


def _quality_table(manifest: dict[str, Any]) -> Table:
    size = manifest["size"]
    rows = [
        (
            "size MB",
            _number(size["reference_bytes"] / 1e6),
            _number(size["candidate_bytes"] / 1e6),
            f"{size['ratio']:.2f} x",
        )
    ]
    rows += _metric_rows(manifest["metrics"])
    rows += _noise_rows({name: errors["sqnr_db"] for name, errors in manifest["parity"].items()})
    return _table("Size and quality", ("measure", "reference", "pressed", "change"), rows)


_MOST_OUTPUTS = 6


def _noise_rows(noises: dict[str, float | None]) -> list[tuple[str, str, str, str]]:
    """Signal to noise of each output; of a decoder's cache, which has two a layer, the worst."""
    cache = [name for name in noises if name.startswith("present")]
    if len(noises) <= _MOST_OUTPUTS or not cache:
        cache = []
    rows = {f"SQNR of {name}, dB": noise for name, noise in noises.items() if name not in cache}
    if cache:
        finite = [noise for name in cache if (noise := noises[name]) is not None]
        rows[f"SQNR of the cache, the worst of {len(cache)}, dB"] = min(finite, default=None)
    return [(name, "", "exact" if noise is None else f"{noise:.1f}", "") for name, noise in rows.items()]


def _metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, row in metrics.items():
        drop = row["drop"]
        change = (
            ""
            if drop is None
            else "unchanged"
            if drop == 0
            else f"{drop:+.2f} %"  # of a perplexity, less is better
            if name == "perplexity"
            else f"{-drop:+.2f}"
            if abs(drop) >= 0.1
            else f"{-drop:+.4f}"
        )
        rows.append((name, _number(row["reference"], 4), _number(row["candidate"], 4), change))
    return rows


def _pass_table(passes: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            p["pass"],
            str(p["seen"]),
            str(p["changed"]),
            str(len(p["left"])),
            f"{p['nodes_before']} -> {p['nodes_after']}",
            f"{p['bytes_before'] / 1e6:.1f} -> {p['bytes_after'] / 1e6:.1f}",
            f"{p['seconds']:.2f}",
        )
        for p in passes
    ]
    return _table("Passes", ("pass", "seen", "changed", "left", "nodes", "weights MB", "s"), rows)


def _gate_table(gates: Sequence[dict[str, Any]]) -> Table:
    rows = [(g["expression"], _number(g["value"], 4), "passed" if g["passed"] else "FAILED") for g in gates]
    return _table("Gates", ("gate", "measured", ""), rows)


def print_validation(result: dict[str, Any], *, as_json: bool) -> None:
    """Errors of each output, metrics and gates."""
    if as_json:
        _json(result)
        return
    console = _console()
    rows = [
        (
            name,
            _number(e["max_abs_error"], 4),
            _number(e["mean_abs_error"], 4),
            _number(e["relative_error"], 4),
            "exact" if e["sqnr_db"] is None else f"{e['sqnr_db']:.1f}",
            _number(e["cosine"], 6),
            _number(e["top1_agreement"], 4),
        )
        for name, e in result["parity"].items()
    ]
    columns = ("output", "max abs", "mean abs", "relative", "SQNR dB", "cosine", "top-1 %")
    console.print(_table("Difference from the original", columns, rows))
    cases = [(c["case"], _number(c["sqnr_db"], 4), _number(c["max_abs_error"], 4)) for c in result["parity_cases"]]
    console.print(_table("By input", ("input", "SQNR dB", "max abs"), cases))
    if result["metrics"]:
        console.print(
            _table("Metrics", ("metric", "reference", "candidate", "change"), _metric_rows(result["metrics"]))
        )
    if result["gates"]:
        console.print(_gate_table(result["gates"]))


def print_benchmarks(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """The speed table alone."""
    if as_json:
        _json({"benchmarks": list(rows)})
    else:
        _console().print(_benchmark_table(rows))


def print_inspection(facts: dict[str, Any], *, as_json: bool) -> None:
    """What is in a model."""
    if as_json:
        _json(facts)
        return
    console = _console()
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in facts["opsets"].items())
    console.print(f"{facts['file']}  {facts['bytes'] / 1e6:.1f} MB, {facts['nodes']} nodes, opset {opsets}")
    for side in ("inputs", "outputs"):
        rows = [
            (s["name"], s["dtype"], " x ".join("?" if d is None else str(d) for d in s["shape"]) or "scalar")
            for s in facts["signature"][side]
        ]
        console.print(_table(side.capitalize(), ("name", "type", "shape"), rows))
    console.print(_table("Operators", ("operator", "count"), [(k, str(v)) for k, v in facts["operators"].items()]))
    weights = [(k, f"{v / 1e6:.2f}") for k, v in facts["weight_bytes"].items()]
    console.print(_table("Weights", ("type", "MB"), weights))
    largest = [(w["name"], w["type"], f"{w['bytes'] / 1e6:.2f}") for w in facts["largest_weights"]]
    console.print(_table("Largest weights", ("name", "type", "MB"), largest))
    if "groups" in facts:
        _print_groups(console, facts)


def _print_groups(console: Console, facts: dict[str, Any]) -> None:
    """What can be cut together, and why the rest stays."""
    rows = [(g["kind"], str(g["units"]), g["name"], str(len(g["cuts"]))) for g in facts["groups"]]
    console.print(_table("Groups that can be pruned", ("kind", "units", "first weight:axis", "weights"), rows))
    stays = [
        (s["name"], str(s["units"]), " ".join((s["reason"], f"({s['node']})" * bool(s["node"]))))
        for s in facts["stays"]
    ]
    console.print(_table("Stays", ("weight:axis", "units", "because"), stays))


def print_doctor(facts: dict[str, Any], *, as_json: bool) -> None:
    """The machine, the versions, and what to do."""
    if as_json:
        _json(facts)
        return
    console, machine = _console(), facts["machine"]
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['os']}")
    console.print(f"Instruction sets: {', '.join(machine['isa']) or 'none that matter here'} (int8: {facts['int8']})")
    console.print(f"Execution providers: {', '.join(facts['providers']) or 'none'}")
    console.print("Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    for finding in facts["findings"]:
        console.print(f"- {finding}")
    if not facts["findings"]:
        console.print("Everything that onnxpress needs is there.")


def _number(value: float | None, digits: int = 3) -> str:
    """Three figures, or as many as asked; whole numbers from 1000 on."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
