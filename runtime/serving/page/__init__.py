# SPDX-License-Identifier: Apache-2.0
"""The page at `/` where a person tries a model and watches the server, and the routes that feed it and Prometheus.

GET /             the page; its style and scripts lie under /page/, and nothing comes from anywhere else
GET /page/models  what the page has to know of each model to offer a form for it
GET /live         the last two minutes in figures
GET /metrics      for Prometheus
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ....contracts.tasks import TASKS
from ...opened import Bundle
from ..model import Loaded
from ..tensors import datatype
from ..watch import Watch

ASSETS = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/charts.js": ("charts.js", "text/javascript"),
    "/page/tryout.js": ("tryout.js", "text/javascript"),
}
"""Path to file and media type: they hold nothing secret, so the page can ask for the API key itself."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_MOST_VALUES = 2000
"""Values of a golden sample that are written into the page's form; nobody edits more by hand."""


def router(watch: Watch) -> APIRouter:
    """The routes, for `create_app`.

    Args:
        watch: Where the figures come from. Asking it waits for its thread, so Starlette runs these routes in threads.
    """

    def metrics(request: Request) -> Response:
        text, kind = watch.text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": kind})

    def live(request: Request) -> Response:
        return _json(watch.live())

    def models(request: Request) -> Response:
        served = request.app.state.server.models
        return _json({"models": [_described(name, model.current) for name, model in served.items()]})

    assets = [Route(path, _asset(*asset)) for path, asset in ASSETS.items()]
    figures = [Route("/metrics", metrics), Route("/live", live), Route("/page/models", models)]
    return APIRouter(routes=[*figures, *assets])


def _json(value: Any) -> Response:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})


def _asset(name: str, kind: str) -> Any:
    async def asset(request: Request) -> Response:
        return Response(_content(name), media_type=kind, headers=_HEADERS)

    return asset


@lru_cache(len(ASSETS))
def _content(name: str) -> bytes:
    return files(__name__).joinpath(name).read_bytes()


@lru_cache(16)
def _described(name: str, loaded: Loaded) -> dict[str, Any]:
    """A model for the page: what it reads, and samples to begin with."""
    bundle = loaded.bundle
    texts = [sample.text for sample in bundle.golden if sample.text and sample.text.isascii()]
    return {
        "name": name,
        "version": loaded.version,
        "bundle": bundle.sha256,
        "task": bundle.task,
        "reads": _reads(loaded),
        "texts": [text for text in texts if 8 <= len(text) <= 300][:2],
        "request": _request(bundle),
    }


def _reads(loaded: Loaded) -> str:
    """What the server can read for it: `text`, `image` or `tensors`."""
    if loaded.images is not None:
        return "image"
    task = TASKS.get(loaded.bundle.task)
    writes = task is not None and task.generates
    return "text" if loaded.bundle.encoder is not None and (loaded.generator is not None or not writes) else "tensors"


def _request(bundle: Bundle) -> dict[str, Any] | None:
    """The first golden sample as a request to /v2/models/NAME/infer; None without one that a person can read."""
    specs = {spec.name: spec for spec in bundle.signature.inputs}
    for sample in bundle.golden:
        if sum(array.size for array in sample.inputs.values()) <= _MOST_VALUES and sample.inputs.keys() == specs.keys():
            return {
                "inputs": [
                    {
                        "name": key,
                        "shape": list(array.shape),
                        "datatype": datatype(specs[key]),
                        "data": list(_values(array)),
                    }
                    for key, array in sample.inputs.items()
                ]
            }
    return None


def _values(array: np.ndarray) -> Iterator[Any]:
    """Flat, with no more digits than float32 holds."""
    for value in array.reshape(-1).tolist():
        yield float(f"{value:.7g}") if isinstance(value, float) else value
