# SPDX-License-Identifier: Apache-2.0
"""What a handoff holds besides its code, whatever the language: the model, its tokenizer, the golden samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ...contracts.errors import InputError
from ...runtime.opened import CONFIG, Bundle
from ...runtime.packing.layout import layout_of
from ...runtime.packing.reader import is_packed, unpack
from .base import write_json
from .golden import golden_texts, write_golden

MODEL, GOLDEN, MODEL_FILE = "model", "golden", "model.onnx"
_PREPROCESSING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "preprocessor_config.json",
    "preprocessing.json",
)


def lay_out(bundle: Bundle, folder: Path) -> Path:
    """Write model/ and golden/ and return the path of model/model.onnx.

    Raises:
        InputError: The model is one of two graphs, or takes or gives what is no tensor of numbers.
    """
    require_one_graph(bundle)
    require_numbers(bundle)
    model = place_model(bundle, folder / MODEL)
    place_preprocessing(bundle, folder / MODEL)
    if (bundle.folder / CONFIG).is_file():
        shutil.copyfile(bundle.folder / CONFIG, folder / MODEL / CONFIG)
    write_golden(bundle, folder / GOLDEN)
    if texts := golden_texts(bundle):
        write_json(texts, folder / GOLDEN / "texts.json", indent=1)
    return model


def place_model(bundle: Bundle, folder: Path) -> Path:
    """Write the main variant as `model.onnx`, unpacked, with its external data under the names that it uses.

    Raises:
        InputError: External data lies outside the model's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, target = bundle.model_file(), folder / MODEL_FILE
    if is_packed(source):
        unpack(source, target)
        return target
    shutil.copyfile(source, target)
    for file in model_files(source)[1:]:
        name = file.relative_to(source.parent)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    return target


def model_files(model: Path) -> list[Path]:
    """The `.onnx` file and its external data."""
    return [file.path for file in layout_of(model).files]


def place_preprocessing(bundle: Bundle, folder: Path) -> list[str]:
    """Copy what turns text or images into tensors, and return the names; no folder is made where there is nothing."""
    names = [name for name in _PREPROCESSING if (bundle.folder / name).is_file()]
    for name in names:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, folder / name)
    return names


def place_files(source: Path, folder: Path, places: Mapping[str, str]) -> None:
    """Copy files to where a language's build tool looks for them: name in `source` to path in `folder`."""
    for name, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / place)


def require_one_graph(bundle: Bundle) -> None:
    """Raise InputError for a bundle of an encoder and a decoder."""
    if bundle.manifest.get("companions"):
        raise InputError(
            "this consumer runs models of one graph; the bundle has an encoder and a decoder",
            next_step="Run it with: onnxpress generate, or onnxpress serve.",
        )


def require_numbers(bundle: Bundle) -> None:
    """Raise InputError for a bundle that takes or gives what is no tensor of numbers."""
    for spec in (*bundle.signature.inputs, *bundle.signature.outputs):
        if spec.dtype == "string" or spec.dtype.endswith(")"):
            raise InputError(f"'{spec.name}' is {spec.dtype}: this consumer handles tensors of numbers only")
