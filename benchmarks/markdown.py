# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and their place in the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A title line and a table."""
    lines = [title, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def write_section(name: str, text: str) -> None:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->` in README.md."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = README.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"README.md has no section {name}")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")
