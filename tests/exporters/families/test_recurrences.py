# SPDX-License-Identifier: Apache-2.0
"""Recurrences against transformers' own forms of them: a whole text from zero, and a token at a time from a state."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.exporters.families.caches import TensorCache
from onnxpress.exporters.families.recurrences import scanned

BATCH, TOKENS = 2, 9


class _Mixer(torch.nn.Module):
    """Stands for a model of one architecture: its class says in which module its functions are."""


def _module(architecture: str) -> Any:
    return importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")


def _ours(architecture: str, name: str, *states: torch.Tensor) -> Any:
    """The function that takes the place of `name` in an architecture's module, which gets its own back."""
    module, cache = _module(architecture), TensorCache([])
    cache.waiting = list(states)
    part = _Mixer()
    part.__class__ = type("Mixer", (_Mixer,), {"__module__": module.__name__})
    own = getattr(module, name)
    with scanned(part, cache):
        replaced = getattr(module, name)
    assert getattr(module, name) is own is not replaced
    return replaced


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _mamba() -> dict[str, Any]:
    return {
        "hidden_states": _random(BATCH, 6, TOKENS), "dt": _random(BATCH, 6, TOKENS), "A": -_random(6, 4).exp(),
        "B": _random(BATCH, 4, TOKENS), "C": _random(BATCH, 4, TOKENS), "D": _random(6), "z": _random(BATCH, 6, TOKENS),
        "delta_bias": _random(6), "delta_softplus": True, "return_last_state": True,
    }  # fmt: skip


def _mamba2(limit: tuple[float, float] = (0.0, float("inf"))) -> dict[str, Any]:
    return {
        "hidden_states": _random(BATCH, TOKENS, 4, 3), "dt": _random(BATCH, TOKENS, 4), "A": -_random(4).exp(),
        "B": _random(BATCH, TOKENS, 2, 5), "C": _random(BATCH, TOKENS, 2, 5), "chunk_size": 4, "D": _random(4),
        "dt_bias": _random(4), "dt_softplus": True, "dt_limit": limit, "return_final_states": True,
    }  # fmt: skip


def _delta(decays: int | None) -> dict[str, Any]:
    """`decays`: channels with a decay of their own, or None for one a head; then two value heads share a key head."""
    heads = 4
    shape = (BATCH, TOKENS, heads) if decays is None else (BATCH, TOKENS, heads, decays)
    key_heads = heads // 2 if decays is None else heads
    return {
        "query": _random(BATCH, TOKENS, key_heads, 6), "key": _random(BATCH, TOKENS, key_heads, 6) + 0.1,
        "value": _random(BATCH, TOKENS, heads, 5), "g": -_random(*shape).exp(),
        "beta": _random(BATCH, TOKENS, heads).sigmoid(), "output_final_state": True, "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip


def _agree(expected: Any, got: Any) -> None:
    for wanted, tensor in zip(expected, got, strict=True):
        assert wanted.shape == tensor.shape
        assert torch.allclose(wanted, tensor, atol=2e-5)


def test_a_selective_scan_from_zero_is_mambas() -> None:
    arguments = _mamba()
    own = _module("mamba").mamba_selective_scan(**arguments)
    _agree(own, _ours("mamba", "mamba_selective_scan", torch.zeros(BATCH, 6, 4))(**arguments))


def test_a_selective_scan_goes_on_from_its_state_as_single_tokens_do() -> None:
    arguments, state = _mamba(), _random(BATCH, 6, 4)
    step, running = _module("mamba").mamba_selective_state_update, state.clone()
    tokens = [
        step(
            running, arguments["hidden_states"][..., t], arguments["dt"][..., t], arguments["A"],
            arguments["B"][..., t], arguments["C"][..., t], arguments["D"], z=arguments["z"][..., t],
            dt_bias=arguments["delta_bias"], dt_softplus=True,
        )
        for t in range(TOKENS)
    ]  # fmt: skip
    _agree((torch.stack(tokens, -1), running), _ours("mamba", "mamba_selective_scan", state)(**arguments))


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, float("inf")), (0.1, 0.9)])
@pytest.mark.parametrize("start", [False, True])
def test_the_dual_form_is_mamba2s(limit: tuple[float, float], start: bool) -> None:
    arguments, state = _mamba2(limit), _random(BATCH, 4, 3, 5) * start
    own = _module("mamba2").mamba2_chunk_scan(**arguments, initial_states=state)
    _agree(own, _ours("mamba2", "mamba2_chunk_scan")(**arguments, initial_states=state))


def test_a_single_token_has_no_limit_of_its_step_in_mamba2_as_in_transformers() -> None:
    arguments, state = _mamba2((50.0, float("inf"))), _random(BATCH, 4, 3, 5)
    one = {n: v[:, :1] if isinstance(v, torch.Tensor) and v.ndim > 1 else v for n, v in arguments.items()}
    ours = _ours("mamba2", "mamba2_chunk_scan")
    free = ours(**{**one, "dt_limit": (0.0, float("inf"))}, initial_states=state)
    _agree(free, ours(**one, initial_states=state))
    assert not torch.allclose(
        ours(**arguments, initial_states=state)[1],
        ours(**{**arguments, "dt_limit": (0.0, float("inf"))}, initial_states=state)[1],
    )


@pytest.mark.parametrize(
    ("architecture", "chunked", "single", "decays"),
    [
        ("qwen3_next", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", None),
        ("kimi_linear", "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", 6),
    ],
)
@pytest.mark.parametrize("start", [False, True])
def test_the_gated_delta_rule_is_that_of_both_forms(
    architecture: str, chunked: str, single: str, decays: int | None, start: bool
) -> None:
    arguments, state = _delta(decays), _random(BATCH, 4, 6, 5) * start
    got = _ours(architecture, chunked)(**arguments, initial_state=state)
    _agree(getattr(_module(architecture), chunked)(**arguments, initial_state=state), got)
    _agree(getattr(_module(architecture), single)(**arguments, initial_state=state), got)


@settings(max_examples=8, deadline=None)
@given(cut=st.integers(1, TOKENS - 1))
def test_a_text_in_two_parts_is_the_text(cut: int) -> None:
    arguments, state = _delta(None), _random(BATCH, 4, 6, 5)
    ours = _ours("qwen3_next", "torch_chunk_gated_delta_rule")

    def part(tokens: slice, start: torch.Tensor) -> Any:
        cut = {n: v[:, tokens] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        return ours(**cut, initial_state=start)

    first, middle = part(slice(None, cut), state)
    second, last = part(slice(cut, None), middle)
    _agree(part(slice(None), state), (torch.cat([first, second], dim=1), last))


def test_heads_take_their_states_in_turn() -> None:
    """Zamba calls the scan for each head, with one state for all of them in its cache."""
    from transformers.cache_utils import LinearAttentionLayer

    from onnxpress.exporters.families.states import StateLayer

    state = _random(BATCH, 3, 6, 4)
    layer = StateLayer(LinearAttentionLayer(), {("conv", 0): _random(BATCH, 6, 2), ("recurrent", 0): state})
    cache = TensorCache([layer])
    cache.get_recurrent_state(0)
    assert [torch.equal(head, state[:, i]) for i, head in enumerate(cache.waiting)] == [True, True, True]
