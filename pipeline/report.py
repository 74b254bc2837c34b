# SPDX-License-Identifier: Apache-2.0
"""The report (one HTML file) and the model card (README.md) of a bundle, written from its manifest and nothing else.

Both are pure functions of the manifest: no clock, no network, no look at the machine, so the same manifest gives the
same bytes. Whatever the manifest does not hold (null, empty list) is left out or called "not measured", never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .templates import (
    NBSP,
    NONE,
    compared,
    crossed,
    environment,
    filesize,
    fraction,
    humane,
    interval,
    number,
    times,
    title,
    unit,
)
from .templates.card import feeds, front_matter, limits, preparation
from .templates.charts import chart

Json = Mapping[str, Any]

_PROVIDERS = {"cuda": "CUDAExecutionProvider"}
"""For the card's sample; what was measured on OpenVINO's own runtime loads in ONNX Runtime's CPU provider as well."""
_SETTINGS = {"latency": "One at a time", "throughput": "Batched"}


# --------------------------------------------------------------------------------------------- what the manifest says


def _reference(manifest: Json) -> tuple[str | None, str]:
    """Return the variant that the ratios refer to, and what to call it."""
    rows = manifest.get("benchmarks") or []
    for row in rows:
        ratio = row.get("ratio_to_reference") or {}
        if row["variant"] != manifest.get("variant") and all(ratio.get(k) == 1.0 for k in ("median", "low", "high")):
            return row["variant"], title(row["variant"])
    if any(row["variant"] == "pytorch-fp32" for row in rows):
        return "pytorch-fp32", title("pytorch-fp32")
    graph = (manifest.get("source") or {}).get("kind") == "onnx"
    return None, "the unmodified graph" if graph else "the PyTorch original"


def _candidate(manifest: Json, setting: str) -> Json:
    rows = manifest.get("benchmarks") or []
    return next((r for r in rows if r["variant"] == manifest.get("variant") and r["setting"] == setting), {})


def _group(manifest: Json, row: Json) -> list[Json]:
    """Return the benchmark rows that may be compared with `row`: same setting, same shape, same threads."""
    keys = ("setting", "batch", "shape", "threads")
    return [r for r in manifest.get("benchmarks") or [] if all(r.get(k) == row.get(k) for k in keys)]


def _median(row: Json) -> float | None:
    return (row.get("latency_ms") or {}).get("p50")


def _speed(row: Json) -> tuple[str, str, str]:
    """Return the speed against the reference in words, its tone, and the interval in the same direction."""
    ratio = row.get("ratio_to_reference") or {}
    if all(ratio.get(side) in (1.0, None) for side in ("median", "low", "high")):
        return "", "", ""  # not compared, or the reference itself
    text, tone = compared(ratio.get("median"), ratio.get("low"), ratio.get("high"), "faster", "slower")
    if tone == "bad":
        ratio = {"low": 1 / (ratio.get("high") or ratio["median"]), "high": 1 / (ratio.get("low") or ratio["median"])}
    return text, tone, interval(ratio)


def metric_rows(manifest: Json) -> list[dict[str, str]]:
    """Return each task metric in words; `drop` above 0 means worse, whichever way the metric counts."""
    rows = []
    for name, values in (manifest.get("metrics") or {}).items():
        reference, candidate, drop = (values.get(k) for k in ("reference", "candidate", "drop"))
        percent = not {"accuracy", "f1"}.isdisjoint(name.split("_"))
        change = candidate - reference if None not in (reference, candidate) else (-drop if drop is not None else None)
        places = 2 if change and abs(change) < 0.1 else 1
        texts = [_metric_value(v, places if percent else _places(candidate), percent) for v in (reference, candidate)]
        worse = change is not None and (-change if drop is None else drop)
        rows.append(
            {
                "name": humane(name),
                "reference": texts[0],
                "candidate": texts[1],
                "change": _change(change, drop, name, places if percent else None),
                "tone": "loss" if worse and worse > 1e-9 else "good" if worse and worse < -1e-9 else "even",
                "percent": "yes" if percent else "",
            }
        )
    return rows


def _places(value: float | None) -> int:
    return len(fraction(float(value or 0)).partition(".")[2])


def _metric_value(value: float | None, places: int, percent: bool) -> str:
    if value is None or not 1e-3 < abs(value) < 1e7 or 1 - 1e-6 < value < 1:
        return fraction(value)
    return f"{value:,.{places}f}".replace("-", "−") + f"{NBSP}%" * percent


