# SPDX-License-Identifier: Apache-2.0
"""uvicorn's connections with the limits that it lacks: on a request's head, on slow senders and on slow readers.

uvicorn itself ends connections that are idle after an answer, and no others: a client that sends a byte now and then
(slowloris) would hold its connection for ever, and a head without an end would be kept.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .settings import Settings

MAX_HEAD = 1 << 16
"""Bytes of a request's head."""


def limited(settings: Settings) -> tuple[type[Any], Any]:
    """A protocol for uvicorn's `http`, and what has to be called every second with the open connections."""

    class Limited(AutoHTTPProtocol):  # type: ignore[misc, valid-type, unused-ignore]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.began = self.loop.time()  # of the request that is coming
            self.head = 0  # its bytes
            self.stalled: float | None = None

        def data_received(self, data: bytes) -> None:
            if self.timeout_keep_alive_task is not None:
                self.began, self.head = self.loop.time(), 0
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self.head += len(data)
                if self.head > MAX_HEAD and self.timeout_keep_alive_task is None:
                    self.refuse(431, "Request Header Fields Too Large", "the head of the request is too large")

        def send_400_response(self, msg: str) -> None:
            self.refuse(400, "Bad Request", "this is not HTTP")

        def refuse(self, status: int, phrase: str, message: str) -> None:
            """End the connection, with an answer where none has begun."""
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                body = json.dumps({"error": message}).encode()
                head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
                self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

        def look(self, now: float) -> None:
            """End the connection where its client takes too long."""
            if self.flow is not None and self.flow.write_paused:
                self.stalled = self.stalled or now
                if now - self.stalled > settings.body_seconds:
                    self.transport.abort()
                return
            self.stalled = None
            if self.timeout_keep_alive_task is not None:  # idle: uvicorn ends it
                return
            if self.cycle is None or self.cycle.response_complete:
                if now - self.began > settings.header_seconds:
                    self.refuse(408, "Request Timeout", "the head of the request took too long")
            elif self.cycle.more_body and now - self.began > settings.header_seconds + settings.body_seconds:
                self.refuse(408, "Request Timeout", "the body of the request took too long")

    def look_at(connections: set[Any]) -> None:
        now = asyncio.get_running_loop().time()
        for connection in list(connections):
            connection.look(now)

    return Limited, look_at
