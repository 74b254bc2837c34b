# SPDX-License-Identifier: Apache-2.0
"""transformers' caches as plain tensors: found by running the model, handed in by name, taken out again.

A cache is an object with layers, and torch.onnx.export takes tensors. What a model keeps (keys and values, a
convolution's last inputs, a recurrent state) is found by running it and looking, so that no list of architectures is
needed; which axes grow is found by running it at two sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ...contracts.errors import ExportError
from .state_layers import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

_OF_TOKENS = ("key", "value", "indexer")
"""Kinds that hold something of every token; a sparse attention's indexer has keys of its own."""


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a cache.

    Attributes:
        layer: Position of its layer.
        kind: `key`, `value`, `indexer`, `conv` or `recurrent`.
        state: Which of several states of its layer; 0 for keys and values.
        several: Whether its layer has several.
        shape: Sizes; those that depend on the call are named.
        dtype: Element type.
    """

    layer: int
    kind: str
    state: int
    several: bool
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def name(self, *, present: bool, role: str = "") -> str:
        """`past_key_values.0.key`, `present.0.decoder.key`, `past_conv.3`."""
        if self.kind in _OF_TOKENS:
            parts = ["present" if present else "past_key_values", str(self.layer), role, self.kind]
        else:
            parts = [f"{'present' if present else 'past'}_{self.kind}", str(self.layer), role]
        return ".".join([part for part in parts if part] + ([str(self.state)] if self.several else []))

    def axes(self) -> dict[int, str]:
        return {axis: dim for axis, dim in enumerate(self.shape) if isinstance(dim, str)}

    def example(self, sizes: dict[str, int], generator: torch.Generator) -> torch.Tensor:
        """Random numbers, or zeros for integers, with these sizes for the named axes."""
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in self.shape]
        if not self.dtype.is_floating_point:
            return torch.zeros(shape, dtype=self.dtype)
        return torch.randn(shape, generator=generator).to(self.dtype)


def tensors_of(cache: Any) -> list[tuple[int, str, int, torch.Tensor]]:
    """(layer, kind, state, tensor) for everything that a cache holds, in order.

    Raises:
        ExportError: It is of a kind of its own, or a layer keeps something that has no name here.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # of a decoder that could have read from an encoder
    if type(cache) not in (DynamicCache, TensorCache):
        raise _unknown(f"the model's cache is a {type(cache).__name__}")
    found: list[tuple[int, str, int, torch.Tensor]] = []
    for number, layer in enumerate(cache.layers):
        _refuse_unknown(layer)
        for kind, attribute in (("conv", "conv_states"), ("recurrent", "recurrent_states")):
            states = getattr(layer, attribute, None) or {}
            found += [(number, kind, state, t) for state, t in states.items() if isinstance(t, torch.Tensor)]
        for kind, attribute in (("key", "keys"), ("value", "values"), ("indexer", "indexer_keys")):
            tensor = getattr(layer, attribute, None)
            if isinstance(tensor, torch.Tensor):
                found.append((number, kind, 0, tensor))
    return found


_KNOWN = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
    "GrowingLayer",
    "GrowingIndexedLayer",
    "StateLayer",
    "StateAndGrowingLayer",
}


def _refuse_unknown(layer: Any) -> None:
    if type(layer).__name__ not in _KNOWN:
        raise _unknown(f"the model's cache has layers of the kind {type(layer).__name__}")
    if getattr(layer, "indexer_position_ids", None) is not None:
        raise _unknown("the model's cache keeps positions beside its keys")


def _unknown(what: str) -> ExportError:
    return ExportError(
        f"{what}, which cannot be passed as tensors here",
        next_step="Export it without a cache (--set export.cache=false), or for another task.",
    )


def _layers(cache: Any) -> list[Any]:
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return layers


