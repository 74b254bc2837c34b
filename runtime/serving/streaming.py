# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: a response that is written while it is made, and ends when nobody reads it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import json_text
from .call import Call
from .refusal import CLOSED, Refusal

_LOG = logging.getLogger(__name__)


class EventStream(Response):
    """Events as JSON, and `[DONE]` at the end.

    Args:
        call: The request, which is over when the stream is.
        events: What is sent. An error in it becomes the last event.
        held: Closed at the end.
    """

    streamed = True

    def __init__(self, call: Call, events: AsyncGenerator[dict[str, Any], None], held: contextlib.ExitStack) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, "text/event-stream")
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._call, self._events, self._held = call, events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        current = asyncio.current_task()
        assert current is not None
        gone = False

        async def look() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            current.cancel()

        watch = asyncio.create_task(look())
        status, error = 200, ""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self._events:
                    await send(_event(json_text.encode(event)))
            except Refusal as refusal:
                status, error = refusal.status, refusal.message
            except Exception:  # noqa: BLE001 - logged; the client hears of it
                _LOG.exception("request %s failed", self._call.id)
                status, error = 500, "internal error"
            if error:
                await send(_event(json_text.encode({"error": {"message": error, "code": status}})))
            await send(_event(b"[DONE]"))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            status, error = CLOSED, "the client has gone"
            if not gone:
                raise
            current.uncancel()
        finally:
            watch.cancel()
            await self._events.aclose()
            self._held.close()
            self._call.over(status, error)


def _event(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
