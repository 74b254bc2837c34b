# SPDX-License-Identifier: Apache-2.0
"""Every error that a user can meet, with its exit code.

    OnnxpressError            1  internal: a bug in onnxpress, or a run that could not go on
    ├── InputError            2  bad input or usage: a path, a recipe, a data file, a target folder
    │   └── BundleError       2  a bundle that is incomplete or was changed after it was written
    ├── GateFailed            3  the result exists but does not meet what was asked of it
    ├── ExportError           4  the source cannot be exported; names the operator, module or line
    └── MissingDependency     5  something needed is not installed; the next step is the command that installs it

Exit code 0 means accepted; 130 means interrupted from the keyboard, as shells have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OnnxpressError(Exception):
    """One clear line for the user, and the next step to take.

    Args:
        message: What is wrong, in one line.
        next_step: What to do about it, in one line; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.message = " ".join(message.split())
        self.next_step = " ".join(next_step.split())


class InputError(OnnxpressError):
    """Bad input or usage."""

    exit_code = 2


class BundleError(InputError):
    """A bundle that is incomplete or was changed after it was written."""


class GateFailed(OnnxpressError):
    """The result does not meet a gate."""

    exit_code = 3


class ExportError(OnnxpressError):
    """The source cannot be exported to ONNX, or the export does not agree with it.

    Attributes:
        backend: The backend that failed, whose place another may take; None where none could do better.
        branches: It is proven that the model takes another branch at other sizes, so that no trace can be right.
    """

    exit_code = 4
    backend: str | None = None
    branches = False


class MissingDependency(OnnxpressError):
    """Something needed is not installed."""

    exit_code = 5


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for a word that begins with `word` or is close to it, or all known words."""
    choices = sorted(known)
    begun = [choice for choice in choices if word and choice.startswith(word)]
    close = begun or get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{close[0]}'?"
    return "Known: " + ", ".join(choices) + "." if choices else ""
