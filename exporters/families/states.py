# SPDX-License-Identifier: Apache-2.0
"""Cache layers of state-space and linear-attention models, with states that come in and go out as tensors.

transformers writes new states into the old ones' memory, for CUDA graphs; a graph's inputs cannot be written to. And
it treats the first call apart (no state yet). A state of zeros is the same thing: a causal convolution pads with zeros,
and a recurrence starts from zero; so one graph serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .state_layers import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

States = Mapping[tuple[str, int], torch.Tensor]


class _Assigned:
    """Replaces the states instead of overwriting them."""

    conv_states: dict[int, Any]
    recurrent_states: dict[int, Any]

    def _take(self, states: States) -> None:
        layer: Any = self
        for (kind, state), tensor in states.items():
            # Of one token, transformers writes the new state over the old one
            getattr(self, f"{kind}_states")[state] = tensor.clone()
            getattr(self, f"is_{kind}_states_initialized")[state] = True
            layer.has_previous_state[state] = True
            layer.dtype, layer.device = tensor.dtype, tensor.device
            if kind == "conv":
                layer.conv_kernel_size[state] = tensor.shape[-1]

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        kept = self.conv_states[state_idx]
        full = torch.cat([kept, conv_states.to(kept.dtype)], dim=-1)
        self.conv_states[state_idx] = full[..., -kept.shape[-1] :]
        return full

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states.to(self.recurrent_states[state_idx].dtype)
        return self.recurrent_states[state_idx]


class StateLayer(_Assigned, LinearAttentionLayer):
    """States only."""

    def __init__(self, original: Any, states: States) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=original.number_of_states)
        self._take(states)


class StateAndGrowingLayer(_Assigned, LinearAttentionAndFullAttentionLayer):
    """States, and keys and values beside them."""

    def __init__(self, original: Any, states: States, keys: torch.Tensor, values: torch.Tensor) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=original.number_of_states)
        self._take(states)
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def get_seq_length(self) -> int:
        assert self.keys is not None
        length: int = self.keys.shape[-2]
        return length
