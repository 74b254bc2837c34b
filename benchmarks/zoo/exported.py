# SPDX-License-Identifier: Apache-2.0
"""Networks with random weights, exported by torch's two exporters and by ours, at different operator sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from zoo import convolutional_networks as images
from zoo import other_networks as other
from zoo.export import Axes, by_dynamo, by_onnxpress, by_torchscript, spread
from zoo.graph import TOKENS, VOCABULARY, Draw, Feeds, Graph, inputs, integers, normal, texts, uniform
from zoo.transformers_models import Outputs, sequence_axes, tiny

Export = Callable[..., Path]
EXPORTERS: dict[str, Export] = {"dynamo": by_dynamo, "script": by_torchscript, "onnxpress": by_onnxpress}
_TITLES = {"dynamo": "dynamo", "script": "TorchScript", "onnxpress": "our exporter"}

_IMAGE = inputs(image=normal(3, 32, 32))
_WORDS = inputs(input_ids=integers(0, VOCABULARY, TOKENS))


def network(
    name: str, description: str, exporter: str, opset: int, make: Callable[[], nn.Module], draw: Draw = _IMAGE, *,
    outputs: Sequence[str] = ("logits",), axes: Axes | None = None, **settings: Any,
) -> Graph:  # fmt: skip
    """A graph of a module without weights of its own; only the first axis is dynamic if `axes` does not say more."""

    def build(folder: Path) -> Path:
        feeds = draw(2, np.random.default_rng(0))
        dynamic = axes or {name: {0: "batch"} for name in feeds}
        return EXPORTERS[exporter](
            spread(make()), feeds, folder / f"{name}.onnx", opset=opset, axes=dynamic, outputs=outputs, **settings
        )

    return Graph(name, f"{description} ({_TITLES[exporter]})", opset, build, draw)


def transformer(
    name: str, description: str, exporter: str, opset: int, kind: str, draw: Draw, *,
    outputs: Sequence[str] = ("logits",), attention: str = "sdpa", **settings: Any,
) -> Graph:  # fmt: skip
    """A graph of one of `transformers_models.SETTINGS`; batch and length are dynamic where the inputs are tokens."""

    def build(folder: Path) -> Path:
        feeds = draw(2, np.random.default_rng(0))
        axes = {name: {0: "batch"} for name in feeds} if "pixel_values" in feeds else sequence_axes(list(feeds))
        module = Outputs(tiny(kind, attention=attention), list(feeds), outputs).eval()
        return EXPORTERS[exporter](
            module, feeds, folder / f"{name}.onnx", opset=opset, axes=axes, outputs=outputs, **settings
        )

    return Graph(name, f"{description} ({_TITLES[exporter]})", opset, build, draw)


def _small_graphs(batch: int, random: np.random.Generator) -> Feeds:
    """So many graphs of 9 nodes and 20 edges as one graph of separate parts."""
    first = np.repeat(9 * np.arange(batch), 20)
    return {
        "features": random.standard_normal((9 * batch, 24)).astype(np.float32),
        "edges": random.integers(0, 9, (2, 20 * batch)) + first,
    }


_GRAPH_AXES = {"features": {0: "nodes"}, "edges": {1: "edges"}}
_CLICKS = inputs(categories=integers(0, 20, 4), numbers=normal(6))
_PIXELS, _LARGE_PIXELS = inputs(pixel_values=normal(3, 32, 32)), inputs(pixel_values=normal(3, 64, 64))
_TOWERS = inputs(user=normal(24), item=normal(40))

CONVOLUTIONAL = [
    network("vgg_9", "biases, Flatten of channels and pixels to Gemm", "script", 9, images.Vgg),
    network("resnet_11", "bottlenecks with projections, BatchNorm folded", "script", 11, images.resnet),
    network("resnext_13", "grouped convolutions, BatchNorm as nodes", "script", 13, lambda: images.resnet(8),
            keep_normalization=True),
    network("resnext_20", "grouped convolutions", "dynamo", 20, lambda: images.resnet(4)),
    network("mobilenetv2_10", "depthwise, ReLU6", "script", 10, lambda: images.mobilenet(2)),
    network("mobilenetv3_18", "depthwise, squeeze-and-excite, hard-swish", "dynamo", 18, lambda: images.mobilenet(3)),
    network("mobilenetv3_14", "the same, BatchNorm as nodes", "script", 14, lambda: images.mobilenet(3),
            keep_normalization=True),
    network("shufflenet_12", "channels split, joined and interleaved", "script", 12, images.shufflenet),
    network("shufflenet_21", "the same", "onnxpress", 21, images.shufflenet),
    network("densenet_15", "every layer reads all before it, BatchNorm before the convolution", "script", 15,
            images.densenet, keep_normalization=True),
    network("googlenet_19", "four branches concatenated", "dynamo", 19, images.googlenet),
    network("unet_16", "ConvTranspose, skips concatenated", "script", 16, images.UNet, outputs=("mask",)),
    network("unet_22", "the same", "dynamo", 22, images.UNet, outputs=("mask",)),
    network("pyramid_17", "Resize, sum of two sizes, PRelu, two outputs", "script", 17, images.Pyramid,
            outputs=("scores", "boxes")),
    network("groupnorm_18", "GroupNorm with residual", "dynamo", 18, images.GroupNormNet),
    network("groupnorm_21", "GroupNorm of opset 21", "dynamo", 21, images.GroupNormNet),
    network("style_11", "InstanceNormalization, reflected Pad, Resize", "script", 11, images.StyleNet,
            outputs=("picture",)),
    network("superresolution_13", "channels become pixels", "script", 13, images.SuperResolution,
            inputs(picture=uniform(1, 24, 24)), outputs=("large",)),
    network("mixer_23", "linear layers over patches and over channels in turn", "onnxpress", 23, images.Mixer),
    network("speech_commands_17", "separable 1-D convolutions with residuals", "script", 17, images.SpeechCommands,
            inputs(spectrum=normal(40, 50))),
]  # fmt: skip

OTHER = [
    network("lstm_tagger_14", "two LSTM layers", "script", 14, lambda: other.LstmTagger(VOCABULARY), _WORDS),
    network("gru_classifier_18", "bidirectional GRU, maximum over time", "script", 18, other.GruClassifier,
            inputs(features=normal(16, 20))),
    network("textcnn_12", "1-D convolutions of three widths, concatenated", "script", 12,
            lambda: other.TextCnn(VOCABULARY), _WORDS),
    network("deepfm_18", "several embeddings, pairwise products, MLP with BatchNorm", "dynamo", 18,
            lambda: other.DeepFm((20, 30, 40, 50)), _CLICKS, outputs=("click",)),
    network("two_towers_13", "two inputs, two MLPs, their cosine", "script", 13, other.Tower, _TOWERS,
            outputs=("cosine",)),
    network("autoencoder_20", "weights used twice, once transposed", "onnxpress", 20, other.Autoencoder,
            inputs(features=normal(40)), outputs=("code", "decoded")),
    network("gcn_18", "graph convolution by ScatterElements", "dynamo", 18, other.Gcn, _small_graphs,
            axes=_GRAPH_AXES),
    network("swiglu_24", "SwiGLU blocks, RMSNormalization of opset 24", "dynamo", 24, other.GatedMlp,
            inputs(features=normal(48))),
    network("swiglu_19", "SwiGLU blocks, RMSNorm in parts", "onnxpress", 19, other.GatedMlp,
            inputs(features=normal(48))),
    network("experts_18", "mixture of experts by Einsum", "dynamo", 18, other.Experts, inputs(features=normal(20))),
    network("speech_transformer_20", "1-D convolutions with GroupNorm over samples, then attention", "onnxpress", 20,
            other.SpeechTransformer, inputs(samples=normal(640))),
    network("chargpt_23", "fused query-key-value, Attention of opset 23, tied output", "dynamo", 23,
            lambda: other.CharGpt(VOCABULARY), _WORDS, axes=sequence_axes(["input_ids"])),
    network("chargpt_17", "fused query-key-value, attention in parts, tied output", "script", 17,
            lambda: other.CharGpt(VOCABULARY), _WORDS, axes=sequence_axes(["input_ids"])),
]  # fmt: skip

_PAIRS = texts(token_types=True)
_STATES = ("last_hidden_state",)

TRANSFORMERS = [
    transformer("bert_18", "BERT", "dynamo", 18, "bert", _PAIRS),
    transformer("bert_23", "BERT with Attention of opset 23", "dynamo", 23, "bert", _PAIRS),
    transformer("bert_13", "BERT, attention and LayerNorm in parts", "script", 13, "bert", _PAIRS, attention="eager"),
    transformer("roberta_20", "RoBERTa, positions from the padding", "onnxpress", 20, "roberta", texts()),
    transformer("albert_20", "ALBERT, one layer used twice", "onnxpress", 20, "albert", _PAIRS),
    transformer("distilbert_21", "DistilBERT", "dynamo", 21, "distilbert", texts()),
    transformer("electra_19", "ELECTRA, embeddings projected", "dynamo", 19, "electra", _PAIRS),
    transformer("deberta_20", "DeBERTa-v2, relative positions gathered", "onnxpress", 20, "deberta-v2", _PAIRS),
    transformer("mpnet_20", "MPNet, one bias of relative positions for all layers", "onnxpress", 20, "mpnet", texts(),
                outputs=_STATES),
    transformer("modernbert_22", "ModernBERT, rotary, gated MLP, local attention", "onnxpress", 22, "modernbert",
                texts()),
    transformer("gpt2_18", "GPT-2, weights transposed (Conv1D)", "dynamo", 18, "gpt2", texts()),
    transformer("gpt2_17", "GPT-2, attention in parts", "script", 17, "gpt2", texts(), attention="eager"),
    transformer("llama_20", "Llama with grouped-query attention, no cache", "dynamo", 20, "llama", texts()),
    transformer("llama_24", "Llama with Attention and RMSNormalization of opset 24", "dynamo", 24, "llama", texts()),
    transformer("qwen2_21", "Qwen2, biases of query, key and value", "onnxpress", 21, "qwen2", texts()),
    transformer("t5_encoder_20", "T5 encoder, gated GELU, relative positions", "onnxpress", 20, "t5", texts(),
                outputs=_STATES),
    transformer("clip_text_18", "CLIP's text encoder, quick GELU", "dynamo", 18, "clip-text", texts(),
                outputs=("last_hidden_state", "pooler_output")),
    transformer("vit_18", "ViT", "dynamo", 18, "vit", _PIXELS),
    transformer("swin_20", "Swin, shifted windows", "onnxpress", 20, "swin", _PIXELS),
    transformer("convnext_22", "ConvNeXt, depthwise 7x7, layer scale", "dynamo", 22, "convnext", _PIXELS),
    transformer("mobilevit_18", "MobileViT, convolutions and attention over unfolded patches", "dynamo", 18,
                "mobilevit", _LARGE_PIXELS),
]  # fmt: skip

GRAPHS = [*CONVOLUTIONAL, *OTHER, *TRANSFORMERS]
