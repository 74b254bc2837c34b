# SPDX-License-Identifier: Apache-2.0
"""What a source's image processor or feature extractor does, as numbers (`runtime/images.py`, `runtime/audio.py`).

A processor is a Python class with settings, and a class may do anything with them. So the numbers are read off the
settings in the way in which transformers' base classes use them, and then held against the processor itself on
pictures or clips of several sizes: where both differ, it does something that the numbers do not say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.preprocessing import RESAMPLES
from .tokenizer import quiet_transformers

Arrays = dict[str, np.ndarray]
MEL_FILTERS = "mel_filters.npy"


class Unsaid(Exception):
    """The numbers cannot say what the processor does; the text is the reason."""


@dataclass(frozen=True)
class Preprocessing:
    """A source's preprocessing.

    Attributes:
        numbers: preprocessing.json.
        process: The processor itself: pictures (uint8 [rows, columns, 3]) or clips (float32 [samples]) to a batch of
            inputs; None where it is not installed, and the numbers are its published settings.
        files: Arrays that the numbers name, by file name.
    """

    numbers: dict[str, Any]
    process: Callable[[list[np.ndarray]], Arrays] | None
    files: Arrays = field(default_factory=dict)


def preprocessing_of(folder: Path, inputs: set[str]) -> Preprocessing | None:
    """What the processor of a transformers folder does; None where the model reads neither pictures nor sound.

    Args:
        folder: Holds preprocessor_config.json or processor_config.json.
        inputs: Names of the inputs of the model's graphs.

    Raises:
        Unsaid: It cannot be loaded, or the numbers cannot say what it does.
    """
    if "pixel_values" in inputs:
        processor = _load("AutoImageProcessor", folder, backend="pil")
    elif inputs & {"input_values", "input_features"}:
        processor = _load("AutoFeatureExtractor", folder)
    else:
        return None
    try:
        return _image(processor) if "pixel_values" in inputs else _audio(processor, inputs)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:  # settings in a form of its own
        raise Unsaid(f"{type(processor).__name__} has settings of another form ({error})") from error


def _load(kind: str, folder: Path, **options: Any) -> Any:
    import transformers

    try:
        with quiet_transformers():
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # what is missing or broken comes as an error of any kind
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Unsaid(f"the source's processor cannot be loaded ({first[:160]})") from error


def _image(processor: Any) -> Preprocessing:
    """The order is that of transformers' `PilBackend._preprocess`."""
    settings: dict[str, Any] = {name: getattr(processor, name, None) for name in _IMAGE_SETTINGS}
    if settings["do_pad"]:
        raise Unsaid(f"{type(processor).__name__} pads pictures to a common size")
    steps: list[dict[str, Any]] = []
    if settings["do_resize"]:
        steps += _resizing(settings, getattr(processor, "crop_pct", None))
    if settings["do_center_crop"]:
        height, width = _height_width(settings["crop_size"])
        steps.append({"step": "crop", "height": height, "width": width, "rounding": "floor"})
    if settings["do_rescale"]:
        steps.append({"step": "rescale", "factor": float(settings["rescale_factor"])})
    if settings["do_normalize"]:
        mean, std = (_three(settings[name]) for name in ("image_mean", "image_std"))
        steps.append({"step": "normalize", "mean": mean, "std": std})
    name = str((getattr(processor, "model_input_names", None) or ["pixel_values"])[0])
    numbers = {
        "kind": "image",
        "input": name,
        "processor": type(processor).__name__,
        "channels": "BGR" if getattr(processor, "do_flip_channel_order", False) else "RGB",
        "steps": steps,
        "layout": "NCHW",
        "dtype": "float32",
    }

    def process(pictures: list[np.ndarray]) -> Arrays:
        made = processor(images=pictures, return_tensors="np", input_data_format="channels_last")
        return {name: np.asarray(made[name])}

    return Preprocessing(numbers, process)


_IMAGE_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_pad",
)  # fmt: skip


def _resizing(settings: Mapping[str, Any], crop_share: float | None) -> list[dict[str, Any]]:
    size = _plain(settings["size"])
    resample = RESAMPLES[int(settings["resample"] if settings["resample"] is not None else 2)]
    if set(size) == {"shortest_edge"} and crop_share is not None:  # ConvNeXT's own way
        edge = int(size["shortest_edge"])
        square = {"height": edge, "width": edge}
        if edge >= 384:
            return [{"step": "resize", **square, "resample": resample}]
        larger = {"step": "resize", "shortest_edge": int(edge / crop_share), "resample": resample}
        return [larger, {"step": "crop", **square, "rounding": "floor"}]
    if set(size) == {"shortest_edge"}:
        return [{"step": "resize", "shortest_edge": int(size["shortest_edge"]), "resample": resample}]
    height, width = _height_width(size)
    return [{"step": "resize", "height": height, "width": width, "resample": resample}]


