# SPDX-License-Identifier: Apache-2.0
"""The signature of a model: what goes in and what comes out, readable in any language."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Dim = int | str | None
"""A fixed size, the name of a dynamic axis (`batch`, `sequence`), or None where nothing is known."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: The name in the graph.
        dtype: numpy's name of the element type (`int64`, `float32`), or `bfloat16`, `string`.
        shape: One entry an axis.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorSpec:
        return cls(data["name"], data["dtype"], tuple(data["shape"]))


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs, in the graph's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def dynamic_axes(self) -> Iterator[str]:
        """Yield the name of each dynamic input axis once, in order of appearance."""
        seen: set[str] = set()
        for spec in self.inputs:
            for dim in spec.shape:
                if isinstance(dim, str) and dim not in seen:
                    seen.add(dim)
                    yield dim

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [s.to_json() for s in self.inputs], "outputs": [s.to_json() for s in self.outputs]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Signature:
        return cls(
            tuple(TensorSpec.from_json(s) for s in data["inputs"]),
            tuple(TensorSpec.from_json(s) for s in data["outputs"]),
        )
