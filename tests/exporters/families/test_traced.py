# SPDX-License-Identifier: Apache-2.0
"""The form in which a model is traced, and that it is left as it was found."""

from typing import Any

from tiny_configs import TEXT, VISION, tiny

from onnxpress.exporters.families.traced import plain_kernels


def attention(model: Any) -> list[str]:
    return [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")]


def test_attention_is_plain_within_the_block_and_as_before_after_it() -> None:
    settings = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION}
    model = tiny("clip", "zero-shot-image-classification", **settings)
    model.vision_model.set_attn_implementation("eager")  # a part may compute otherwise than the whole
    before = attention(model)
    assert set(before) == {"sdpa", "eager"}
    with plain_kernels(model):
        assert set(attention(model)) == {"eager"}
    assert attention(model) == before


def test_a_mixture_of_experts_has_no_loop_over_experts() -> None:
    model = tiny("mixtral", "text-generation", **TEXT, num_key_value_heads=2, num_local_experts=2)
    before = model.config._experts_implementation
    with plain_kernels(model):
        assert model.config._experts_implementation == "batched_mm"
    assert model.config._experts_implementation == before
