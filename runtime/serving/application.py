# SPDX-License-Identifier: Apache-2.0
"""FastAPI behind the guard, with a short way to the busiest route.

FastAPI and Starlette pass a request through eight layers before a route is found. An inference needs none of them: its
handler reads its own body and answers its own errors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .guard import Guard
from .settings import Settings

Endpoint = Callable[[Request], Awaitable[Response]]

NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI would send traces where the environment configures OpenTelemetry."""


class Application(FastAPI):
    """The application.

    Args:
        settings: For the guard.
        infer: The endpoint of `/v2/models/NAME/infer` and `/v2/models/NAME/versions/VERSION/infer`.
        options: FastAPI's.
    """

    def __init__(self, settings: Settings, infer: Endpoint, **options: Any) -> None:
        super().__init__(**options, telemetry=NO_TELEMETRY)
        self._infer = infer
        self._guard = Guard(self._pass, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (found := inferred(scope["path"])):
            scope["path_params"] = found
            response = await self._infer(Request(scope, receive, send))
            await response(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def inferred(path: str) -> dict[str, str] | None:
    """The model and the version that a path asks to infer; None for every other path."""
    if not (path.startswith("/v2/models/") and path.endswith("/infer")):
        return None
    match path.split("/")[3:]:
        case [model, "infer"] if model:
            return {"model": model}
        case [model, "versions", version, "infer"] if model and version:
            return {"model": model, "version": version}
    return None
