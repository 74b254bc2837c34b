# SPDX-License-Identifier: Apache-2.0
"""The geometry of a bar chart, as percentages of its width: what chart.html.j2 draws."""

from __future__ import annotations

import math
from typing import Any


def ticks(top: float) -> list[float]:
    """Return round axis marks from 0 to at least `top`, three to six of them."""
    step = 10.0 ** math.floor(math.log10(top))
    step = next((s for s in (step / 5, step / 2, step, step * 2) if top / s <= 5), step * 2)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def chart(name: str, note: str, bars: list[dict[str, Any]], symbol: str) -> dict[str, Any]:
    """Return a chart with an axis; each bar has `value`, and `low` and `high` for its whisker or None, in `symbol`."""
    marks = ticks(max(max(b["value"], b["high"] or 0) for b in bars) or 1.0)
    for bar in bars:
        for key in ("value", "low", "high"):
            bar[f"{key}_pct"] = None if bar[key] is None else round(100 * bar[key] / marks[-1], 2)
    axis = [{"pct": round(100 * m / marks[-1], 2), "text": f"{m:,.6g}"} for m in marks]
    return {"name": name, "note": note, "bars": bars, "axis": axis, "unit": symbol}
