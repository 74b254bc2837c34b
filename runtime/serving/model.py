# SPDX-License-Identifier: Apache-2.0
"""A model under its name: the bundle version that answers now, and how another one takes its place.

A version is loaded beside the one that answers: its files are compared with their hashes, its golden samples are run.
Only then do new requests go to it, in one assignment on the event loop; the old one answers what it has accepted and is
closed. A bundle that fails anywhere on that way is refused, and the old one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...contracts.errors import BundleError, InputError, MissingDependency, OnnxpressError
from ...contracts.signature import Signature
from ...contracts.tasks import TASKS
from ..bundle import MANIFEST, SUMS, hash_file, largest_difference
from ..machine import default_threads
from ..opened import Bundle
from ..session import Session
from .batching import Batcher
from .chat import ChatTemplate
from .joining import Joining
from .observers import Observers
from .refusal import Refusal
from .row_independence import proven
from .settings import Settings

if TYPE_CHECKING:
    from ..generation import Generator
    from ..images import ImageEncoder

_LOG = logging.getLogger(__name__)
_RETRY_SECONDS = 30.0
"""A bundle may be refused because it was still being copied."""

_MOST_TWICE, _LEAST_SECONDS, _LEAST_GAIN, _TRIES = 256 << 20, 1e-3, 1.2, 8
"""A session on all cores is kept beside the one on one core: for models of so many bytes at most, which take so long,
and which it makes so many times faster."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(eq=False)
class Loaded:
    """One version of a bundle, verified and loaded.

    Attributes:
        bundle: The bundle, whose files have been read as far as they are needed.
        session: Its main variant.
        wide: The same on all cores, for a batch beside which nothing runs; None where it would not pay.
        joining: Which requests share a run.
        version: The first 12 digits of the bundle's hash.
        milliseconds: What verifying and loading took.
        generator: For language models, else None.
        images: For models that read pictures and say how, else None.
        chat: For language models with a chat template, else None.
    """

    bundle: Bundle
    session: Session
    joining: Joining
    version: str
    milliseconds: float = 0.0
    generator: Generator | None = None
    images: ImageEncoder | None = None
    chat: ChatTemplate | None = None
    wide: Session | None = None

    @classmethod
    def open(cls, folder: Path, settings: Settings) -> Loaded:
        """Verify and load; takes seconds, so not on an event loop.

        Raises:
            BundleError: The folder is no bundle, was changed, or does not answer its golden samples.
            InputError, MissingDependency: As `Session`.
        """
        started = time.perf_counter()
        bundle = Bundle(folder)
        generator = _generator(bundle, settings)
        session = generator.session if generator else _session(bundle, settings)
        _require_golden(bundle, session)
        encoder = bundle.encoder
        joining = Joining.of(
            session.signature,
            pad=encoder.pad if encoder is not None and settings.pad else None,
            left=encoder is not None and encoder.left,
        )
        joining = proven(
            joining, [sample.inputs for sample in bundle.golden], session.run, bundle.tolerance, settings.join
        )
        wide = None if generator else _wide(bundle, session, settings)
        images, chat = _images(bundle), ChatTemplate.of(folder) if generator else None
        # What is read only when it is asked for would come from the next version's files by then
        _ = bundle.config, bundle.generation_config, bundle.sha256, bundle.signature
        if hash_file(folder / SUMS) != bundle.sha256:
            raise BundleError(f"{folder} was changed while it was read", next_step="Replace a bundle by renaming.")
        milliseconds = (time.perf_counter() - started) * 1e3
        return cls(bundle, session, joining, bundle.sha256[:12], milliseconds, generator, images, chat, wide)

    @property
    def signature(self) -> Signature:
        """Of the graph."""
        return self.session.signature


@dataclass(eq=False)
class Version:
    """A loaded bundle and its queue, as long as anybody uses it."""

    loaded: Loaded
    batcher: Batcher
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    async def retire(self) -> None:
        """Wait until nobody uses it, then end its workers."""
        if self.users:
            await self.unused.wait()
        await self.batcher.close()


