# SPDX-License-Identifier: Apache-2.0
"""What every kind of model comes down to: a flat module, example inputs, names and open axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from ..finish import DynamicAxes


def _nothing(graph: ir.Model) -> None:
    pass


@dataclass
class Traced:
    """One graph to be made, and the original that it has to agree with.

    Attributes:
        name: Of the file: `model`, or one of `encoder_model` and `decoder_model`.
        reference: Called with the tensors of `inputs`, in order; returns a tuple of tensors.
        inputs: Names of the finished graph's inputs.
        outputs: Names of the outputs.
        module: What is traced; takes the tensors of `examples`. As a rule it is `reference`.
        examples: Example tensors by input name; open axes are at least 2 long.
        axes: Input name to {axis: symbol}.
        prefix: What stands before the model's own parameter names in `module`.
        finish: Last changes to the graph, such as replacing an input.
        details: For the manifest.
    """

    name: str
    reference: torch.nn.Module
    inputs: Sequence[str]
    outputs: Sequence[str]
    module: torch.nn.Module
    examples: dict[str, torch.Tensor]
    axes: DynamicAxes
    prefix: str = "model."
    finish: Callable[[ir.Model], None] = _nothing
    details: dict[str, Any] = field(default_factory=dict)


class plain_kernels:
    """Within the block, the model computes with operators that ONNX has, in the form that fusers and runtimes know.

    Attention is MatMul, Softmax, MatMul: SDPA's ONNX translation adds a NaN check on every score and reshapes the keys
    twice (12 IsNaN, 36 Slice on BERT-base), for rows that attend to nothing. A mixture of experts gathers the weights
    of the experts that a token is sent to: the loop over experts depends on data, grouped products have no operator.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        # Parents first: setting one sets those below it. A backbone may support less than the model around it
        self.configs: list[Any] = list(
            {id(c): c for part in model.modules() if (c := getattr(part, "config", None)) is not None}.values()
        )
        self.attention = [getattr(config, "_attn_implementation", None) for config in self.configs]
        self.experts = getattr(getattr(model, "config", None), "_experts_implementation", None)

    def __enter__(self) -> None:
        if any(self.attention) and hasattr(self.model, "set_attn_implementation"):
            self.model.set_attn_implementation("eager")
        self._set_experts("batched_mm")

    def __exit__(self, *_: object) -> None:
        for config, attention in zip(self.configs, self.attention, strict=True):
            if attention is not None:
                config._attn_implementation = attention
        self._set_experts(self.experts)

    def _set_experts(self, experts: str | None) -> None:
        if self.experts and experts and hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation(experts)
