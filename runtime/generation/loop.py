# SPDX-License-Identifier: Apache-2.0
"""The loops: one token after the other in each row until it ends, or beams."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...contracts.errors import OnnxpressError
from ..session import Array
from .beams import Finished, Search
from .choosing import Chooser, Rules
from .chunks import Cancellation, Chunk, Finish, Usage
from .detokenizing import Decode, Detokenizer, StopText
from .graphs import Graphs
from .processors import log_softmax
from .sampling import Sampling
from .steps import Steps


@dataclass(frozen=True)
class Request:
    """Prompts that were checked.

    Attributes:
        rows: Token ids that each row of the decoder begins with.
        sizes: Tokens of each prompt; 0 for a prompt that is not of tokens.
        limits: New tokens that each row may have.
        sampling: How.
        pad: What padding consists of.
        longest: Positions that a causal model has, or None.
        encoded: The encoder's inputs; None for a causal model.
        decode: Tokens to text; None without a tokenizer.
    """

    rows: Sequence[Sequence[int]]
    sizes: Sequence[int]
    limits: Sequence[int]
    sampling: Sampling
    pad: int
    longest: int | None = None
    encoded: Mapping[str, Array] | None = None
    decode: Decode | None = None

    def begin(self, graphs: Graphs, beams: int, cancellation: Cancellation) -> Steps:
        """Make the batch, each row `beams` times."""
        room = max(self.limits)
        if self.encoded is not None:
            return graphs.begin_encoded(self.rows[0][0], self.encoded, beams, room, cancellation)
        rows = [row for row in self.rows for _ in range(beams)]
        return graphs.begin(rows, room, self.pad, self.longest, cancellation)

    def context(self, row: int) -> Sequence[int]:
        """The tokens before a row's text, where they are text."""
        return self.rows[row] if self.encoded is None else ()


class _Row:
    """One text on its way out."""

    def __init__(self, request: Request, row: int) -> None:
        self._row, self._limit, self._eos = row, request.limits[row], frozenset(request.sampling.eos)
        self._text = Detokenizer(request.decode, request.context(row)) if request.decode is not None else None
        self._stop = StopText(request.sampling.stop)
        self._count = 0
        self.finish: Finish | None = None

    def take(self, token: int) -> Chunk:
        """The chunk of one more token."""
        self._count += 1
        text = ""
        if token in self._eos:
            self.finish = "eos"
        elif self._text is not None:
            text, stopped = self._stop.push(self._text.push(token))
            self.finish = "stop" if stopped else None
        if self.finish is None and self._count == self._limit:
            self.finish = "length"
        if self.finish in ("eos", "length"):
            text += self._rest()
        return Chunk(text, (token,), self.finish, self._row)

    def _rest(self) -> str:
        """What was held back; a stop string may yet be found in it."""
        if self._text is None:
            return ""
        text, stopped = self._stop.push(self._text.finish())
        if stopped:
            self.finish = "stop"
            return text
        return text + self._stop.finish()


def one_by_one(graphs: Graphs, request: Request, usage: Usage, cancellation: Cancellation) -> Iterator[Chunk]:
    """Greedy or drawn tokens; a chunk for each row and token until the row ends."""
    rows = [_Row(request, row) for row in range(len(request.rows))]
    tokens: Array | None = None
    steps: Steps | None = None
    chooser: Chooser | None = None
    while any(row.finish is None for row in rows):
        began = time.perf_counter()
        try:
            if steps is None or tokens is None:
                steps = request.begin(graphs, 1, cancellation)
                logits = steps.start()
            else:
                logits = steps.step(tokens)
        except OnnxpressError:
            if cancellation.asked:
                return
            raise
        if chooser is None:
            chooser = Chooser(request.sampling, request.rows, logits.shape[-1], request.limits)
        tokens = chooser(logits)
        chunks = [row.take(token) for row, token in zip(rows, tokens.tolist(), strict=True) if row.finish is None]
        usage.new_tokens += len(chunks)
        _count(usage, time.perf_counter() - began, steps.graph_seconds)
        yield from chunks
        if cancellation.asked:
            return


def follow_beams(graphs: Graphs, request: Request, usage: Usage, cancellation: Cancellation) -> Iterator[Chunk]:
    """Beam search; one chunk for each row, when all searches are over."""
    beams = request.sampling.beams
    searches = [Search(request.sampling, limit) for limit in request.limits]
    steps = request.begin(graphs, beams, cancellation)
    every = np.arange(len(searches) * beams)
    rules: Rules | None = None
    tokens: Array | None = None
    while not all(search.over for search in searches):
        began = time.perf_counter()
        try:
            logits = steps.start() if tokens is None else steps.step(tokens)
        except OnnxpressError:
            if cancellation.asked:
                return
            raise
        if rules is None:
            repeated = [request.rows[row // beams] for row in range(len(every))]
            limits = [request.limits[row // beams] for row in range(len(every))]
            rules = Rules(request.sampling, repeated, logits.shape[-1], limits)
        scores = log_softmax(logits)
        rules(scores)
        parents, tokens = _advance(searches, scores, beams)
        rules.follow(parents)
        rules.chose(tokens)
        if not np.array_equal(parents, every):
            steps.follow(parents)
        _count(usage, time.perf_counter() - began, steps.graph_seconds)
        if cancellation.asked:
            return
    for row, search in enumerate(searches):
        found = search.result()
        usage.new_tokens += len(found.tokens)
        yield Chunk(_text(request, row, found), found.tokens, "eos" if found.ended else "length", row)


def _advance(searches: Sequence[Search], scores: Array, beams: int) -> tuple[Array, Array]:
    """Let each search choose; the rows that each row goes on from, and its token."""
    parents, tokens = np.arange(len(scores)), np.zeros(len(scores), np.int64)
    for place, search in enumerate(searches):
        part = slice(place * beams, (place + 1) * beams)
        if not search.over:
            search.advance(scores[part])
            parents[part], tokens[part] = search.parents + place * beams, search.tokens
    return parents, tokens


def _text(request: Request, row: int, found: Finished) -> str:
    if request.decode is None:
        return ""
    detokenizer = Detokenizer(request.decode, request.context(row))
    eos = set(request.sampling.eos)
    return "".join([detokenizer.push(token) for token in found.tokens if token not in eos] + [detokenizer.finish()])


def _count(usage: Usage, seconds: float, graph_seconds: float) -> None:
    """Add one call of the graph, with what was done around it; `graph_seconds` are those of all calls so far."""
    if usage.prefill_seconds == 0:
        usage.prefill_seconds, usage.prefill_graph_seconds = seconds, graph_seconds
        return
    usage.steps += 1
    usage.decode_seconds += seconds
    usage.graph_seconds = graph_seconds - usage.prefill_graph_seconds
