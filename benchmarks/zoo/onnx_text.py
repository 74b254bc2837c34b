# SPDX-License-Identifier: Apache-2.0
"""Graphs written in ONNX's text form: old operator sets, and operators that no exporter writes.

A graph input whose name is a letter and a number is a weight: `w` Kaiming-sized, `b` a bias, `s` a scale, `m` a mean,
`v` a variance, `e` an embedding, `c` and `t` cosines and sines of positions. Files of IR version 3 keep their weights
among the inputs, as they had to.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper, version_converter

from zoo.graph import TOKENS, VOCABULARY, Draw, Feeds, Graph, inputs, integers, normal

_WEIGHT = re.compile(r"[wbsmvect]\d+")


def write_text(text: str, file: Path) -> Path:
    """Parse, give every weight its values, check and write."""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for value in list(model.graph.input):
        if _WEIGHT.fullmatch(value.name):
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            model.graph.initializer.append(numpy_helper.from_array(_drawn(value.name[0], shape, random), value.name))
            if model.ir_version > 3:
                model.graph.input.remove(value)
    onnx.checker.check_model(model)
    onnx.save(model, file)
    return file


def _drawn(kind: str, shape: list[int], random: np.random.Generator) -> np.ndarray:
    """Values as `spread` in `export.py` draws them."""
    bounds = {"b": (-0.3, 0.3), "s": (0.6, 1.4), "m": (-0.3, 0.3), "v": (0.4, 1.6)}
    if kind in bounds:
        values = random.uniform(*bounds[kind], shape)
    elif kind in "ct":
        angles = np.outer(np.arange(shape[0]), 10000.0 ** -(np.arange(shape[1]) / shape[1]))
        values = np.cos(angles) if kind == "c" else np.sin(angles)
    elif kind == "e":
        values = random.standard_normal(shape) / 2
    else:
        # Filters are [out, in, ...], stacks of matrices [..., in]; of a matrix it does not matter which side is which
        incoming = {2: min(shape), 3: shape[-1]}.get(len(shape), int(np.prod(shape[1:])))
        rows = random.uniform(0.5, 1.7, [shape[0], *[1] * (len(shape) - 1)])
        values = random.standard_normal(shape) * rows / np.sqrt(incoming)
    return values.astype(np.float32)


def convert(file: Path, opset: int, to: Path) -> Path:
    """Bring a file to another operator set with ONNX's own converter."""
    onnx.save(version_converter.convert_version(onnx.load(file), opset), to)
    return to


ALEXNET = """
<ir_version: 3, opset_import: ["": 8]>
alexnet (float[N, 3, 32, 32] image, float[32, 3, 5, 5] w1, float[32] b1, float[48, 16, 3, 3] w2, float[48] b2,
         float[64, 48, 3, 3] w3, float[64] b3, float[96, 1024] w4, float[96] b4, float[10, 96] w5, float[10] b5)
      => (float[N, 10] probability)
{
    shape = Constant <value = int64[2] {0, -1}> ()
    c1 = Conv <kernel_shape = [5, 5], pads = [2, 2, 2, 2]> (image, w1, b1)
    r1 = Relu (c1)
    n1 = LRN <size = 5, alpha = 0.0005, beta = 0.75, bias = 2.0> (r1)
    p1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (n1)
    c2 = Conv <group = 2, pads = [1, 1, 1, 1]> (p1, w2, b2)
    r2 = Relu (c2)
    n2 = LRN <size = 5, alpha = 0.0005, beta = 0.75, bias = 2.0> (r2)
    p2 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (n2)
    c3 = Conv <pads = [1, 1, 1, 1]> (p2, w3, b3)
    r3 = Relu (c3)
    p3 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (r3)
    flat = Reshape (p3, shape)
    d1 = Dropout <ratio = 0.5> (flat)
    f1 = Gemm <transB = 1> (d1, w4, b4)
    r4 = Relu (f1)
    d2 = Dropout <ratio = 0.5> (r4)
    f2 = Gemm <transB = 1> (d2, w5, b5)
    probability = Softmax <axis = 1> (f2)
}
"""
"""Opset 8, weights among the inputs, LRN over channels, convolution in two groups, Dropout left in."""

