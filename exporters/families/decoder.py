# SPDX-License-Identifier: Apache-2.0
"""A causal language model as one graph: prefill and decode, any number of new tokens after any number of old ones.

Two graphs, one for the first call and one for those after it, hold the weights twice, or once with an If that no pass
sees through. One graph does, where the cache may be empty: `past_key_values.N.key` of length 0.

Only the last logits are needed to go on, and at a vocabulary of 128,000 all logits of a prompt of 2,000 tokens are a
gigabyte. The graph reads `num_logits_to_keep` (0: all), as transformers.js has it. The model itself takes the positions
to keep, so the trace has `logit_positions` as an input, which is then computed from the number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...contracts.decoding import INPUT_IDS, KEEP, MASK, POSITIONS
from ...contracts.errors import ExportError, InputError
from ..blame import first_line, place
from .caches import CacheTensor, cache_from, describe, new_cache, tensors_of
from .recurrences import scanned
from .traced import Traced

_KEPT = "logit_positions"
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
"""Open axes: examples, new tokens, tokens in the cache, and the two together."""

_SIZES = {BATCH: 2, SEQUENCE: 5, PAST: 3, TOTAL: 8}


@dataclass(frozen=True)
class DecoderLayout:
    """What a causal language model takes besides tokens.

    Attributes:
        caches: The tensors that its cache consists of.
        template: A cache of the model's own.
        cache_name: The parameter of `forward` that takes it.
        positions: Whether `forward` takes position_ids.
        keeps: Whether `forward` takes logits_to_keep.
    """

    caches: tuple[CacheTensor, ...]
    template: Any
    cache_name: str
    positions: bool
    keeps: bool

    @property
    def grows(self) -> bool:
        """Whether it keeps something of every token."""
        return any(spec.kind == "key" for spec in self.caches)

    @property
    def has_states(self) -> bool:
        """Whether it keeps states of fixed size."""
        return any(spec.kind in ("conv", "recurrent") for spec in self.caches)

    def input_names(self) -> list[str]:
        names = [INPUT_IDS, MASK] + ([POSITIONS] if self.positions else []) + ([KEEP] if self.keeps else [])
        return names + [spec.name(present=False) for spec in self.caches]

    def output_names(self) -> list[str]:
        return ["logits", *(spec.name(present=True) for spec in self.caches)]


def layout_of(model: Any) -> DecoderLayout | None:
    """Run the model at two sizes and look at what it keeps; None where it returns no cache.

    Raises:
        ExportError: It keeps something that cannot be passed as tensors.
        InputError: It fails.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((n for n in ("past_key_values", "cache_params") if n in parameters), None)
    small = _cache_after(model, 2, 5, name)
    large = _cache_after(model, 4, 6, name)
    if name is None or small is None or large is None:
        return None
    caches = describe(small, large, {2: BATCH, 1: PAST}, PAST)
    return DecoderLayout(tuple(caches), small, name, POSITIONS in parameters, "logits_to_keep" in parameters)


@torch.no_grad()
def _cache_after(model: Any, batch: int, length: int, name: str | None) -> Any:
    ids = torch.full((batch, length), _some_token(model))
    try:
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, return_dict=True)
    except Exception as error:  # the model's own code
        raise InputError(
            f"{type(model).__name__} fails in PyTorch already, with a text and use_cache=True: "
            f"{type(error).__name__}: {first_line(error)}{place(error)}",
            next_step="Export it without a cache (--set export.cache=false), or for another task.",
        ) from error
    return getattr(result, name, None) if name else None


def _some_token(model: Any) -> int:
    """A token that no model treats apart: neither padding nor beginning nor end."""
    config = model.config.get_text_config(decoder=True)
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    flat = {i for value in special for i in (value if isinstance(value, list | tuple) else [value])}
    return next(i for i in range(int(config.vocab_size)) if i not in flat)


