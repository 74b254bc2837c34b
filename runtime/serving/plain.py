# SPDX-License-Identifier: Apache-2.0
"""Plain JSON by task: text or a picture in, labels, vectors or text out.

POST /models/NAME/predict  {"text": "..."}, {"text": ["...", "..."], "text_pair": ["...", "..."]},
                           {"question": "...", "context": "..."}, {"image": "<base64>"}, or a picture as the body
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.responses import Response
from starlette.routing import Route

from ...contracts.errors import InputError
from ..text import TextEncoder, Tokens
from .answers import ANSWERS, Asked
from .call import Call, answered, reply
from .generating import complete, sampling_of
from .model import Loaded, Version
from .refusal import NotFinite, Refusal
from .server import Server
from .settings import Settings

_LONG = 4096
"""Characters from which on a text is read beside the event loop."""


def routes(server: Server) -> list[Route]:
    """The routes by task."""
    return [
        Route("/models/{model}/predict", answered(server, "predict", _predict), methods=["POST"]),
    ]


async def _predict(call: Call) -> Response:
    server = call.server
    with server.using(call, call.request.path_params["model"]) as version:
        loaded, deadline = version.loaded, call.deadline()
        if call.request.headers.get("content-type", "").startswith("image/"):
            found = await _pictures(call, version, [await call.body()], None, deadline)
            return _told(call, loaded, found)
        asked = await call.json()
        top = _whole(asked, "top_k")
        if "image" in asked:
            files = [_decoded(text) for text in _list(asked["image"], "image", server.settings)]
            found = await _pictures(call, version, files, top, deadline)
        elif loaded.generator is not None:
            texts = _list(asked.get("text"), "text", server.settings)
            sampling = sampling_of(loaded.generator, asked, server.settings)
            found = [await complete(call, version, text, sampling) for text in texts]
        else:
            found = await _texts(call, version, asked, top, deadline)
        return _told(call, loaded, found)


async def _texts(
    call: Call, version: Version, asked: Mapping[str, Any], top: int | None, deadline: float | None
) -> list[dict[str, Any]]:
    loaded, settings = version.loaded, call.server.settings
    answer = _answer(loaded, call.model)
    first, second = ("question", "context") if loaded.bundle.task == "question-answering" else ("text", "text_pair")
    texts = _list(asked.get(first), first, settings)
    pairs = None if second not in asked and second != "context" else _list(asked.get(second), second, settings)
    if pairs is not None and len(pairs) != len(texts):
        raise Refusal(400, f"'{first}' and '{second}' have {len(texts)} and {len(pairs)} texts")
    read = await read_texts(call, loaded, texts, pairs)
    outputs = await run_rows(call, version, [tokens.feeds for tokens in read], deadline)
    places = texts if pairs is None or second != "context" else pairs
    rows = zip(read, outputs, places, strict=True)
    return [answer(out, Asked(loaded.bundle, tokens, text, top, tokens.feeds)) for tokens, out, text in rows]


async def _pictures(
    call: Call, version: Version, files: Sequence[bytes], top: int | None, deadline: float | None
) -> list[dict[str, Any]]:
    loaded = version.loaded
    answer = _answer(loaded, call.model)
    if loaded.images is None:
        raise Refusal(400, f"model '{call.model}' takes no pictures: POST its tensors to /v2/models/{call.model}/infer")
    try:
        # Decoding a picture takes milliseconds
        read = [await asyncio.to_thread(loaded.images, file) for file in files]
    except InputError as error:
        raise Refusal(400, str(error)) from None
    outputs = await run_rows(call, version, read, deadline)
    return [answer(out, Asked(loaded.bundle, top=top)) for out in outputs]


def _answer(loaded: Loaded, name: str) -> Any:
    if loaded.bundle.task not in ANSWERS:
        raise Refusal(400, f"'{loaded.bundle.task}' has no plain route: POST tensors to /v2/models/{name}/infer")
    return ANSWERS[loaded.bundle.task]


async def read_texts(
    call: Call, loaded: Loaded, texts: Sequence[str], pairs: Sequence[str] | None = None
) -> list[Tokens]:
    """Tokenize, each text by itself, so that no short one is as wide in memory as the longest.

    Raises:
        Refusal: 400, the bundle has no tokenizer, or a text cannot be read; 413, one is too long.
    """
    encoder, settings = loaded.bundle.encoder, call.server.settings
    if encoder is None:
        raise Refusal(400, f"model '{call.model}' has no tokenizer: POST its tensors to /v2/models/{call.model}/infer")

    others: Sequence[str | None] = pairs or [None] * len(texts)

    def read() -> list[Tokens]:
        found = []
        for text, pair in zip(texts, others, strict=True):
            found.append(_tokens(encoder, text, pair, settings))
        return found

    size = sum(map(len, texts)) + sum(map(len, pairs or ()))
    return read() if size < _LONG else await asyncio.to_thread(read)


def _tokens(encoder: TextEncoder, text: str, pair: str | None, settings: Settings) -> Tokens:
    try:
        tokens = encoder.tokens(text, pair)
    except Exception as error:  # noqa: BLE001 - tokenizers' Rust side raises bare Exception, TypeError for half characters
        raise Refusal(400, f"a text cannot be read: {type(error).__name__}") from None
    if encoder.limit is None and len(tokens.ids) > settings.max_tokens:
        raise Refusal(413, f"a text has {len(tokens.ids)} tokens: at most {settings.max_tokens} are read")
    return tokens


async def run_rows(
    call: Call, version: Version, rows: Sequence[Mapping[str, np.ndarray]], deadline: float | None
) -> list[dict[str, np.ndarray]]:
    """Run single rows, those that fit together as one request.

    Returns:
        Outputs with one row each, in the order of the rows.

    Raises:
        NotFinite: 500, an output is not (minus infinity aside, which stands for what cannot be).
    """
    answers = await _rows(call, version, rows, deadline)
    for outputs in answers:
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not (array < np.inf).all():
                raise NotFinite(name, 500)
    return answers


async def _rows(
    call: Call, version: Version, rows: Sequence[Mapping[str, np.ndarray]], deadline: float | None
) -> list[dict[str, np.ndarray]]:
    if len(rows) == 1:
        return [(await call.run(version, rows[0], None, deadline)).outputs]
    joining, most = version.loaded.joining, call.server.settings.max_batch if version.loaded.joining.batched else 1
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(joining.key(row), []).append(number)
    found: dict[int, dict[str, np.ndarray]] = {}
    for numbers in groups.values():
        for start in range(0, len(numbers), most):
            part = numbers[start : start + most]
            group = [rows[number] for number in part]
            ran = await call.run(version, joining.join(group), None, deadline)
            found.update(zip(part, joining.split(ran.outputs, group), strict=True))
    return [found[number] for number in range(len(rows))]


def _told(call: Call, loaded: Loaded, found: list[dict[str, Any]]) -> Response:
    return reply({"model": call.model, "version": loaded.version, "predictions": found})


def _list(value: Any, key: str, settings: Settings) -> list[str]:
    """One text or several.

    Raises:
        Refusal: 400 or 413, it is neither, or they are too many or too long.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, f"'{key}' is to be a text or a list of texts")
    if len(texts) > settings.max_texts:
        raise Refusal(413, f"'{key}' has {len(texts)} entries: at most {settings.max_texts} are taken")
    longest = max(map(len, texts))
    if key != "image" and longest > settings.max_text_characters:
        raise Refusal(413, f"'{key}' has {longest} characters: at most {settings.max_text_characters} are read")
    return texts


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "'image' is not base64") from None


def _whole(asked: Mapping[str, Any], key: str) -> int | None:
    value = asked.get(key)
    if value is not None and (type(value) is not int or not 0 < value <= 10_000):
        raise Refusal(400, f"'{key}' is not a whole number from 1 to 10000")
    return value
