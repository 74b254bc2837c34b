# SPDX-License-Identifier: Apache-2.0
"""The folder that transformers.js reads: file names by data type, config.json with its own section, cache shapes.

Names and rules are those of transformers.js 4 (src/utils/dtypes.js, src/configs.js, src/models/modeling_utils.js): a
file is `onnx/model{suffix}.onnx` with its data in `..._data`; an empty cache gets the shape of the graph's input, where
the axis named `batch_size` is known and every other open axis is 0.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ....contracts.decoding import Decoding, growing_axis
from ....contracts.errors import InputError
from ....contracts.tasks import FEATURES, GENERATION
from ....exporters import graph_file
from ....exporters.tokenizer import PROCESSOR_FILES
from ....runtime.opened import Bundle
from ..base import write_json
from ..model_files import model_files

SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "q8": "_quantized",
    "int8": "_int8",
    "uint8": "_uint8",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bnb4": "_bnb4",
}
"""Data type to file name suffix."""

PIPELINES = {
    name: name
    for name in (
        "text-classification",
        "token-classification",
        "fill-mask",
        "question-answering",
        GENERATION,
        "image-classification",
        "audio-classification",
        "object-detection",
        "depth-estimation",
        "image-segmentation",
    )
} | {"semantic-segmentation": "image-segmentation"}
"""Task to the pipeline that reads its outputs under the names that our graphs have."""

HIDDEN = "last_hidden_state"
"""What the feature-extraction pipeline reads; it would pool a `sentence_embedding` once more, if it found it."""

_STATEFUL = frozenset({"lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Model types for which transformers.js feeds past_conv.N and past_recurrent.N."""

_TEXT, _IMAGE, _SOUND = "input_ids", "pixel_values", ("input_values", "input_features")


def pipeline_for(bundle: Bundle) -> str | None:
    """The pipeline that takes this model, or None where it has to be called itself."""
    if bundle.task == FEATURES:
        return FEATURES if bundle.signature.outputs[0].name == HIDDEN else None
    return PIPELINES.get(bundle.task)


def require_what_it_reads(bundle: Bundle) -> None:
    """Raise InputError for a bundle that transformers.js cannot load, with the reason."""
    if bundle.manifest.get("companions"):
        raise InputError(
            "transformers.js wants the decoder of an encoder-decoder with inputs that ours does not have",
            next_step="Run it with: onnxpress generate, or onnxpress serve.",
        )
    if not bundle.config.get("model_type"):
        raise InputError(
            "transformers.js knows a model by config.json, which this bundle does not have",
            next_step="Hand it to the target node or web, which take any model.",
        )
    inputs = {spec.name for spec in bundle.signature.inputs}
    missing = [
        file
        for needed, file in (
            (_TEXT in inputs, "tokenizer.json"),
            (_TEXT in inputs, "tokenizer_config.json"),
            (bool(inputs & {_IMAGE, *_SOUND}), "preprocessor_config.json"),
        )
        if needed and not _processor_file(bundle, file)
    ]
    if missing:
        raise InputError(
            f"transformers.js needs {missing[0]}, which this bundle does not have",
            next_step="Put it beside the model and press it again, or use the target node, which takes tensors.",
        )
    _require_known_caches(bundle)


def _require_known_caches(bundle: Bundle) -> None:
    decoding = Decoding.of(bundle.signature)
    for cache in decoding.caches if decoding else ():
        if not cache.name.startswith("past_key_values.") and bundle.config["model_type"] not in _STATEFUL:
            raise InputError(
                f"transformers.js does not feed '{cache.name}' of a {bundle.config['model_type']}",
                next_step="Hand it to the target node, whose generate.mjs does.",
            )


def write_model(bundle: Bundle, folder: Path) -> tuple[list[str], str]:
    """Write the Hub's layout into `folder`; returns the `.onnx` files' names and the data type of the first variant."""
    files: dict[str, str] = {}
    (folder / "onnx").mkdir(parents=True)
    external = {}
    for variant in bundle.variants:
        source = bundle.model_file(variant)
        dtype = _data_type(source, files)
        files[dtype] = name = f"model{SUFFIXES[dtype]}.onnx"
        if _place(bundle, source, folder / "onnx" / name):
            external[name] = 1
    first = next(iter(files))
    for name in PROCESSOR_FILES:
        content = _processor_file(bundle, name)
        if isinstance(content, dict):
            write_json(content, folder / name, indent=2)
        elif content:
            shutil.copyfile(bundle.folder / name, folder / name)
    config = {**bundle.config, "transformers.js_config": {"dtype": first}}
    if external:
        config["transformers.js_config"]["use_external_data_format"] = external
    write_json(config, folder / "config.json", indent=2)
    return list(files.values()), first


def _data_type(source: Path, taken: dict[str, str]) -> str:
    """What the file's name says; a suffix that transformers.js does not know (bf16) goes under a name that is free."""
    suffix = source.stem.removeprefix("model")
    named = next((dtype for dtype, known in SUFFIXES.items() if known == suffix and dtype not in taken), None)
    free = named or next((dtype for dtype in SUFFIXES if dtype not in taken), None)
    if free is None:
        raise InputError("the bundle has more variants than transformers.js has names")
    return free


def _place(bundle: Bundle, source: Path, target: Path) -> bool:
    """Copy a model, or write it anew where its cache's batch or its data's name has to change; whether it has data."""
    has_data = len(model_files(source)) > 1
    decoding = Decoding.of(bundle.signature)
    if not decoding and not (has_data and target.name != source.name):
        for file in model_files(source):
            shutil.copyfile(file, target.with_name(file.name if has_data else target.name))
        return has_data
    model = graph_file.read(source)
    for cache in decoding.caches if decoding else ():
        grows = growing_axis(cache)
        if any(not isinstance(dim, int) for axis, dim in enumerate(cache.shape) if axis not in (0, grows)):
            raise InputError(f"'{cache.name}' has an open head size, which transformers.js takes for 0")
        _rename(model, str(cache.shape[0]), "batch_size")
    graph_file.write(model, target, external_from=0 if has_data else None)
    return has_data


def _rename(model: ir.Model, old: str, new: str) -> None:
    """Give an open dimension another name, wherever it stands alone."""
    values = [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None and any(getattr(dim, "value", None) == old for dim in value.shape):
            value.shape = ir.Shape([new if getattr(dim, "value", None) == old else dim for dim in value.shape])


def _processor_file(bundle: Bundle, name: str) -> Any:
    """A processor file's content for the layout: changed ones as a dict, True for a plain copy, None if absent."""
    path = bundle.folder / name
    if name == "preprocessor_config.json" and not path.is_file():
        both = bundle.folder / "processor_config.json"  # transformers 5 writes this one alone
        inner = json.loads(both.read_text("utf-8")) if both.is_file() else {}
        return inner.get("image_processor") or inner.get("feature_extractor")
    if not path.is_file():
        return None
    if name == "tokenizer_config.json" and bundle.max_length is not None:
        return {**json.loads(path.read_text("utf-8")), "model_max_length": bundle.max_length}
    return True
