# SPDX-License-Identifier: Apache-2.0
"""Random models of the families that `fuse` is measured on, and the flat modules that torch.export takes.

Decoders have the inputs and outputs of the ecosystem: `past_key_values.N.key` [batch, kv heads, past, head size] in,
`present.N.key` out, so that one graph is prefill (past 0) and decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from peers.assets import find
from torch import Tensor, nn

from onnxpress.exporters.dynamo import export_module

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """One architecture.

    Attributes:
        module: Builds the flat module, in eval mode.
        example: Inputs to trace it with.
        outputs: One name an output.
        axes: Input name to {axis: symbol}.
        settings: Name of a setting to the inputs that latency is measured on.
    """

    name: str
    module: nn.Module
    example: dict[str, Tensor]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    settings: dict[str, Feeds] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The model's configuration, as transformers has it."""
        return self.module.model.config

    def export(self, opset: int = 20) -> ir.Model:
        return export_module(self.module, self.example, output_names=self.outputs, dynamic_axes=self.axes, opset=opset)

    def expected(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            found = self.module(*(torch.from_numpy(feeds[name]) for name in self.example))
        return [tensor.numpy() for tensor in found]


class Encoder(nn.Module):
    """A model without a cache, called by keyword."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), return_dict=True)
        return (found[0],)


class Decoder(nn.Module):
    """A causal language model with its cache as flat tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        input_ids, attention_mask, position_ids, *past = tensors
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return (found.logits, *_flat(found.past_key_values))


class CrossDecoder(nn.Module):
    """The decoder of an encoder-decoder with both caches: self-attention grows, cross-attention is read as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        input_ids, encoder_attention_mask, encoder_hidden_states, *past = tensors
        half = len(past) // 2
        own = DynamicCache(list(zip(past[:half:2], past[1:half:2], strict=True)))
        cross = DynamicCache(list(zip(past[half::2], past[half + 1 :: 2], strict=True)))
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = {layer: True for layer in range(half // 2)}
        found = self.model(
            decoder_input_ids=input_ids, attention_mask=encoder_attention_mask, past_key_values=cache, use_cache=True,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
        )  # fmt: skip
        return (found.logits, *_flat(found.past_key_values.self_attention_cache))


def _flat(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _present(layers: int) -> tuple[str, ...]:
    return tuple(f"present.{i}.{part}" for i in range(layers) for part in ("key", "value"))


def _past(name: str, layers: int) -> list[str]:
    return [f"{name}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def causal_feeds(config: Any, batch: int, past: int, length: int, *, left_padding: int = 0, seed: int = 0) -> Feeds:
    """Inputs of a `Decoder`; the first row begins with `left_padding` masked tokens."""
    rng = np.random.default_rng(seed)
    layers, heads, size = cache_shape(config)
    mask = np.ones((batch, past + length), np.int64)
    mask[0, :left_padding] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    feeds = {
        "input_ids": rng.integers(3, config.vocab_size, (batch, length)),
        "attention_mask": mask,
        "position_ids": positions,
    }
    for name in _past("past_key_values", layers):
        feeds[name] = rng.standard_normal((batch, heads, past, size)).astype(np.float32)
    return feeds


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads of the cache, head size."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def decoder(name: str, model: nn.Module, *, length: int = 128) -> Subject:
    config = model.config
    layers = cache_shape(config)[0]
    feeds = causal_feeds(config, 2, 3, 4)
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "past_sequence + sequence"},
        "position_ids": {0: "batch", 1: "sequence"},
        **{past: {0: "batch", 2: "past_sequence"} for past in _past("past_key_values", layers)},
    }
    return Subject(
        name, Decoder(model.eval()), {k: torch.from_numpy(v) for k, v in feeds.items()},
        ("logits", *_present(layers)), axes,
        {
            f"prefill 1 x {length}": causal_feeds(config, 1, 0, length),
            f"decode, past {length}": causal_feeds(config, 1, length, 1),
        },
    )  # fmt: skip


def cross_feeds(config: Any, batch: int, past: int, source: int, length: int = 1) -> Feeds:
    rng = np.random.default_rng(0)
    mask = np.ones((batch, source), np.int64)
    mask[-1, -2:] = 0
    feeds = {
        "input_ids": rng.integers(3, config.vocab_size, (batch, length)),
        "encoder_attention_mask": mask,
        "encoder_hidden_states": rng.standard_normal((batch, source, config.d_model)).astype(np.float32),
    }
    layers = config.num_decoder_layers
    for kind, size in (("past_key_values", past), ("cross_key_values", source)):
        for name in _past(kind, layers):
            feeds[name] = rng.standard_normal((batch, config.num_heads, size, config.d_kv)).astype(np.float32)
    return feeds


def cross_decoder(name: str, model: nn.Module, *, length: int = 128) -> Subject:
    config = model.config
    layers = config.num_decoder_layers
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "encoder_attention_mask": {0: "batch", 1: "source"},
        "encoder_hidden_states": {0: "batch", 1: "source"},
        **{past: {0: "batch", 2: "past_sequence"} for past in _past("past_key_values", layers)},
        **{past: {0: "batch", 2: "source"} for past in _past("cross_key_values", layers)},
    }
    feeds = cross_feeds(config, 2, 3, 5, 4)
    return Subject(
        name, CrossDecoder(model.eval()), {k: torch.from_numpy(v) for k, v in feeds.items()},
        ("logits", *_present(layers)), axes, {f"decode, past {length}": cross_feeds(config, 1, length, length)},
    )  # fmt: skip


def text_feeds(config: Any, batch: int, length: int, *, padding: int = 2) -> Feeds:
    rng = np.random.default_rng(0)
    mask = np.ones((batch, length), np.int64)
    if padding:
        mask[-1, -padding:] = 0
    return {"input_ids": rng.integers(5, config.vocab_size, (batch, length)), "attention_mask": mask}


def encoder(name: str, model: nn.Module, *, length: int = 128) -> Subject:
    feeds = text_feeds(model.config, 2, 7)
    return Subject(
        name, Encoder(model.eval(), tuple(feeds)), {k: torch.from_numpy(v) for k, v in feeds.items()}, ("hidden",),
        {key: {0: "batch", 1: "sequence"} for key in feeds}, {f"1 x {length}": text_feeds(model.config, 1, length)},
    )  # fmt: skip


def image_feeds(config: Any, batch: int) -> Feeds:
    size = config.image_size
    return {"pixel_values": np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)}


def vision(name: str, model: nn.Module) -> Subject:
    feeds = image_feeds(model.config, 2)
    return Subject(
        name, Encoder(model.eval(), tuple(feeds)), {k: torch.from_numpy(v) for k, v in feeds.items()}, ("hidden",),
        {"pixel_values": {0: "batch"}}, {"1 image": image_feeds(model.config, 1)},
    )  # fmt: skip


def build(name: str, *, tiny: bool = False, attention: str = "eager") -> Subject:
    """A subject by its name; `tiny` for trying things out."""
    import transformers

    torch.manual_seed(0)
    make = MODELS[name]
    kind, model_class, settings = make(tiny)
    if model_class == "folder":
        source = find("stories260K") / "derived/hf"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, attn_implementation=attention, dtype=torch.float32
        )
    else:
        found = getattr(transformers, model_class)
        config = found.config_class(**settings) if not model_class.startswith("Auto") else settings
        config._attn_implementation = attention
        model = found(config)
    return kind(name, model)


Recipe = tuple[Callable[..., Subject], str, dict[str, Any]]


def _text(tiny: bool, **more: Any) -> dict[str, Any]:
    size, layers, heads = (64, 2, 4) if tiny else (768, 4, 12)
    return {
        "vocab_size": 300 if tiny else 4000, "hidden_size": size, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 3 * size, "max_position_embeddings": 512, **more,
    }  # fmt: skip


def _tokens() -> dict[str, Any]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _t5(tiny: bool) -> dict[str, Any]:
    size, layers, heads = (64, 2, 4) if tiny else (512, 4, 8)
    return {
        "vocab_size": 300 if tiny else 4000, "d_model": size, "d_kv": size // heads, "d_ff": 2 * size,
        "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads, "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip


def _kv(tiny: bool) -> dict[str, Any]:
    return {"num_key_value_heads": 2 if tiny else 4}


def _gpt2(tiny: bool) -> dict[str, Any]:
    size, layers, heads = (64, 2, 4) if tiny else (768, 4, 12)
    return {
        "vocab_size": 300 if tiny else 4000, "n_embd": size, "n_layer": layers, "n_head": heads, "n_positions": 512,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


MODELS: dict[str, Callable[[bool], Recipe]] = {
    "bert": lambda tiny: (encoder, "BertModel", _text(tiny)),
    "modernbert": lambda tiny: (
        encoder, "ModernBertModel",
        _text(tiny, local_attention=16, cls_token_id=2, sep_token_id=3, **_tokens()),
    ),
    "vit": lambda tiny: (
        vision, "ViTModel", {**_text(tiny), "image_size": 32 if tiny else 224, "patch_size": 8 if tiny else 16}
    ),
    "gpt2": lambda tiny: (decoder, "GPT2LMHeadModel", _gpt2(tiny)),
    "llama": lambda tiny: (decoder, "LlamaForCausalLM", _text(tiny, **_tokens(), **_kv(tiny))),
    "qwen3": lambda tiny: (
        decoder, "Qwen3ForCausalLM", _text(tiny, **_tokens(), **_kv(tiny), head_dim=16 if tiny else 64)
    ),
    "phi": lambda tiny: (decoder, "PhiForCausalLM", _text(tiny, **_tokens())),
    "gpt_neox": lambda tiny: (decoder, "GPTNeoXForCausalLM", _text(tiny, **_tokens())),
    "stories260K": lambda tiny: (decoder, "folder", {}),
    "t5_encoder": lambda tiny: (encoder, "T5EncoderModel", _t5(tiny)),
    "t5_decoder": lambda tiny: (cross_decoder, "T5ForConditionalGeneration", _t5(tiny)),
}  # fmt: skip
