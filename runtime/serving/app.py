# SPDX-License-Identifier: Apache-2.0
"""The application: any ASGI server can run it, `serve` does it with uvicorn."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...contracts.errors import MissingDependency
from .events import Observer
from .refusal import Refusal
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

_LOG = logging.getLogger(__name__)

INSTALL = 'pip install "onnxpress[serve]"'


def create_app(
    models: Mapping[str, str | Path],
    settings: Settings | None = None,
    observers: Iterable[Observer] = (),
    routers: Iterable[APIRouter] = (),
) -> FastAPI:
    """Verify and load bundles, and return the application that answers for them.

    `app.state.server` is the `Server`: its models, settings and observers.

    Args:
        models: Name to bundle folder.
        settings: Limits; the defaults if absent.
        observers: Told of every load, batch and answer.
        routers: Further routes, such as the metrics and the page.

    Raises:
        BundleError: A bundle fails verification.
        InputError: There is no model, or a name cannot stand in a URL.
        MissingDependency: FastAPI is not installed.
    """
    if find_spec("fastapi") is None:
        raise MissingDependency("fastapi is not installed", next_step=INSTALL)
    from starlette.exceptions import HTTPException

    from . import openai, plain, v2
    from .application import Application
    from .call import answered
    from .openapi import describe
    from .server import Server

    settings = settings or Settings()
    server = Server(models, settings, observers)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await server.stop()

    version = _version()
    infer = answered(server, "infer", v2.infer)
    app = Application(
        settings,
        infer,
        title="onnxpress",
        version=version,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its script from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _http_error, Refusal: _refusal, Exception: _internal_error},
    )
    app.state.server = server
    app.router.routes.extend([*v2.routes(server, version, infer), *plain.routes(server), *openai.routes(server)])
    for router in routers:
        app.include_router(router)
    describe(app)
    return app


def _version() -> str:
    try:
        return version_of("onnxpress")
    except PackageNotFoundError:
        return "unknown"


async def _http_error(request: Request, error: Any) -> Response:
    """What the framework refuses (no such route, method not allowed), in the protocol's form."""
    from .call import refused

    response = refused(Refusal(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _refusal(request: Request, error: Any) -> Response:
    from .call import refused

    return refused(error)


async def _internal_error(request: Request, error: Exception) -> Response:
    from .call import refused

    return refused(Refusal(500, "internal error"))
