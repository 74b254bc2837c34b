# SPDX-License-Identifier: Apache-2.0
"""The Jinja templates of the report and of the model card, and the filters that write numbers for people in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import jinja2

NBSP = "\u00a0"
NONE = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TITLES = {
    "pytorch-fp32": "PyTorch fp32 eager",
    "pytorch-bf16": "PyTorch bf16 eager",
    "pytorch-fp16": "PyTorch fp16 eager",
    "onnx-fp32": "ONNX fp32",
}


@cache
def environment() -> jinja2.Environment:
    """Return the environment: HTML is escaped, Markdown is not (its template names the filter at each value)."""
    found = jinja2.Environment(
        loader=jinja2.FunctionLoader(_load),
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: NONE if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    numbers = (number, fraction, exact, unit, filesize, times, interval, sqnr)
    for helper in (*numbers, humane, title, shape, crossed, shorten, markdown, code):
        found.filters[helper.__name__] = helper
    return found


def _load(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _absent(value: Any) -> bool:
    return value is None or isinstance(value, jinja2.Undefined)


def number(value: Any, digits: int = 3) -> str:
    """Return a number with `digits` significant digits."""
    if _absent(value):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}{NBSP}×{NBSP}10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")
    power = int(f"{size:.{digits - 1}e}".split("e")[1])
    decimals = max(0, digits - 1 - power) if size else 0
    return f"{value:,.{decimals}f}".replace("-", "−")


def fraction(value: Any) -> str:
    """Return a cosine or another figure whose best is 1: one just below 1 is never rounded up to 1."""
    if not isinstance(value, float) or not 0.9 <= value < 1:
        return number(value)
    if value > 1 - 1e-6:
        return f">{NBSP}0.999999"
    return f"{value:.{max(4, math.ceil(-math.log10(1 - value) - 1e-6) + 1)}f}"


def exact(value: Any) -> str:
    """Return a number as a gate compares it: no trailing zeros, six significant digits."""
    if isinstance(value, float) and 1e-4 <= abs(value) < 1e6:
        text = f"{value:.6g}".replace("-", "−")
        return fraction(value) if text == "1" else text
    return number(value)


def unit(value: Any, symbol: str) -> str:
    """Return a number with its unit, kept on one line."""
    return NONE if _absent(value) else f"{number(float(value))}{NBSP}{symbol}"


def filesize(value: Any) -> str:
    """Return a size in bytes in SI units: 1 MB is 1,000,000 bytes."""
    if _absent(value):
        return NONE
    for power, symbol in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if abs(value) >= 999.5 * 1000 ** (power - 1):
            return unit(value / 1000**power, symbol)
    return f"{value:,}{NBSP}B".replace("-", "−")


def times(value: Any) -> str:
    """Return a ratio: 3.97 ×."""
    return unit(value, "×")


def compared(ratio: float | None, low: float | None, high: float | None, better: str, worse: str) -> tuple[str, str]:
    """Return a ratio in words and its tone; no words where the interval holds 1 or the change is under 0.5 %."""
    if not ratio:
        return "", "even"
    low, high = (ratio if low is None else low), (ratio if high is None else high)
    if low > 1 and ratio >= 1.005:
        return f"{times(ratio)} {better}", "good"
    if high < 1 and ratio <= 0.995:
        return f"{times(1 / ratio)} {worse}", "bad"
    return "", "even"


def interval(ratio: Mapping[str, Any] | None) -> str:
    """Return the interval of a measured ratio, or an empty string where it has none."""
    low, high = ((ratio or {}).get(side) for side in ("low", "high"))
    if low is None or high is None or low == high:
        return ""
    return f"{number(float(low))}–{number(float(high))}"


def humane(name: Any) -> str:
    """Return a key of the manifest as words."""
    return str(name).replace("_", " ")


def title(variant: Any) -> str:
    """Return the name of a benchmarked variant as a reader says it."""
    return _TITLES.get(str(variant), str(variant))


def shape(dims: Iterable[Any] | None) -> str:
    """Return a tensor's shape: batch × sequence × 384."""
    return " × ".join("?" if d is None else str(d) for d in dims or ()) or "scalar"


def sqnr(errors: Mapping[str, Any]) -> str:
    """Return the signal to quantization noise ratio; null stands for no noise at all."""
    value = errors.get("sqnr_db")
    if value is None:
        return "identical" if errors.get("max_abs_error") in (0, None) else NONE
    return unit(value, "dB")


def shorten(text: Any, limit: int = 22) -> str:
    """Return a text that fits a chart's label."""
    short = str(text)
    return short if len(short) <= limit else short[: limit - 1] + "…"


def crossed(text: Any) -> str:
    """Return a text such as `8 x 128 tokens` with real multiplication signs."""
    return str(text or "").replace(" x ", " × ")


def markdown(value: Any) -> str:
    """Escape a text for a Markdown line or table cell; HTML in it stays text."""
    text = " ".join(str(NONE if value is None else value).replace(NBSP, " ").split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)


def code(value: Any) -> str:
    """Return a Markdown code span that its content cannot end."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"
