# SPDX-License-Identifier: Apache-2.0
"""Live requests once more, on another bundle of the same model, in a thread that takes only the time nobody else wants.

What it cannot keep up with is dropped and counted: the live server never waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ...contracts.errors import OnnxpressError
from ..opened import Bundle
from ..session import Session
from .events import Answer

_LOG = logging.getLogger("onnxpress.serve")

Replayed = Callable[[Answer, Mapping[str, np.ndarray]], None]


class Shadow:
    """Replays requests.

    Args:
        bundles: Name of a live model -> folder of its shadow bundle.
        replayed: Called in this thread with each answer and what the shadow bundle answers.
        most: Requests that may wait.
        most_bytes: Bytes of tensors that may wait.

    Attributes:
        hashes: Model -> hash of its shadow bundle.
        replayed_count, dropped, failed: Requests by model.
        failing: Model -> why its last request failed; gone when one succeeds.

    Raises:
        InputError: A shadow bundle cannot be opened.
    """

    def __init__(
        self, bundles: Mapping[str, str | Path], replayed: Replayed, *, most: int = 256, most_bytes: int = 256 << 20
    ) -> None:
        self._replayed, self._most, self._most_bytes = replayed, most, most_bytes
        self.hashes: dict[str, str] = {}
        self._sessions: dict[str, Session] = {}
        for name, folder in bundles.items():
            bundle = Bundle(folder)
            self._sessions[name] = bundle.session(threads=1)  # in its own thread, so that the thread's priority counts
            self.hashes[name] = bundle.sha256
        self.failing: dict[str, str] = {}
        self.replayed_count, self.dropped, self.failed = Counter[str](), Counter[str](), Counter[str]()
        self._waiting: deque[tuple[Answer, int]] = deque()
        self._bytes = 0
        self._ready = threading.Condition()
        self._closing = self._busy = False
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, answer: Answer) -> None:
        """Replay an answered request if there is room for it; returns at once."""
        size = sum(array.nbytes for array in (*answer.inputs.values(), *answer.outputs.values()))
        with self._ready:
            if len(self._waiting) >= self._most or self._bytes + size > self._most_bytes or self._closing:
                self.dropped[answer.model] += 1
                return
            self._waiting.append((answer, size))
            self._bytes += size
            self._ready.notify_all()

    def settle(self, timeout: float = 30.0) -> None:
        """Wait until everything that waits has been replayed."""
        with self._ready:
            self._ready.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self) -> None:
        """Drop what waits and end the thread."""
        with self._ready:
            self._closing = True
            for answer, _ in self._waiting:
                self.dropped[answer.model] += 1
            self._waiting.clear()
            self._ready.notify_all()
        self._thread.join()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._ready:
                self._busy = False
                self._ready.notify_all()
                self._ready.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                answer, size = self._waiting.popleft()
                self._bytes -= size
                self._busy = True
            self._replay(answer)

    def _replay(self, answer: Answer) -> None:
        try:
            session = self._sessions[answer.model]
            wanted = [spec.name for spec in session.signature.outputs if spec.name in answer.outputs]
            inputs = {
                spec.name: answer.inputs[spec.name] for spec in session.signature.inputs if spec.name in answer.inputs
            }
            self._replayed(answer, session.run(inputs, wanted))
            self.replayed_count[answer.model] += 1
            self.failing.pop(answer.model, None)
        except OnnxpressError as error:
            self.failing[answer.model] = str(error)
            self.failed[answer.model] += 1
        except Exception:  # noqa: BLE001 - logged; the shadow must not end
            _LOG.exception("replaying a request failed")
            self.failing[answer.model] = "internal error"
            self.failed[answer.model] += 1
