# SPDX-License-Identifier: Apache-2.0
"""Example inputs of a transformers model: which of `forward`'s parameters it needs, and tensors that fit them.

The configuration says how large an image or a spectrogram is; whether an input is needed, only a run says. So the
smallest set of inputs that the task implies is tried first, and the next larger one when the model refuses.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...contracts.errors import ExportError, InputError
from ..blame import place

BATCH, SEQUENCE = "batch", "sequence"
LENGTH = 7
"""Tokens in an example text: odd and unlike any other size, so that torch.export ties it to nothing by chance."""

Axes = dict[int, str]


@dataclass(frozen=True)
class Example:
    """One example input: its tensor, and which of its axes are open."""

    tensor: torch.Tensor
    axes: Axes


class Examples:
    """Makes example inputs for one model.

    Args:
        model: In eval mode.
        preprocessor: preprocessor_config.json of its folder, or an empty dict: the size of images.
        seed: Of the random numbers.
        length: Tokens in a text.
        batch: Number of examples.
        choices: For multiple choice, texts in an example: one more axis; 0 without it.
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        length: int = LENGTH,
        batch: int = 2,
        choices: int = 0,
    ) -> None:
        self.model, self.config = model, model.config
        self.preprocessor = dict(preprocessor or {})
        self.length, self.batch, self.choices = length, batch, choices
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = list(inspect.signature(model.forward).parameters)

    def make(self, name: str) -> Example | None:
        """An example for the parameter `name`; None where nothing is known about it."""
        maker = _MAKERS.get(name)
        return None if maker is None or name not in self.parameters else maker(self)

    def find(self, name: str, default: Any = None) -> Any:
        """A setting of the model, or of the part of it that has one: `image_size` of a CLIP's vision_config."""
        for config in self._configs():
            value = getattr(config, name, None)
            if value is not None:
                return value
        return default

    def _configs(self) -> Iterator[Any]:
        yield self.config
        names = sorted(n for n in vars(self.config) if n.endswith("_config") or n in ("encoder", "decoder"))
        for name in names:
            inner = getattr(self.config, name, None)
            if inner is not None and hasattr(inner, "to_dict"):
                yield inner

    @property
    def text(self) -> Any:
        """The configuration of the part that reads text."""
        return self.config.get_text_config()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    @property
    def text_shape(self) -> tuple[int, ...]:
        return (self.batch, self.choices, self.length) if self.choices else (self.batch, self.length)

    @property
    def text_axes(self) -> Axes:
        return {0: BATCH, 1: "choices", 2: SEQUENCE} if self.choices else {0: BATCH, 1: SEQUENCE}

    def tokens(self, shape: tuple[int, ...], config: Any) -> torch.Tensor:
        """Token ids that no model treats apart: none of the configuration's special ones."""
        vocabulary = int(getattr(config, "vocab_size", None) or self.find("vocab_size", 100))
        special = {v for c in (self.config, config) for v in _special_tokens(c)}
        usual = [i for i in range(min(vocabulary, 1000)) if i not in special] or [0]
        picked = torch.randint(0, len(usual), shape, generator=self.generator)
        return torch.tensor(usual)[picked]


def _special_tokens(config: Any) -> Iterator[int]:
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))


def _ids(make: Examples) -> Example:
    ids = make.tokens(make.text_shape, make.text)
    eos = getattr(make.text, "eos_token_id", None)
    if make.config.is_encoder_decoder and isinstance(eos, int) and 0 <= eos < int(make.text.vocab_size):
        ids[..., -1] = eos  # BART's classifier reads the end of the sentence, and wants one in each
    return Example(ids, make.text_axes)


def _mask(make: Examples) -> Example:
    main = make.model.main_input_name
    if main in ("input_values", "input_features") and "input_ids" not in make.parameters:
        audio = make.make(main)
        assert audio is not None
        time = next((axis for axis, name in audio.axes.items() if name != BATCH), audio.tensor.ndim - 1)
        size = audio.tensor.shape[time]
        return Example(
            torch.ones(make.batch, size, dtype=torch.int64),
            {0: BATCH, 1: audio.axes[time]} if time in audio.axes else {0: BATCH},
        )
    return Example(torch.ones(make.text_shape, dtype=torch.int64), make.text_axes)


def _types(make: Examples) -> Example | None:
    if (make.find("type_vocab_size") or 0) < 2:
        return None
    return Example(torch.zeros(make.text_shape, dtype=torch.int64), make.text_axes)


