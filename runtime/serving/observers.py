# SPDX-License-Identifier: Apache-2.0
"""All observers as one, of which none can fail a request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ..opened import Bundle
from .events import Answer, Observer

_LOG = logging.getLogger(__name__)


class Observers:
    """Tells each of several observers; itself an `Observer`. Empty means false."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def __bool__(self) -> bool:
        return bool(self._observers)

    def loaded(self, model: str, bundle: Bundle, version: str, milliseconds: float) -> None:
        self._tell(lambda observer: observer.loaded(model, bundle, version, milliseconds))

    def queued(self, model: str, depth: int) -> None:
        self._tell(lambda observer: observer.queued(model, depth))

    def ran(self, model: str, rows: int, milliseconds: float) -> None:
        self._tell(lambda observer: observer.ran(model, rows, milliseconds))

    def answered(self, answer: Answer) -> None:
        self._tell(lambda observer: observer.answered(answer))

    def _tell(self, say: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                say(observer)
            except Exception:  # noqa: BLE001 - logged; it is the observer's own trouble
                _LOG.exception("an observer failed")
