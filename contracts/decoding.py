# SPDX-License-Identifier: Apache-2.0
"""How a decoder's graph is fed: one graph for prefill and decode, told by its input and output names alone.

    inputs   input_ids [batch, sequence], attention_mask [batch, past + sequence], position_ids [batch, sequence],
             num_logits_to_keep (scalar), past_key_values.N.key and .value [batch, heads, past, head size],
             past_conv.N, past_recurrent.N (state-space and linear attention layers: no axis grows)
    outputs  logits [batch, kept, vocabulary], present.N.key, ...: each takes the place of its past in the next call

The names are those that optimum, transformers.js and ONNX Runtime GenAI read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .signature import Signature, TensorSpec

INPUT_IDS = "input_ids"
MASK = "attention_mask"
POSITIONS = "position_ids"
KEEP = "num_logits_to_keep"
"""How many of the last logits are wanted, int64 scalar; 0 means all, as transformers.js has it."""

_PAST_TO_PRESENT = (
    ("past_key_values.", "present."),
    ("past_conv.", "present_conv."),
    ("past_recurrent.", "present_recurrent."),
)


def present_of(past: str) -> str | None:
    """`present.0.key` for `past_key_values.0.key`; None for an input that is no cache."""
    for old, new in _PAST_TO_PRESENT:
        if past.startswith(old):
            return new + past.removeprefix(old)
    return None


@dataclass(frozen=True)
class Decoding:
    """A decoder's inputs beyond the tokens, and how to make them.

    Attributes:
        caches: The inputs that hold what earlier tokens left, in the graph's order.
        present: Name of each cache to the output that replaces it.
        inputs: All inputs by name.
    """

    caches: tuple[TensorSpec, ...]
    present: dict[str, str]
    inputs: dict[str, TensorSpec]

    @classmethod
    def of(cls, signature: Signature) -> Decoding | None:
        """Read it off the names; None for a graph that has no cache in and out."""
        inputs = {spec.name: spec for spec in signature.inputs}
        outputs = {spec.name for spec in signature.outputs}
        present = {name: new for name in inputs if (new := present_of(name)) in outputs and new is not None}
        if INPUT_IDS not in inputs or not present:
            return None
        return cls(tuple(inputs[name] for name in present), present, inputs)

    def empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token: nothing along the axis that grows, zeros in states of fixed size."""
        return {spec.name: np.zeros(cache_shape(spec, batch, 0), spec.dtype) for spec in self.caches}

    def next_cache(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The cache for the next call, out of this call's outputs."""
        return {past: outputs[new] for past, new in self.present.items()}

    def feeds(
        self,
        input_ids: np.ndarray,
        mask: np.ndarray | None = None,
        cache: Mapping[str, np.ndarray] | None = None,
        *,
        keep: int = 0,
    ) -> dict[str, np.ndarray]:
        """Everything that the graph reads.

        Args:
            input_ids: The new tokens, int64 [batch, sequence].
            mask: 1 for tokens that count, int64 [batch, past + sequence]; all count without it.
            cache: From `next_cache`; None for the first call.
            keep: How many of the last logits are wanted; 0 for all.
        """
        batch, length = input_ids.shape
        cache = self.empty_cache(batch) if cache is None else cache
        if mask is None:
            mask = np.ones((batch, self.past_length(cache) + length), np.int64)
        values: dict[str, np.ndarray] = {
            INPUT_IDS: input_ids,
            MASK: mask,
            POSITIONS: positions(mask)[:, -length:] if length else input_ids,
            KEEP: np.asarray(keep),
            **cache,
        }
        return {
            name: np.asarray(values[name], dtype=spec.dtype) for name, spec in self.inputs.items() if name in values
        }

    def past_length(self, cache: Mapping[str, np.ndarray]) -> int:
        """Tokens that a cache holds; 0 where no axis of it grows."""
        for spec in self.caches:
            axis = growing_axis(spec)
            if axis is not None:
                return int(cache[spec.name].shape[axis])
        return 0


def growing_axis(spec: TensorSpec) -> int | None:
    """The axis along which a cache grows: the first open one behind the batch."""
    return next((i for i, dim in enumerate(spec.shape) if i > 0 and not isinstance(dim, int)), None)


def cache_shape(spec: TensorSpec, batch: int, past: int) -> tuple[int, ...]:
    """The shape of a cache that holds `past` tokens of `batch` texts."""
    axis = growing_axis(spec)
    return tuple(
        past if i == axis else dim if isinstance(dim, int) else batch if i == 0 else 1
        for i, dim in enumerate(spec.shape)
    )


def positions(mask: np.ndarray) -> np.ndarray:
    """Position of each token among those that count, as transformers' `generate` numbers them; int64, like `mask`."""
    counted: np.ndarray = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int64)
    return counted
