# SPDX-License-Identifier: Apache-2.0
"""Into how many pieces NNAPI and Core ML would cut a model, as ONNX Runtime's own usability checker estimates it.

It looks at operators and at whether shapes are fixed, not at attributes: an estimate. Each change between an
accelerator and the processor copies tensors, so that many small pieces are slower than no accelerator at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Partition:
    """What one accelerator would take.

    Attributes:
        accelerator: `NNAPI`, `Core ML (NeuralNetwork)` or `Core ML (MLProgram)`.
        fixed_shapes: Whether all sizes are taken as known; False: the model as it is.
        nodes: Nodes of the model after basic optimization.
        supported: Nodes that it would take.
        partitions: In how many pieces.
        largest: Nodes of the largest piece.
        unsupported: Operators that it does not know.
        advice: `yes`, `maybe` or `no`, the checker's word on whether it pays.
    """

    accelerator: str
    fixed_shapes: bool
    nodes: int
    supported: int
    partitions: int
    largest: int
    unsupported: tuple[str, ...]
    advice: str


def partitions_of(model: Path) -> list[Partition]:
    """Ask the checker for each accelerator, with the model's shapes as they are and with all of them fixed."""
    from onnxruntime.tools.mobile_helpers import usability_checker as checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    accelerators: Mapping[str, Callable[..., Any]] = {
        "NNAPI": checker.check_nnapi_partitions,
        "Core ML (NeuralNetwork)": lambda graph, fixed: checker.check_coreml_partitions(
            graph, fixed, "coreml_supported_neuralnetwork_ops.md"
        ),
        "Core ML (MLProgram)": lambda graph, fixed: checker.check_coreml_partitions(
            graph, fixed, "coreml_supported_mlprogram_ops.md"
        ),
    }
    with tempfile.TemporaryDirectory() as place:
        optimized = Path(place) / "model.onnx"
        optimize_model(model, optimized, use_external_initializers=True)
        shaped = ModelProtoWithShapeInfo(optimized)  # keeps a file of its own until it goes
        found = []
        for name, check in accelerators.items():
            for fixed in (False, True):
                found.append(_partition(name, fixed, check(shaped.model_with_shape_info, not fixed)))
    return found


def _partition(accelerator: str, fixed: bool, info: Any) -> Partition:
    return Partition(
        accelerator,
        fixed,
        info.num_nodes,
        info.num_supported_nodes,
        info.num_partitions,
        max((len(group) for group in info.supported_groups), default=0),
        tuple(sorted(info.unsupported_ops)),
        info.suitability().name.lower() if info.num_nodes else "no",
    )


def table(partitions: list[Partition]) -> str:
    """The same for people, in Markdown."""
    rows = [
        f"| {p.accelerator} | {'all fixed' if p.fixed_shapes else 'as they are'} | {p.supported} of {p.nodes} "
        f"| {p.partitions} | {p.largest} | {p.advice} | {', '.join(map(_short, p.unsupported)) or '-'} |"
        for p in partitions
    ]
    head = ["| accelerator | shapes | nodes taken | pieces | largest | pays | operators it lacks |", "|---" * 7 + "|"]
    return "\n".join([*head, *rows]) + "\n"


def _short(operator: str) -> str:
    return operator.removeprefix("ai.onnx:")
