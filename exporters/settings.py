# SPDX-License-Identifier: Apache-2.0
"""How a source is exported: the `export:` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Pooling = Literal["auto", "none", "mean", "cls"]


class ExportSettings(BaseModel):
    """Settings of the export.

    Attributes:
        opset: ONNX operator set of the graph.
        pooling: For feature-extraction: `mean` or `cls` makes one `sentence_embedding` a text; `auto` does what the
            source's sentence-transformers files say, and nothing where there are none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    opset: int = Field(default=20, ge=18, le=24)
    pooling: Pooling = "auto"
