# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over sequences of different lengths, traced without `PackedSequence`.

Packing lays the tokens of all sequences end to end, so that shapes depend on the lengths, and torch.export cannot trace
it. ONNX's LSTM, GRU and RNN read padded batches and the lengths beside them (input `sequence_lens`), to the same
effect: nothing behind a sequence's end counts, the way back begins at its last token, and its final state is the one
after that token. Within `padded`, `pack_padded_sequence` therefore only keeps the batch and its lengths together, and a
recurrent layer that is given them becomes these operators.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import rnn

_OPERATORS = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""PyTorch's gates (LSTM: i f g o, GRU: r z n) in ONNX's order (i o f c; z r h)."""


class Padded:
    """What stands for a `PackedSequence` during tracing.

    Args:
        data: [time, batch, features].
        lengths: int64 [batch], each at least 1.
    """

    def __init__(self, data: torch.Tensor, lengths: torch.Tensor) -> None:
        self.tokens, self.lengths = data, lengths

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"PackedSequence.{name} has a shape that depends on lengths: pad the sequence first")

    def __getitem__(self, _: object) -> Any:
        raise NotImplementedError("a PackedSequence cannot be taken apart in a graph: pad the sequence first")


@contextlib.contextmanager
def padded(module: nn.Module) -> Iterator[None]:
    """Let `module`'s classes find our packing, padding and recurrent layers instead of PyTorch's."""
    ours: dict[Callable[..., Any], Callable[..., Any]] = {
        rnn.pack_padded_sequence: _pack,
        rnn.pad_packed_sequence: _pad,
    }
    # A class may hold the functions by names of its own module: `from torch.nn.utils.rnn import pack_padded_sequence`
    modules = {type(part).__module__: sys.modules.get(type(part).__module__) for part in module.modules()}
    places = [rnn, *(found for name, found in modules.items() if found is not None and not name.startswith("torch."))]
    changes: list[tuple[Any, str, Any]] = [
        (place, name, value)
        for place in places
        for name, value in list(vars(place).items())
        if callable(value) and any(value is theirs for theirs in ours)
    ]
    layers = (nn.LSTM, nn.GRU, nn.RNN)
    originals = [(layer, "forward", layer.forward) for layer in layers]
    try:
        for place, name, value in changes:
            setattr(place, name, ours[value])
        for layer, name, value in originals:
            setattr(layer, name, _forward(value))
        yield
    finally:
        for place, name, value in (*changes, *originals):
            setattr(place, name, value)


def _pack(
    input: torch.Tensor,
    lengths: torch.Tensor,
    batch_first: bool = False,
    enforce_sorted: bool = True,
) -> Padded:
    return Padded(input.transpose(0, 1) if batch_first else input, torch.as_tensor(lengths))


def _pad(
    sequence: Padded, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lengths = sequence.tokens, sequence.lengths
    if padding_value:
        inside = torch.arange(tokens.shape[0])[:, None, None] < lengths[None, :, None]
        tokens = torch.where(inside, tokens, padding_value)
    if total_length is None:
        longest = lengths.max().item()
        torch._check(longest >= 1)
        torch._check(longest <= tokens.shape[0])
        tokens = tokens[:longest]
    else:
        torch._check(total_length == tokens.shape[0], lambda: "total_length is not the length that was packed")
    return (tokens.transpose(0, 1) if batch_first else tokens), lengths


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        return _run(self, input, hx) if isinstance(input, Padded) else original(self, input, hx)

    return forward


def _run(layers: nn.RNNBase, sequence: Padded, hx: Any) -> tuple[Padded, Any]:
    """All layers of a module over one padded batch; returns what the module would: outputs and final states."""
    if getattr(layers, "proj_size", 0):
        raise NotImplementedError("an LSTM with proj_size has no counterpart in ONNX")
    lstm = layers.mode == "LSTM"
    initial = () if hx is None else hx if lstm else (hx,)
    directions = 2 if layers.bidirectional else 1
    tokens = sequence.tokens
    finals: list[list[torch.Tensor]] = [[], []]
    for layer in range(layers.num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        made = _layer(layers, layer, tokens, sequence.lengths, [state[rows] for state in initial])
        tokens = made[0].transpose(1, 2).flatten(2)  # [time, directions, batch, hidden] to [time, batch, both]
        for parts, final in zip(finals, made[1:], strict=False):
            parts.append(final)
    states = tuple(torch.cat(parts) for parts in finals if parts)
    return Padded(tokens, sequence.lengths), states if lstm else states[0]


def _layer(
    layers: nn.RNNBase, layer: int, tokens: torch.Tensor, lengths: torch.Tensor, initial: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """One ONNX operator: outputs [time, directions, batch, hidden] and final states [directions, batch, hidden]."""
    operator, hidden = _OPERATORS[layers.mode], layers.hidden_size
    suffixes = [f"l{layer}", f"l{layer}_reverse"][: 2 if layers.bidirectional else 1]
    inputs: list[torch.Tensor | None] = [
        tokens,
        *(torch.stack([_gates(getattr(layers, f"{kind}_{s}"), operator) for s in suffixes])
          for kind in ("weight_ih", "weight_hh")),
        torch.stack([_biases(layers, s, operator) for s in suffixes]) if layers.bias else None,
        lengths.to(torch.int32),
        *initial,
    ]  # fmt: skip
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if layers.bidirectional else "forward",
    }
    if operator == "GRU":
        attributes["linear_before_reset"] = 1
    if operator == "RNN":
        attributes["activations"] = ["Tanh" if layers.mode == "RNN_TANH" else "Relu"] * len(suffixes)
    state = [len(suffixes), tokens.shape[1], hidden]
    shapes = [[tokens.shape[0], *state], *([state] * (2 if operator == "LSTM" else 1))]
    made = torch.onnx.ops.symbolic_multi_out(
        operator, inputs, attributes, dtypes=[tokens.dtype] * len(shapes), shapes=shapes, version=14
    )
    return tuple(made)


def _gates(weight: torch.Tensor, operator: str) -> torch.Tensor:
    order = _GATES[operator]
    size = weight.shape[0] // len(order)
    parts = [weight[i * size : (i + 1) * size] for i in order]  # Split would keep `clean` from folding them
    return torch.cat(parts) if len(parts) > 1 else weight


def _biases(layers: nn.RNNBase, suffix: str, operator: str) -> torch.Tensor:
    return torch.cat([_gates(getattr(layers, f"bias_{kind}_{suffix}"), operator) for kind in ("ih", "hh")])
