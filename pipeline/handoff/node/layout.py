# SPDX-License-Identifier: Apache-2.0
"""What every JavaScript handoff holds besides its code: the model, what is known about it, and the golden samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ....contracts.decoding import INPUT_IDS, Decoding, cache_shape
from ....contracts.errors import InputError
from ....contracts.signature import TensorSpec
from ....runtime.opened import Bundle
from ..base import write_json
from ..golden import golden_texts, write_golden
from ..model_files import model_files, require_one_graph

SHARED = ("golden.mjs", "tensors.mjs", "text.mjs", "generate.mjs")
"""Modules of this folder that the page in the browser uses as well."""

TYPES = frozenset(
    {"float16", "float32", "float64", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
)
"""What a tensor in JavaScript can hold; bfloat16 and the 8-bit floats have no typed array."""


def write_common(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """Write model/, model.json and golden/; returns what model.json says.

    Raises:
        InputError: The model is one of two graphs, or a type is one that JavaScript has no array for.
    """
    require_one_graph(bundle)
    check_types(bundle)
    about = describe(bundle)
    (folder / "model").mkdir()
    for file in model_files(bundle.model_file()):
        shutil.copyfile(file, folder / "model" / file.name)
    for name in ("tokenizer.json", "tokenizer_config.json") if about["tokenizer"] else ():
        write_json(json.loads((bundle.folder / name).read_text("utf-8")), folder / "model" / name)
    write_json(about, folder / "model.json", indent=2)
    write_golden(bundle, folder / "golden")
    write_json(golden_texts(bundle), folder / "golden" / "texts.json", indent=1)
    return about


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a consumer asks about the model that the graph itself does not say."""
    file = bundle.model_file()
    decoding = Decoding.of(bundle.signature)
    has_tokenizer = all((bundle.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return {
        "name": bundle.name,
        "task": bundle.task,
        "model": f"model/{file.name}",
        "externalData": [f"model/{other.name}" for other in model_files(file)[1:]],
        "inputs": [_spec(spec) for spec in bundle.signature.inputs],
        "outputs": [_spec(spec) for spec in bundle.signature.outputs],
        "caches": _caches(decoding) if decoding else [],
        "labels": {str(number): label for number, label in bundle.labels.items()},
        "maxLength": bundle.max_length,
        "tokenizer": has_tokenizer and any(spec.name == INPUT_IDS for spec in bundle.signature.inputs),
    }


def check_types(bundle: Bundle) -> None:
    """Raise InputError for a type that no typed array holds."""
    for spec in (*bundle.signature.inputs, *bundle.signature.outputs):
        if spec.dtype not in TYPES:
            raise InputError(
                f"'{spec.name}' is {spec.dtype}, which JavaScript has no array for",
                next_step="Press it with a recipe whose inputs and outputs are float32.",
            )


def _caches(decoding: Decoding) -> list[dict[str, Any]]:
    """Each cache, what replaces it, and its shape before the first token of one text."""
    return [
        {"name": c.name, "present": decoding.present[c.name], "dtype": c.dtype, "shape": list(cache_shape(c, 1, 0))}
        for c in decoding.caches
    ]


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
