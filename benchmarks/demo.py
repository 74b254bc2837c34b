# SPDX-License-Identifier: Apache-2.0
"""The demo's figures as the README shows them, from the manifest that `make demo` wrote.

make demo && .venv/bin/python benchmarks/demo.py [--write]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from markdown import table, write_section

MANIFEST = Path(__file__).parents[1] / "artifacts" / "demo" / "manifest.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    manifest = json.loads(MANIFEST.read_text("utf-8"))
    text = "\n\n".join((speed(manifest), quality(manifest), environment(manifest)))
    print(text)
    if options.write:
        write_section("demo", text)


def speed(manifest: dict[str, Any]) -> str:
    rows = []
    for row in manifest["benchmarks"]:
        ratio, latency = row["ratio_to_reference"], row["latency_ms"]
        interval = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
        times = (f"{latency['p50']:.1f}", f"{latency['p95']:.1f}", interval)
        rows.append((row["shape"], row["variant"], *times, f"{row['load_ms']:.0f}", f"{row['peak_rss_mb']:.0f}"))
    columns = ("input", "", "p50 ms", "p95 ms", "x PyTorch eager fp32 (95 %)", "load ms", "peak MiB")
    return table(f"**Speed** ({manifest['benchmarks'][0]['threads']} threads, interleaved)", columns, rows)


def quality(manifest: dict[str, Any]) -> str:
    size = manifest["size"]
    sizes = [f"{size[f'{side}_bytes'] / 1e6:.1f}" for side in ("reference", "candidate")]
    rows = [("size, MB", *sizes, f"{size['ratio']:.2f} x smaller")]
    for name, row in manifest["metrics"].items():
        change = "unchanged" if row["drop"] == 0 else f"{-row['drop']:+.4f}"
        rows.append((name.replace("_", " "), f"{row['reference']:.4f}", f"{row['candidate']:.4f}", change))
    return table("**Size and quality**", ("", "original", "int8-dynamic", "change"), rows)


def environment(manifest: dict[str, Any]) -> str:
    machine, versions = manifest["machine"], manifest["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "onnxruntime"))
    return f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['isa'])}); {named}."


if __name__ == "__main__":
    main()
