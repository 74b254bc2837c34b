# SPDX-License-Identifier: Apache-2.0
"""What a generation hands out, piece by piece and at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

Finish = Literal["eos", "stop", "length"]
"""Why a text ended: an end token, a stop string, or max_new_tokens (or the model's longest sequence)."""


@dataclass(frozen=True)
class Chunk:
    """A piece of one text.

    Attributes:
        text: What is certain by now and was not handed out before: never half a character, never the beginning of what
            may become a stop string. Often empty, where that must be waited for; always empty without a tokenizer.
        tokens: The token ids that were chosen since the last chunk, an end token included.
        finish: Why the text ended; None for all chunks but a row's last.
        row: Which prompt it belongs to.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish | None = None
    row: int = 0


@dataclass
class Usage:
    """What a generation took; complete when it has ended.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens chosen so far, of all rows.
        steps: Calls of the graph after the first.
        prefill_seconds: From the start to the first token.
        prefill_graph_seconds: Of these, spent within the graph.
        decode_seconds: From the first token to the last.
        graph_seconds: Of these, spent within the graph.
    """

    prompt_tokens: tuple[int, ...]
    new_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    prefill_graph_seconds: float = 0.0
    decode_seconds: float = 0.0
    graph_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second, of all rows."""
        return sum(self.prompt_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first of each row; 0 where there was but one."""
        later = self.new_tokens - len(self.prompt_tokens)
        return later / self.decode_seconds if later > 0 and self.decode_seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """One finished text.

    Attributes:
        text: All of it, without the prompt and without the stop string; empty without a tokenizer.
        tokens: Its token ids, an end token included.
        finish: Why it ended.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish


class Cancellation:
    """Asks a running generation to end; may be called from any thread."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._interrupt: Callable[[], None] | None = None

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def interrupt_with(self, interrupt: Callable[[], None] | None) -> None:
        """Say how to stop what is running right now; None where nothing is."""
        with self._lock:
            self._interrupt = interrupt
            if interrupt is not None and self._asked.is_set():
                interrupt()

    def ask(self) -> None:
        with self._lock:
            self._asked.set()
            if self._interrupt is not None:
                self._interrupt()


@dataclass
class Stream(Iterator[Chunk]):
    """The chunks of a generation, one after the other; the work is done while they are asked for.

    One thread iterates; `close` may be called from any, also while another waits for the next chunk: the step that is
    running (a long prompt, say) is interrupted, and the iteration ends. It is a context manager that closes.

    Attributes:
        usage: What it took so far.
    """

    usage: Usage
    _chunks: Iterator[Chunk]
    _cancellation: Cancellation = field(default_factory=Cancellation)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if self._cancellation.asked:
            raise StopIteration
        return next(self._chunks)

    def close(self) -> None:
        """End it. Nothing happens where it has ended."""
        self._cancellation.ask()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
