# SPDX-License-Identifier: Apache-2.0
"""Graphs that went through an optimizer: com.microsoft's operators, and ONNX's own converter of versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxpress.exporters import graph_file
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from zoo import exported
from zoo.export import quiet
from zoo.graph import Graph
from zoo.onnx_text import convert

_EXPORTED = {graph.name: graph for graph in exported.GRAPHS}


def _by_onnxruntime(model_type: str) -> Callable[[Path, Path], Path]:
    """ONNX Runtime's optimizer for transformers, called as its documentation shows."""

    def fuse(file: Path, to: Path) -> Path:
        from onnxruntime.transformers import optimizer

        with quiet():
            fused = optimizer.optimize_model(str(file), model_type=model_type, num_heads=4, hidden_size=64, opt_level=0)
            fused.save_model_to_file(str(to))
        return to

    return fuse


def _by_onnxpress(*passes: Pass) -> Callable[[Path, Path], Path]:
    """Our own passes, after `clean` and `fuse`."""

    def change(file: Path, to: Path) -> Path:
        model = graph_file.read(file)
        for step in (Clean(), Fuse(optional=True), *passes):
            model, _ = run_pass(step, model)
        graph_file.write(model, to)
        return to

    return change


def _made(name: str, description: str, source: str, change: Callable[..., Path], **differs: Any) -> Graph:
    """Another graph, changed."""
    origin = _EXPORTED[source]

    def build(folder: Path) -> Path:
        return change(origin.build(folder), to=folder / f"{name}.onnx")

    return Graph(name, description, differs.get("opset", origin.opset), build, origin.draw)


GRAPHS = [
    _made("bert_13_onnxruntime", "Attention, SkipLayerNormalization, BiasGelu by ONNX Runtime's optimizer",
          "bert_13", _by_onnxruntime("bert")),
    _made("gpt2_17_onnxruntime", "GPT-2 by ONNX Runtime's optimizer", "gpt2_17", _by_onnxruntime("gpt2")),
    _made("bert_18_onnxpress", "MultiHeadAttention by our clean and fuse", "bert_18", _by_onnxpress()),
    _made("roberta_20_onnxpress", "RoBERTa by our clean and fuse", "roberta_20", _by_onnxpress()),
    _made("distilbert_21_int8", "int8 weights, activations quantized as they come", "distilbert_21",
          _by_onnxpress(QuantizeDynamic())),
    _made("resnet_11_fp16", "float16 weights and arithmetic", "resnet_11", _by_onnxpress(CastPass(to="float16")),
          opset=13),
    _made("unet_16_to_21", "U-Net, brought to 21 by ONNX's converter", "unet_16",
          lambda file, to: convert(file, 21, to), opset=21),
    _made("resnext_13_to_24", "ResNeXt with BatchNorm, brought to 24 by ONNX's converter", "resnext_13",
          lambda file, to: convert(file, 24, to), opset=24),
]  # fmt: skip
