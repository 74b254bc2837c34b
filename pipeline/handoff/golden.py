# SPDX-License-Identifier: Apache-2.0
"""The golden samples in a form that any language reads in twenty lines: a table of text and one file of raw numbers.

golden/tensors.txt   one line a tensor, its fields separated by one space:
                     `SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...`
                     KIND is `input`, `reference` (what the original answered) or `python` (what ONNX Runtime in Python
                     answered with this very model). TOLERANCE is `-` but for `reference`, where it is absolute.
golden/tensors.bin   the numbers, little-endian, in C order, each tensor from a multiple of 64 bytes on

Inputs have the dtype of the graph. Floating-point answers are float32 and all other numbers int64, whatever the graph
has, so that a consumer compares two types only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...contracts.decoding import INPUT_IDS, MASK
from ...contracts.errors import InputError
from ...runtime.opened import Bundle

INDEX, NUMBERS = "tensors.txt", "tensors.bin"
_ALIGNMENT = 64


def write_golden(bundle: Bundle, folder: Path, variant: str | None = None) -> None:
    """Write the golden samples of a bundle into `folder`, with what Python answers for a variant of it.

    Raises:
        InputError: An input holds strings, or a name has a space in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, offset = [], 0
    with (folder / NUMBERS).open("wb") as numbers:
        for sample, kind, name, array, tolerance in _tensors(bundle, variant):
            if array.dtype.kind not in "biuf" or any(sign.isspace() for sign in name) or not name:
                raise InputError(f"'{name}' ({array.dtype.name}) cannot be written as a golden tensor")
            offset += numbers.write(bytes(-offset % _ALIGNMENT))
            raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            fields = (sample, kind, name, array.dtype.name, offset, len(raw), tolerance, array.ndim, *array.shape)
            lines.append(" ".join(map(str, fields)))
            offset += numbers.write(raw)
    (folder / INDEX).write_text("\n".join(lines) + "\n", "utf-8", newline="\n")


def golden_texts(bundle: Bundle) -> list[dict[str, Any]]:
    """The golden samples that are one text each, with the token ids that Python made of it."""
    rows = []
    for number, sample in enumerate(bundle.golden):
        ids = sample.inputs.get(INPUT_IDS)
        if sample.text is not None and ids is not None and ids.shape[0] == 1:
            mask = sample.inputs.get(MASK, np.ones_like(ids))[:, -ids.shape[1] :]
            rows.append({"sample": number, "text": sample.text, "ids": [int(i) for i in ids[mask != 0]]})
    return rows


def _tensors(bundle: Bundle, variant: str | None) -> Iterator[tuple[int, str, str, np.ndarray, str]]:
    session = bundle.session(variant)
    for number, sample in enumerate(bundle.golden):
        for name, array in sample.inputs.items():
            yield number, "input", name, array, "-"
        for name, array in sample.outputs.items():
            yield number, "reference", name, _plain(array), f"{bundle.tolerance(name, variant):.9g}"
        for name, array in session.run(dict(sample.inputs)).items():
            yield number, "python", name, _plain(array), "-"


def _plain(array: np.ndarray) -> np.ndarray:
    floating = array.dtype.kind not in "biu"  # bfloat16 is of numpy's kind V
    return np.asarray(array, np.float32 if floating else np.int64)