RESNET = """
<ir_version: 3, opset_import: ["": 9]>
resnet (float[N, 3, 32, 32] image, float[32, 3, 3, 3] w1, float[32] s1, float[32] b1, float[32] m1, float[32] v1,
        float[32, 32, 3, 3] w2, float[32] s2, float[32] b2, float[32] m2, float[32] v2,
        float[32, 32, 3, 3] w3, float[32] s3, float[32] b3, float[32] m3, float[32] v3,
        float[48, 32, 1, 1] w4, float[48] b4, float[32, 3] w5, float[3] b5, float[16, 5] w6, float[5] b6)
     => (float[N, 3] classes, float[N, 5] ages)
{
    c1 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (image, w1)
    n1 = BatchNormalization <epsilon = 0.00001> (c1, s1, b1, m1, v1)
    r1 = Relu (n1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
    n2 = BatchNormalization <epsilon = 0.00001> (c2, s2, b2, m2, v2)
    r2 = Relu (n2)
    c3 = Conv <pads = [1, 1, 1, 1]> (r2, w3)
    n3 = BatchNormalization <epsilon = 0.00001> (c3, s3, b3, m3, v3)
    sum = Add (n3, r1)
    r3 = Relu (sum)
    c4 = Conv (r3, w4, b4)
    pooled = GlobalAveragePool (c4)
    vector = Flatten <axis = 1> (pooled)
    left, right = Split <axis = 1, split = [32, 16]> (vector)
    tall = Unsqueeze <axes = [2]> (left)
    flat = Squeeze <axes = [2]> (tall)
    p1 = MatMul (flat, w5)
    classes = Add (p1, b5)
    p2 = MatMul (right, w6)
    ages = Add (p2, b6)
}
"""
"""Opset 9: BatchNormalization as nodes, Split, Unsqueeze and Squeeze with attributes, two outputs."""

SEGMENTATION = """
<ir_version: 5, opset_import: ["": 10]>
segmentation (float[N, 3, 32, 32] image, float[24, 3, 3, 3] w1, float[24] b1, float[24] s1,
              float[48, 24, 3, 3] w2, float[48] b2, float[32, 48, 3, 3] w3, float[32] b3,
              float[32, 24, 3, 3] w4, float[24] b4, float[5, 48, 1, 1] w5, float[5] b5)
           => (float[N, 5, 32, 32] scores)
<float[4] twice = {1.0, 1.0, 2.0, 2.0}, int64[1] zero = {0}, int64[1] half = {24}, int64[1] axis = {1},
 int64[1] most = {1000}>
{
    c1 = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
    slope = Unsqueeze <axes = [1, 2]> (s1)
    a1 = PRelu (c1, slope)
    p1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a1)
    c2 = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (p1, w2, b2)
    a2 = LeakyRelu <alpha = 0.1> (c2)
    top = Slice (a2, zero, half, axis)
    bottom = Slice (a2, half, most, axis)
    gate = Sigmoid (bottom)
    kept = Mul (top, gate)
    joined = Concat <axis = 1> (kept, bottom)
    c3 = Conv <pads = [1, 1, 1, 1]> (joined, w3, b3)
    a3 = Elu <alpha = 1.0> (c3)
    wide = ConvTranspose <pads = [1, 1, 1, 1]> (a3, w4, b4)
    large = Resize <mode = "nearest"> (wide, twice)
    both = Concat <axis = 1> (a1, large)
    scores = Conv (both, w5, b5)
}
"""
"""Opset 10: Slice with inputs over channels, a gate between two halves, dilation, ConvTranspose, Resize of scales."""

