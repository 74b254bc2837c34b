# SPDX-License-Identifier: Apache-2.0
"""The demo's figures as the README shows them, from the manifest that `make demo` wrote.

make demo && .venv/bin/python benchmarks/demo.py [--write]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from markdown import environment, interval, table, write_section

MANIFEST = Path(__file__).parents[1] / "artifacts" / "demo" / "manifest.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    manifest = json.loads(MANIFEST.read_text("utf-8"))
    machine = environment(manifest["machine"], manifest["versions"], ("torch", "transformers", "onnxruntime"))
    text = "\n\n".join((speed(manifest), quality(manifest), machine))
    print(text)
    if options.write:
        write_section("demo", text)


def speed(manifest: dict[str, Any]) -> str:
    rows = []
    for row in manifest["benchmarks"]:
        latency = row["latency_ms"]
        times = (f"{latency['p50']:.1f}", f"{latency['p95']:.1f}", interval(row["ratio_to_reference"]))
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


if __name__ == "__main__":
    main()