def _change(change: float | None, drop: float | None, name: str, places: int | None) -> str:
    if change is None or change != change:
        return NONE
    if abs(change) < 1e-9:
        return "unchanged"
    if name == "perplexity" and drop is not None:
        return f"{drop:+.2f}{NBSP}%".replace("-", "−")
    sign = "+" if change > 0 else "−"
    if places is None:
        return sign + number(abs(float(change)), 2)
    return f"{sign}{abs(change):.{places}f}{NBSP}points"


# --------------------------------------------------------------------------------------------------------- the verdict

Part = tuple[str, str]
"""A piece of a sentence and its tone: good, bad, even, or empty for plain words."""


def headline(manifest: Json) -> list[Part]:
    """Return the verdict as one sentence in plain words, in pieces with their tone."""
    row, size = _candidate(manifest, "latency"), manifest.get("size") or {}
    speed, ratio = _speed(row), size.get("ratio")
    small = compared(ratio, None, None, "smaller", "larger")
    batch = f" (batch {row['batch']})" if row.get("batch") else ""
    claims = [(text, tone, note) for (text, tone), note in ((small, ""), (speed[:2], batch)) if text]
    parts: list[Part] = []
    for index, (text, tone, note) in enumerate(claims):
        if index:
            parts.append((" and " if tone == claims[0][1] else " but ", ""))
        parts += [(text, tone), (note, "")]
    if claims:
        parts.append((f" than {_reference(manifest)[1]}", ""))
    rest: list[list[Part]] = []
    if ratio and not small[0]:
        rest.append([("the same size", "")])
    if speed[1] == "even":
        where = ": ".join(filter(None, (batch.strip(" ()"), f"{speed[2]} ×" if speed[2] else "")))
        rest.append([(f"no measurable change in speed{f' ({where})' if where else ''}", "even")])
    rest += [_metric_part(metric) for metric in _headline_metric(manifest)]
    for clause in rest:
        parts += [("; ", "")] * bool(parts) + clause
    parts = [part for part in parts if part[0]] or [("nothing was measured", "")]
    first = parts[0][0]
    return [(first[:1].upper() + first[1:], parts[0][1]), *parts[1:], (".", "")]


def _headline_metric(manifest: Json) -> list[dict[str, str]]:
    rows = metric_rows(manifest)
    return ([row for row in rows if row["percent"]] or rows)[:1]


def _metric_part(metric: dict[str, str]) -> list[Part]:
    plain = {k: v.replace(f"{NBSP}%", "") for k, v in metric.items() if k in ("candidate", "reference")}
    values = f"{metric['name']} {plain['candidate']} vs {plain['reference']} ("
    return [(values, ""), (metric["change"], metric["tone"]), (")", "")]


def rival(manifest: Json) -> str:
    """Return how the candidate compares with the fastest variant beside the reference; batched only where it loses."""
    sentences: list[str] = []
    for setting in _SETTINGS:
        row = _candidate(manifest, setting)
        own, skip = _median(row), {manifest.get("variant"), _reference(manifest)[0]}
        others = [(m, r["variant"]) for r in _group(manifest, row) if r["variant"] not in skip and (m := _median(r))]
        if not own or not others or (sentences and min(others)[0] > 0.97 * own):
            continue
        best, name = min(others)
        words = "About as fast as" if 0.97 < best / own < 1.03 else ""
        words = words or compared(best / own, None, None, "faster than", "slower than")[0]
        medians = f"({unit(own, 'ms')} vs {unit(best, 'ms')}, batch {row.get('batch')})"
        sentences.append(f"{words} {title(name)}, the fastest other variant measured {medians}.")
    return " ".join(sentences)


def unmeasured(manifest: Json) -> str:
    """Return what the reader might expect and will not find, in one sentence."""
    gaps = [word for word, key in (("Speed", "benchmarks"), ("Quality on a task", "metrics")) if not manifest.get(key)]
    if not gaps:
        return ""
    return " and ".join(gaps[:1] + [g.lower() for g in gaps[1:]]) + f" {'were' if gaps[1:] else 'was'} not measured."


