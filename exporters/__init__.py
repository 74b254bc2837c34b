# SPDX-License-Identifier: Apache-2.0
"""From a source to an exported model. Importing this imports nothing heavy; each name is loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..contracts.lazy import lazy_names

if TYPE_CHECKING:
    from .exported import ExportedModel, Reference, SourceInfo
    from .settings import ExportSettings
    from .sources import load

__all__ = ["ExportSettings", "ExportedModel", "Reference", "SourceInfo", "load"]

__getattr__ = lazy_names(
    __name__,
    {
        "exported": ("ExportedModel", "Reference", "SourceInfo"),
        "settings": ("ExportSettings",),
        "sources": ("load",),
    },
)
