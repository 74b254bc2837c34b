# SPDX-License-Identifier: Apache-2.0
"""From a source to an exported model. Importing this imports nothing heavy; each name is loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exported import ExportedModel, Reference, SourceInfo
    from .settings import ExportSettings
    from .sources import load

__all__ = ["ExportSettings", "ExportedModel", "Reference", "SourceInfo", "load"]

_HOME = {
    "exported": ("ExportedModel", "Reference", "SourceInfo"),
    "settings": ("ExportSettings",),
    "sources": ("load",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
