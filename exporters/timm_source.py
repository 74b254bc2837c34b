# SPDX-License-Identifier: Apache-2.0
"""Models of the timm library: `timm:NAME` with the weights that it publishes, `timm:NAME@file.safetensors` with the
user's own, or a folder (or hub id) whose config.json names a timm architecture. https://huggingface.co/docs/timm
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..contracts.digest import sha256_of
from ..contracts.errors import InputError, MissingDependency, OnnxpressError, did_you_mean
from .arguments import Flat, split
from .exported import ExportedModel, SourceInfo
from .original import Original, export_original, what
from .settings import ExportSettings
from .tokenizer import read_config

INPUT = "pixel_values"
"""What transformers and optimum call an image batch, float32 [batch, channels, height, width]."""


def is_timm_folder(folder: Path) -> bool:
    """Whether config.json names an architecture as timm does, instead of transformers' `model_type`."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("architecture"), str) and "model_type" not in config


def export_timm(source: str, settings: ExportSettings) -> ExportedModel:
    """Export `timm:NAME` or `timm:NAME@file.safetensors`, with a dynamic batch.

    Raises:
        MissingDependency: timm is not installed.
        InputError: It knows no such model, has no weights for it that can be fetched, or the file's do not fit.
    """
    name, weights = _parts(source)
    shown = f"timm:{name}" if weights is None else f"timm:{name}@{weights.name}"  # without the path
    return _exported(original_timm(source), shown, weights, settings)


def export_timm_folder(folder: Path, name: str, settings: ExportSettings) -> ExportedModel:
    """Export what timm's `save_for_hf` wrote; see `export_timm`. Class names come from its config.json."""
    config = read_config(folder)
    exported = _exported(original_of_folder(folder), name, _weights_in(folder), settings)
    exported.processor_files = {"config.json": folder / "config.json"}
    exported.image_settings = {**(exported.image_settings or {}), **(config.get("pretrained_cfg") or {})}
    labels = config.get("label_names")
    if isinstance(labels, list) and len(labels) == config.get("num_classes"):
        exported.id2label = {number: str(label) for number, label in enumerate(labels)}
    return exported


def original_timm(source: str) -> Original:
    """The module behind `timm:NAME[@file]`."""
    name, weights = _parts(source)
    if weights is None:
        try:
            return _original(source, _create(name, pretrained=True))
        except OnnxpressError:
            raise
        except Exception as error:  # what timm and the hub raise for weights that are not there
            raise InputError(
                f"timm has no weights for '{name}' here, and cannot fetch them ({type(error).__name__})",
                next_step=f"Fetch them once with network, or give a file: timm:{name}@model.safetensors.",
            ) from error
    return _original(source, _with_weights(name, weights, {}))


def original_of_folder(folder: Path) -> Original:
    """The module behind a folder of timm's."""
    config = read_config(folder)
    arguments = dict(config.get("model_args") or {})
    arguments.setdefault("num_classes", config.get("num_classes"))
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    model = _with_weights(str(config["architecture"]), _weights_in(folder), arguments)
    return _original(folder.resolve().name, model, size)


def _exported(original: Original, name: str, weights: Path | None, settings: ExportSettings) -> ExportedModel:
    module = original.module.module
    digest = None if weights is None else sha256_of([weights])
    parameters = sum(p.numel() for p in module.parameters())
    exported = export_original(original, SourceInfo("timm", name, digest, type(module).__name__, parameters), settings)
    exported.image_settings = dict(getattr(module, "pretrained_cfg", None) or {}) or None
    return exported


def _original(name: str, model: torch.nn.Module, size: Any = None) -> Original:
    cfg: Any = getattr(model, "pretrained_cfg", {})
    channels, height, width = size or cfg.get("input_size") or (3, 224, 224)
    images = torch.randn((2, channels, height, width), generator=torch.Generator().manual_seed(0))
    form, _ = split([INPUT], [images], {})
    return Original(
        name,
        Flat(model.eval(), form),
        {INPUT: images},
        {INPUT: {0: "batch"}},
        contract="Check the model in timm first.",
        outputs=("logits" if getattr(model, "num_classes", 0) else "features",),
    )


def _parts(source: str) -> tuple[str, Path | None]:
    name, _, weights = source.removeprefix("timm:").partition("@")
    return name, Path(weights) if weights else None


def _weights_in(folder: Path) -> Path:
    return folder / "model.safetensors"


def _create(name: str, **arguments: Any) -> torch.nn.Module:
    try:
        timm: Any = import_module("timm")
    except ImportError as error:
        raise MissingDependency(f"timm is not installed ({error})", next_step="pip install timm") from error
    architecture = name.partition(".")[0]  # the rest names a set of weights
    if not timm.is_model(architecture):
        raise InputError(
            f"timm has no model '{architecture}'", next_step=did_you_mean(architecture, timm.list_models())
        )
    model: torch.nn.Module = timm.create_model(name, exportable=True, **arguments)
    return model


def _with_weights(name: str, weights: Path, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """The architecture with a file's weights; the number of classes follows from them where nothing else says it."""
    if not weights.is_file():
        raise InputError(
            f"no such file of weights: {weights.name}",
            next_step="Give a .safetensors: timm.models.save_for_hf(model, folder, safe_serialization=True) writes it.",
        )
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors' own error, and OSError
        raise InputError(
            f"{weights.name} is no readable .safetensors file: {what(error)}", next_step="Copy or save it again."
        ) from error
    try:
        given = {key: value for key, value in arguments.items() if value is not None}
        model = _create(name, pretrained=False, **given)
        classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
        head = tensors.get(f"{classifier}.weight")
        classes = 0 if head is None else len(head)
        if "num_classes" not in given and classifier and classes != getattr(model, "num_classes", None):
            model = _create(name, pretrained=False, num_classes=classes)
        model.load_state_dict(tensors)
    except OnnxpressError:
        raise
    except Exception as error:  # the architecture's own code, or weights of another one
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s)") else (lines or [type(error).__name__])[0]
        raise InputError(
            f"{weights.name} does not fit timm's {name}: {first[:200]}", next_step="Name the model it was saved from."
        ) from error
    return model
