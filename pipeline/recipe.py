# SPDX-License-Identifier: Apache-2.0
"""Recipes: what is done to a model, as data. One YAML file holds everything that a run needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..contracts.errors import InputError, did_you_mean
from ..exporters.settings import ExportSettings
from .gates import Gate
from .passes.base import Pass, pass_named

_Model = TypeVar("_Model", bound=BaseModel)

SUFFIXES = {
    "fp32": "",
    "fp16": "_fp16",
    "bf16": "_bf16",
    "int8": "_int8",
    "uint8": "_uint8",
    "quantized": "_quantized",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bnb4": "_bnb4",
}
"""Variant to file name suffix, as transformers.js looks for them: `onnx/model_quantized.onnx`."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchmarkSettings(_Section):
    """How the result is timed.

    Attributes:
        rounds: Interleaved rounds a setting.
        max_seconds: Time after which a setting stops early, after a full round.
        batch: Batch of the compute-bound setting.
        sequence: Its length in tokens, for models that read text.
        threads: Threads of every contender; None takes the processor's cores.
    """

    rounds: int = Field(default=30, ge=5)
    max_seconds: float = Field(default=60.0, gt=0)
    batch: int = Field(default=8, ge=1)
    sequence: int = Field(default=128, ge=1)
    threads: int | None = Field(default=None, ge=1)


class ValidationSettings(_Section):
    """How the result is compared.

    Attributes:
        export_tolerance: Largest error of the exported fp32 graph, relative to the largest output value; above it the
            export has failed.
        examples: Evaluation examples to use at most; None takes all.
        batch: Examples a batch.
    """

    export_tolerance: float = Field(default=1e-3, gt=0)
    examples: int | None = Field(default=None, ge=1)
    batch: int = Field(default=8, ge=1)


class CalibrationSettings(_Section):
    """How passes measure on `--calibration DATA`.

    Attributes:
        examples: Examples to use at most, drawn evenly with a fixed seed.
        batch: Examples of one length a batch, at most.
        memory_limit_mib: What fetched activations and Gram matrices may take at a time.
    """

    examples: int = Field(default=256, ge=1)
    batch: int = Field(default=16, ge=1)
    memory_limit_mib: int = Field(default=1024, ge=1)


class Recipe(_Section):
    """A recipe as the user writes it; see the built-in ones with `onnxpress recipes`."""

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1, max_length=80, pattern=r"^[\w.-]+$")
    variant: str = "fp32"
    export: ExportSettings = ExportSettings()
    passes: tuple[dict[str, Any], ...] = ()
    gates: tuple[str, ...] = ()
    calibration: CalibrationSettings = CalibrationSettings()
    validation: ValidationSettings = ValidationSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, value: str) -> str:
        if value not in SUFFIXES:
            raise ValueError(f"unknown variant '{value}'. {did_you_mean(value, SUFFIXES)}")
        return value

    @property
    def file_name(self) -> str:
        return f"model{SUFFIXES[self.variant]}.onnx"

    def built_passes(self) -> list[Pass]:
        """The settings objects of all passes, in order."""
        return [_build_pass(index, entry) for index, entry in enumerate(self.passes)]

    def parsed_gates(self) -> list[Gate]:
        return [Gate.parse(text) for text in self.gates]

    def to_json(self) -> dict[str, Any]:
        return json.loads(self.model_dump_json())  # type: ignore[no-any-return]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def built_in() -> dict[str, str]:
    """Name to YAML text of every built-in recipe, by name."""
    package = resources.files(f"{__package__}.recipes")
    files = {f.name.removesuffix(".yaml"): f for f in package.iterdir() if f.name.endswith(".yaml")}
    return {name: files[name].read_text("utf-8") for name in sorted(files)}


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), gates: Sequence[str] = ()) -> Recipe:
    """Read a built-in recipe or a YAML file, apply `--set key=value` and `--gate`, and check all of it.

    Raises:
        InputError: Unknown recipe, unreadable YAML, an unknown key or a wrong type, each with the key's full path.
    """
    text, origin = _text_of(name_or_file)
    try:
        data = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{origin}{line}: not valid YAML", next_step="Check the indentation.") from error
    if not isinstance(data, dict):
        raise InputError(f"{origin}: a recipe is a mapping of keys", next_step="Start from: onnxpress recipes fp32")
    for override in overrides:
        _override(data, override)
    recipe = _validated(Recipe, data, origin)
    recipe = recipe.model_copy(update={"gates": (*recipe.gates, *gates)})
    recipe.built_passes()
    recipe.parsed_gates()
    return recipe


