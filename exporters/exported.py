# SPDX-License-Identifier: Apache-2.0
"""What every exporter returns: the graph, what it means, and the original that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from ..contracts.signature import Signature

Arrays = Mapping[str, np.ndarray]


class Reference(Protocol):
    """The original, called with the same named arrays as the graph."""

    name: str

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs as numpy arrays, under the graph's output names."""
        ...


class Tokenize(Protocol):
    """Text to model inputs, exactly as the source's own tokenizer has it."""

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> dict[str, np.ndarray]: ...

    def words(self, sentences: Sequence[Sequence[str]]) -> tuple[dict[str, np.ndarray], list[list[int | None]]]: ...


@dataclass(frozen=True)
class SourceInfo:
    """Where the model came from, without any path of the machine.

    Attributes:
        kind: `transformers`, `factory` or `onnx`.
        name: The folder's or file's last component, the hub id, or `package.module:factory`.
        sha256: Of the weights as read (files in name order), or None for a factory.
        architecture: The class, or None.
        parameters: Number of parameters, or None.
    """

    kind: str
    name: str
    sha256: str | None
    architecture: str | None
    parameters: int | None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class ExportedModel:
    """The graph with its signature, its task, its processor files and its reference.

    Attributes:
        model: The graph; passes change it in place.
        name: Of its file: `model`, or `decoder_model` and `encoder_model` of an encoder-decoder.
        companions: The graphs that it works with: the encoder of an encoder-decoder.
        signature: Inputs and outputs.
        task: A name from `contracts.tasks`, or `generic`.
        source: Where it came from.
        reference: The PyTorch original; None when the source is an `.onnx`, whose own graph is then the reference.
        processor_files: Name in the bundle to file, for config.json, tokenizer.json and the like.
        tokenize: Text to inputs, or None when the model does not read text.
        max_length: Longest sequence in tokens that the model's positions allow, or None.
        id2label: Class names, or None.
        fixed_inputs: For a factory, one example input per name; None otherwise.
        known_inputs: Inputs that the original is known to take, such as those of the calls that were observed. Where
            there are some, they are what is compared on and timed with.
        original_file: For an `.onnx` source, the file.
        location: The source as it was given, for loading it again in another process; never written anywhere.
        image_settings: timm's `pretrained_cfg`, for sources that have no processor's files; None otherwise.
        export_details: How the export went: backend, attention implementation, mask form, seconds.
    """

    model: ir.Model
    signature: Signature
    task: str
    source: SourceInfo
    reference: Reference | None = None
    processor_files: dict[str, Path] = field(default_factory=dict)
    tokenize: Tokenize | None = None
    max_length: int | None = None
    id2label: dict[int, str] | None = None
    fixed_inputs: dict[str, np.ndarray] | None = None
    known_inputs: tuple[dict[str, np.ndarray], ...] = ()
    original_file: Path | None = None
    location: str = ""
    image_settings: dict[str, Any] | None = None
    export_details: dict[str, Any] = field(default_factory=dict)
    name: str = "model"
    companions: tuple[ExportedModel, ...] = ()