class Decoder(torch.nn.Module):
    """Takes and returns plain tensors, in the order of the layout's names."""

    def __init__(self, model: torch.nn.Module, layout: DecoderLayout, *, by_position: bool = False) -> None:
        super().__init__()
        self.model, self.layout, self.by_position = model, layout, by_position
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `contracts.decoding`; with `by_position`, int64 positions [kept] stand for num_logits_to_keep."""
        keywords, held = self._read(inputs)
        length = keywords[INPUT_IDS].shape[1]
        if self.layout.keeps and not self.by_position:
            keywords["logits_to_keep"] = _last(int(keywords["logits_to_keep"]), length)
        cache = cache_from(self.layout.template, self.layout.caches, held)
        with scanned(self.model, cache) if self.layout.has_states else contextlib.nullcontext():
            logits = self._call(keywords, cache)
        return (logits, *(tensor for *_, tensor in tensors_of(cache)))

    def _read(self, inputs: Sequence[torch.Tensor]) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Keywords of the model's forward, and what its cache held."""
        given, layout = list(inputs), self.layout
        keywords: dict[str, Any] = {INPUT_IDS: given.pop(0), MASK: given.pop(0)}
        if layout.positions:
            keywords[POSITIONS] = given.pop(0)
        if layout.keeps:
            keywords["logits_to_keep"] = given.pop(0)
        return keywords, given

    def _call(self, keywords: Mapping[str, Any], cache: Any) -> torch.Tensor:
        """Logits; the cache is filled."""
        words = dict(keywords)
        if not self.layout.grows:  # states alone say nothing of how many tokens they are of, nor does the mask
            words[MASK] = words[MASK][:, -words[INPUT_IDS].shape[1] :]
        logits: torch.Tensor = self.model(
            **words, **{self.layout.cache_name: cache}, use_cache=True, return_dict=True
        ).logits
        return logits


class StatefulDecoder(Decoder):
    """The original of a model with states, in the forms in which it can be believed.

    The first call goes to the model with a cache of its own, and several tokens after a cache as they are, or one by
    one where the model would forget the cache over them.
    """

    @functools.cached_property
    def continues(self) -> bool:
        """Whether the model goes on from a cache with several tokens at once."""
        found: bool = _reads_states(self.model, self.layout)
        return found

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `contracts.decoding`."""
        keywords, held = self._read(inputs)
        kept = int(keywords.pop("logits_to_keep", 0))
        if _is_start(self.layout.caches, held):
            cache = new_cache(self.layout.template)
            logits = self._call(keywords, cache)
        else:
            cache = cache_from(self.layout.template, self.layout.caches, held)
            calls = [keywords] if self.continues else _single_tokens(keywords)
            logits = torch.cat([self._call(call, cache) for call in calls], dim=1)
        return (logits[:, -kept:], *(tensor for *_, tensor in tensors_of(cache)))


@torch.no_grad()
def _reads_states(model: Any, layout: DecoderLayout) -> bool:
    """Whether several tokens in one call depend on the recurrent state that is handed in."""
    if not any(spec.kind == "recurrent" for spec in layout.caches):
        return True
    like = next(model.parameters())
    ids = torch.full((1, 4), _some_token(model), device=like.device)
    generator, sizes = torch.Generator().manual_seed(0), {**_SIZES, BATCH: 1, PAST: 0}
    some = [spec.example(sizes, generator).to(like) for spec in layout.caches]
    none = [torch.zeros_like(t) if spec.kind == "recurrent" else t for t, spec in zip(some, layout.caches, strict=True)]
    first, second = (
        model(input_ids=ids, use_cache=True, return_dict=True, **{layout.cache_name: cache}).logits
        for cache in (cache_from(layout.template, layout.caches, held) for held in (some, none))
    )
    return not bool(torch.equal(first, second))


def _is_start(caches: Sequence[CacheTensor], held: Sequence[torch.Tensor]) -> bool:
    """Whether there is no token yet: no keys, or, where nothing grows, zeros throughout."""
    keys = [tensor.shape[2] for spec, tensor in zip(caches, held, strict=True) if spec.kind == "key"]
    return keys[0] == 0 if keys else not any(bool(tensor.any()) for tensor in held)


def _single_tokens(keywords: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The keywords of a call with several new tokens, as calls with one; the mask, over all tokens, grows."""
    length = keywords[INPUT_IDS].shape[1]
    for i in range(length):
        step = {name: tensor[:, i : i + 1] for name, tensor in keywords.items() if name != MASK}
        yield {**step, MASK: keywords[MASK][:, : keywords[MASK].shape[1] - length + i + 1]}


def _last(count: int, length: int) -> torch.Tensor:
    return torch.arange(length - count if 0 < count < length else 0, length)