MOBILE = """
<ir_version: 6, opset_import: ["": 11]>
mobile (float[N, 3, 32, 32] image, float[32, 3, 3, 3] w1, float[32] b1, float[32, 1, 3, 3] w2, float[32] b2,
        float[64, 32, 1, 1] w3, float[64] b3, float[64, 1, 3, 3] w4, float[64] b4, float[64, 64, 1, 1] w5,
        float[64] b5, float[64, 16] w6, float[16] b6, float[16, 64] w7, float[64] b7, float[64, 10] w8, float[10] b8)
     => (float[N, 10] logits)
<float low = {0.0}, float high = {6.0}, int64[8] border = {0, 0, 1, 1, 0, 0, 1, 1}>
{
    padded = Pad <mode = "constant"> (image, border)
    c1 = Conv <strides = [2, 2]> (padded, w1, b1)
    a1 = Clip (c1, low, high)
    c2 = Conv <group = 32, auto_pad = "SAME_UPPER"> (a1, w2, b2)
    a2 = Clip (c2, low, high)
    c3 = Conv (a2, w3, b3)
    a3 = Clip (c3, low, high)
    c4 = Conv <group = 64, pads = [1, 1, 1, 1]> (a3, w4, b4)
    a4 = Clip (c4, low, high)
    c5 = Conv (a4, w5, b5)
    residual = Add (a3, c5)
    means = ReduceMean <axes = [2, 3], keepdims = 0> (residual)
    g1 = Gemm (means, w6, b6)
    g2 = Relu (g1)
    g3 = Gemm (g2, w7, b7)
    gate = HardSigmoid <alpha = 0.2, beta = 0.5> (g3)
    tall = Unsqueeze <axes = [2, 3]> (gate)
    scaled = Mul (residual, tall)
    vector = ReduceMean <axes = [2, 3], keepdims = 0> (scaled)
    p = MatMul (vector, w8)
    logits = Add (p, b8)
}
"""
"""Opset 11: depthwise convolutions, Clip with inputs, Pad, squeeze-and-excite of Gemms."""

ATTENTION = """
<ir_version: 7, opset_import: ["": 12]>
attention (int64[N, T] tokens, float[120, 32] e1, float[32, 32] w1, float[32] b1, float[32, 32] w2, float[32] b2,
           float[32, 32] w3, float[32] b3, float[32, 32] w4, float[32] b4, float[32, 96] w5, float[96] b5,
           float[96, 32] w6, float[32] b6, float[4, 8, 32] w7, float[1, 160, 32] w8, float[1, 160, 40] w9,
           float[1, 320] b9, float[40, 6] w10, float[6] b10)
        => (float[N, 6] logits)
<int64[4] heads = {0, 0, 4, 8}, int64[3] flat = {0, 0, 32}, float eighth = {0.3535534}, float half = {0.5},
 float one = {1.0}, float root = {1.4142135}, int64 last = {-1}>
{
    x = Gather (e1, tokens)
    q0 = MatMul (x, w1)
    q1 = Add (q0, b1)
    q2 = Reshape (q1, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (x, w2)
    k1 = Add (k0, b2)
    k2 = Reshape (k1, heads)
    k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v0 = MatMul (x, w3)
    v1 = Add (v0, b3)
    v2 = Reshape (v1, heads)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
    scores = MatMul (q, k)
    scaled = Mul (scores, eighth)
    weights = Softmax <axis = 3> (scaled)
    mixed = MatMul (weights, v)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    out0 = Einsum <equation = "bthd,hde->bte"> (back, w7)
    rows = Reshape (back, flat)
    out1 = MatMul (rows, w4)
    out2 = Add (out1, b4)
    out3 = Add (out0, out2)
    residual = Add (x, out3)
    up = MatMul (residual, w5)
    biased = Add (up, b5)
    divided = Div (biased, root)
    erf = Erf (divided)
    plus = Add (erf, one)
    times = Mul (biased, plus)
    gelu = Mul (times, half)
    down = MatMul (gelu, w6)
    down1 = Add (down, b6)
    block = Add (residual, down1)
    steps = Transpose <perm = [1, 0, 2]> (block)
    states, final = LSTM <hidden_size = 40> (steps, w8, w9, b9)
    state = Squeeze <axes = [0]> (final)
    p = MatMul (state, w10)
    logits = Add (p, b10)
}
"""
"""Opset 12: attention by hand, an Einsum over heads, GELU by Erf, then an LSTM."""

