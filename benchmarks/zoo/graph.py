# SPDX-License-Identifier: Apache-2.0
"""What a graph of the collection is: how its file is made, and inputs that it can be run with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Feeds = dict[str, np.ndarray]
Draw = Callable[[int, np.random.Generator], Feeds]
"""Makes inputs for so many samples."""

Field = Callable[[int, np.random.Generator], np.ndarray]
"""Makes one input for so many samples."""

TOKENS, VOCABULARY = 14, 120
BATCHES = (1, 3)


@dataclass(frozen=True)
class Graph:
    """One graph.

    Attributes:
        name: Its key in `GRAPHS`.
        description: What is in it that others have not, on one line.
        opset: The version of the ONNX operator set in the file (reading it with `graph_file.read` may raise it).
        build: Writes the `.onnx` into a folder and returns its path; the same weights every time.
        draw: Makes inputs.
        fixed_batch: The only batch size that it can be run at; None where every one is possible.
    """

    name: str
    description: str
    opset: int
    build: Callable[[Path], Path]
    draw: Draw
    fixed_batch: int | None = None

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes at which a check should run it."""
        return BATCHES if self.fixed_batch is None else (self.fixed_batch,)

    def feeds(self, batch: int, seed: int = 0) -> Feeds:
        """Valid random inputs, name to array; the same for the same seed.

        Raises:
            ValueError: The graph has another batch size, which is fixed.
        """
        if self.fixed_batch not in (None, batch):
            raise ValueError(f"{self.name} runs at batch {self.fixed_batch} only, not {batch}")
        return self.draw(batch, np.random.default_rng(seed))


def inputs(**fields: Field) -> Draw:
    """Every input by a function of its own."""
    return named(fields)


def named(fields: Mapping[str, Field]) -> Draw:
    """The same for names that are no Python names, such as `input.1`."""
    return lambda batch, random: {name: field(batch, random) for name, field in fields.items()}


def normal(*shape: int) -> Field:
    """Float32 [batch, *shape], standard normal."""
    return lambda batch, random: random.standard_normal((batch, *shape)).astype(np.float32)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Field:
    """Float32 [batch, *shape] in [low, high)."""
    return lambda batch, random: random.uniform(low, high, (batch, *shape)).astype(np.float32)


def integers(low: int, high: int, *shape: int, dtype: type[np.integer] = np.int64) -> Field:
    """Integers [batch, *shape] of low to high - 1."""
    return lambda batch, random: random.integers(low, high, (batch, *shape)).astype(dtype)


def texts(*, token_types: bool = False, length: int = TOKENS, vocabulary: int = VOCABULARY, first: int = 5) -> Draw:
    """Token ids with padding on the right: every row but the first is two tokens shorter than the one before it."""

    def draw(batch: int, random: np.random.Generator) -> Feeds:
        mask = (np.arange(length) < length - 2 * np.arange(batch)[:, None]).astype(np.int64)
        feeds = {"input_ids": random.integers(first, vocabulary, (batch, length)) * mask, "attention_mask": mask}
        if token_types:
            feeds["token_type_ids"] = (np.arange(length) >= length // 2) * mask
        return feeds

    return draw
