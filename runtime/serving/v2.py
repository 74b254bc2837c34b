# SPDX-License-Identifier: Apache-2.0
"""The routes of the Open Inference Protocol, version 2, over HTTP (kserve/open-inference-protocol, inference_rest.md).

Beyond it, as Triton has them: binary tensors, `/v2/repository/index`, and `/v2/repository/models/NAME/load`, which
takes the version that lies in the bundle's folder now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...contracts.signature import Signature
from . import tensors
from .call import Call, answered, refused, reply
from .model import ServedModel
from .refusal import Refusal
from .server import Server

EXTENSIONS = ["binary_tensor_data", "model_repository"]
_HEADER_LENGTH = "inference-header-content-length"


def routes(server: Server, version: str, infer: Any) -> list[Route]:
    """The protocol's routes.

    Args:
        server: The server.
        version: Of this package, for the server's metadata.
        infer: The endpoint that answers inferences.
    """
    model = "/v2/models/{model}"
    both = (model, model + "/versions/{version}")
    return [
        *(Route(f"{path}/infer", infer, methods=["POST"]) for path in both),
        Route("/v2/health/live", _just({"live": True})),
        Route("/v2/health/ready", _ready(server)),
        *(Route(f"{path}/ready", _of_model(server, _model_ready)) for path in both),
        *(Route(path, _of_model(server, _metadata)) for path in both),
        *(
            Route(path, _just({"name": "onnxpress", "version": version, "extensions": EXTENSIONS}))
            for path in ("/v2", "/v2/")
        ),
        Route("/v2/repository/index", _index(server), methods=["GET", "POST"]),
        Route("/v2/repository/models/{model}/load", answered(server, "load", _load), methods=["POST"]),
    ]


async def infer(call: Call) -> Response:
    """Answer an inference request."""
    server, path = call.server, call.request.path_params
    body = await call.body()
    with server.using(call, path["model"], path.get("version")) as version:
        loaded, deadline = version.loaded, call.deadline()
        header = call.request.headers.get(_HEADER_LENGTH)
        wanted = await server.beside(len(body), tensors.read_request, body, header, loaded.signature, server.settings)
        call.named(wanted.id)
        require_length(loaded.bundle.max_length, wanted.feeds)
        ran = await call.run(version, wanted.feeds, wanted.outputs, deadline)
        size = sum(array.nbytes for array in ran.outputs.values())
        text, length = await server.beside(
            size, tensors.write_answer, call.model, loaded.version, wanted.id, ran.outputs, wanted.binary
        )
    if length is None:
        return Response(text, media_type="application/json")
    return Response(text, headers={_HEADER_LENGTH: str(length)}, media_type="application/octet-stream")


def require_length(limit: int | None, feeds: Any) -> None:
    """Raise Refusal, 400, for more tokens than the model has positions."""
    ids = feeds.get("input_ids")
    if limit is not None and ids is not None and ids.ndim == 2 and ids.shape[1] > limit:
        raise Refusal(400, f"input 'input_ids' has {ids.shape[1]} tokens: the model reads at most {limit}")


async def _load(call: Call) -> Response:
    model = await call.server.load(call.request.path_params["model"])
    call.model, call.bundle = model.name, model.bundle.sha256
    return reply({"name": model.name, "version": model.version, "state": "READY"})


def _just(value: Any) -> Any:
    async def endpoint(request: Request) -> Response:
        return reply(value)

    return endpoint


def _ready(server: Server) -> Any:
    async def ready(request: Request) -> Response:
        # The protocol's text names the field `live` here too; `ready` is what one would look for
        return reply({"live": True, "ready": server.ready}, 200 if server.ready else 503)

    return ready


def _of_model(server: Server, tell: Callable[[ServedModel], Response]) -> Any:
    """What is told of the model that the path names."""

    async def told(request: Request) -> Response:
        try:
            model = server.find(request.path_params["model"], request.path_params.get("version"))
        except Refusal as refusal:
            return refused(refusal)
        return tell(model)

    return told


def _model_ready(model: ServedModel) -> Response:
    return reply({"name": model.name, "ready": model.ready}, 200 if model.ready else 503)


def _metadata(model: ServedModel) -> Response:
    return reply(
        {
            "name": model.name,
            "versions": [model.version],
            "platform": "onnx_onnxv1",
            "parameters": {"join": model.current.joining.told()},
            **_tensors(model.current.signature),
        }
    )


def _tensors(signature: Signature) -> dict[str, list[dict[str, Any]]]:
    return {
        key: [{"name": s.name, "datatype": tensors.datatype(s), "shape": tensors.shape(s)} for s in specs]
        for key, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
    }


def _index(server: Server) -> Any:
    async def index(request: Request) -> Response:
        return reply(
            [
                {
                    "name": model.name,
                    "version": model.version,
                    "state": "READY" if model.ready else "UNAVAILABLE",
                    "reason": model.refused,
                }
                for model in server.models.values()
            ]
        )

    return index
