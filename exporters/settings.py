# SPDX-License-Identifier: Apache-2.0
"""How a source is exported: the `export:` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FieldSerializationInfo, field_serializer

Pooling = Literal["auto", "none", "mean", "cls"]
BackendName = Literal["auto", "dynamo", "transformers", "torchscript", "optimum"]


class ExportSettings(BaseModel):
    """Settings of the export.

    Attributes:
        opset: ONNX operator set of the graph.
        pooling: For feature-extraction: `mean` or `cls` makes one `sentence_embedding` a text; `auto` does what the
            source's sentence-transformers files say, and nothing where there are none.
        cache: Whether a model that generates takes and returns what it keeps of earlier tokens.
        trust_remote_code: Whether a transformers folder's own Python code may be run to load it.
        inputs: For a TorchScript archive, `.npz` files with an example array for each argument; sizes that differ
            between files are dynamic.
        dynamic_axes: For a TorchScript archive, input name to {axis: symbol}, instead of what its inputs show.
        submodule: For a TorchScript archive, the part of it to export.
        weights: `memory` loads a transformers checkpoint, `streamed` leaves it in its files (see `streamed`); `auto`
            streams what would take a large part of the machine's memory.
        backend: What traces the model (see `backends`); `auto` tries them in order until one proves to be right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    opset: int = Field(default=20, ge=18, le=24)
    pooling: Pooling = "auto"
    backend: BackendName = "auto"
    weights: Literal["auto", "memory", "streamed"] = "auto"
    cache: bool = True
    trust_remote_code: bool = False
    inputs: tuple[str, ...] = ()
    dynamic_axes: dict[str, dict[int, str]] | None = None
    submodule: str = ""

    @field_serializer("inputs")
    def _without_folders(self, inputs: tuple[str, ...], info: FieldSerializationInfo) -> list[str]:
        """A recipe goes into the bundle, which holds no path of the machine; another process needs the paths."""
        paths = bool((info.context or {}).get("paths"))
        return list(inputs) if paths else [Path(file).name for file in inputs]