def trace_decoder(model: torch.nn.Module) -> Traced:
    """What to trace for a causal language model.

    Raises:
        ExportError: It keeps no cache, or something in it that cannot be passed as tensors.
    """
    traced = trace_cached(model)
    if traced is None:
        raise ExportError(
            f"{type(model).__name__} returns no cache, so that it cannot go on from where it stopped",
            next_step="Use --set export.cache=false to export it without one.",
        )
    return traced


def trace_cached(model: torch.nn.Module) -> Traced | None:
    """What to trace for a causal language model that keeps a cache; None for others."""
    layout = layout_of(model)
    if layout is None:
        return None
    generator = torch.Generator().manual_seed(0)
    token = _some_token(model)
    tensors: dict[str, torch.Tensor] = {
        INPUT_IDS: torch.full((_SIZES[BATCH], _SIZES[SEQUENCE]), token),
        MASK: torch.ones(_SIZES[BATCH], _SIZES[TOTAL], dtype=torch.int64),
    }
    axes: dict[str, dict[int, str]] = {INPUT_IDS: {0: BATCH, 1: SEQUENCE}, MASK: {0: BATCH, 1: TOTAL}}
    if layout.positions:
        tensors[POSITIONS] = torch.arange(_SIZES[PAST], _SIZES[TOTAL]).repeat(_SIZES[BATCH], 1)
        axes[POSITIONS] = {0: BATCH, 1: SEQUENCE}
    if layout.keeps:
        tensors[_KEPT] = torch.arange(_SIZES[SEQUENCE])
        axes[_KEPT] = {0: "kept"}
    for spec in layout.caches:
        tensors[spec.name(present=False)] = spec.example(_SIZES, generator)
        axes[spec.name(present=False)] = spec.axes()
    return Traced(
        name="model",
        reference=StatefulDecoder(model, layout) if layout.has_states else Decoder(model, layout),
        inputs=layout.input_names(),
        outputs=layout.output_names(),
        module=Decoder(model, layout, by_position=True),
        examples=tensors,
        axes=axes,
        finish=_count_logits if layout.keeps else lambda graph: None,
        details={"cache": sorted({spec.kind for spec in layout.caches}), "num_logits_to_keep": layout.keeps},
    )


def _count_logits(model: ir.Model) -> None:
    """Compute the input `logit_positions` from a new one, `num_logits_to_keep`: the last n positions, or all for 0."""
    graph = model.graph
    old = next((value for value in graph.inputs if value.name == _KEPT), None)
    tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
    if old is None:
        raise ExportError("the trace has lost the input that says which logits to keep")
    number = ir.Value(name=KEEP, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    nodes = _position_nodes(tokens, number)
    for node in reversed(nodes):
        graph.insert_before(graph[0], node)
    old.replace_all_uses_with(nodes[-1].outputs[0])
    graph.inputs[graph.inputs.index(old)] = number


def _position_nodes(tokens: ir.Value, number: ir.Value) -> list[ir.Node]:
    """start = 0 where n is 0, max(length - n, 0) otherwise; positions = start .. length."""

    def constant(value: int, shape: Sequence[int], name: str) -> ir.Node:
        array = np.full(shape, value, np.int64)
        return ir.node("Constant", [], {"value": ir.tensor(array)}, num_outputs=1, name=f"{KEEP}_{name}")

    zero, one, axis = constant(0, [], "zero"), constant(1, [], "one"), constant(0, [1], "axis")
    length = ir.node("Shape", [tokens], {"start": 1, "end": 2}, name=f"{KEEP}_shape")
    scalar = ir.node("Squeeze", [length.outputs[0], axis.outputs[0]], name=f"{KEEP}_length")
    first = ir.node("Sub", [scalar.outputs[0], number], name=f"{KEEP}_sub")
    clipped = ir.node("Max", [first.outputs[0], zero.outputs[0]], name=f"{KEEP}_max")
    every = ir.node("Equal", [number, zero.outputs[0]], name=f"{KEEP}_every")
    start = ir.node("Where", [every.outputs[0], zero.outputs[0], clipped.outputs[0]], name=f"{KEEP}_start")
    kept = ir.node("Range", [start.outputs[0], scalar.outputs[0], one.outputs[0]], name=f"{KEEP}_range")
    nodes = [zero, one, axis, length, scalar, first, clipped, every, start, kept]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_value"
    kept.outputs[0].name = _KEPT
    kept.outputs[0].type, kept.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape(["kept"])
    return nodes
