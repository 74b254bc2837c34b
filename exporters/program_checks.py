# SPDX-License-Identifier: Apache-2.0
"""What a `.pt2` file may hold before PyTorch is let near it.

`torch.export.load` says itself that it must not be given files from strangers: tensors of unusual classes and custom
objects are unpickled, sizes are evaluated as Python expressions (sympy's `sympify`), an operator is any name below
`torch`, and the types of arguments are imported by name. All of that is text or a table in the archive, so it is read
here first, and only what a plain program needs is let through.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..contracts.errors import ExportError, InputError
from .archives import names_in, read_member

_NO_PICKLE = "Save the program with plain tensors as weights and constants, or pass a package.module:factory."
_ARITHMETIC = {
    *("abs", "add", "and_", "ceil", "eq", "floor", "floordiv", "ge", "getitem", "gt", "index", "invert", "le"),
    *("lshift", "lt", "max", "min", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub"),
    *("truediv", "trunc", "xor"),
}
"""Names below Python's `operator` and `math` that torch.export writes for sizes."""

_SIZES = re.compile(r"torch\._?sym_(\w+)")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|torchvision|onnx|quantized_decomposed)\.\w+(\.[A-Za-z]\w*)?"
)
_TOUCHES_FILES = re.compile(r"torch\.ops\.aten\.(from_file|save|load)\b")
_FUNCTIONS = {
    *("Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "FloatPow", "FloatTrueDiv", "FloorDiv"),
    *("FloorToInt", "Ge", "Gt", "Identity", "IntTrueDiv", "LShift", "Le", "Lt", "Max", "Min", "Mod", "ModularIndexing"),
    *("Mul", "Ne", "Not", "Or", "Pow", "PowByNatural", "PythonMod", "RShift", "RoundDecimal", "RoundToInt", "ToFloat"),
    *("TruncToFloat", "TruncToInt", "Where", "ceiling", "floor", "sqrt", "Float", "Integer", "Rational"),
}
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
_SYMBOL = re.compile(r"_?[a-z]{1,5}\d+")


def check_program(path: Path) -> None:
    """Refuse a program that is damaged, of another version, or that would run anything when it is loaded.

    Raises:
        InputError: It is, with the part that is to blame.
        ExportError: It calls an operator that is not PyTorch's own.
    """
    inner = [name.partition("/")[2] for name in names_in(path)]
    models = [name for name in inner if name.startswith("models/")]
    if models != ["models/model.json"]:
        raise InputError(
            f"{path.name} holds {'no program' if not models else 'several programs'}",
            next_step="Save one with torch.export.save; what AOTInductor compiles is machine code, not a program.",
        )
    _check_payloads(path, inner)
    program = _json(path, "models/model.json")
    _check_version(path, program)
    _check_examples(path)
    for key, value in _entries(program):
        if key in ("target", "as_operator") and isinstance(value, str):
            _check_target(path, value)
        elif key == "expr_str":
            _check_expression(path, value)
        elif key in ("in_spec", "out_spec") and value and re.search(r"default_factory|__enum__", str(value)):
            raise InputError(
                f"{path.name}: the arguments of the program hold a class that would be imported by name",
                next_step="Export the program with dicts, lists and tuples of tensors.",
            )
    for size in dict(program.get("range_constraints") or {}):
        _check_expression(path, size)


def _json(path: Path, member: str) -> dict[str, Any]:
    try:
        return dict(json.loads(read_member(path, member)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: {member} is no JSON", next_step="Copy or save the file again.") from error


def _check_payloads(path: Path, inner: list[str]) -> None:
    """Weights and constants have to be raw bytes with a description, as torch.export.save writes plain tensors."""
    pickled = [n for n in inner if re.match(r"data/(weights|constants)/.*\.pt$", n)]
    for kind in ("weights", "constants"):
        config = _json(path, f"data/{kind}/model_{kind}_config.json")
        for name, payload in dict(config.get("config") or {}).items():
            raw = str(payload.get("path_name")).startswith(("weight_", "tensor_"))
            if payload.get("use_pickle") is not False or not raw:
                pickled.append(name)
    if pickled:
        raise InputError(
            f"{path.name}: '{pickled[0]}' would have to be unpickled, which can run any code", next_step=_NO_PICKLE
        )


def _check_version(path: Path, program: dict[str, Any]) -> None:
    from torch._export.serde.schema import SCHEMA_VERSION

    version = program.get("schema_version") or {}
    major, minor = version.get("major"), version.get("minor")
    if major != SCHEMA_VERSION[0]:
        raise InputError(
            f"{path.name} was written by torch {program.get('torch_version', 'of another version')} in format "
            f"{major}.{minor}; the installed torch {torch.__version__.split('+')[0]} reads format {SCHEMA_VERSION[0]}",
            next_step="Install the torch that wrote it, or save the program again with this one.",
        )


def _check_examples(path: Path) -> None:
    """torch falls back to a full unpickler where the safe one refuses; here the refusal is final."""
    try:
        examples = read_member(path, "data/sample_inputs/model.pt")
        if examples:
            torch.load(io.BytesIO(examples), weights_only=True)  # noqa: TID251 - the safe unpickler
    except InputError:
        raise
    except Exception as error:  # whatever the unpickler meets
        raise InputError(
            f"{path.name}: its example inputs would have to be unpickled, which can run any code", next_step=_NO_PICKLE
        ) from error


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value."""
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield from here.items()
            waiting.extend(here.values())
        elif isinstance(here, list):
            waiting.extend(here)


def _check_target(path: Path, target: str) -> None:
    module, _, name = target.partition(".")
    if (module in ("_operator", "math") and name in _ARITHMETIC) or _SIZES.fullmatch(target):
        return
    if _OPERATOR.fullmatch(target) and not _TOUCHES_FILES.match(target):
        return
    parts = target.removeprefix("torch.ops.").split(".")
    shown = "::".join(parts[:2]) if target.startswith("torch.ops.") else target
    raise ExportError(
        f"{path.name} calls '{shown[:80]}', which is no operator that ONNX could have",
        next_step="Rewrite the model with PyTorch's own operators and export it again.",
    )


def _check_expression(path: Path, text: Any) -> None:
    """A size is arithmetic on symbols; what sympy would evaluate beyond that is refused."""
    try:
        plain = _is_arithmetic(ast.parse(str(text), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        plain = False
    if not plain:
        raise InputError(
            f"{path.name}: a size is given as '{str(text)[:60]}', which is more than arithmetic",
            next_step="Save the program again with torch.export.save.",
        )


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    if isinstance(node, ast.Name):
        return node.id in ("int_oo", "oo", "zoo", "nan") or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "Symbol":  # Symbol('s1', positive=True, integer=True)
            return (
                len(node.args) == 1
                and isinstance(node.args[0], ast.Constant)
                and _SYMBOL.fullmatch(str(node.args[0].value)) is not None
                and all(isinstance(keyword.value, ast.Constant) for keyword in node.keywords)
            )
        # Float('1.5', precision=53)
        plain = [a for a in node.args if not (isinstance(a, ast.Constant) and _NUMBER.fullmatch(str(a.value)))]
        precise = all(k.arg == "precision" and isinstance(k.value, ast.Constant) for k in node.keywords)
        return node.func.id in _FUNCTIONS and precise and all(map(_is_arithmetic, plain))
    parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return isinstance(node, ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.Compare) and all(map(_is_arithmetic, parts))