GROUP_QUERY = """
<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
decoder (int64[N, T] input_ids, float[N, 2, P, 16] past_key, float[N, 2, P, 16] past_value, int32[N, 1] seqlens_k,
         int32 total_length, float[120, 64] e1, float[64] s1, float[64, 64] w1, float[64, 32] w2, float[64, 32] w3,
         float[64, 64] w4, float[64] s2, float[64, 160] w5, float[64, 160] w6, float[160, 64] w7, float[64] s3,
         float[64, 120] w8, float[32, 8] c1, float[32, 8] t1)
      => (float[N, T, 120] logits, float[N, 2, Q, 16] present_key, float[N, 2, Q, 16] present_value)
<float tiny = {0.00001}>
{
    x = Gather (e1, input_ids)
    squares = Mul (x, x)
    mean = ReduceMean <axes = [-1]> (squares)
    above = Add (mean, tiny)
    root = Sqrt (above)
    normed = Div (x, root)
    n1 = Mul (normed, s1)
    q = MatMul (n1, w1)
    k = MatMul (n1, w2)
    v = MatMul (n1, w3)
    mixed, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = 4, kv_num_heads = 2, do_rotary = 1>
        (q, k, v, past_key, past_value, seqlens_k, total_length, c1, t1)
    out = MatMul (mixed, w4)
    n2, a3, a4, r2 = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (x, out, s2)
    gate = MatMul (n2, w5)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    up = MatMul (n2, w6)
    inner = Mul (silu, up)
    down = MatMul (inner, w7)
    n3 = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (r2, down, s3)
    logits = MatMul (n3, w8)
}
"""
"""One layer of a Llama as ONNX Runtime's own builder writes it: GroupQueryAttention with past and present."""

STANDARD_DECODER = """
<ir_version: 12, opset_import: ["": %d]>
decoder (int64[N, T] input_ids, int64[N, T] position_ids, float[120, 64] e1, float[64] s1, float[64, 64] w1,
         float[64, 32] w2, float[64, 32] w3, float[64, 64] w4, float[64] s2, float[64, 160] w5, float[64, 160] w6,
         float[160, 64] w7, float[64] s3, float[64, 120] w8, float[32, 8] c1, float[32, 8] t1)
      => (float[N, T, 120] logits)
{
    x = Gather (e1, input_ids)
    n1 = RMSNormalization <axis = -1, epsilon = 0.00001> (x, s1)
    q = MatMul (n1, w1)
    k = MatMul (n1, w2)
    v = MatMul (n1, w3)
    qr = RotaryEmbedding <num_heads = 4> (q, c1, t1, position_ids)
    kr = RotaryEmbedding <num_heads = 2> (k, c1, t1, position_ids)
    mixed = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (qr, kr, v)
    out = MatMul (mixed, w4)
    r1 = Add (x, out)
    n2 = RMSNormalization <axis = -1, epsilon = 0.00001> (r1, s2)
    gate = MatMul (n2, w5)
    %s
    up = MatMul (n2, w6)
    inner = Mul (silu, up)
    down = MatMul (inner, w7)
    r2 = Add (r1, down)
    n3 = RMSNormalization <axis = -1, epsilon = 0.00001> (r2, s3)
    logits = MatMul (n3, w8)
}
"""
"""The same in the standard's own operators of opset 23 and 24; the second gap is how SiLU is written."""