def _boxes(make: Examples) -> Example:
    """Left, top, right, bottom of each token on a page of 1,000 by 1,000."""
    limit = min(1000, int(make.find("max_2d_position_embeddings", 1000)) - 1)
    low = torch.randint(0, limit // 2, (make.batch, make.length, 2), generator=make.generator)
    boxes = torch.cat([low, low + torch.randint(1, limit // 2, low.shape, generator=make.generator)], dim=-1)
    return Example(boxes, {0: BATCH, 1: SEQUENCE})


def _image_size(make: Examples) -> tuple[int, int]:
    """Height and width: the model's own, or what its image processor makes."""
    for found in (make.find("image_size"), make.preprocessor.get("crop_size"), make.preprocessor.get("size")):
        size = _pair(found)
        if size is not None:
            return size
    return (224, 224)


def _pair(found: Any) -> tuple[int, int] | None:
    if isinstance(found, int):
        return (found, found)
    if isinstance(found, list | tuple) and len(found) == 2:
        return (int(found[0]), int(found[1]))
    if isinstance(found, Mapping):
        if "height" in found and "width" in found:
            return (int(found["height"]), int(found["width"]))
        edge = found.get("shortest_edge") or found.get("longest_edge")
        return _pair(int(edge)) if edge else None
    return None


def _pixels(make: Examples) -> Example:
    channels = int(make.find("num_channels", 3)) if isinstance(make.find("num_channels", 3), int) else 3
    height, width = _image_size(make)
    frames = make.find("num_frames")
    if isinstance(frames, int) and "pixel_values_videos" not in make.parameters:
        return Example(make.normal(make.batch, frames, channels, height, width), {0: BATCH})
    return Example(make.normal(make.batch, channels, height, width), {0: BATCH})


def _video(make: Examples) -> Example:
    frames = next((n for key in ("num_frames", "frames_per_clip") if isinstance(n := make.find(key), int)), 4)
    height, width = _image_size(make)
    return Example(make.normal(make.batch, frames, int(make.find("num_channels", 3)), height, width), {0: BATCH})


def _waveform(make: Examples) -> Example:
    """Samples [batch, samples], or a spectrogram [batch, frames, mel bins] where the model reads one."""
    bins, frames = make.find("num_mel_bins"), make.find("max_length")
    if isinstance(bins, int) and isinstance(frames, int) and make.find("conv_kernel") is None:
        return Example(make.normal(make.batch, frames, bins), {0: BATCH})
    # Every convolution of the feature encoder must have something left to read
    needed = 1
    for kernel, stride in reversed(list(zip(make.find("conv_kernel", []), make.find("conv_stride", []), strict=False))):
        needed = (needed - 1) * int(stride) + int(kernel)
    return Example(make.normal(make.batch, max(8000, 12 * needed)), {0: BATCH, 1: "samples"})


def _features(make: Examples) -> Example:
    """A spectrogram: whole windows [batch, mel bins, frames] for Whisper's kind, [batch, frames, size] for others."""
    positions, bins = make.find("max_source_positions"), make.find("num_mel_bins")
    if isinstance(positions, int) and isinstance(bins, int) and make.find("conv_kernel_sizes") is None:
        return Example(make.normal(make.batch, bins, 2 * positions), {0: BATCH})
    for name in ("feature_projection_input_dim", "input_feat_per_channel", "input_dim", "num_mel_bins", "feature_size"):
        size = make.find(name)
        if isinstance(size, int):
            return Example(make.normal(make.batch, 61, size), {0: BATCH, 1: "frames"})
    return Example(make.normal(make.batch, 61, 80), {0: BATCH, 1: "frames"})


def _decoder_ids(make: Examples) -> Example:
    return Example(make.tokens((make.batch, 5), make.text), {0: BATCH, 1: "decoder_sequence"})


def _series(make: Examples) -> Example:
    length = int(make.find("context_length", 0) or make.find("context_points", 32))
    channels = int(make.find("num_input_channels", 0) or make.find("input_size", 1))
    shape = (make.batch, length, channels) if channels > 1 or make.find("num_input_channels") else (make.batch, length)
    return Example(make.normal(*shape), {0: BATCH})


_MAKERS: dict[str, Callable[[Examples], Example | None]] = {
    "input_ids": _ids,
    "attention_mask": _mask,
    "token_type_ids": _types,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_values": _waveform,
    "input_features": _features,
    "past_values": _series,
    "decoder_input_ids": _decoder_ids,
}
"""Parameter of `forward` to the function that makes an example for it, in the order of the graph's inputs."""


def inputs_for(model: Any, needed: Sequence[str], make: Examples) -> dict[str, Example]:
    """The smallest set of inputs with which the model runs.

    Args:
        model: In eval mode.
        needed: Inputs that the task implies; those that the model does not take are left out.
        make: Of this model.

    Raises:
        ExportError: No set of known inputs fits.
        InputError: The model's own code fails on all of them.
    """
    if model.main_input_name not in _MAKERS:
        raise _unknown_inputs(model)
    first: Exception | None = None
    for examples in _candidates(_sets(model, needed, make), make):
        examples = with_image_tokens(model, examples, make)
        try:
            with torch.no_grad():
                model(**{name: e.tensor for name, e in examples.items()}, return_dict=True)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            first = first or error
            continue
        return examples
    if first is None:
        raise _unknown_inputs(model)
    line = (str(first).splitlines() or [""])[0][:240]
    raise InputError(
        f"{type(model).__name__} fails in PyTorch already: {type(first).__name__}: {line}{place(first)}",
        next_step="Check that config.json, the weights and --task belong together, or write a factory.",
    ) from first


def _unknown_inputs(model: Any) -> ExportError:
    parameters = inspect.signature(model.forward).parameters.values()
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][:1]
    reads = model.main_input_name if model.main_input_name not in _MAKERS or not first else first[0]
    return ExportError(
        f"{type(model).__name__} reads '{reads}', for which no example can be made here (known: {', '.join(_MAKERS)})",
        next_step="Write a factory that returns the model with example inputs: package.module:factory.",
    )


def _one_channel(example: Example) -> Example:
    """[batch, samples] as [batch, 1, samples], which audio codecs read."""
    return Example(example.tensor[:, None], {axis + (axis > 0): name for axis, name in example.axes.items()})


def _bins_first(example: Example) -> Example:
    """[batch, frames, bins] as [batch, bins, frames], which some spectrogram encoders read."""
    return Example(example.tensor.transpose(1, 2), {(0, 2, 1)[axis]: name for axis, name in example.axes.items()})


_OTHER_LAYOUTS: dict[str, tuple[int, Callable[[Example], Example]]] = {
    "input_values": (2, _one_channel),
    "input_features": (3, _bins_first),
}
"""Input to the number of axes that its example has by default, and another layout that some models want."""


def _candidates(sets: Iterator[list[str]], make: Examples) -> Iterator[dict[str, Example]]:
    """Examples for each set of inputs, in the usual layout and then in the other."""
    for names in sets:
        examples = {name: example for name in names if (example := make.make(name)) is not None}
        if not examples:
            continue
        yield examples
        other: dict[str, Example] = {}
        for name, (axes, layout) in _OTHER_LAYOUTS.items():
            if name in examples and examples[name].tensor.ndim == axes:
                other[name] = layout(examples[name])
        if other:
            yield {**examples, **other}


def _sets(model: Any, needed: Sequence[str], make: Examples) -> Iterator[list[str]]:
    """Names of inputs, from the fewest to all that are known."""
    core = {model.main_input_name, *needed}
    if "input_ids" in core:
        core |= {"attention_mask", "token_type_ids", "bbox"}
    more = core | {"decoder_input_ids"}
    growing = [core, more, core | {"attention_mask"}, core | {"pixel_values"}, core | {"input_ids", "attention_mask"}]
    growing += [more | {"pixel_values"}, more | {"input_ids", "attention_mask", "pixel_values"}, set(_MAKERS)]
    seen: list[list[str]] = []
    for names in growing:
        ordered = [name for name in _MAKERS if name in names and name in make.parameters]
        if ordered not in seen:
            seen.append(ordered)
            yield ordered


_MISMATCH = re.compile(r"features:? (\d+)")


def with_image_tokens(model: Any, examples: dict[str, Example], make: Examples) -> dict[str, Example]:
    """Put as many image tokens into the text as the model makes image features, which its refusal tells."""
    token = make.find("image_token_id", make.find("image_token_index"))
    if token is None or not {"input_ids", "pixel_values"} <= set(examples):
        return examples
    found = _MISMATCH.search(_refusal(model, examples))
    if found is None:
        return examples
    # Some count features, others the numbers in them
    for size in (1, int(getattr(make.text, "hidden_size", None) or 1)):
        count, rest = divmod(int(found[1]), make.batch * size)
        if rest == 0 and 0 < count < _MOST_IMAGE_TOKENS:
            longer = _text_with(examples, int(token), count)
            if not _refusal(model, longer):
                return longer
    return examples


_MOST_IMAGE_TOKENS = 10_000


def _refusal(model: Any, examples: Mapping[str, Example]) -> str:
    """What the model says to these inputs; nothing where it takes them."""
    try:
        with torch.no_grad():
            model(**{name: e.tensor for name, e in examples.items()}, return_dict=True)
    except Exception as error:  # noqa: BLE001 - the message is what is wanted
        return str(error) or type(error).__name__
    return ""


def _text_with(examples: dict[str, Example], token: int, count: int) -> dict[str, Example]:
    """The example with `count` image tokens in front of each text, in every input that has a sequence."""
    longer: dict[str, Example] = {}
    for name, example in examples.items():
        tensor = example.tensor
        if example.axes.get(1) == SEQUENCE:
            value = token if name == "input_ids" else 1 if name == "attention_mask" else 0
            front = torch.full((tensor.shape[0], count, *tensor.shape[2:]), value, dtype=tensor.dtype)
            tensor = torch.cat([front, tensor], dim=1)
        longer[name] = Example(tensor, example.axes)
    return longer
