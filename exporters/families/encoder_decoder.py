# SPDX-License-Identifier: Apache-2.0
"""An encoder-decoder as two graphs that share nothing but numbers.

    encoder_model   the text, sound or image -> last_hidden_state, present.N.encoder.key and .value
    decoder_model   new tokens, past_key_values.N.decoder.* and .encoder.* -> logits, present.N.decoder.*

What the decoder attends to in the encoder's output is the same in every step, so the encoder computes its keys and
values, once. That leaves one decoder graph for the first call and all others: no second copy of the weights, and no If
that passes cannot see through, as in a "merged" decoder.

Both are traced from the whole model: what the encoder's trace does not need of the decoder falls away as dead code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ...contracts.decoding import INPUT_IDS, present_of
from ...contracts.errors import ExportError
from .caches import CacheTensor, cache_from, describe, tensors_of
from .decoder import BATCH, PAST, SEQUENCE
from .examples import Example, Examples, inputs_for
from .traced import Traced

ENCODER_MASK = "encoder_attention_mask"
STATES = "last_hidden_state"
ENCODED = "encoder_sequence"
"""The open axis of what the encoder read, in its own positions."""

_TAKEN = 3  # tokens in the cache of the decoder's example


@dataclass(frozen=True)
class Layout:
    """What passes between encoder and decoder.

    Attributes:
        inputs: Example inputs of the encoder.
        own: The decoder's cache of its own tokens.
        cross: Its cache of the encoder's output.
        templates: Caches of the model's own, for both.
        encoded: Shape of the encoder's output, its axes named where they are open.
        masks: Whether the decoder reads the encoder's attention mask.
    """

    inputs: dict[str, Example]
    own: tuple[CacheTensor, ...]
    cross: tuple[CacheTensor, ...]
    templates: tuple[Any, Any]
    encoded: tuple[int | str, ...]
    masks: bool

    def own_names(self, *, present: bool) -> list[str]:
        return [spec.name(present=present, role="decoder") for spec in self.own]

    def cross_names(self, *, present: bool) -> list[str]:
        return [spec.name(present=present, role="encoder") for spec in self.cross]


def layout_of(model: Any, preprocessor: Mapping[str, Any]) -> Layout:
    """Run the model at two sizes and look at what its caches hold.

    Raises:
        ExportError: The model keeps no two caches.
    """
    make = Examples(model, preprocessor)
    inputs = {n: e for n, e in inputs_for(model, (), make).items() if n != "decoder_input_ids"}
    larger = {n: e for n in inputs if (e := Examples(model, preprocessor, length=9, batch=4).make(n)) is not None}
    small, states = _run(model, inputs, _tokens(model, 2, _TAKEN))
    large, more = _run(model, larger, _tokens(model, 4, _TAKEN + 1))
    grown = {y - x: ENCODED for x, y in zip(states.shape[1:], more.shape[1:], strict=True) if x != y}
    encoded = tuple(
        x if x == y else BATCH if axis == 0 else ENCODED
        for axis, (x, y) in enumerate(zip(states.shape, more.shape, strict=True))
    )
    own = describe(small.self_attention_cache, large.self_attention_cache, {2: BATCH, 1: PAST}, PAST)
    cross = describe(small.cross_attention_cache, large.cross_attention_cache, {**grown, 2: BATCH}, ENCODED)
    cross = [_as_encoded(spec, states.shape[1] == more.shape[1]) for spec in cross]
    return Layout(
        inputs,
        tuple(own),
        tuple(cross),
        (small.self_attention_cache, small.cross_attention_cache),
        encoded,
        "attention_mask" in inputs and "input_ids" in inputs,
    )


def _as_encoded(spec: CacheTensor, fixed: bool) -> CacheTensor:
    """Axis 2 of cross keys is as long as the encoder's output; 2 more positions must not pass for 2 more examples."""
    if fixed or spec.kind not in ("key", "value"):
        return spec
    shape = (BATCH, spec.shape[1], ENCODED, spec.shape[3])
    return CacheTensor(spec.layer, spec.kind, spec.state, spec.several, shape, spec.dtype)


def _tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    return Examples(model, batch=batch).tokens((batch, length), model.config.get_text_config(decoder=True))