class ServedModel:
    """A name that is answered.

    Args:
        name: In the URL.
        folder: Where the bundle lies, and where the next version will.
        settings: Of the server.
        observers: Told of loading, queueing and batches.

    Attributes:
        name, folder: As above.
        current: The version that answers.
        refused: Why the last version that was offered was not taken; empty where it was.
        generating: Held by the one generation that runs.

    Raises:
        InputError: The name cannot stand in a URL.
        BundleError: The bundle fails verification.
    """

    def __init__(self, name: str, folder: str | Path, settings: Settings, observers: Observers | None = None) -> None:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"'{name}' cannot be a model's name", next_step="Letters, digits, '.', '_' and '-': NAME=FOLDER."
            )
        self.name, self.folder = name, Path(folder)
        self._settings, self._observers = settings, observers or Observers()
        self._seen = self._look()
        self.current = Loaded.open(self.folder, settings)
        self.refused = ""
        self._retry_at = 0.0
        self._version: Version | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self.generating = asyncio.Lock()

    @property
    def version(self) -> str:
        """Of the bundle that answers."""
        return self.current.version

    @property
    def bundle(self) -> Bundle:
        """The bundle that answers."""
        return self.current.bundle

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self._version is not None

    @property
    def depth(self) -> int:
        """Requests that wait for a batch."""
        return self._version.batcher.depth if self._version else 0

    @contextlib.contextmanager
    def use(self) -> Iterator[Version]:
        """The version that answers now, which stays until the request is over, whatever is loaded meanwhile.

        Raises:
            Refusal: The server has not started, or is stopping.
        """
        version = self._version
        if version is None:
            raise Refusal(503, f"model '{self.name}' is not ready", retry_after=1)
        version.users += 1
        try:
            yield version
        finally:
            version.users -= 1
            if not version.users:
                version.unused.set()

    def start(self) -> None:
        """Begin to answer; on the event loop."""
        self._version = Version(self.current, self._batcher(self.current))
        self._tell_loaded()

    async def close(self) -> None:
        """Answer what was accepted, then stop."""
        if self._version is not None:
            self._retire(self._version)
            self._version = None
        await asyncio.gather(*self._retiring)

    async def reload(self) -> bool:
        """Take the version that lies in the folder now. False where it is the one that answers already.

        Raises:
            OnnxpressError: It is refused; the old one goes on.
        """
        async with self._reloading:
            self._seen = self._look()
            try:
                if await asyncio.to_thread(_sums, self.folder) == self.bundle.sha256:
                    self.refused = ""
                    return False
                loaded = await asyncio.to_thread(Loaded.open, self.folder, self._settings)
            except OnnxpressError as error:
                self.refused, self._retry_at = str(error), time.monotonic() + _RETRY_SECONDS
                raise
            old = self._version
            self.refused, self.current = "", loaded
            if old is not None:
                self._version = Version(loaded, self._batcher(loaded))
                self._retire(old)
        self._tell_loaded()
        return True

    async def reload_if_changed(self) -> None:
        """Reload where the folder looks different from the last time, or after a while where that was refused."""
        told = self.refused
        if self._look() == self._seen and not (told and time.monotonic() > self._retry_at):
            return
        try:
            await self.reload()
        except OnnxpressError as error:
            if str(error) != told:
                _LOG.warning("model %s: a new bundle is refused, %s stays: %s", self.name, self.version, error)

    def _tell_loaded(self) -> None:
        joined = self.current.joining.told()
        _LOG.info("model %s: version %s answers from now on; %s", self.name, self.version, joined)
        self._observers.loaded(self.name, self.bundle, self.version, self.current.milliseconds)

    def _retire(self, version: Version) -> None:
        task = asyncio.get_running_loop().create_task(version.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _batcher(self, loaded: Loaded) -> Batcher:
        watched, settings = bool(self._observers), self._settings
        return Batcher(
            loaded.session.run,
            loaded.joining,
            run_alone=loaded.wide.run if loaded.wide else None,
            max_batch=settings.max_batch,
            queue=settings.queue,
            max_wait_ms=settings.max_wait_ms,
            workers=settings.batch_workers,
            on_depth=functools.partial(self._observers.queued, self.name) if watched else None,
            on_ran=functools.partial(self._observers.ran, self.name) if watched else None,
        )

    def _look(self) -> tuple[Any, ...]:
        """What changes when another bundle is put into the folder, without reading files: a copy in progress too."""
        seen: list[tuple[int, int, int] | None] = []
        for name in (SUMS, MANIFEST, "."):
            try:
                state = (self.folder / name).stat()
            except OSError:
                seen.append(None)
            else:
                seen.append((state.st_ino, state.st_mtime_ns, state.st_size if name != "." else 0))
        return tuple(seen)


def named_folders(words: list[str]) -> dict[str, Path]:
    """`NAME=FOLDER` or `FOLDER`, whose own name is taken.

    Raises:
        InputError: Two have one name.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, sign, path = word.partition("=")
        folder = Path(path if sign else word)
        name = name if sign else folder.resolve().name
        if name in folders:
            raise InputError(f"two bundles are named '{name}'", next_step="Name them: NAME=FOLDER.")
        folders[name] = folder
    return folders


def _sums(folder: Path) -> str:
    try:
        return hash_file(folder / SUMS)
    except OSError:
        raise BundleError(f"{folder} has no {SUMS}", next_step="Fetch the bundle again.") from None


def _require_golden(bundle: Bundle, session: Session) -> None:
    """Raise BundleError for the first golden sample that is not answered within its tolerance."""
    for sample in bundle.golden:
        try:
            answer = session.run(sample.inputs)
        except OnnxpressError as error:
            raise BundleError(f"{bundle.name} fails on golden sample {sample.name}: {error}") from error
        for name, expected in sample.outputs.items():
            allowed = bundle.tolerance(name)
            found = answer.get(name, np.empty(0))
            if found.shape != expected.shape or not largest_difference(found, expected) <= allowed:
                raise BundleError(
                    f"{bundle.name} does not answer golden sample {sample.name} within its tolerance ({name})",
                    next_step="See: onnxpress verify.",
                )


def _session(bundle: Bundle, settings: Settings) -> Session:
    return bundle.session(provider=settings.provider, threads=settings.session_threads)


def _wide(bundle: Bundle, session: Session, settings: Settings) -> Session | None:
    """A second session with all cores, where it is allowed, small enough to have twice, and measured to be faster.

    Under load several batches side by side, each on one core, do more in a second; a single request on an idle server
    is answered sooner by all cores.
    """
    size = bundle.model_file().stat().st_size
    if settings.threads is not None or settings.batch_workers < 2 or size > _MOST_TWICE:
        return None
    feeds = sorted((sample.inputs for sample in bundle.golden), key=_elements)[len(bundle.golden) // 2]
    narrow = _fastest(session, feeds)
    if narrow < _LEAST_SECONDS:
        return None
    wide = bundle.session(provider=settings.provider, threads=default_threads())
    return wide if wide.threads > session.threads and _fastest(wide, feeds) * _LEAST_GAIN < narrow else None


def _elements(feeds: Mapping[str, np.ndarray]) -> int:
    return sum(array.size for array in feeds.values())


def _fastest(session: Session, feeds: Mapping[str, np.ndarray]) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        session.run(feeds)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _generator(bundle: Bundle, settings: Settings) -> Generator | None:
    task = TASKS.get(bundle.task)
    if task is None or not task.generates:
        return None
    from ..generation import Generator

    try:
        return Generator(bundle, provider=settings.provider, threads=settings.threads)
    except InputError as error:  # one without a cache still answers /infer
        _LOG.warning("%s cannot generate text: %s", bundle.name, error)
        return None


def _images(bundle: Bundle) -> ImageEncoder | None:
    if bundle.preprocessing.get("kind") != "image":
        return None
    from ..images import ImageEncoder

    try:
        return ImageEncoder(bundle)
    except MissingDependency as error:
        _LOG.warning("%s takes tensors only: %s", bundle.name, error)
        return None
