# SPDX-License-Identifier: Apache-2.0
"""What `Session` asks of an engine: ONNX Runtime with one of its providers, or OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..contracts.signature import Signature

Array = np.ndarray[Any, np.dtype[Any]]


class Engine(Protocol):
    """A model loaded into an engine. It may trust its inputs: `Session` has checked them.

    Attributes:
        signature: Inputs and outputs; dynamic axes keep the names they have in the graph.
        threads: Threads that one operator may use, as the engine has set them up.
        load_ms: Milliseconds from the file (or bytes) to a model ready to run, without importing the engine.
    """

    @property
    def signature(self) -> Signature: ...

    @property
    def threads(self) -> int: ...

    @property
    def load_ms(self) -> float: ...

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        """Return the named outputs, in that order, in arrays that later runs leave alone.

        Raises:
            InputError: The model refuses the values.
            OnnxpressError: The model failed while running.
        """
        ...

    def end_profiling(self) -> Path:
        """Finish the trace of all runs so far, in the format of ONNX Runtime's, and return its path."""
        ...


def model_label(model: str | Path | bytes) -> str:
    """What an error message calls the model: never a path."""
    return "the model" if isinstance(model, bytes) else Path(model).name
