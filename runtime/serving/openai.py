# SPDX-License-Identifier: Apache-2.0
"""The routes that OpenAI's clients use: models, completions, chat completions (both also streamed), embeddings."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...contracts.errors import InputError
from .answers import pooled
from .call import Call, answered, refused, reply
from .generating import Written, begin, complete, ids_or_text, pieces, sampling_of
from .model import ServedModel, Version
from .plain import read_texts, run_rows
from .refusal import Refusal
from .server import Server
from .streaming import EventStream

_UNSUPPORTED = ("logprobs", "top_logprobs", "echo", "suffix", "best_of", "logit_bias", "tools", "functions", "audio")
ROLES = ("system", "developer", "user", "assistant", "tool")


def routes(server: Server) -> list[Route]:
    """OpenAI's routes; errors have its form too."""
    posts = (("completions", _completions), ("chat/completions", _chat), ("embeddings", _embeddings))
    return [
        *(
            Route(f"/v1/{path}", answered(server, "generate", handler, _refused), methods=["POST"])
            for path, handler in posts
        ),
        Route("/v1/models", _models(server)),
        Route("/v1/models/{model}", _models(server)),
    ]


async def _completions(call: Call) -> Response:
    asked = await call.json()
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    return await _written(call, asked, lambda version: ids_or_text(prompt), _completion)


async def _chat(call: Call) -> Response:
    asked = await call.json()
    messages = [_message(message) for message in _messages(asked)]

    def prompt(version: Version) -> list[int]:
        template, encoder = version.loaded.chat, version.loaded.bundle.encoder
        if template is None or encoder is None:
            raise Refusal(400, f"model '{call.model}' has no chat template: use /v1/completions")
        try:
            return encoder.ids(template(messages), special=False)
        except (InputError, UnicodeError, TypeError) as error:
            raise Refusal(400, str(error)) from None

    return await _written(call, asked, prompt, _chat_completion)


async def _written(
    call: Call, asked: Mapping[str, Any], prompt: Callable[[Version], Any], form: Callable[..., dict[str, Any]]
) -> Response:
    """Write a text, whole or as events."""
    for key in _UNSUPPORTED:
        if asked.get(key):
            raise Refusal(400, f"'{key}' is not supported")
    if asked.get("n", 1) not in (1, None):
        raise Refusal(400, "'n' is not supported: one text is written")
    head = {"id": f"cmpl-{call.id}", "created": int(time.time()), "model": asked.get("model")}
    with contextlib.ExitStack() as stack:
        version = stack.enter_context(call.server.using(call, _name(call.server, asked)))
        if version.loaded.generator is None:
            raise Refusal(400, f"model '{call.model}' does not write text")
        sampling = sampling_of(version.loaded.generator, asked, call.server.settings)
        if not asked.get("stream"):
            found = await complete(call, version, prompt(version), sampling)
            usage = found["usage"]
            return reply({**head, **form(found["text"], found["finish_reason"]), "usage": usage})
        stream, written = await begin(call, version, prompt(version), sampling)
        options = asked.get("stream_options")
        wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        events = _events(pieces(call, stream, written), written, head, form, wants_usage)
        return EventStream(call, events, stack.pop_all())
    raise AssertionError("unreachable")  # pragma: no cover


async def _events(
    parts: AsyncGenerator[str, None],
    written: Written,
    head: Mapping[str, Any],
    form: Callable[..., dict[str, Any]],
    wants_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    async with contextlib.aclosing(parts):
        first = True
        async for text in parts:
            if text or first:
                yield {**head, **form(text, None, chunk=True, first=first)}
                first = False
    yield {**head, **form("", written.finish, chunk=True)}
    if wants_usage:
        yield {**head, **form("", None, chunk=True), "choices": [], "usage": written.usage}


def _completion(text: str, finish: str | None, *, chunk: bool = False, first: bool = False) -> dict[str, Any]:
    return {
        "object": "text_completion",
        "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}],
    }


def _chat_completion(text: str, finish: str | None, *, chunk: bool = False, first: bool = False) -> dict[str, Any]:
    if not chunk:
        message = {"role": "assistant", "content": text}
        return {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        }
    delta = {"role": "assistant"} if first else {}
    return {
        "object": "chat.completion.chunk",
        "choices": [
            {"index": 0, "delta": {**delta, **({"content": text} if text or first else {})}, "finish_reason": finish}
        ],
    }


async def _embeddings(call: Call) -> Response:
    call.route = "predict"
    asked = await call.json()
    if asked.get("dimensions") is not None:
        raise Refusal(400, "'dimensions' is not supported")
    form = asked.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise Refusal(400, "'encoding_format' is to be float or base64")
    texts = asked.get("input")
    texts = [texts] if isinstance(texts, str) else texts
    settings = call.server.settings
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "'input' is to be a text or a list of texts")
    if len(texts) > settings.max_texts or max(map(len, texts)) > settings.max_text_characters:
        raise Refusal(413, f"at most {settings.max_texts} texts of {settings.max_text_characters} characters are read")
    with call.server.using(call, _name(call.server, asked)) as version:
        if version.loaded.bundle.task != "feature-extraction":
            raise Refusal(400, f"model '{call.model}' makes no embeddings: it is for {version.loaded.bundle.task}")
        read = await read_texts(call, version.loaded, texts)
        outputs = await run_rows(call, version, [tokens.feeds for tokens in read], call.deadline())
        vectors = [pooled(out, tokens.feeds) for out, tokens in zip(outputs, read, strict=True)]
    used = sum(len(tokens.ids) for tokens in read)
    data = [{"object": "embedding", "index": i, "embedding": _vector(v, form)} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": used, "total_tokens": used}
    return reply({"object": "list", "data": data, "model": call.model, "usage": usage})


def _vector(vector: np.ndarray, form: str) -> Any:
    vector = np.ascontiguousarray(vector, "<f4")
    return vector if form == "float" else base64.b64encode(vector.tobytes()).decode("ascii")


def _name(server: Server, asked: Mapping[str, Any]) -> str:
    """The model that is asked for; the only one without a name."""
    name = asked.get("model")
    if name is None and len(server.models) == 1:
        return next(iter(server.models))
    if not isinstance(name, str):
        raise Refusal(400, "'model' is to be the name of a model")
    return name


def _messages(asked: Mapping[str, Any]) -> list[Any]:
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "'messages' is to be a list of messages")
    return messages


def _message(message: Any) -> dict[str, str]:
    """A role and its text, out of a text or of parts that are text."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refusal(400, f"a message is to have a role: {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise Refusal(400, "a message is to have a text as its content")
    return {"role": message["role"], "content": content}


def _models(server: Server) -> Any:
    def entry(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "onnxpress",
            "task": model.bundle.task,
            "version": model.version,
        }

    async def models(request: Request) -> Response:
        name = request.path_params.get("model")
        if name is None:
            return reply({"object": "list", "data": [entry(model) for model in server.models.values()]})
        try:
            return reply(entry(server.find(name)))
        except Refusal as refusal:
            return _refused(refusal)

    return models


def _refused(refusal: Refusal) -> Response:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
    kind = kinds.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    told = {"message": refusal.message, "type": kind, "param": None, "code": None}
    return refused(refusal, {"error": told})