def _text_of(name_or_file: str) -> tuple[str, str]:
    recipes = built_in()
    if name_or_file in recipes:
        return recipes[name_or_file], name_or_file
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return path.read_text("utf-8"), path.name
        except FileNotFoundError:
            raise InputError(f"no such recipe file: {path}", next_step="Check the path.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read recipe {path}: {error}", next_step="It has to be UTF-8 text.") from error
    raise InputError(f"unknown recipe '{name_or_file}'", next_step=did_you_mean(name_or_file, recipes))


def _build_pass(index: int, entry: dict[str, Any]) -> Pass:
    settings = dict(entry)
    name = settings.pop("pass", None)
    if not isinstance(name, str):
        raise InputError(f"passes.{index} has no 'pass' key", next_step="Write it as: - pass: clean")
    cls = pass_named(name)
    # YAML has lists where settings are tuples; strict mode would refuse them
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return _validated(cls, settings, f"passes.{index} ({name})")


def _validated(cls: type[_Model], data: dict[str, Any], where: str) -> _Model:
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            fields = _fields_at(cls, first["loc"])
            message = f"{where}: unknown key '{path}'"
            raise InputError(message, next_step=did_you_mean(str(first["loc"][-1]), fields)) from error
        given = first.get("input")
        got = "" if first["type"] == "missing" else f" (got {str(given)[:60]!r})"
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {path}: {reason}{got}", next_step="See: onnxpress recipes NAME") from error


def _fields_at(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    current: Any = cls
    for part in location[:-1]:
        field = current.model_fields.get(part) if isinstance(part, str) and hasattr(current, "model_fields") else None
        if field is None:
            return []
        current = field.annotation
    return list(getattr(current, "model_fields", {}))


def _override(data: dict[str, Any], assignment: str) -> None:
    """Apply one `passes.0.key=value` (a number or a pass's name) or `section.key=value`; the value is YAML."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise InputError(f"--set {assignment}: not of the form key=value", next_step="Example: --set export.opset=20")
    try:
        value = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"--set {assignment}: the value is not YAML", next_step="Quote it.") from error
    parts = key.split(".")
    here: Any = data
    for position, part in enumerate(parts[:-1]):
        here = _step(here, part, ".".join(parts[: position + 1]))
    if isinstance(here, list):
        raise InputError(f"--set {key}: names a whole list entry", next_step="Name a key inside it.")
    if not isinstance(here, dict):
        raise InputError(f"--set {'.'.join(parts[:-1])}: not a section", next_step="See: onnxpress recipes NAME")
    here[parts[-1]] = value


def _step(here: Any, part: str, path: str) -> Any:
    if isinstance(here, list):
        names = [entry.get("pass") if isinstance(entry, dict) else None for entry in here]
        index = int(part) if part.isdecimal() else names.index(part) if part in names else -1
        if not 0 <= index < len(here) or not isinstance(here[index], dict):
            known = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise InputError(f"--set {path}: no such pass", next_step=f"This recipe has {known or 'none'}.")
        return here[index]
    if not isinstance(here, dict):
        raise InputError(f"--set {path}: not a section", next_step="See: onnxpress recipes NAME")
    if here.get(part) is None:
        here[part] = {}
    return here[part]
