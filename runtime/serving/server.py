# SPDX-License-Identifier: Apache-2.0
"""What the routes share: the models by name, the settings, the observers, and the look for new bundles."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...contracts.errors import InputError, OnnxpressError, did_you_mean
from .call import Call
from .events import Observer
from .model import ServedModel, Version
from .observers import Observers
from .refusal import Refusal
from .settings import Settings

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

_LARGE = 1 << 18
"""Bytes from which on work is done beside the event loop, where others go on in turns."""


class Server:
    """The models and all that surrounds them.

    Args:
        folders: Name to bundle folder.
        settings: Limits.
        observers: Whoever watches.

    Attributes:
        models: Name to model.
        settings, observers: As above.
        stopping: It answers what it has, and takes no more.

    Raises:
        InputError: There is no model, or a name cannot stand in a URL.
        BundleError: A bundle fails verification.
    """

    def __init__(self, folders: Mapping[str, str | Path], settings: Settings, observers: Iterable[Observer]) -> None:
        if not folders:
            raise InputError("there is nothing to serve", next_step="Name a bundle folder.")
        self.settings, self.observers = settings, Observers(observers)
        self.models = {
            name: ServedModel(name, folder, settings, self.observers) for name, folder in sorted(folders.items())
        }
        self.stopping = False
        self._watch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether every model answers."""
        return not self.stopping and all(model.ready for model in self.models.values())

    def start(self) -> None:
        """Begin; on the event loop."""
        for model in self.models.values():
            model.start()
        if self.settings.reload_seconds:
            self._watch = asyncio.get_running_loop().create_task(self._look_for_bundles())

    async def stop(self) -> None:
        """Answer what was accepted, then end."""
        self.stopping = True
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await asyncio.gather(*(model.close() for model in self.models.values()))

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """A model.

        Raises:
            Refusal: 404, there is none of that name or version.
        """
        model = self.models.get(name)
        if model is None:
            raise Refusal(404, f"there is no model '{name[:100]}'. {did_you_mean(name[:100], self.models)}")
        if version is not None and version != model.version:
            raise Refusal(404, f"model '{name}' has no version '{version[:100]}'; it is at '{model.version}'")
        return model

    @contextlib.contextmanager
    def using(self, call: Call, name: str, version: str | None = None) -> Iterator[Version]:
        """The version that answers a call, noted in the call.

        Raises:
            Refusal: 404, there is no such model; 503, it is not ready.
        """
        model = self.find(name, version)
        call.model = model.name
        with model.use() as used:
            call.answers_with(model, used)
            yield used

    async def beside(self, size: int, work: Callable[..., _T], *args: Any) -> _T:
        """Do something at once, or in a thread where it is large (`size` in bytes)."""
        return work(*args) if size < _LARGE else await asyncio.to_thread(work, *args)

    async def load(self, name: str) -> ServedModel:
        """Take the version of a model that lies in its folder now.

        Raises:
            Refusal: 404, there is no such model; 400, the bundle is refused, and the old one goes on.
        """
        model = self.find(name)
        try:
            await model.reload()
        except OnnxpressError as error:
            raise Refusal(400, f"the bundle is refused, version {model.version} stays: {error}") from None
        return model

    def reload_soon(self) -> None:
        """Look for new bundles now; on the event loop."""
        for model in self.models.values():
            task = asyncio.get_running_loop().create_task(model.reload_if_changed())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look_for_bundles(self) -> None:
        while True:
            await asyncio.sleep(self.settings.reload_seconds)
            for model in self.models.values():
                try:
                    await model.reload_if_changed()
                except Exception:  # noqa: BLE001 - logged; the old version goes on
                    _LOG.exception("model %s could not be reloaded", model.name)
