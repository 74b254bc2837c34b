# SPDX-License-Identifier: Apache-2.0
"""What every request passes first: the API key, and limits on what may be in memory at one time.

A body that is declared too large is refused before it is read; one that grows too large, while it is. Only
what has passed is counted, so a flood of refused requests costs nothing but their heads.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .call import refused
from .refusal import Refusal
from .settings import Settings

PAGE = ("/", "/page/page.css", "/page/page.js", "/page/charts.js", "/page/tryout.js")
OPEN = frozenset({*PAGE, "/v2/health/live", "/v2/health/ready"})
"""Answered without the key: the page, which asks for it, and what an orchestrator probes."""


class Guard:
    """ASGI middleware.

    Args:
        app: What is guarded.
        settings: Limits and the key.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._key = None if settings.api_key is None else settings.api_key.strip().encode()
        self._requests = self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        try:
            length = self._admit(scope)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, send)
            return None
        body = _Body(self, receive, length)
        self._requests += 1
        self._bytes += body.counted
        try:
            await self._app(scope, body.receive if length is None else receive, send)
        finally:
            self._requests -= 1
            self._bytes -= body.counted

    def grow(self, total: int, more: int) -> None:
        """Count bytes that no header announced.

        Raises:
            Refusal: 413 or 503, they are too many.
        """
        self._require_room(total, more)
        self._bytes += more

    def _admit(self, scope: Scope) -> int | None:
        """The length of the body, None where it is not known.

        Raises:
            Refusal: The request may not pass.
        """
        length: int | None = 0
        given = b""
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = int(value) if value.isdigit() and len(value) < 20 else self._settings.max_body + 1
            elif name == b"transfer-encoding":
                length = None
            elif name == b"x-api-key" or (name == b"authorization" and value[:7].lower() == b"bearer "):
                given = value if name == b"x-api-key" else value[7:]
        if self._key is not None and not (scope["path"] in OPEN or hmac.compare_digest(given, self._key)):
            raise Refusal(401, "an API key is wanted: Authorization: Bearer KEY", close=bool(length is None or length))
        if self._requests >= self._settings.max_in_flight and scope["path"] not in OPEN:  # a probe says that it lives
            raise Refusal(503, "too many requests at once; try again later", retry_after=1, close=True)
        if length:
            self._require_room(length, length)
        return length

    def _require_room(self, total: int, more: int) -> None:
        if total > self._settings.max_body:
            raise Refusal(413, f"the body is larger than {self._settings.max_body_mb:g} MiB", close=True)
        if self._bytes + more > self._settings.max_buffered:
            raise Refusal(503, "too much is being sent at once; try again later", retry_after=1, close=True)


class _Body:
    """Counts a body that comes in chunks of no announced length."""

    def __init__(self, guard: Guard, receive: Receive, length: int | None) -> None:
        self._guard, self._receive = guard, receive
        self.counted = length or 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and (more := len(message.get("body", b""))):
            self._guard.grow(self.counted + more, more)
            self.counted += more
        return message
