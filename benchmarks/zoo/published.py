# SPDX-License-Identifier: Apache-2.0
"""Real models: files that others exported, and published weights exported here. Each is left out where it is absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from peers import factories
from peers.assets import ASSETS

from zoo.export import by_dynamo, by_onnxpress, by_torchscript
from zoo.graph import Draw, Graph, inputs, integers, named, normal, texts, uniform
from zoo.transformers_models import Cached, Outputs, published, sequence_axes


def _file(name: str, path: str, description: str, opset: int, draw: Draw, fixed_batch: int | None = None) -> Graph:
    """A file as it is published, copied."""
    return Graph(name, description, opset, lambda f: Path(shutil.copy(ASSETS / path, f)), draw, fixed_batch)


def _silero(batch: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "input": (random.standard_normal((batch, 576)) / 10).astype(np.float32),
        "state": (random.standard_normal((2, batch, 128)) / 10).astype(np.float32),
        "sr": np.array(16000, np.int64),
    }


_IMAGE = inputs(image=normal(3, 32, 32))


def _resnet20(folder: Path) -> Path:
    module, feeds = factories.resnet20()
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return by_torchscript(
        module, arrays, folder / "resnet20.onnx", opset=13, axes={"image": {0: "batch"}}, outputs=["logits"],
        keep_normalization=True,
    )  # fmt: skip


def _resnet44(folder: Path) -> Path:
    module, feeds = factories.resnet44()
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return by_onnxpress(
        module, arrays, folder / "resnet44.onnx", opset=20, axes={"image": {0: "batch"}}, outputs=["logits"]
    )


def _squeezenet(folder: Path) -> Path:
    module, feeds = factories.squeezenet()
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return by_dynamo(
        module, arrays, folder / "squeezenet.onnx", opset=18, axes={"image": {0: "batch"}}, outputs=["logits"]
    )


def _transformer(name: str, path: str, kind: str, draw: Draw, opset: int) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        feeds = draw(2, np.random.default_rng(0))
        module = Outputs(published(ASSETS / path, kind), list(feeds), ["logits"]).eval()
        axes = sequence_axes(list(feeds))
        return by_onnxpress(module, feeds, folder / f"{name}.onnx", opset=opset, axes=axes, outputs=["logits"])

    return build


_LAYERS = 5


def _past(batch: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Three new tokens after six, for the five layers of stories260K, with 4 heads of 8 for keys and values."""
    feeds: dict[str, np.ndarray] = {
        "input_ids": random.integers(3, 512, (batch, 3)),
        "attention_mask": np.ones((batch, 9), np.int64),
    }
    for layer in range(_LAYERS):
        for kind in ("key", "value"):
            past = random.standard_normal((batch, 4, 6, 8)).astype(np.float32)
            feeds[f"past_key_values.{layer}.{kind}"] = past
    return feeds


def _stories_with_past(folder: Path) -> Path:
    feeds = _past(2, np.random.default_rng(0))
    module = Cached(published(ASSETS / "stories260K/derived/hf", "LlamaForCausalLM")).eval()
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 2: "past"} for name in feeds}
    axes |= {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    outputs = ["logits", *(f"present.{layer}.{kind}" for layer in range(_LAYERS) for kind in ("key", "value"))]
    return by_dynamo(module, feeds, folder / "stories_past.onnx", opset=18, axes=axes, outputs=outputs)


def _checkpoint(name: str, path: str, kind: str, description: str, draw: Draw, opset: int) -> Graph:
    """A transformers folder, exported by our exporter."""
    return Graph(name, f"{description} (our exporter)", opset, _transformer(name, path, kind, draw, opset), draw)


_FACE = inputs(input=uniform(3, 240, 320, low=-1))
_ALL: dict[str, Graph] = {
    "onnx_zoo/ort_examples/c_cxx__MNIST__mnist.onnx": _file(
        "mnist_8", "onnx_zoo/ort_examples/c_cxx__MNIST__mnist.onnx", "CNTK's digits, weights among the inputs", 8,
        inputs(Input3=uniform(1, 28, 28, high=255)), 1),
    "ultralight_face/models/onnx/version-slim-320.onnx": _file(
        "face_slim_9", "ultralight_face/models/onnx/version-slim-320.onnx",
        "face detector, BatchNormalization and shape arithmetic as nodes", 9, _FACE, 1),
    "ultralight_face/models/onnx/version-RFB-320_simplified.onnx": _file(
        "face_rfb_9", "ultralight_face/models/onnx/version-RFB-320_simplified.onnx",
        "face detector, dilated branches, simplified", 9, _FACE, 1),
    "fastestdet/example/onnx-runtime/FastestDet.onnx": _file(
        "fastestdet_11", "fastestdet/example/onnx-runtime/FastestDet.onnx", "detector, ShuffleNetV2 with Gather", 11,
        named({"input.1": uniform(3, 352, 352)}), 1),
    "magika_onnx/standard_v2_1/model.onnx": _file(
        "magika_13", "magika_onnx/standard_v2_1/model.onnx", "file types from bytes, from TensorFlow", 13,
        inputs(bytes=integers(0, 257, 4096, dtype=np.int32))),
    "silero_vad/silero_vad.onnx": _file(
        "silero_vad_16", "silero_vad/silero_vad.onnx", "voice activity, all of it inside If", 16, _silero),
    "cifar_resnet/resnet20-12fca82f.th": Graph(
        "cifar_resnet20_13", "ResNet-20 for CIFAR-10, BatchNorm as nodes, shortcuts padded (TorchScript)", 13,
        _resnet20, _IMAGE),
    "cifar_resnet/resnet44-014dd654.th": Graph(
        "cifar_resnet44_20", "ResNet-44 for CIFAR-10, shortcuts padded (our exporter)", 20, _resnet44, _IMAGE),
    "squeezenet_v1.0/derived": Graph(
        "squeezenet_18", "SqueezeNet 1.0 for ImageNet, branches concatenated (dynamo)", 18, _squeezenet,
        inputs(image=normal(3, 227, 227))),
    "minilm-sst2": _checkpoint(
        "minilm_sst2_20", "minilm-sst2", "BertForSequenceClassification", "MiniLM for SST-2, 6 layers",
        texts(token_types=True, vocabulary=30522, first=1000), 20),
    "rxnmapper_albert": _checkpoint(
        "rxnmapper_albert_20", "rxnmapper_albert", "AlbertForMaskedLM", "ALBERT for chemical reactions, 12 layers",
        texts(token_types=True, vocabulary=591, first=20), 20),
    "stories260K/derived/hf": _checkpoint(
        "stories260k_21", "stories260K/derived/hf", "LlamaForCausalLM", "Llama with grouped-query attention, 5 layers",
        texts(vocabulary=512, first=3), 21),
}  # fmt: skip

_ALL["stories260K/derived"] = Graph(
    "stories260k_past_18",
    "the same Llama with past and present keys and values (dynamo)",
    18,
    _stories_with_past,
    _past,
)

GRAPHS = [graph for path, graph in _ALL.items() if (ASSETS / path).exists()]
