# SPDX-License-Identifier: Apache-2.0
"""A text continued by a graph, and by transformers' own `generate`: both pick the likeliest token each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from onnxpress.contracts.decoding import Decoding
from onnxpress.exporters.dynamo import export_module
from onnxpress.exporters.families.traced import Traced, plain_kernels
from onnxpress.exporters.graph_file import signature_of
from onnxpress.pipeline.decoder_inputs import mask_of_output
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean

Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray]], Arrays]


@dataclass
class Exported:
    """A graph, ready to run, and what it was made from."""

    model: Any
    trace: Traced
    graph: ir.Model
    run: Run

    @property
    def decoding(self) -> Decoding:
        found = Decoding.of(signature_of(self.graph))
        assert found is not None
        return found

    def original(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        with torch.no_grad():
            results = self.trace.reference(*(torch.from_numpy(feeds[name]) for name in self.trace.inputs))
        return {name: tensor.numpy() for name, tensor in zip(self.trace.outputs, results, strict=True)}


def build(auto_class: str, config: Any) -> Any:
    """A model with random weights, spread widely enough that its layers matter."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None  # an end would stop `generate`, not the graph
    model.generation_config.pad_token_id = 0
    return model


def export(model: Any, trace: Traced) -> Exported:
    with plain_kernels(model):
        graph = export_module(
            trace.module,
            trace.examples,
            output_names=trace.outputs,
            dynamic_axes=trace.axes,
            opset=20,
            strip_prefix=trace.prefix,
        )
    trace.finish(graph)
    graph, _ = run_pass(Clean(), graph)
    return Exported(model, trace, graph, runner(graph))


def runner(graph: ir.Model) -> Run:
    data = ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def texts(vocabulary: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and a mask with padding on the left, a token more in each row."""
    ids = np.random.default_rng(3).integers(3, vocabulary, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, :row] = 0
    return ids, mask


def continued(run: Run, decoding: Decoding, ids: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    """`steps` tokens after `ids`, by the graph: the text in one call, then a token in each."""
    cache, new, tokens = None, ids, []
    for _ in range(steps):
        outputs = run(decoding.feeds(new, mask, cache, keep=1))
        cache, new = decoding.next_cache(outputs), outputs["logits"][:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        tokens.append(new)
    return np.concatenate(tokens, axis=1)


def generated(model: Any, ids: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    """`steps` tokens after `ids`, by transformers."""
    with torch.no_grad():
        result = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=steps,
            do_sample=False,
            use_cache=True,
        )
    found: np.ndarray = result[:, -steps:].numpy()
    return found


def relative_error(expected: np.ndarray, got: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Where the mask [batch, tokens], if the output has a value for each token, is 1: nobody reads the others."""
    assert expected.shape == got.shape
    counts = None if mask is None else mask_of_output(mask.astype(bool), expected.shape)
    if counts is not None:
        expected, got = expected[counts], got[counts]
    return float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-12))