def tiles(manifest: Json) -> list[dict[str, str]]:
    """Return the key figures; a figure that was not measured has no tile."""
    found = []
    size, name = manifest.get("size") or {}, _reference(manifest)[1]
    if size.get("candidate_bytes") is not None:
        text, tone = compared(size.get("ratio"), None, None, "smaller", "larger")
        note = f"from {filesize(size['reference_bytes'])}" if size.get("reference_bytes") else ""
        found.append(
            {"label": "Size", "value": filesize(size["candidate_bytes"]), "change": text, "tone": tone, "note": note}
        )
    for setting, label in (("latency", "Latency"), ("throughput", "Throughput")):
        row = _candidate(manifest, setting)
        value = unit(_median(row), "ms") if setting == "latency" else unit(row.get("throughput_per_s"), "/s")
        if value != NONE:
            text, tone, span = _speed(row)
            note = f"than {name}" + (f", {span}" if span else "") if text else f"as {name}" * bool(tone)
            found.append(
                {
                    "label": f"{label}, batch {row.get('batch')}",
                    "value": value,
                    "change": text or "as fast" * bool(tone),
                    "tone": tone,
                    "note": note,
                }
            )
    for metric in _headline_metric(manifest):
        found.append(
            {
                "label": metric["name"].capitalize(),
                "value": metric["candidate"],
                "change": metric["change"],
                "tone": metric["tone"],
                "note": f"from {metric['reference']}",
            }
        )
    return found


# ---------------------------------------------------------------------------------------------------------- the charts


def panels(manifest: Json) -> list[dict[str, Any]]:
    """Return one chart for each setting, with every length as a percentage of the chart's width."""
    charts, done = [], []
    for row in manifest.get("benchmarks") or []:
        group = [r for r in _group(manifest, row) if _median(r) is not None]
        if row in done or not group:
            continue
        done += group
        providers = {r["provider"] for r in group if r["provider"] != "pytorch"}
        bars = [_bar(manifest, r, len(providers) > 1) for r in group]
        where = [crossed(row.get("shape")), f"{row['threads']} threads" if row.get("threads") else ""]
        charts.append(chart(_SETTINGS.get(row["setting"], row["setting"]), ", ".join(filter(None, where)), bars, "ms"))
    return charts


def _bar(manifest: Json, row: Json, with_provider: bool) -> dict[str, Any]:
    ratio, span = row.get("ratio_to_reference") or {}, interval(row.get("ratio_to_reference"))
    reference = row["variant"] == _reference(manifest)[0]
    return {
        "label": title(row["variant"]) + (f" · {row['provider']}" if with_provider else ""),
        "value": row["latency_ms"]["p50"],
        "low": row["latency_ms"].get("min"),
        "high": row["latency_ms"].get("p95"),
        "text": unit(_median(row), "ms"),
        "ratio": "reference" if reference else times(ratio.get("median")) if ratio.get("median") else "",
        "interval": "" if reference else span,
        "kind": "own" if row["variant"] == manifest.get("variant") else "other",
    }


def size_panel(manifest: Json) -> dict[str, Any] | None:
    """Return the size chart, or None where a size is missing."""
    size = manifest.get("size") or {}
    ends: list[tuple[str, Any, str]] = [
        (_reference(manifest)[1], size.get("reference_bytes"), "other"),
        (title(manifest.get("variant")), size.get("candidate_bytes"), "own"),
    ]
    if not all(value for _, value, _ in ends):
        return None
    bars = [
        {"label": name, "value": value / 1e6, "low": None, "high": None, "text": filesize(value), "kind": kind,
         "ratio": "reference" if kind == "other" else times(size.get("ratio")), "interval": ""}
        for name, value, kind in ends
    ]  # fmt: skip
    return chart("On disk", "1 MB is 1,000,000 bytes, here and below", bars, "MB")


# -------------------------------------------------------------------------------------------------- tables and passes


def pass_rows(manifest: Json) -> list[dict[str, Any]]:
    """Return the passes with what they left, one line a reason, most frequent first."""
    rows = []
    for entry in manifest.get("passes") or []:
        reasons: dict[str, list[str]] = {}
        for item in entry.get("left") or []:
            reasons.setdefault(item.get("reason") or "no reason given", []).append(item.get("node") or NONE)
        left = sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0]))
        # What is said layer by layer is in the manifest (sensitivity has a section of its own)
        found = (entry.get("details") or {}).items()
        details = {key: value for key, value in found if value not in ({}, []) and not _nested(value)}
        rows.append({**entry, "details": details, "change": _shrunk(entry), "reasons": left})
    return rows


def _nested(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(part, dict) for part in inner)


def sensitivity_rows(manifest: Json) -> list[dict[str, Any]]:
    """Return the layers that were tried one at a time, most fragile first.

    `share` is the bar: 1 for the layer that alone does most harm, 0 for the one that does least, evenly in dB.
    """
    found = [
        row for entry in manifest.get("passes") or [] for row in (entry.get("details") or {}).get("sensitivity") or []
    ]
    rows = [
        {"name": row.get("layer") or NONE, "form": row.get("form") or NONE, "choice": choice, "db": db}
        for row in found
        for choice, db in (row.get("alone_db") or {}).items()
        if db is not None
    ]
    rows.sort(key=lambda row: (row["db"], row["name"]))
    span = rows[-1]["db"] - rows[0]["db"] if rows else 0
    return [{**row, "share": (rows[-1]["db"] - row["db"]) / span if span else 0} for row in rows]


