# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and their place in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A title line and a table."""
    lines = [title, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def interval(ratio: Mapping[str, float]) -> str:
    """A ratio to the reference with its interval, as `median (low–high)`."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def environment(machine: Mapping[str, Any], versions: Mapping[str, str], packages: Sequence[str]) -> str:
    """The line below a table: processor, cores, instruction sets, and the versions of `packages`."""
    named = ", ".join(f"{name} {versions[name]}" for name in packages)
    return f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['isa'])}); {named}."


def write_section(name: str, text: str) -> None:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->` in README.md."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = README.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"README.md has no section {name}")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")
