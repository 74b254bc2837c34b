# SPDX-License-Identifier: Apache-2.0
"""One request on its way through the server: its limits, its identity, and what the observers hear of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import json_text
from .batching import Ran
from .events import Answer
from .model import ServedModel, Version
from .refusal import CLOSED, NotFinite, Refusal

if TYPE_CHECKING:
    from .server import Server

_LOG = logging.getLogger(__name__)
_PREFIX = os.urandom(6).hex()
_COUNT = itertools.count(1)

_PATIENCE = 0.1
"""Seconds after which a request that has no answer begins to look whether its client is still there."""

_LINGER = 2.0
"""Seconds for which the rest of a refused body is thrown away."""


class Call:
    """A request.

    Args:
        server: The server.
        request: Starlette's request.
        route: For the observers.

    Attributes:
        server, request, route: As above.
        id: The client's `X-Request-Id`, or the `id` of its body, or one made here; sent back as a header.
        model: The name that was reached.
        bundle: The hash of the bundle that answers.
        inputs, outputs, rows, queued_ms, computed_ms: As in `Answer`; of the last batch, where it took several.
        started: When its last byte was here, on `time.perf_counter`.
    """

    def __init__(self, server: Server, request: Request, route: str) -> None:
        self.server, self.request, self.route = server, request, route
        given = request.headers.get("x-request-id", "")
        self._named = _is_name(given)
        self.id = given if self._named else f"{_PREFIX}-{next(_COUNT)}"
        self.model = self.bundle = ""
        self.inputs: Mapping[str, np.ndarray] = {}
        self.outputs: Mapping[str, np.ndarray] = {}
        self.rows = 0
        self.queued_ms: float | None = None
        self.computed_ms: float | None = None
        self.started = time.perf_counter()

    def named(self, given: str | None) -> None:
        """Take the id that the body brings, where no header brought one."""
        if given is not None and not self._named and _is_name(given):
            self.id = given

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            Refusal: 499, the client went away.
        """
        try:
            body = await self.request.body()
        except ClientDisconnect:
            raise Refusal(CLOSED, "the client has gone") from None
        self.started = time.perf_counter()
        return body

    async def json(self) -> dict[str, Any]:
        """The body, which is to be a JSON object.

        Raises:
            Refusal: 400, it is none.
        """
        body = await self.body()
        value = await self.server.beside(len(body), json_text.decode, body)
        if not isinstance(value, dict):
            raise Refusal(400, "the body is not a JSON object")
        return value

    def answers_with(self, model: ServedModel, version: Version) -> None:
        """Note who answers."""
        self.model, self.bundle = model.name, version.loaded.bundle.sha256

    def deadline(self) -> float | None:
        """When the answer has to be there, on `time.perf_counter`.

        Raises:
            Refusal: 400, the header is no number.
        """
        limit = self.server.settings.deadline_ms
        if (header := self.request.headers.get("x-deadline-ms")) is not None:
            try:
                wanted = float(header)
            except ValueError:
                wanted = -1.0
            if not wanted > 0:
                raise Refusal(400, "X-Deadline-Ms is not a positive number of milliseconds")
            limit = min(limit, wanted) if limit else wanted
        return self.started + limit / 1e3 if limit and limit < 1e12 else None

    async def run(
        self,
        version: Version,
        feeds: Mapping[str, np.ndarray],
        names: tuple[str, ...] | None = None,
        deadline: float | None = None,
    ) -> Ran:
        """Run the model; taken back when the client goes away.

        Raises:
            Refusal: As `Batcher.submit`; 499 where nobody waits any more.
        """
        ran: Ran = await self.while_connected(version.batcher.submit(feeds, names, deadline))
        if not self.rows:
            self.inputs, self.outputs = ran.inputs, ran.outputs
        else:
            part = f"@{self.rows}"
            self.inputs = {**self.inputs, **{name + part: array for name, array in ran.inputs.items()}}
            self.outputs = {**self.outputs, **{name + part: array for name, array in ran.outputs.items()}}
        self.rows += ran.rows
        self.queued_ms = ran.queued_ms if self.queued_ms is None else self.queued_ms
        self.computed_ms = ran.computed_ms + (self.computed_ms or 0.0)
        return ran

    async def while_connected(self, work: Awaitable[Any]) -> Any:
        """Await something, and cancel it when the client goes away.

        Looking for that costs a task, so it begins only where the answer takes a while.

        Raises:
            Refusal: 499, the client has gone.
        """
        current = asyncio.current_task()
        assert current is not None
        watch: list[asyncio.Task[None]] = []
        gone = False

        async def look() -> None:
            nonlocal gone
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            current.cancel()

        begin = asyncio.get_running_loop().call_later(
            _PATIENCE, lambda: watch.append(asyncio.get_running_loop().create_task(look()))
        )
        try:
            return await work
        except asyncio.CancelledError:
            if gone:
                current.uncancel()
                raise Refusal(CLOSED, "the client has gone") from None
            raise
        finally:
            begin.cancel()
            if watch:
                watch[0].cancel()

    def over(self, status: int, error: str = "", *, seen: bool = False) -> None:
        """Tell the observers; of an error's outputs only where they are to be `seen`."""
        observers = self.server.observers
        outputs = self.outputs if seen or not error else {}
        if observers:
            observers.answered(
                Answer(
                    request_id=self.id,
                    model=self.model,
                    bundle=self.bundle,
                    route=self.route,
                    status=status,
                    error=error,
                    rows=self.rows,
                    queued_ms=self.queued_ms,
                    computed_ms=self.computed_ms,
                    total_ms=(time.perf_counter() - self.started) * 1e3,
                    inputs=self.inputs,
                    outputs=outputs,
                )
            )


