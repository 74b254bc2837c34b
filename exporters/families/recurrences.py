# SPDX-License-Identifier: Apache-2.0
"""Recurrences of state-space and linear-attention layers, as one Scan over the tokens that starts from any state.

transformers computes a text in one of two forms. One token at a time continues from a state. A whole text is taken in
chunks of 64 to 256 tokens, to which it is padded, in Python loops whose length torch.export fixes; and Mamba's starts
from zero, whatever came before. What both compute is a sum over tokens, which is written here as it stands. (Mamba: Gu
and Dao, arXiv:2312.00752. Mamba-2: Dao and Gu, arXiv:2405.21060. Gated delta rule: Yang, Kautz and Hatamizadeh,
arXiv:2412.06464; with a decay for each channel: Kimi Linear, arXiv:2510.26692.) Only that is inside the Scan:
projections, convolutions, gates and norms work on all tokens at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan_op

Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(state, what stands at this token ..., what is the same for all ...) to the next state and the output."""


class scanned:
    """Within the block, the model's recurrences are the ones of this module.

    Args:
        model: Its modeling modules are searched for the names in `_FORMS`, which its families share.
        cache: A `caches.TensorCache`, with which the model is called. Mamba does not hand its scan the state that its
            layer has fetched from the cache; the cache remembers it.
    """

    def __init__(self, model: torch.nn.Module, cache: Any) -> None:
        modules = {sys.modules[type(part).__module__] for part in model.modules()}
        self.replaced = [(m, name, getattr(m, name)) for m in modules for name in _FORMS if hasattr(m, name)]
        self.cache = cache

    def __enter__(self) -> None:
        for module, name, _ in self.replaced:
            setattr(module, name, _FORMS[name](self.cache))

    def __exit__(self, *_: object) -> None:
        for module, name, original in self.replaced:
            setattr(module, name, original)


def _over_tokens(
    step: Step, state: torch.Tensor, inputs: Sequence[torch.Tensor], axis: int, *shared: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `step` over the tokens, which stand along `axis` in `inputs`; outputs stand along axis 1.

    torch's public `scan` compiles the step first, 2 seconds a layer; this is the operator under it.
    """
    # A copy, also contiguous: the state has to be laid out as its successor is, and apart from the graph's inputs
    start = state.clone(memory_format=torch.contiguous_format)
    last, outputs = scan_op(step, [start], [tensor.movedim(axis, 0) for tensor in inputs], additional_inputs=shared)
    return outputs.movedim(0, 1), last


def _selective(cache: Any) -> Callable[..., Any]:
    """Mamba: state [batch, channels, n], a decay for each of its numbers; Zamba calls it for each of several heads."""

    def mamba_selective_scan(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        z: torch.Tensor,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, dt, z [batch, channels, tokens]; A [channels, n]; B, C [batch, n, tokens]."""
        dt = dt if delta_bias is None else dt + delta_bias[:, None]
        dt = F.softplus(dt) if delta_softplus else dt

        def step(
            state: torch.Tensor, dt: torch.Tensor, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, a: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            state = state * torch.exp(a * dt[..., None]) + x[..., None] * b[:, None]
            return state, torch.matmul(state, c[..., None])[..., 0]

        mixed, last = _over_tokens(step, cache.waiting.pop(0), (dt, dt * hidden_states, B, C), 2, A)
        return (mixed.transpose(1, 2) + hidden_states * D[:, None]) * F.silu(z), last

    return mamba_selective_scan


def _state_space_dual(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor,
    initial_states: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2: state [batch, heads, size, n], one decay a head; heads of a group share B and C.

    hidden_states [batch, tokens, heads, size]; dt [batch, tokens, heads]; B, C [batch, tokens, groups, n].
    """
    dt = dt if dt_bias is None else dt + dt_bias
    dt = _limited(F.softplus(dt) if dt_softplus else dt, dt_limit)
    groups = (B.shape[2], -1)
    decay, x = torch.exp(A * dt).unflatten(2, groups), (hidden_states * dt[..., None]).unflatten(2, groups)

    def step(
        state: torch.Tensor, decay: torch.Tensor, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = state * decay[..., None, None] + x[..., None] * b[:, :, None, None]
        return state, torch.matmul(state, c[:, :, None, :, None])[..., 0]

    mixed, last = _over_tokens(step, initial_states.unflatten(1, groups), (decay, x, B, C), 1)
    return mixed.flatten(2, 3) + hidden_states * D[:, None], last.flatten(1, 2)


def _limited(dt: torch.Tensor, limit: tuple[float, float]) -> torch.Tensor:
    """Keep dt in its limits where the text has several tokens: transformers leaves them out for a single one."""
    low, high = limit
    if low <= 0.0 and high == float("inf"):
        return dt
    several = torch.scalar_tensor(dt.shape[1]) > 1
    return torch.where(several, dt.clamp(min=low, max=None if high == float("inf") else high), dt)


def _gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated delta rule: state [batch, heads, key size, value size], a decay a head or a channel of the keys.

    query, key, value [batch, tokens, heads, size]; g [batch, tokens, heads (, key size)], the logarithm of the decay.
    """
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    shared = value.shape[2] // key.shape[2]  # value heads that one key head serves
    if shared > 1:
        query, key = query.repeat_interleave(shared, dim=2), key.repeat_interleave(shared, dim=2)
    decay = torch.exp(g)[..., None] if g.ndim == 4 else torch.exp(g)[..., None, None]

    def step(
        state: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = state * decay
        known = torch.matmul(k[..., None, :], state)
        state = state + k[..., None] * ((v[..., None, :] - known) * beta[..., None, None])
        return state, torch.matmul(q[..., None, :], state)[..., 0, :]

    return _over_tokens(step, initial_state, (query * query.shape[-1] ** -0.5, key, value, decay, beta), 1)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Length 1 along the last axis; the epsilon is that of the kernels that the models were trained with."""
    return vectors * torch.rsqrt((vectors * vectors).sum(dim=-1, keepdim=True) + 1e-6)


_FORMS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "mamba_selective_scan": _selective,
    "mamba2_chunk_scan": lambda cache: _state_space_dual,
    "torch_chunk_gated_delta_rule": lambda cache: _gated_delta,
    "chunk_kimi_delta_attention": lambda cache: _gated_delta,
}
"""transformers' function for a whole text, to what takes its place."""