def _shrunk(entry: Json) -> str:
    before, after = entry.get("bytes_before"), entry.get("bytes_after")
    if not before or after is None:
        return NONE
    change = 100 * (after / before - 1)
    return f"{change:+.{1 if abs(change) >= 0.1 else 2}f}{NBSP}%".replace("-", "−") if change else "0"


def benchmark_groups(manifest: Json) -> list[dict[str, Any]]:
    """Return the benchmark rows under their setting, in the manifest's order."""
    groups: dict[str, list[Json]] = {}
    for row in manifest.get("benchmarks") or []:
        groups.setdefault(str(row["setting"]), []).append(row)
    return [{"name": _SETTINGS.get(key, key), "rows": rows} for key, rows in groups.items()]


# ------------------------------------------------------------------------------------------------------------- the card


def card_rows(manifest: Json) -> list[tuple[str, str, str, str]]:
    """Return the measured table: what, reference, this model, change."""
    size = manifest.get("size") or {}
    rows = []
    if size.get("candidate_bytes") is not None:
        change = compared(size.get("ratio"), None, None, "smaller", "larger")[0] or "same"
        rows.append(("Size", filesize(size.get("reference_bytes")), filesize(size["candidate_bytes"]), change))
    for setting in _SETTINGS:
        row = _candidate(manifest, setting)
        base = next((r for r in _group(manifest, row) if r["variant"] == _reference(manifest)[0]), {})
        if row:
            text, tone, span = _speed(row)
            change = (text or ("no measurable change" if tone else NONE)) + (f" ({span})" if span else "")
            rows.append(
                (
                    f"Median latency, {crossed(row.get('shape'))}",
                    unit(_median(base), "ms"),
                    unit(_median(row), "ms"),
                    change,
                )
            )
    return rows + [(m["name"].capitalize(), m["reference"], m["candidate"], m["change"]) for m in metric_rows(manifest)]


# ------------------------------------------------------------------------------------------------------------ rendering


def render_report(manifest: Json) -> str:
    """Return the report: one HTML file that needs no network and no script.

    Args:
        manifest: The bundle's manifest, schema version 1. Ratios above 1 mean that the pressed model is better.
    """
    sentence = headline(manifest)
    view = {
        "m": manifest,
        "sentence": sentence,
        "plain": "".join(text for text, _ in sentence),
        "accepted": manifest.get("status") == "accepted",
        "failed": [gate for gate in manifest.get("gates") or [] if gate.get("passed") is False],
        "reference": _reference(manifest)[1],
        "rival": rival(manifest),
        "unmeasured": unmeasured(manifest),
        "tiles": tiles(manifest),
        "panels": panels(manifest),
        "size_panel": size_panel(manifest),
        "metrics": metric_rows(manifest),
        "benchmarks": benchmark_groups(manifest),
        "passes": pass_rows(manifest),
        "sensitivity": sensitivity_rows(manifest),
    }
    return environment().get_template("report.html.j2").render(view)


def render_card(manifest: Json) -> str:
    """Return the model card: README.md with the YAML front matter that the Hub reads.

    Args:
        manifest: The bundle's manifest, schema version 1.
    """
    inputs, variants = feeds(manifest), manifest.get("variants") or {}
    row = _candidate(manifest, "latency")
    view = {
        "m": manifest,
        "front": front_matter(manifest),
        "plain": "".join(text for text, _ in headline(manifest)),
        "rows": card_rows(manifest),
        "reference": _reference(manifest)[1],
        "unmeasured": unmeasured(manifest),
        "limits": limits(manifest),
        "preparation": preparation(manifest),
        "path": repr((variants.get(manifest.get("variant")) or {}).get("path") or "onnx/model.onnx"),
        "provider": _PROVIDERS.get(str(row.get("provider")), "CPUExecutionProvider"),
        "feeds": inputs,
        "text": any(feed["text"] for feed in inputs),
        "length": next((feed["length"] for feed in inputs if feed["text"]), ""),
        "outputs": [spec["name"] for spec in (manifest.get("signature") or {}).get("outputs") or []],
        "failed": [gate for gate in manifest.get("gates") or [] if gate.get("passed") is False],
    }
    return environment().get_template("card.md.j2").render(view)
