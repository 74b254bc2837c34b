# SPDX-License-Identifier: Apache-2.0
"""An exporter's failure: keep its noise from the user, and find the line of the user's own code in its report."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's log lines and deprecations away from the user; its errors still come through.

    torch also prints the half-made graph to standard error before it raises, some hundred lines of it.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, the root last."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of a message that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:limit]


_THIS_PACKAGE = str(Path(__file__).parent)
NOT_THE_USERS = re.compile(r"/(torch|onnxscript|onnx_ir|importlib)/|^<frozen|^" + re.escape(_THIS_PACKAGE))


def place(error: BaseException) -> str:
    """` (model.py line 3, in forward)`: the innermost line of the model's own code that an error names, or ``."""
    errors = chain(error)
    texts = [str(e) for e in errors]
    if (node := _node(error)) is not None:
        texts.append(str(node.meta.get("stack_trace", "")))
    # As torch quotes it: File "x.py", line 3, in forward
    quoted = [
        q for text in reversed(texts) for q in reversed(re.findall(r'File "([^"]+)", line (\d+), in ([^\s,]+)', text))
    ]
    frames = [
        (frame.filename, str(frame.lineno), frame.name)
        for e in reversed(errors)
        for frame in reversed(traceback.extract_tb(e.__traceback__))
    ]
    for file, line, function in (*quoted, *frames):
        if not NOT_THE_USERS.search(file):
            return f" ({Path(file).name} line {line}, in {function})"
    return ""


def part(error: BaseException, module: torch.nn.Module, *prefixes: str) -> str:
    """`encoder.layers.3.attn (Attention)`: the submodule that was being traced or translated, or ``.

    While the model runs, it is a variable of the innermost function that has one; while a graph is translated, the node
    in hand notes it.

    Args:
        error: What the exporter raised.
        module: What was exported.
        prefixes: Left out one after the other at the front of the path, for a module that was wrapped.
    """
    node = _node(error)
    noted = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
    names = {id(m): name for name, m in module.named_modules()}
    ran = ((names[id(v)], type(v)) for v in _variables(error) if isinstance(v, torch.nn.Module) and id(v) in names)
    for path, kind in ([(str(path), kind) for path, kind in reversed(noted)]) or ran:
        name = path + "."
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if name := name.rstrip("."):
            return f"{name} ({kind.__name__ if isinstance(kind, type) else str(kind).rpartition('.')[2]})"
    return ""


def _node(error: BaseException) -> torch.fx.Node | None:
    """The node of a graph that was being translated."""
    return next((v for v in _variables(error) if isinstance(v, torch.fx.Node) and "nn_module_stack" in v.meta), None)


def _variables(error: BaseException) -> Iterator[Any]:
    """The variables of every function that was active when an error was raised, the innermost first."""
    for each in reversed(chain(error)):
        for frame, _ in reversed(list(traceback.walk_tb(each.__traceback__))):
            yield from frame.f_locals.values()