def describe(small: Any, large: Any, names: dict[int, str], grows: str) -> list[CacheTensor]:
    """The tensors of a cache, from two runs that differ in size.

    Args:
        small: The cache after a run.
        large: The cache after a run with a larger batch and more tokens.
        names: Difference in size, large minus small, to the axis name that it stands for.
        grows: Name of the axis of keys and values along which tokens stand.
    """
    described = []
    first, second = tensors_of(small), tensors_of(large)
    for (layer, kind, state, a), (*_, b) in zip(first, second, strict=True):
        shape = tuple(
            x if x == y else names.get(y - x, f"axis_{axis}")
            for axis, (x, y) in enumerate(zip(a.shape, b.shape, strict=True))
        )
        if kind in ("key", "value") and _layers(small)[layer].is_sliding:
            shape = (*shape[:2], grows, *shape[3:])  # a short window had filled up already
        several = sum(1 for other in first if other[:2] == (layer, kind)) > 1
        described.append(CacheTensor(layer, kind, state, several, shape, a.dtype))
    return described


class GrowingLayer(DynamicLayer):
    """Keys and values that are there from the start, also when they hold no token yet.

    Layers with an attention window keep everything too: the mask hides what lies outside it, and one rule for all
    layers spares the graph a second length.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def get_seq_length(self) -> int:
        # The original compares numel with 0, which torch.export would turn into a condition on the size
        assert self.keys is not None
        length: int = self.keys.shape[-2]
        return length


class GrowingIndexedLayer(GrowingLayer):
    """Keys and values, and the keys by which a sparse attention picks among them, [batch, tokens, size]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, indexer_keys: torch.Tensor) -> None:
        super().__init__(keys, values)
        self.indexer_keys = indexer_keys

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        self.indexer_keys = torch.cat([self.indexer_keys, indexer_key_states], dim=1)
        return self.indexer_keys


class TensorCache(DynamicCache):
    """A cache that remembers which recurrent state was fetched last, for `recurrences.scanned`.

    Attributes:
        waiting: The states of the layer that runs, [batch, channels, n] each; several where it has heads.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = layers, None
        self.waiting: list[torch.Tensor] = []

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state = super().get_recurrent_state(layer_idx, state_idx)
        if state is not None:
            self.waiting = list(state.unbind(1)) if state.ndim == 4 else [state]
        return state


def cache_from(template: Any, described: Sequence[CacheTensor], tensors: Sequence[torch.Tensor]) -> Any:
    """Build the cache that the model is called with, out of plain tensors.

    Args:
        template: A cache of the model's own, for the layers that keep nothing.
        described: What `tensors` are.
        tensors: In that order.
    """
    from .states import StateAndGrowingLayer, StateLayer

    by_layer: dict[int, dict[tuple[str, int], torch.Tensor]] = {}
    for spec, tensor in zip(described, tensors, strict=True):
        by_layer.setdefault(spec.layer, {})[spec.kind, spec.state] = tensor
    layers: list[Any] = []
    for number, original in enumerate(_layers(template)):
        held = by_layer.get(number, {})
        attends = ("key", 0) in held
        states = {key: tensor for key, tensor in held.items() if key[0] in ("conv", "recurrent")}
        if attends and states:
            layers.append(StateAndGrowingLayer(original, states, held["key", 0], held["value", 0]))
        elif ("indexer", 0) in held:
            layers.append(GrowingIndexedLayer(held["key", 0], held["value", 0], held["indexer", 0]))
        elif attends:
            layers.append(GrowingLayer(held["key", 0], held["value", 0]))
        elif states:
            layers.append(StateLayer(original, states))
        else:
            layers.append(_unused(original))
    return TensorCache(layers)


def new_cache(template: Any) -> Any:
    """An empty cache in the model's own form, without windows, so that it holds what a graph's cache holds."""
    layers: list[Any] = []
    for original in _layers(template):
        if isinstance(original, LinearAttentionLayer):
            attends = isinstance(original, DynamicLayer)
            kind = LinearAttentionAndFullAttentionLayer if attends else LinearAttentionLayer
            layers.append(kind(number_of_states=original.number_of_states))
        else:
            layers.append(_unused(original))
    return TensorCache(layers)


def _unused(original: Any) -> Any:
    """A layer of the same kind, without a window, that holds nothing yet."""
    return DynamicLayer() if isinstance(original, DynamicSlidingWindowLayer) else type(original)()
