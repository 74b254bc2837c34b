# SPDX-License-Identifier: Apache-2.0
"""Caches as plain tensors: what is found in them, what it is called, and the way back."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from onnxpress.contracts.errors import ExportError
from onnxpress.exporters.families.caches import cache_from, describe, new_cache, tensors_of

HEADS, SIZE, KERNEL = 2, 4, 3


def _cache(*layers: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = list(layers), None
    return cache


def _filled(batch: int, tokens: int) -> DynamicCache:
    """One layer of each kind, after `tokens` tokens."""
    cache = _cache(
        DynamicLayer(),
        DynamicSlidingWindowLayer(sliding_window=3),
        LinearAttentionLayer(),
        LinearAttentionAndFullAttentionLayer(),
        DynamicIndexedLayer(),
    )
    keys = torch.arange(batch * HEADS * tokens * SIZE, dtype=torch.float32).reshape(batch, HEADS, tokens, SIZE)
    for layer in (0, 1, 3, 4):
        cache.update(keys + layer, -keys, layer)
    for layer in (2, 3):
        cache.update_conv_state(torch.ones(batch, 5, KERNEL), layer)
        cache.update_recurrent_state(torch.ones(batch, 5, SIZE), layer)
    cache.update_indexer(torch.ones(batch, tokens, 6), 4)
    return cache


def _described() -> list[Any]:
    return describe(_filled(2, 5), _filled(4, 6), {2: "batch", 1: "past"}, "past")


def test_every_kind_is_found_and_named() -> None:
    keys = ("batch", HEADS, "past", SIZE)
    assert [(spec.name(present=False), spec.shape) for spec in _described()] == [
        ("past_key_values.0.key", keys),
        ("past_key_values.0.value", keys),
        ("past_key_values.1.key", keys),  # its window had filled up already
        ("past_key_values.1.value", keys),
        ("past_conv.2", ("batch", 5, KERNEL)),
        ("past_recurrent.2", ("batch", 5, SIZE)),
        ("past_conv.3", ("batch", 5, KERNEL)),
        ("past_recurrent.3", ("batch", 5, SIZE)),
        ("past_key_values.3.key", keys),
        ("past_key_values.3.value", keys),
        ("past_key_values.4.key", keys),
        ("past_key_values.4.value", keys),
        ("past_key_values.4.indexer", ("batch", "past", 6)),
    ]
    present = [spec.name(present=True) for spec in _described()]
    assert present[:1] + present[4:6] + present[-1:] == [
        "present.0.key", "present_conv.2", "present_recurrent.2", "present.4.indexer",
    ]  # fmt: skip
    assert _described()[0].name(present=True, role="encoder") == "present.0.encoder.key"


def test_several_states_of_a_layer_are_numbered() -> None:
    def filled(batch: int) -> DynamicCache:
        cache = _cache(LinearAttentionLayer(number_of_states=2))
        for state in range(2):
            cache.update_conv_state(torch.ones(batch, 5, KERNEL), 0, state_idx=state)
        return cache

    described = describe(filled(2), filled(4), {2: "batch"}, "past")
    assert [spec.name(present=False) for spec in described] == ["past_conv.0.0", "past_conv.0.1"]


def test_tensors_come_back_as_they_went_in_and_are_not_written_to() -> None:
    template, described = _filled(2, 5), _described()
    sizes = {"batch": 3, "past": 4}
    generator = torch.Generator().manual_seed(0)
    given = [spec.example(sizes, generator) for spec in described]
    kept = [tensor.clone() for tensor in given]
    cache = cache_from(template, described, given)
    assert all(torch.equal(a, b) for a, (*_, b) in zip(given, tensors_of(cache), strict=True))
    assert cache.get_seq_length(0) == 4
    cache.update(torch.zeros(3, HEADS, 2, SIZE), torch.zeros(3, HEADS, 2, SIZE), 1)
    cache.get_conv_state(2).zero_()  # what transformers does for a single token
    cache.update_recurrent_state(torch.zeros(3, 5, SIZE), 2)
    cache.update_indexer(torch.zeros(3, 2, 6), 4)
    after = {spec.name(present=False): t for spec, (*_, t) in zip(described, tensors_of(cache), strict=True)}
    assert after["past_key_values.1.key"].shape[2] == 6  # beyond the window of 3
    assert after["past_key_values.4.indexer"].shape[1] == 6
    assert not after["past_conv.2"].any()
    assert not after["past_recurrent.2"].any()
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_a_state_of_zeros_is_no_state_to_a_convolution() -> None:
    described = [spec for spec in _described() if spec.layer == 2]
    cache = cache_from(_cache(*_filled(2, 5).layers[2:3]), [_at_layer_0(spec) for spec in described],
                       [torch.zeros(2, 5, KERNEL), torch.zeros(2, 5, SIZE)])  # fmt: skip
    new = torch.randn(2, 5, 4)
    seen = cache.update_conv_state(new, 0)
    assert torch.equal(seen, torch.nn.functional.pad(new, (KERNEL, 0)))
    assert torch.equal(cache.get_conv_state(0), new[..., -KERNEL:])


def _at_layer_0(spec: Any) -> Any:
    import dataclasses

    return dataclasses.replace(spec, layer=0)


def test_a_cache_may_be_empty() -> None:
    described = _described()[:2]
    cache = cache_from(_filled(2, 5), described, [torch.zeros(2, HEADS, 0, SIZE)] * 2)
    assert cache.get_seq_length(0) == 0
    keys, _ = cache.update(torch.ones(2, HEADS, 3, SIZE), torch.ones(2, HEADS, 3, SIZE), 0)
    assert keys.shape == (2, HEADS, 3, SIZE)


def test_a_new_cache_is_the_models_own_without_windows() -> None:
    mixed = LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=3)
    kinds = [type(layer) for layer in new_cache(_cache(*_filled(2, 5).layers, mixed)).layers]
    assert kinds == [
        DynamicLayer, DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, DynamicIndexedLayer,
        LinearAttentionAndFullAttentionLayer,
    ]  # fmt: skip


def test_the_half_that_a_decoder_alone_fills_is_taken() -> None:
    cache = EncoderDecoderCache(_filled(2, 5), DynamicCache())
    assert len(tensors_of(cache)) == len(tensors_of(_filled(2, 5)))


def test_what_has_no_name_here_is_refused() -> None:
    class OwnCache(DynamicCache):
        pass

    with pytest.raises(ExportError, match="is a OwnCache") as refused:
        tensors_of(OwnCache())
    assert "export.cache=false" in (refused.value.next_step or "")

    class OwnLayer(DynamicLayer):
        pass

    with pytest.raises(ExportError, match="layers of the kind OwnLayer"):
        tensors_of(_cache(OwnLayer()))
    positions = DynamicIndexedLayer()
    positions.indexer_position_ids = torch.zeros(1, 2, 3)
    with pytest.raises(ExportError, match="positions beside its keys"):
        tensors_of(_cache(positions))
