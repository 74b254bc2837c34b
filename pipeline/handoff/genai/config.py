# SPDX-License-Identifier: Apache-2.0
"""genai_config.json, read off the graph's own signature where that says it, else off config.json."""

from __future__ import annotations

from typing import Any

from ....contracts.decoding import INPUT_IDS, MASK, POSITIONS, Decoding
from ....contracts.errors import InputError
from ....runtime.opened import Bundle

_TYPES = {
    "chatglm",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gptoss",
    "granite",
    "internlm2",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "phi",
    "phi3",
    "phi3small",
    "phimoe",
    "qwen2",
    "qwen3",
    "smollm3",
}
"""Decoders that GenAI calls by their own names; any other is a `decoder`."""

_SEARCH: dict[str, Any] = {
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""What transformers takes where a generation_config.json says nothing."""


def config_of(bundle: Bundle, decoding: Decoding, *, in_place: bool) -> dict[str, Any]:
    """All of genai_config.json.

    Args:
        bundle: A causal language model.
        decoding: Of the same.
        in_place: Whether one buffer is past and present of a cache.

    Raises:
        InputError: config.json lacks what the graph does not say.
    """
    keys = [spec for spec in decoding.caches if spec.name.endswith(".key")]
    _, kv_heads, _, size = keys[0].shape
    text = bundle.config.get("text_config") or bundle.config
    length = bundle.max_length or text.get("max_position_embeddings")
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    eos = _first(bundle, "eos_token_id")
    if not all(isinstance(number, int) for number in (length, heads, hidden, kv_heads, size)) or eos is None:
        raise InputError(
            "config.json does not say all of max_position_embeddings, num_attention_heads, hidden_size, eos_token_id",
            next_step="Press the model from its transformers folder.",
        )
    ends = eos if isinstance(eos, list) else [eos]
    pad = _first(bundle, "pad_token_id")
    family = str(text.get("model_type"))
    return {
        "model": {
            "type": family if family in _TYPES else "decoder",
            "bos_token_id": _or(_first(bundle, "bos_token_id"), ends[0]),
            "eos_token_id": eos,
            "pad_token_id": _or(pad, ends[0]),
            "context_length": length,
            "vocab_size": next(spec.shape[-1] for spec in bundle.signature.outputs if spec.name == "logits"),
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": size,
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": len(keys),
                "inputs": {
                    **{name: name for name in (INPUT_IDS, MASK, POSITIONS) if name in decoding.inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **_SEARCH,
            **{key: value for key in _SEARCH if (value := bundle.generation_config.get(key)) is not None},
            "max_length": length,
            "past_present_share_buffer": in_place,
        },
    }


def _first(bundle: Bundle, key: str) -> Any:
    """What generation_config.json says, else config.json."""
    said = bundle.generation_config.get(key)
    return bundle.config.get(key) if said is None else said


def _or(value: Any, other: int) -> int:
    return value if isinstance(value, int) else other
