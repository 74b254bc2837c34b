# SPDX-License-Identifier: Apache-2.0
"""Inputs for the example that a handoff shows: one row of the first golden sample, short enough to be source code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...contracts.signature import Dim, TensorSpec
from ...runtime.opened import Bundle

_WRITTEN_OUT = 64
"""Longer inputs are filled with one number: nobody reads an image's pixels in a source file."""


@dataclass(frozen=True)
class ExampleInput:
    """One input as a program writes it.

    Attributes:
        name: The name in the graph.
        dtype: numpy's name.
        open_shape: What the signature says, as text: `[batch, sequence]`.
        shape: The example's own.
        size: How many numbers that is.
        numbers: All of them in C order; None where they are too many, and each is `fill`.
        fill: One number.
    """

    name: str
    dtype: str
    open_shape: str
    shape: tuple[int, ...]
    size: int
    numbers: tuple[int | float, ...] | None
    fill: int | float

    def listed(self, separator: str = ", ") -> str:
        """The numbers as C, Java, Rust and C# write them; booleans as 0 and 1."""
        return separator.join(map(_number, self.numbers or ()))


def example_inputs(bundle: Bundle) -> list[ExampleInput]:
    """One row of the first golden sample, in the graph's order of inputs."""
    arrays, specs = bundle.golden[0].inputs, bundle.signature.inputs
    batch = next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)), None)
    return [_example(spec, arrays[spec.name], batch) for spec in specs]


def about(bundle: Bundle) -> str:
    """What the example's inputs are, for a comment of one line."""
    text = bundle.golden[0].text
    if text is None:
        return "One row of the first golden sample; large inputs are filled with one number."
    shown = text if len(text) <= 60 else text[:60] + "…"
    return f"The tokens of {quoted(shown)}."


def one_line(text: str) -> str:
    """Text that cannot leave a comment which ends with its line."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def quoted(text: str) -> str:
    """A string literal in C, C++, Java, C# and Rust."""
    return json.dumps(text, ensure_ascii=False)


def _example(spec: TensorSpec, array: np.ndarray, batch: Dim) -> ExampleInput:
    if batch is not None and spec.shape and spec.shape[0] == batch:
        array = array[:1]
    numbers: tuple[int | float, ...] | None = None
    if array.size <= _WRITTEN_OUT and np.isfinite(array).all():
        numbers = tuple(array.astype(_plain(array)).ravel().tolist())
    fill = 0.5 if array.dtype.kind == "f" else int(array.flat[0]) if array.size else 0
    return ExampleInput(spec.name, spec.dtype, _text(spec.shape), array.shape, array.size, numbers, fill)


def _plain(array: np.ndarray) -> type[np.float32] | type[np.int64]:
    return np.float32 if array.dtype.kind == "f" else np.int64


def _number(value: int | float) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    whole = isinstance(value, float) and not {"e", "."} & set(text)
    return text + ".0" * whole


def _text(shape: Sequence[Dim]) -> str:
    return "[" + ", ".join("?" if dim is None else one_line(str(dim)) for dim in shape) + "]"