Handler = Callable[[Call], Awaitable[Response]]


def answered(
    server: Server, route: str, handler: Handler, form: Callable[[Refusal], Response] | None = None
) -> Callable[[Request], Awaitable[Response]]:
    """The Starlette endpoint of a handler: errors become JSON, and the observers hear of every end.

    A response that streams tells its end itself (`streamed` is set on it).

    Args:
        server: The server.
        route: For the observers.
        handler: What answers.
        form: Makes the answer to a refusal; the protocol's form if absent.
    """
    refuse = form or refused

    async def endpoint(request: Request) -> Response:
        call = Call(server, request, route)
        try:
            response = await handler(call)
        except Refusal as refusal:
            call.over(refusal.status, refusal.message, seen=isinstance(refusal, NotFinite))
            response = refuse(refusal)
        except asyncio.CancelledError:
            call.over(CLOSED, "the server stopped, or the client has gone")
            raise
        except Exception:  # noqa: BLE001 - logged; the client hears of it
            _LOG.exception("request %s failed", call.id)
            call.over(500, "internal error")
            response = refuse(Refusal(500, "internal error"))
        else:
            if not getattr(response, "streamed", False):
                call.over(response.status_code)
        response.raw_headers.append((b"x-request-id", call.id.encode("latin-1", "replace")))
        return response

    endpoint.__name__ = getattr(handler, "__name__", "endpoint")
    return endpoint


def refused(refusal: Refusal, told: Any = None) -> Response:
    """The answer to a request that is refused, in the protocol's form unless `told` is the body."""
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(int(refusal.retry_after))
    if refusal.close:
        headers["Connection"] = "close"
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    status = 400 if refusal.status == CLOSED else refusal.status  # nobody reads it
    kind = _Closing if refusal.close else Response
    return kind(json_text.encode(told or {"error": refusal.message}), status, headers, "application/json")


class _Closing(Response):
    """An answer to a body that is still being sent. Closed at once, the connection would be reset, and the client
    would see that and not the answer; so what comes is thrown away for a moment (nginx's lingering close)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _is_name(given: str) -> bool:
    """Whether a request can be called so in logs and headers."""
    return 0 < len(given) <= 128 and given.isascii() and given.isprintable()


def reply(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(json_text.encode(value), status, None, "application/json")