ROTARY = """
<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]>
encoder (int64[N, T] input_ids, int64[N, T] position_ids, float[120, 64] e1, float[64] s1, float[64] b1,
         float[64, 192] w1, float[192] b2, float[64, 64] w2, float[64] b3, float[64] s2, float[64] b4,
         float[64, 160] w3, float[160] b5, float[160, 64] w4, float[64] b6, float[32, 8] c1, float[32, 8] t1,
         float[64, 9] w5, float[9] b7)
      => (float[N, T, 9] logits)
<int64[3] parts = {64, 64, 64}>
{
    x = Gather (e1, input_ids)
    n1 = LayerNormalization <axis = -1> (x, s1, b1)
    qkv0 = MatMul (n1, w1)
    qkv = Add (qkv0, b2)
    q, k, v = Split <axis = -1> (qkv, parts)
    qr = com.microsoft.RotaryEmbedding <num_heads = 4, rotary_embedding_dim = 0> (q, position_ids, c1, t1)
    kr = com.microsoft.RotaryEmbedding <num_heads = 4, rotary_embedding_dim = 0> (k, position_ids, c1, t1)
    mixed = com.microsoft.MultiHeadAttention <num_heads = 4> (qr, kr, v)
    out = MatMul (mixed, w2)
    biased = Add (out, b3)
    n2, a1, a2, r1 = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (x, biased, s2, b4)
    up = MatMul (n2, w3)
    active = com.microsoft.FastGelu (up, b5)
    down0 = MatMul (active, w4)
    down = Add (down0, b6)
    r2 = Add (r1, down)
    p = MatMul (r2, w5)
    logits = Add (p, b7)
}
"""
"""com.microsoft's RotaryEmbedding, MultiHeadAttention, SkipLayerNormalization and FastGelu."""


def _past(batch: int, random: np.random.Generator) -> Feeds:
    """One new token after a past of seven: ONNX Runtime takes several only at batch 1."""
    past = (batch, 2, 7, 16)
    return {
        "input_ids": random.integers(0, VOCABULARY, (batch, 1)),
        "past_key": random.standard_normal(past).astype(np.float32),
        "past_value": random.standard_normal(past).astype(np.float32),
        "seqlens_k": np.full((batch, 1), 7, np.int32),
        "total_length": np.array(8, np.int32),
    }


def _positions(batch: int, random: np.random.Generator) -> np.ndarray:
    return np.tile(np.arange(TOKENS), (batch, 1))


def _graph(name: str, description: str, opset: int, text: str, draw: Draw, converted: bool = False) -> Graph:
    """A graph of a text; if `converted`, brought from the opset in the text to `opset`."""

    def build(folder: Path) -> Path:
        file = write_text(text, folder / f"{name}.onnx")
        return convert(file, opset, file) if converted else file

    return Graph(name, description, opset, build, draw)


_IMAGE, _WORDS = inputs(image=normal(3, 32, 32)), inputs(tokens=integers(0, VOCABULARY, TOKENS))
_DECODER = inputs(input_ids=integers(0, VOCABULARY, TOKENS), position_ids=_positions)
_OLD_SILU = "sigmoid = Sigmoid (gate)\n    silu = Mul (gate, sigmoid)"

GRAPHS = [
    _graph("text_alexnet_8", "LRN, groups, Reshape to Gemm, Dropout, weights among the inputs", 8, ALEXNET, _IMAGE),
    _graph("text_resnet_9", "BatchNormalization, residual, Split by attribute, two outputs", 9, RESNET, _IMAGE),
    _graph("text_segmentation_10", "Slice over channels, gate, PRelu, dilation, Resize", 10, SEGMENTATION, _IMAGE),
    _graph("text_mobile_11", "depthwise, Clip, Pad, squeeze-and-excite of Gemms", 11, MOBILE, _IMAGE),
    _graph("text_attention_12", "attention by hand, Einsum, Erf, LSTM", 12, ATTENTION, _WORDS),
    _graph("text_resnet_9_to_15", "the one of opset 9, brought to 15 by ONNX's converter", 15, RESNET, _IMAGE, True),
    _graph("text_mobile_11_to_22", "the one of opset 11, brought to 22 by ONNX's converter", 22, MOBILE, _IMAGE, True),
    _graph("gqa_decoder_17", "com.microsoft GroupQueryAttention with past and present", 17, GROUP_QUERY, _past),
    _graph("rotary_encoder_20", "com.microsoft RotaryEmbedding, MultiHeadAttention, FastGelu", 20, ROTARY, _DECODER),
    _graph("decoder_23", "Attention with grouped heads, RMSNormalization, RotaryEmbedding of opset 23", 23,
           STANDARD_DECODER % (23, _OLD_SILU), _DECODER),
    _graph("decoder_24", "the same with Swish of opset 24", 24,
           STANDARD_DECODER % (24, "silu = Swish (gate)"), _DECODER),
]  # fmt: skip
