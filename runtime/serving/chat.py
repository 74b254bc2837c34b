# SPDX-License-Identifier: Apache-2.0
"""Messages to one prompt by the bundle's chat template, rendered in Jinja's sandbox, as transformers does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from ...contracts.errors import InputError


class ChatTemplate:
    """A template.

    Args:
        source: Jinja.
        words: Special tokens by name (`bos_token`), which templates refer to.

    Raises:
        InputError: It is no Jinja template.
    """

    def __init__(self, source: str, words: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"the chat template cannot be read: {error}") from None
        self._words, self._error = dict(words), TemplateError

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate | None:
        """The template of a bundle: chat_template.jinja, or the one in tokenizer_config.json; None without one."""
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        source = config.get("chat_template")
        if isinstance(source, list):  # several by name; `default` is the one for chats
            named = {row.get("name"): row.get("template") for row in source if isinstance(row, Mapping)}
            source = named.get("default")
        own = folder / "chat_template.jinja"
        source = own.read_text("utf-8") if own.is_file() else source
        if not isinstance(source, str):
            return None
        words = {name: word for name, token in config.items() if name.endswith("_token") and (word := _word(token))}
        return cls(source, words)

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, up to where the assistant speaks.

        Raises:
            InputError: The template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._words)
        except (self._error, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"the chat template refuses the messages: {error}") from None


def _word(token: Any) -> str | None:
    word = token.get("content") if isinstance(token, Mapping) else token
    return word if isinstance(word, str) else None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes HTML


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
