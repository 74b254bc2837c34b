# SPDX-License-Identifier: Apache-2.0
"""Architectures of the transformers library, tiny and with random weights, and the wrappers that export needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.export import quiet, spread
from zoo.graph import VOCABULARY

_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 160, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 176, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "AutoModelForSequenceClassification", _BERT),
    "roberta": ("roberta", "AutoModelForTokenClassification", {**_BERT, "type_vocab_size": 1}),
    "albert": ("albert", "AutoModelForMaskedLM", {**_BERT, "embedding_size": 32}),
    "distilbert": (
        "distilbert", "AutoModelForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 160,
         "max_position_embeddings": 40, "num_labels": 3},
    ),
    "electra": ("electra", "AutoModelForTokenClassification", {**_BERT, "embedding_size": 32}),
    "deberta-v2": (
        "deberta-v2", "AutoModelForSequenceClassification",
        {**_BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": ("mpnet", "AutoModel", _BERT),
    "modernbert": (
        "modernbert", "AutoModelForMaskedLM",
        {**_BERT, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "gpt2": (
        "gpt2", "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama": ("llama", "AutoModelForCausalLM", _LLAMA),
    "qwen2": ("qwen2", "AutoModelForCausalLM", _LLAMA),
    "t5": (
        "t5", "T5EncoderModel",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4,
         "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1},
    ),
    "vit": (
        "vit", "AutoModelForImageClassification",
        {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 160, "num_labels": 5},
    ),
    "convnext": (
        "convnext", "AutoModelForImageClassification",
        {"image_size": 32, "hidden_sizes": [32, 48], "depths": [1, 1], "num_stages": 2, "patch_size": 4,
         "num_labels": 5},
    ),
    "swin": (
        "swin", "AutoModelForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
         "num_labels": 5},
    ),
    "mobilevit": (
        "mobilevit", "AutoModelForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 24, 32, 48, 48, 96],
         "num_attention_heads": 4, "num_labels": 5},
    ),
    "clip-text": (
        "clip_text_model", "CLIPTextModel",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2},
    ),
}  # fmt: skip
"""Name: model type, class, configuration."""


class Outputs(nn.Module):
    """A transformers model with positional inputs that returns named outputs, without a cache."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, tuple(inputs), tuple(outputs)
        known = inspect.signature(model.forward).parameters
        self.settings = {"use_cache": False} if "use_cache" in known else {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.settings)
        return tuple(found[name] for name in self.outputs)


class Cached(nn.Module):
    """A decoder that takes keys and values of the past and returns those of the present, layer after layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        present = [tensor for layer in found.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (found.logits, *present)


def tiny(name: str, *, attention: str = "sdpa") -> nn.Module:
    """One of `SETTINGS`, with its weights drawn."""
    import transformers

    model_type, kind, settings = SETTINGS[name]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    if kind.startswith("Auto"):
        model = getattr(transformers, kind).from_config(config, **_attention(name, attention))
    else:
        model = getattr(transformers, kind)(config)
    return spread(model)


def published(folder: Path, kind: str) -> nn.Module:
    """A checkpoint in a transformers folder, in float32."""
    import transformers

    with quiet():
        model: nn.Module = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


_ONE_ATTENTION = ("deberta-v2", "mpnet", "convnext", "mobilevit", "swin")


def _attention(name: str, attention: str) -> dict[str, str]:
    return {} if name in _ONE_ATTENTION else {"attn_implementation": attention}


def sequence_axes(names: Sequence[str]) -> dict[str, dict[int, str]]:
    """Batch and length of token inputs."""
    return {name: {0: "batch", 1: "sequence"} for name in names}
