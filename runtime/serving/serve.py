# SPDX-License-Identifier: Apache-2.0
"""Run the application with uvicorn. SIGTERM and SIGINT finish what was accepted, SIGHUP looks for new bundles."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...contracts.errors import InputError, MissingDependency
from .app import INSTALL, create_app
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .watch import Watching

_SWITCH_SECONDS = 0.0005
"""A worker that has finished a batch waits at most so long for the event loop to hand over the interpreter."""


def serve(
    app: FastAPI, host: str = "127.0.0.1", port: int = 8000, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Answer until a signal comes.

    Args:
        app: From `create_app`.
        host: Where to listen; anything but the default can be reached from other machines.
        port: 0 takes a free one.
        on_ready: Told the address once requests are answered.

    Raises:
        InputError: The address is taken, or not this machine's.
        MissingDependency: uvicorn is not installed.
    """
    listener = _listen(host, port)
    with listener:
        make_server(app, on_ready=on_ready).run(sockets=[listener])


def serve_bundles(
    folders: Mapping[str, str | Path],
    settings: Settings,
    watching: Watching,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_ready: Callable[[FastAPI, str], None] | None = None,
) -> None:
    """Serve with everything: the routes, the figures, the logs and the page.

    Args:
        folders: Name to bundle folder.
        settings: Limits.
        watching: What is logged, audited and replayed.
        host, port: As for `serve`.
        on_ready: Told the application and its address once requests are answered.

    Raises:
        InputError, BundleError: A bundle, a log or the address cannot be used.
        MissingDependency: The extra `serve` is not installed.
    """
    try:
        from .page import router
        from .watch import Watch
    except ImportError as error:
        raise MissingDependency(f"{error.name} is not installed", next_step=INSTALL) from None
    listener = _listen(host, port)  # before the models are loaded: a taken port is told at once
    with listener:
        watch = Watch(watching)
        try:
            app = create_app(folders, settings, [watch], [router(watch)])
            ready = None if on_ready is None else functools.partial(on_ready, app)
            make_server(app, on_ready=ready).run(sockets=[listener])
        finally:
            watch.close()


def make_server(app: FastAPI, *, on_ready: Callable[[str], None] | None = None) -> Any:
    """A `uvicorn.Server` for the application, to be run with `sockets`; in a thread, it leaves signals alone.

    Raises:
        MissingDependency: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingDependency("uvicorn is not installed", next_step=INSTALL) from None
    from .connections import limited

    serving = app.state.server
    settings: Settings = serving.settings
    protocol, look_at = limited(settings)

    async def every_second() -> None:
        look_at(server.server_state.connections)

    class Server(uvicorn.Server):  # type: ignore[misc, unused-ignore]
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if on_ready is not None and sockets:
                on_ready(_address(sockets[0]))

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            serving.stopping = True
            await super().shutdown(sockets)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn raises the signal again at its end; a server that was asked to stop and did so has succeeded."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            ends = [signal.SIGINT, signal.SIGTERM]
            before = {number: signal.signal(number, self.handle_exit) for number in ends}
            if hasattr(signal, "SIGHUP"):
                loop = asyncio.get_running_loop()
                again = lambda *_: loop.call_soon_threadsafe(serving.reload_soon)  # noqa: E731
                before[signal.SIGHUP] = signal.signal(signal.SIGHUP, again)
            interval = sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_SECONDS)
            try:
                yield
            finally:
                sys.setswitchinterval(interval)
                for number, handler in before.items():
                    signal.signal(number, handler)

    server = Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=max(1, round(settings.idle_seconds)),
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            backlog=2048,
            callback_notify=every_second,
            timeout_notify=1,
        )
    )
    return server


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket that says it is TCP: asyncio turns Nagle's algorithm off only where a socket says so, and with
    it every answer in two writes waits 40 ms for the client's delayed acknowledgement."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}", next_step="Choose another --port.") from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