def _plain(size: Any) -> dict[str, Any]:
    """A size as a dict of what is set: transformers has a class of its own for it, or a number."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, list | tuple):
        raise Unsaid(f"pictures are brought to a size given by {size}")
    data = dict(size or {}) if size is None or isinstance(size, Mapping) else vars(size)
    return {key: value for key, value in data.items() if value is not None}


def _height_width(size: Any) -> tuple[int, int]:
    data = _plain(size)
    if set(data) != {"height", "width"}:
        raise Unsaid(f"pictures are brought to a size given by {' and '.join(sorted(data)) or 'nothing'}")
    return int(data["height"]), int(data["width"])


def _three(value: Any) -> list[float]:
    values = [float(v) for v in (value if isinstance(value, list | tuple) else [value] * 3)]
    if len(values) != 3:
        raise Unsaid(f"pictures have {len(values)} channels")
    return values


def timm_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """The numbers of a timm model's `pretrained_cfg`, as timm's evaluation transforms use them.

    https://github.com/huggingface/pytorch-image-models, timm/data/transforms_factory.py: Resize of the shorter edge to
    floor(size / crop_pct) and CenterCrop, which rounds half to even.

    Raises:
        Unsaid: It asks for more than these.
    """
    try:
        channels, height, width = (int(n) for n in config["input_size"])
        mean, std = _three(list(config["mean"])), _three(list(config["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Unsaid("timm's settings have no size, mean or std") from error
    resample, mode = str(config.get("interpolation", "bicubic")), str(config.get("crop_mode") or "center")
    if channels != 3 or resample not in RESAMPLES or mode not in ("center", "squash"):
        raise Unsaid(f"timm's settings ask for crop_mode {mode}, interpolation {resample} and {channels} channels")
    share = float(config.get("crop_pct") or 0.875)
    scaled = [math.floor(side / share) for side in (height, width)]
    if mode == "center" and scaled[0] != scaled[1]:
        raise Unsaid("timm resizes to a size that is no square")
    to = {"shortest_edge": scaled[0]} if mode == "center" else {"height": scaled[0], "width": scaled[1]}
    numbers = {
        "kind": "image",
        "input": "pixel_values",
        "processor": "timm",
        "channels": "RGB",
        "steps": [
            {"step": "resize", **to, "resample": resample},
            {"step": "crop", "height": height, "width": width, "rounding": "half_even"},
            {"step": "rescale", "factor": 1 / 255},
            {"step": "normalize", "mean": mean, "std": std},
        ],
        "layout": "NCHW",
        "dtype": "float32",
    }
    return Preprocessing(numbers, _timm_transforms(config))


def _timm_transforms(config: Mapping[str, Any]) -> Callable[[list[np.ndarray]], Arrays] | None:
    """timm's own evaluation transforms, where timm, torchvision and Pillow are installed."""
    try:
        from PIL import Image

        timm: Any = import_module("timm.data")
    except ImportError:
        return None
    chosen = timm.resolve_data_config({}, pretrained_cfg=dict(config))
    transform = timm.create_transform(**chosen, is_training=False)
    return lambda pictures: {"pixel_values": np.stack([np.asarray(transform(Image.fromarray(p))) for p in pictures])}


def _audio(extractor: Any, inputs: set[str]) -> Preprocessing:
    rate = int(extractor.sampling_rate)
    name = str(extractor.model_input_names[0])
    used = [n for n in (name, "attention_mask") if n in inputs]
    numbers: dict[str, Any] = {
        "kind": "audio",
        "inputs": used,
        "processor": type(extractor).__name__,
        "sampling_rate": rate,
        "dtype": "float32",
    }
    files: Arrays = {}
    if name == "input_values" and getattr(extractor, "feature_size", None) == 1:
        numbers |= {
            "form": "waveform",
            "normalize": bool(getattr(extractor, "do_normalize", False)),
            # Without a mask transformers takes the mean over the padding too
            "normalize_padding": not getattr(extractor, "return_attention_mask", False),
            "padding_value": float(extractor.padding_value),
        }
        padding: str | bool = True
    elif name == "input_features" and hasattr(extractor, "mel_filters") and hasattr(extractor, "n_samples"):
        if getattr(extractor, "dither", 0.0):
            raise Unsaid(f"{type(extractor).__name__} adds noise (dither)")
        numbers |= {
            "form": "log_mel",
            "samples": int(extractor.n_samples),
            "n_fft": int(extractor.n_fft),
            "hop": int(extractor.hop_length),
            "mel_filters": MEL_FILTERS,
            "range": 8.0,
            "shift": 4.0,
            "scale": 4.0,
        }
        files, padding = {MEL_FILTERS: np.asarray(extractor.mel_filters, np.float32)}, "max_length"
    else:
        raise Unsaid(f"{type(extractor).__name__} makes '{name}' in a way of its own")

    def process(clips: list[np.ndarray]) -> Arrays:
        with quiet_transformers():
            made = extractor(clips, sampling_rate=rate, padding=padding, return_tensors="np")
        return {n: np.asarray(made[n]) for n in used if n in made}

    return Preprocessing(numbers, process, files)