@torch.no_grad()
def _run(model: Any, inputs: Mapping[str, Example], tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
    tensors = {name: example.tensor for name, example in inputs.items()}
    result = model(**tensors, decoder_input_ids=tokens, use_cache=True, return_dict=True)
    cache, states = getattr(result, "past_key_values", None), getattr(result, "encoder_last_hidden_state", None)
    if not isinstance(cache, EncoderDecoderCache) or states is None:
        raise ExportError(
            f"{type(model).__name__} keeps no pair of caches, so that its decoder cannot go on from where it stopped",
            next_step="Export it for feature-extraction, or write a factory.",
        )
    return cache, states


@dataclass
class _Encoded(BaseModelOutput):
    """An encoder's output with the fields that some models have beside its states, and read: Moonshine, NLLB-MoE."""

    attention_mask: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class EncoderPart(torch.nn.Module):
    """The encoder, and the decoder's keys and values of what it read."""

    def __init__(self, model: torch.nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs of `layout.inputs`, in order."""
        tokens = inputs[0].new_zeros((inputs[0].shape[0], 2), dtype=torch.int64)  # any will do: they leave no trace
        result = self.model(
            **dict(zip(self.layout.inputs, inputs, strict=True)),
            decoder_input_ids=tokens,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            use_cache=True,
            return_dict=True,
        )
        cross = tensors_of(result.past_key_values.cross_attention_cache)
        return (result.encoder_last_hidden_state, *(tensor for *_, tensor in cross))


class DecoderPart(torch.nn.Module):
    """The decoder, given its own cache and the keys and values of the encoder's output."""

    def __init__(self, model: torch.nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """New tokens [batch, sequence], the encoder's mask where it has one, own cache, cross cache."""
        given, layout = list(inputs), self.layout
        tokens = given.pop(0)
        keywords: dict[str, Any] = {"attention_mask": given.pop(0)} if layout.masks else {}
        own = cache_from(layout.templates[0], layout.own, given[: len(layout.own)])
        cross = cache_from(layout.templates[1], layout.cross, given[len(layout.own) :])
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        result = self.model(
            encoder_outputs=_Encoded(last_hidden_state=self._stand_in(given[len(layout.own)])),
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **keywords,
        )
        return (result.logits, *(tensor for *_, tensor in tensors_of(own)))

    def _stand_in(self, keys: torch.Tensor) -> torch.Tensor:
        """Zeros in the encoder output's shape: with its keys and values at hand the decoder asks for no more."""
        sizes = {BATCH: keys.shape[0], ENCODED: keys.shape[2]}
        return keys.new_zeros([sizes[dim] if isinstance(dim, str) else dim for dim in self.layout.encoded])


def trace_encoder_decoder(model: Any, preprocessor: Mapping[str, Any]) -> list[Traced]:
    """What to trace for an encoder-decoder: its decoder, then its encoder."""
    layout = layout_of(model, preprocessor)
    return [_trace_decoder(model, layout), _trace_encoder(model, layout)]


def _trace_encoder(model: Any, layout: Layout) -> Traced:
    part = EncoderPart(model, layout)
    names = list(layout.inputs)
    return Traced(
        name="encoder_model",
        reference=part,
        inputs=names,
        outputs=[STATES, *layout.cross_names(present=True)],
        module=part,
        examples={name: example.tensor for name, example in layout.inputs.items()},
        axes={name: example.axes for name, example in layout.inputs.items()},
    )


def _trace_decoder(model: Any, layout: Layout) -> Traced:
    generator = torch.Generator().manual_seed(0)
    sizes = {BATCH: 2, SEQUENCE: 5, PAST: _TAKEN, ENCODED: 11}
    tensors = {INPUT_IDS: _tokens(model, sizes[BATCH], sizes[SEQUENCE])}
    axes: dict[str, dict[int, str]] = {INPUT_IDS: {0: BATCH, 1: SEQUENCE}}
    if layout.masks:
        tensors[ENCODER_MASK] = torch.ones(sizes[BATCH], sizes[ENCODED], dtype=torch.int64)
        axes[ENCODER_MASK] = {0: BATCH, 1: ENCODED}
    for names, specs in (
        (layout.own_names(present=False), layout.own),
        (layout.cross_names(present=False), layout.cross),
    ):
        for name, spec in zip(names, specs, strict=True):
            tensors[name], axes[name] = spec.example(sizes, generator), spec.axes()
    part = DecoderPart(model, layout)
    return Traced(
        name="decoder_model",
        reference=part,
        inputs=list(tensors),
        outputs=["logits", *layout.own_names(present=True)],
        module=part,
        examples=tensors,
        axes=axes,
        details={"cache": ["key", "value"]},
    )


STEPS = 8
"""Calls in a sample of decoding: enough for an error in a cache or a position to grow."""


@torch.no_grad()
def decoding_samples(
    decoder: Traced, encoder: Traced, encoded: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], ...]:
    """What the decoder is called with, step by step, when it reads these inputs of the encoder: to compare on.

    The original picks each next token, the likeliest one; the last call takes three at once.

    Args:
        decoder: From `trace_encoder_decoder`.
        encoder: Likewise.
        encoded: Inputs of the encoder by name.
    """
    results = encoder.reference(*(torch.from_numpy(encoded[n]) for n in encoder.inputs))
    names = dict(zip(encoder.outputs, results, strict=True))
    fixed = {n: names[str(present_of(n))] for n in decoder.inputs if ".encoder." in n}
    if ENCODER_MASK in decoder.inputs:
        fixed[ENCODER_MASK] = torch.from_numpy(encoded["attention_mask"])
    batch = next(iter(fixed.values())).shape[0]
    own = {
        name: tensor.new_zeros(
            [0 if axes.get(axis) == PAST else n for axis, n in enumerate((batch, *tensor.shape[1:]))]
        )
        for name, tensor in decoder.examples.items()
        if ".decoder." in name and (axes := decoder.axes[name]) is not None
    }
    tokens, calls = decoder.examples[INPUT_IDS][:1, :1].repeat(batch, 1), []
    for step in range(STEPS):
        feeds = {INPUT_IDS: tokens, **fixed, **own}
        calls.append({name: feeds[name].numpy() for name in decoder.inputs})
        results = dict(zip(decoder.outputs, decoder.reference(*(feeds[n] for n in decoder.inputs)), strict=True))
        own = {name: results[str(present_of(name))] for name in own}
        likeliest = results["logits"][:, -1].argmax(-1, keepdim=True)
        tokens = likeliest.repeat(1, 3) if step == STEPS - 2 else likeliest
    return tuple(calls)
