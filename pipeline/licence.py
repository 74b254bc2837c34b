# SPDX-License-Identifier: Apache-2.0
"""The licence that a source states of itself: in its model card, as the Hub has it, in config.json, or by timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..exporters.exported import ExportedModel

_UNSAID = {"", "other", "unknown", "none"}


def stated_licence(exported: ExportedModel) -> str | None:
    """The licence's name as the source writes it, or None where it states none that has a name."""
    folders = dict.fromkeys(file.parent for file in exported.processor_files.values())
    found: list[Any] = [_in_card(folder / "README.md") for folder in folders]
    found += [_in_config(folder / "config.json") for folder in folders]
    found.append((exported.image_settings or {}).get("license"))
    names = [name.strip() for name in found if isinstance(name, str) and len(name) < 200]
    return next((name for name in names if name.lower() not in _UNSAID), None)


def _in_card(card: Path) -> Any:
    """`license` (or, where that is `other`, `license_name`) of a card's YAML."""
    try:
        lines = card.read_text("utf-8").splitlines()
        if not lines or lines[0].strip() != "---":
            return None
        end = next(number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---")
        data = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, UnicodeDecodeError, StopIteration, yaml.YAMLError):
        return None
    if not isinstance(data, dict):
        return None
    licence = data.get("license")
    licence = licence[0] if isinstance(licence, list) and licence else licence
    return data.get("license_name") if licence == "other" else licence


def _in_config(file: Path) -> Any:
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("license") if isinstance(data, dict) else None
