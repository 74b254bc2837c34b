# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen and when to stop: what transformers calls the generation config, in one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...contracts.errors import InputError, did_you_mean

DEFAULT_NEW_TOKENS = 256
"""Where neither the caller nor generation_config.json says; transformers would stop at 20 tokens, prompt included."""


@dataclass(frozen=True)
class Sampling:
    """Names and meanings are those of transformers' GenerationConfig, with two differences: temperature 0 is greedy
    (what transformers has in `do_sample`), and `stop` is `stop_strings`, which are not part of the text.

    Attributes:
        temperature: 0 takes the likeliest token each time; else logits are divided by it before one is drawn.
        top_k: Draw among this many of the likeliest tokens; 0 among all.
        top_p: Draw among the likeliest tokens that together have this probability; in (0, 1].
        min_p: Draw among tokens at least this likely relative to the likeliest; 0 among all.
        repetition_penalty: Logits of tokens that have occurred, also in the prompt, are divided by it (where positive;
            multiplied where negative); 1 changes nothing.
        no_repeat_ngram_size: No n-gram occurs twice; 0 does not look.
        seed: Of the random numbers; None takes another each time. Row i of a batch draws from a stream of its own.
        max_new_tokens: Stop after so many tokens, or earlier at the model's longest sequence.
        min_new_tokens: Do not end with an end token before.
        stop: Texts that end the generation; they may lie across tokens, and are cut off.
        eos: Tokens that end the generation.
        suppress: Tokens that are never chosen.
        begin_suppress: Tokens that are not chosen first.
        forced_bos: The first token that an encoder-decoder writes.
        forced_eos: The token that is written where max_new_tokens is reached.
        beams: Texts that beam search follows at once; 1 does not search.
        length_penalty: Beam search divides a text's log probability by its length to this power.
        early_stopping: Beam search stops at `beams` finished texts (True), where a better one is unlikely (False), or
            where it is impossible ("never").

    Raises:
        InputError: A value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, low=0.0)
        _require_number("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _require_number("min_p", self.min_p, low=0.0, high=1.0)
        _require_number("repetition_penalty", self.repetition_penalty, low=0.0, open_low=True)
        _require_number("length_penalty", self.length_penalty)
        for name, low in (
            ("top_k", 0), ("no_repeat_ngram_size", 0), ("max_new_tokens", 1), ("min_new_tokens", 0), ("beams", 1),
        ):  # fmt: skip
            _require_whole(name, getattr(self, name), low)
        if self.seed is not None:
            _require_whole("seed", self.seed, 0)
        if any(not text for text in self.stop):
            raise InputError("a stop string is empty", next_step="Leave it out.")
        if self.beams > 1 and self.temperature > 0:
            raise InputError("beam search draws nothing", next_step="Use temperature 0 with beams, or one beam.")
        if self.early_stopping not in (True, False, "never"):
            raise InputError("early_stopping is true, false or 'never'")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    def changed(self, **changes: Any) -> Sampling:
        """A copy with other values; None leaves a value as it is, and a temperature alone ends a beam search.

        Raises:
            InputError: A name is unknown, or a value is outside its range.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        for name in given:
            if name not in self.__dataclass_fields__:
                raise InputError(f"there is no '{name}'", next_step=did_you_mean(name, self.__dataclass_fields__))
        if given.get("temperature", 0) != 0:
            given.setdefault("beams", 1)
        if "stop" in given:
            given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
        return replace(self, **given)


def sampling_of(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], *, encoder_decoder: bool = False
) -> Sampling:
    """What a bundle's generation_config.json asks for, and config.json where that is silent.

    Args:
        generation_config: generation_config.json; may be empty.
        config: config.json; may be empty.
        encoder_decoder: Whether the model begins with a token of its own, which `max_length` counts.
    """

    def asked(name: str, default: Any = None) -> Any:
        found = generation_config.get(name)
        if found is None and not generation_config:
            found = _from_config(config, name)
        return default if found is None else found

    began = 1 if encoder_decoder else 0
    new = asked("max_new_tokens") or (int(asked("max_length", 0)) - began if encoder_decoder else 0)
    eos = asked("eos_token_id")
    return Sampling(
        temperature=float(asked("temperature", 1.0)) if asked("do_sample", False) else 0.0,
        top_k=int(asked("top_k", 50)),
        top_p=float(asked("top_p", 1.0)),
        min_p=float(asked("min_p", 0.0)),
        repetition_penalty=float(asked("repetition_penalty", 1.0)),
        no_repeat_ngram_size=int(asked("no_repeat_ngram_size", 0)),
        max_new_tokens=int(new) if new and new > 0 else DEFAULT_NEW_TOKENS,
        min_new_tokens=max(
            int(asked("min_new_tokens", 0)), int(asked("min_length", 0)) - began if encoder_decoder else 0
        ),
        stop=_texts(asked("stop_strings")),
        eos=_ids(eos if eos is not None else _from_config(config, "eos_token_id")),
        suppress=_ids(asked("suppress_tokens")),
        begin_suppress=_ids(asked("begin_suppress_tokens")),
        forced_bos=asked("forced_bos_token_id") if encoder_decoder else None,
        forced_eos=_ids(asked("forced_eos_token_id")),
        beams=1 if asked("do_sample", False) else int(asked("num_beams", 1)),
        length_penalty=float(asked("length_penalty", 1.0)),
        early_stopping=asked("early_stopping", False),
    )


def token_of(name: str, generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """A special token's id (`bos_token_id`), out of generation_config.json or config.json; the first of several."""
    found = generation_config.get(name)
    ids = _ids(found if found is not None else _from_config(config, name))
    return ids[0] if ids else None


def _from_config(config: Mapping[str, Any], name: str) -> Any:
    """A value of config.json, or of the text model within it."""
    if config.get(name) is not None:
        return config[name]
    inner = config.get("text_config") or config.get("decoder")
    return inner.get(name) if isinstance(inner, Mapping) else None


def _ids(value: Any) -> tuple[int, ...]:
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    return tuple(int(i) for i in values)


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _require_number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low:g}" if low > -math.inf else "a number"
        bounds += f" and at most {high:g}" if high < math.inf else ""
        raise InputError(f"{name} has to be {bounds}, not {value!r}")


def _require_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"{name} has to be a whole number from {low}, not {value!r}")
