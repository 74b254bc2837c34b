# SPDX-License-Identifier: Apache-2.0
"""Texts continued by a bundle's language model: prompts in, chunks of text and tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...contracts.errors import InputError
from ..opened import Bundle
from ..session import Array, Session
from .chunks import Cancellation, Chunk, Generation, Stream, Usage
from .graphs import Graphs
from .loop import Request, follow_beams, one_by_one
from .sampling import Sampling, sampling_of, token_of

Prompt = str | Sequence[int] | Mapping[str, Array]
"""A text, token ids, or, for an encoder-decoder, the encoder's inputs by name, each with one row."""


class Generator:
    """A language model, loaded.

    Args:
        bundle: An opened bundle, or its folder.
        variant: Which of its variants; the main one without a name.
        provider: A key of `runtime.PROVIDERS`. Caches stay on its device.
        threads: Threads that one operator may use.
        spinning: Keep worker threads awake between tokens, see `Session`: where nothing else runs on these cores.

    Attributes:
        bundle: The bundle.
        defaults: What its generation_config.json asks for: begin with this and `changed(...)`.
        max_length: Longest text in tokens, prompt included, or None without a limit.
        encoder_decoder: Whether the prompt is read by an encoder (translation, summaries, speech).
        has_text: Whether prompts may be text, and chunks have text.

    Raises:
        InputError: The bundle is no language model, or the provider is unknown.
        MissingDependency: The provider is not installed.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        variant: str | None = None,
        provider: str = "cpu",
        threads: int | None = None,
        spinning: bool = False,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        self._graphs = Graphs(self.bundle, variant=variant, provider=provider, threads=threads, spinning=spinning)
        self.encoder_decoder = self._graphs.encoder is not None
        configs = self.bundle.generation_config, self.bundle.config
        self.defaults = sampling_of(*configs, encoder_decoder=self.encoder_decoder)
        self.max_length = self.bundle.max_length
        self._first = token_of("decoder_start_token_id", *configs) if self.encoder_decoder else None
        self._bos, pad = token_of("bos_token_id", *configs), token_of("pad_token_id", *configs)
        self._pad = pad if pad is not None else self.defaults.eos[0] if self.defaults.eos else 0
        self._text = self.bundle.text_encoder(None)  # a prompt that is too long is an error here, not cut
        self.has_text = self._text is not None

    @property
    def session(self) -> Session:
        """The decoder's graph, loaded; others may run it too, so that the model is in memory once."""
        return self._graphs.decoder

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Stream:
        """Continue one text; see `stream_batch`. Chunks have row 0."""
        return self.stream_batch([prompt], sampling)

    def stream_batch(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> Stream:
        """Continue several texts at once, each until it ends.

        The prompts are checked before this returns; the work begins with the first chunk that is asked for.

        Args:
            prompts: Texts of any length, or token ids.
            sampling: How; `defaults` if absent. Beam search yields one chunk for each row, at its end.

        Raises:
            InputError: A prompt is empty and the model has no token to begin with, is too long, holds unknown ids, or
                is text and the bundle has no tokenizer; or stop strings are asked for without one.
        """
        sampling = sampling or self.defaults
        if not prompts:
            raise InputError("there is no prompt")
        if sampling.stop and (self._text is None or sampling.beams > 1):
            raise InputError("stop strings need a tokenizer.json in the bundle, and one beam")
        request = self._request(prompts, sampling)
        cancellation = Cancellation()
        usage = Usage(tuple(request.sizes))
        work = follow_beams if sampling.beams > 1 else one_by_one
        return Stream(usage, work(self._graphs, request, usage, cancellation), cancellation)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Generation]:
        """Continue several texts and return them whole, in the prompts' order; raises what `stream_batch` does."""
        rows: list[list[Chunk]] = [[] for _ in prompts]
        for chunk in self.stream_batch(prompts, sampling):
            rows[chunk.row].append(chunk)
        return [whole(chunks) for chunks in rows]

    def tokens(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt is read as, special tokens included.

        Raises:
            InputError: As for `stream_batch`.
        """
        if isinstance(prompt, Mapping):
            raise InputError("a prompt of arrays has no tokens")
        ids = self._ids(prompt)
        unknown = next((i for i in ids if not 0 <= i < self._vocabulary()), None)
        if unknown is not None:
            raise InputError(f"there is no token {unknown}; the model has {self._vocabulary()}")
        room = 0 if self.encoder_decoder else 1
        if self.max_length is not None and len(ids) + room > self.max_length:
            raise InputError(
                f"the prompt has {len(ids)} tokens, and the model takes {self.max_length - room}",
                next_step="Shorten it.",
            )
        return ids

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._text is None:
                raise InputError(
                    f"{self.bundle.name} has no tokenizer.json, so that it reads no text",
                    next_step="Give token ids instead (--tokens).",
                )
            ids = self._text.ids(prompt)
        else:
            ids = [int(token) for token in prompt]
        if not ids and self._bos is None:
            raise InputError(
                "the prompt is empty, and the model has no token that a text begins with",
                next_step="Give it a word to begin with.",
            )
        return ids or [self._bos]  # type: ignore[list-item]

    def _vocabulary(self) -> int:
        return self._graphs.vocabulary

    def _request(self, prompts: Sequence[Prompt], sampling: Sampling) -> Request:
        """Check the prompts."""
        read = [prompt if isinstance(prompt, Mapping) else self.tokens(prompt) for prompt in prompts]
        if self.encoder_decoder:
            return self._to_encode(read, sampling)
        rows = [list(prompt) for prompt in read if not isinstance(prompt, Mapping)]
        if len(rows) < len(read):
            raise InputError(f"{self.bundle.name} reads text or tokens, not arrays")
        room = [sampling.max_new_tokens if self.max_length is None else self.max_length - len(row) for row in rows]
        return self._asked(
            rows,
            sizes=[len(row) for row in rows],
            limits=[min(sampling.max_new_tokens, free) for free in room],
            sampling=replace(sampling, forced_bos=None),
            longest=self.max_length,
        )

    def _to_encode(self, prompts: Sequence[Sequence[int] | Mapping[str, Array]], sampling: Sampling) -> Request:
        start = self._first if self._first is not None else self._bos
        if start is None:
            raise InputError("the model's configuration names no token that its decoder begins with")
        room = self._graphs.decoder_room(self.bundle.config)
        limit = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room)
        return self._asked(
            [[start] for _ in prompts],
            sizes=[0 if isinstance(prompt, Mapping) else len(prompt) for prompt in prompts],
            limits=[limit for _ in prompts],
            sampling=sampling,
            encoded=self._graphs.encoder_inputs(prompts, self._pad),
        )

    def _asked(self, rows: Sequence[Sequence[int]], **more: Any) -> Request:
        return Request(rows, pad=self._pad, decode=self._text.decode if self._text is not None else None, **more)


def whole(chunks: Sequence[Chunk]) -> Generation:
    """One row's chunks as one text."""
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    finish = chunks[-1].finish if chunks else None
    return Generation("".join(chunk.text for chunk in chunks), tokens, finish or "length")
