# SPDX-License-Identifier: Apache-2.0
"""The description of the routes, for /openapi.json, written by hand: the handlers read their bodies themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .openai import ROLES

if TYPE_CHECKING:
    from fastapi import FastAPI


def describe(app: FastAPI) -> None:
    """Add the server's own routes to what FastAPI says of the others."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            document["paths"] = {**_PATHS, **document.get("paths", {})}
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_SCHEMAS)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


_STRING: dict[str, Any] = {"type": "string"}
_OPEN: dict[str, Any] = {"type": "object"}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def _list(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _one_or_more(of: Any) -> dict[str, Any]:
    return {"anyOf": [of, {**_list(of), "minItems": 1}]}


def _schema(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_DATATYPE = {"type": "string", "pattern": "^[A-Z]+[0-9]*$"}
_SHAPE = _list({"type": "integer", "minimum": 0})
_TENSOR_INFO = _object(
    ("name", "datatype", "shape"), name=_STRING, datatype=_DATATYPE, shape=_list({"type": "integer", "minimum": -1})
)

_TENSOR = _object(
    ("name", "shape", "datatype"),
    name=_STRING,
    shape=_SHAPE,
    datatype=_DATATYPE,
    parameters=_OPEN,
    data=_schema("TensorData"),
)
_MESSAGE = _object(("role", "content"), role={"type": "string", "enum": list(ROLES)}, content=_STRING)

_SCHEMAS: dict[str, Any] = {
    "Error": _object(("error",), error=_STRING),
    "OpenAIError": _object(("error",), error=_object(("message", "type"), message=_STRING, type=_STRING)),
    "TensorData": {
        "type": "array",
        "items": {"anyOf": [_schema("TensorData"), {"type": "number"}, {"type": "boolean"}, _STRING]},
    },
    "InputTensor": _TENSOR,
    "OutputTensor": _TENSOR,
    "InferRequest": _object(
        ("inputs",),
        id=_STRING,
        parameters=_OPEN,
        inputs=_list(_schema("InputTensor")),
        outputs=_list(_object(("name",), name=_STRING, parameters=_OPEN)),
    ),
    "InferResponse": _object(
        ("model_name", "outputs"),
        model_name=_STRING,
        model_version=_STRING,
        id=_STRING,
        outputs=_list(_schema("OutputTensor")),
    ),
    "ModelMetadata": _object(
        ("name", "versions", "platform", "inputs", "outputs"),
        name=_STRING,
        versions=_list(_STRING),
        platform=_STRING,
        parameters=_object(join=_STRING),
        inputs=_list(_TENSOR_INFO),
        outputs=_list(_TENSOR_INFO),
    ),
    "PredictRequest": _object(
        text=_one_or_more(_STRING),
        text_pair=_one_or_more(_STRING),
        question=_one_or_more(_STRING),
        context=_one_or_more(_STRING),
        image=_one_or_more(_STRING),
        top_k={"type": "integer", "minimum": 1, "maximum": 10000},
    ),
    "PredictResponse": _object(
        ("model", "version", "predictions"), model=_STRING, version=_STRING, predictions=_list(_OPEN)
    ),
    "CompletionRequest": _object(
        ("prompt",),
        model=_STRING,
        prompt=_STRING,
        max_tokens={"type": "integer", "minimum": 1},
        temperature={"type": "number", "minimum": 0},
        top_p={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        stop=_one_or_more(_STRING),
        seed={"type": "integer", "minimum": 0},
        stream={"type": "boolean"},
    ),
    "ChatRequest": _object(
        ("messages",),
        model=_STRING,
        messages={**_list(_MESSAGE), "minItems": 1},
        max_tokens={"type": "integer", "minimum": 1},
        temperature={"type": "number", "minimum": 0},
        stream={"type": "boolean"},
    ),
    "EmbeddingsRequest": _object(
        ("input",),
        model=_STRING,
        input=_one_or_more(_STRING),
        encoding_format={"type": "string", "enum": ["float", "base64"]},
    ),
}


def _operation(
    summary: str, answer: Any, *path: str, body: Any = None, openai: bool = False, binary: bool = False
) -> dict[str, Any]:
    """One operation: 200 with `answer`, or an error, whatever its status is."""
    kinds = {"application/json": {"schema": answer}, **({"application/octet-stream": {}} if binary else {})}
    told = {"application/json": {"schema": _schema("OpenAIError" if openai else "Error")}}
    operation: dict[str, Any] = {
        "summary": summary,
        "parameters": [{"name": name, "in": "path", "required": True, "schema": _STRING} for name in path],
        "responses": {
            "200": {"description": "Done.", "content": kinds},
            "default": {"description": "Refused; 503 with Retry-After, 504 after the deadline.", "content": told},
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _paths() -> dict[str, Any]:
    model, versioned = ("model",), ("model", "version")
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("Server metadata", _OPEN)},
        "/v2/health/live": {"get": _operation("Server live", _OPEN)},
        "/v2/health/ready": {"get": _operation("Server ready", _OPEN)},
        "/v2/repository/index": {
            "get": _operation("The models", _list(_OPEN)),
            "post": _operation("The models, as Triton's clients ask for them", _list(_OPEN)),
        },
        "/v2/repository/models/{model}/load": {"post": _operation("Take the version in the folder", _OPEN, *model)},
        "/models/{model}/predict": {
            "post": _operation(
                "Text or a picture in, an answer by task out",
                _schema("PredictResponse"),
                *model,
                body=_schema("PredictRequest"),
            )
        },
        "/v1/models": {"get": _operation("The models", _OPEN, openai=True)},
        "/v1/models/{model}": {"get": _operation("One model", _OPEN, *model, openai=True)},
    }
    for name, schema in (
        ("completions", "CompletionRequest"),
        ("chat/completions", "ChatRequest"),
        ("embeddings", "EmbeddingsRequest"),
    ):
        paths[f"/v1/{name}"] = {"post": _operation(f"OpenAI's {name}", _OPEN, body=_schema(schema), openai=True)}
    for prefix, names in (("/v2/models/{model}", model), ("/v2/models/{model}/versions/{version}", versioned)):
        paths[prefix] = {"get": _operation("Model metadata", _schema("ModelMetadata"), *names)}
        paths[f"{prefix}/ready"] = {"get": _operation("Model ready", _OPEN, *names)}
        infer = _operation("Inference", _schema("InferResponse"), *names, body=_schema("InferRequest"), binary=True)
        paths[f"{prefix}/infer"] = {"post": infer}
    return paths


_PATHS = _paths()
