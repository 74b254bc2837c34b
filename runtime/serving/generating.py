# SPDX-License-Identifier: Apache-2.0
"""Text generation for the event loop: one at a time for each model, in a thread, handed over token by token.

A generation ends early when nobody listens any more; the next one begins when its thread has really ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...contracts.errors import InputError
from .call import Call
from .model import Version
from .refusal import Refusal
from .settings import Settings

if TYPE_CHECKING:
    from ..generation import Chunk, Generator, Prompt, Sampling, Stream

_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
}
"""What a request may say, to the names of `Sampling`."""

_MOST_STOPS, _LONGEST_STOP = 16, 256


def sampling_of(generator: Generator, asked: Mapping[str, Any], settings: Settings) -> Sampling:
    """The bundle's own way of sampling, with what a request changes.

    Raises:
        Refusal: 400, a value is outside its range.
    """
    changes = {name: asked[key] for key, name in _NAMES.items() if asked.get(key) is not None}
    stop = asked.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if (
            not isinstance(stops, list)
            or len(stops) > _MOST_STOPS
            or not all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in stops)
        ):
            raise Refusal(400, f"'stop' is to be a text or at most {_MOST_STOPS} texts")
        changes["stop"] = tuple(stops)
    changes.setdefault("max_new_tokens", min(generator.defaults.max_new_tokens, settings.max_new_tokens))
    if isinstance(changes["max_new_tokens"], int) and changes["max_new_tokens"] > settings.max_new_tokens:
        raise Refusal(400, f"at most {settings.max_new_tokens} tokens are written")
    try:
        return generator.defaults.changed(**changes)
    except (InputError, TypeError) as error:
        raise Refusal(400, str(error)) from None


@dataclass
class Written:
    """What a generation has written, filled while it goes on."""

    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: str = "length"

    @property
    def usage(self) -> dict[str, int]:
        """In OpenAI's words."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.tokens),
            "total_tokens": self.prompt_tokens + len(self.tokens),
        }


async def begin(call: Call, version: Version, prompt: Prompt, sampling: Sampling) -> tuple[Stream, Written]:
    """Check a prompt; the generation begins with `pieces`.

    Raises:
        Refusal: 400, the model writes no text, or refuses the prompt.
    """
    generator = version.loaded.generator
    if generator is None:
        raise Refusal(400, f"model '{call.model}' does not write text")

    def check() -> tuple[Stream, list[int]]:
        ids = generator.tokens(prompt)
        return generator.stream(prompt, sampling), ids

    try:
        stream, ids = await asyncio.to_thread(check)
    except InputError as error:
        raise Refusal(400, str(error)) from None
    call.route = "generate"
    call.inputs = {"input_ids": np.array([ids], np.int64)}
    return stream, Written(len(ids))


async def pieces(call: Call, stream: Stream, written: Written) -> AsyncGenerator[str, None]:
    """The text, as it is written. Closing it ends the generation.

    Raises:
        Refusal: 503, too many wait already; 504, the deadline passed before it began.
    """
    model, settings = call.server.models[call.model], call.server.settings
    await _acquire(call, model.generating, settings.queue)
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def write() -> None:
        def put(item: Chunk | Exception | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                with stream:
                    for chunk in stream:
                        put(chunk)
            except Exception as error:  # noqa: BLE001 - it is raised where the text is awaited
                put(error)
            put(None)

    started = time.perf_counter()
    thread = loop.run_in_executor(None, write)
    thread.add_done_callback(lambda _: model.generating.release())
    call.queued_ms = (started - call.started) * 1e3
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, InputError):
                raise Refusal(400, str(item))
            if isinstance(item, Exception):
                raise item
            yield _note(item, written)
    finally:
        stream.close()  # also in the middle of a step; where it has ended, nothing happens
        call.rows, call.computed_ms = 1, (time.perf_counter() - started) * 1e3
        call.outputs = {"tokens": np.array([written.tokens], np.int64)}


async def complete(call: Call, version: Version, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    """The whole text at once; given up when the client goes away.

    Raises:
        Refusal: As `begin` and `pieces`.
    """
    stream, written = await begin(call, version, prompt, sampling)

    async def whole() -> str:
        async with contextlib.aclosing(pieces(call, stream, written)) as parts:
            return "".join([part async for part in parts])

    text = await call.while_connected(whole())
    return {"text": text, "finish_reason": written.finish, "usage": written.usage}


def _note(chunk: Chunk, written: Written) -> str:
    written.tokens.extend(chunk.tokens)
    if chunk.finish is not None:
        written.finish = "length" if chunk.finish == "length" else "stop"
    return chunk.text


async def _acquire(call: Call, lock: asyncio.Lock, most: int) -> None:
    waiting = len(getattr(lock, "_waiters", None) or ())
    if waiting >= most:
        raise Refusal(503, "too many texts wait to be written; try again later", retry_after=5)
    deadline = call.deadline()
    try:
        async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.perf_counter())):
            await lock.acquire()
    except TimeoutError:
        raise Refusal(504, "the deadline of this request has passed") from None


def ids_or_text(value: Any) -> str | Sequence[int]:
    """A prompt as OpenAI takes it: text, or token ids.

    Raises:
        Refusal: 400, it is neither.
    """
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return value
    raise Refusal(400, "the prompt is to be a text or a list of token ids")
