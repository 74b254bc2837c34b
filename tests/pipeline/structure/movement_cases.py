# SPDX-License-Identifier: Apache-2.0
"""Graphs for the operators that move elements, for sizes that are computed, and for attention in all its forms."""

from __future__ import annotations

from .operator_cases import MICROSOFT, Case, graph_text

_ROWS = "float[N, T, 10] x, float[10, 12] w1, float[12] b1, float[12, 4] w2"
_PICTURE = "float[N, 3, 8, 8] x, float[12, 3, 1, 1] w1, float[12] b1"


def _rows(body: str, out: str = "float[N, T, 4] y", constants: str = "", weights: str = "", opset: int = 21) -> str:
    head = "h0 = MatMul (x, w1)\n h = Add (h0, b1)\n"
    return graph_text(_ROWS + weights, out, head + body, constants, opset)


def _picture(body: str, weights: str, out: str, constants: str = "", opset: int = 21) -> str:
    return graph_text(_PICTURE + weights, out, "h = Conv (x, w1, b1)\n" + body, constants, opset)


def shapes() -> dict[str, Case]:
    def case(operator: str, text: str, groups: dict[str, list[int]], *, inert: bool = False) -> Case:
        return Case((("", operator),), text, groups, inert)

    neurons = {"neurons": [12]}
    return {
        "Transpose": case("Transpose", _rows(
            "t = Transpose <perm = [2, 0, 1]> (h)\n b = Transpose <perm = [1, 2, 0]> (t)\n"
            "y = MatMul (b, w2)"), neurons),
        "Squeeze": case("Squeeze", _rows(
            "u = Unsqueeze (h, at)\n s = Squeeze (u, at)\n"
            "y = MatMul (s, w2)", constants="<int64[1] at = {1}>"), neurons),
        "Unsqueeze": case("Unsqueeze", _rows(
            "u = Unsqueeze <axes = [1, -1]> (h)\n s = Squeeze <axes = [1, 4]> (u)\n"
            "y = MatMul (s, w2)", opset=12), neurons),
        "Flatten": case("Flatten", _picture(
            "p = MaxPool <kernel_shape = [4, 4], strides = [4, 4]> (h)\n f = Flatten (p)\n y = MatMul (f, w2)",
            ", float[48, 4] w2", "float[N, 4] y"), {"channels": [12]}),
        "Reshape of heads": case("Reshape", _rows(
            "r = Reshape (h, heads)\n t = Transpose <perm = [0, 2, 1, 3]> (r)\n"
            "k = Transpose <perm = [0, 2, 3, 1]> (r)\n"
            "s = MatMul (t, k)\n p = Softmax <axis = -1> (s)\n m = MatMul (p, t)\n"
            "b = Transpose <perm = [0, 2, 1, 3]> (m)\n f = Reshape (b, flat)\n y = MatMul (f, w2)",
            constants="<int64[4] heads = {0, 0, 3, 4}, int64[3] flat = {0, 0, 12}>"), {"heads": [3]}),
        "Reshape to batch and heads": case("Reshape", graph_text(
            "float[N, 5, 10] x, float[10, 12] w1, float[12, 4] w2", "float[N, 5, 4] y",
            "h = MatMul (x, w1)\n r = Reshape (h, heads)\n t = Transpose <perm = [0, 2, 1, 3]> (r)\n"
            "q = Reshape (t, rows)\n k = Transpose <perm = [0, 2, 1]> (q)\n s = MatMul (q, k)\n"
            "p = Softmax <axis = -1> (s)\n m = MatMul (p, q)\n v = Reshape (m, back)\n"
            "b = Transpose <perm = [0, 2, 1, 3]> (v)\n f = Reshape (b, flat)\n y = MatMul (f, w2)",
            "<int64[4] heads = {0, 0, 3, 4}, int64[3] rows = {-1, 5, 4}, int64[4] back = {-1, 3, 5, 4},"
            " int64[3] flat = {0, 0, 12}>"), {"heads": [3]}),
        "Reshape to a computed number of batch and heads": case("Reshape", graph_text(
            "float[N, 5, 10] x, float[10, 12] w1, float[12, 4] w2", "float[N, 5, 4] y",
            "h = MatMul (x, w1)\n r = Reshape (h, heads)\n t = Transpose <perm = [0, 2, 1, 3]> (r)\n"
            "n = Shape <end = 1> (x)\n nh = Mul (n, three)\n rows = Concat <axis = 0> (nh, inside)\n"
            "q = Reshape (t, rows)\n k = Transpose <perm = [0, 2, 1]> (q)\n s = MatMul (q, k)\n"
            "p = Softmax <axis = -1> (s)\n m = MatMul (p, q)\n back = Concat <axis = 0> (n, three, inside)\n"
            "v = Reshape (m, back)\n b = Transpose <perm = [0, 2, 1, 3]> (v)\n f = Reshape (b, flat)\n"
            "y = MatMul (f, w2)",
            "<int64[4] heads = {0, 0, 3, 4}, int64[1] three = {3}, int64[2] inside = {5, 4},"
            " int64[3] flat = {0, 0, 12}>"), {"heads": [3]}),
        "Shape": case("Shape", _rows(
            "s = Shape (h)\n b = Slice (s, zero, two)\n p = Concat <axis = 0> (b, parts)\n r = Reshape (h, p)\n"
            "t = Shape <start = 2> (h)\n j = Concat <axis = 0> (b, t)\n f = Reshape (r, j)\n y = MatMul (f, w2)",
            constants="<int64[1] zero = {0}, int64[1] two = {2}, int64[2] parts = {3, 4}>"), {"neurons": [4]}),
        "Shape computed with": case("Shape", _rows(
            "s = Shape (h)\n n = Gather (s, last)\n d = Div (n, three)\n du = Unsqueeze (d, at)\n"
            "tu = Unsqueeze (three, at)\n"
            "b = Slice (s, at, two)\n p = Concat <axis = 0> (b, tu, du)\n r = Reshape (h, p)\n"
            "j = Concat <axis = 0> (b, minus)\n f = Reshape (r, j)\n y = MatMul (f, w2)",
            constants="<int64 last = {2}, int64 three = {3}, int64[1] at = {0}, int64[1] two = {2},"
            " int64[1] minus = {-1}>"), {"neurons": [4]}),
        "Concat": case("Concat", _rows(
            "k = MatMul (x, w3)\n j = Concat <axis = -1> (h, k, h)\n y = MatMul (j, w4)",
            weights=", float[10, 6] w3, float[30, 4] w4"), {"neurons": [6, 12]}),
        "Split": case("Split", _rows(
            "a, b = Split <axis = 2> (h, parts)\n c = MatMul (a, w3)\n d = MatMul (b, w4)\n y = Add (c, d)",
            constants="<int64[2] parts = {8, 4}>", weights=", float[8, 4] w3, float[4, 4] w4"), {"neurons": [4, 8]}),
        "Split in halves": case("Split", _rows(
            "a, b = Split <axis = 2, num_outputs = 2> (h)\n g = Sigmoid (b)\n m = Mul (a, g)\n y = MatMul (m, w3)",
            weights=", float[6, 4] w3"), {"neurons": [6]}),
        "Split of opset 12": case("Split", _rows(
            "a, b = Split <axis = 2, split = [8, 4]> (h)\n c = MatMul (a, w3)\n d = MatMul (b, w4)\n y = Add (c, d)",
            weights=", float[8, 4] w3, float[4, 4] w4", opset=12), {"neurons": [4, 8]}),
        "Slice": case("Slice", _rows(
            "a = Slice (h, low, high, at)\n b = Slice (h, high, most, at)\n c = MatMul (a, w3)\n d = MatMul (b, w4)\n"
            "e = MatMul (h, w2)\n y = Sum (c, d, e)", weights=", float[5, 4] w3, float[4, 4] w4",
            constants="<int64[1] low = {3}, int64[1] high = {-4}, int64[1] most = {2147483647}, int64[1] at = {-1}>"),
            {"neurons": [3, 4, 5]}),
        "Slice of opset 9": case("Slice", _rows(
            "a = Slice <axes = [2], starts = [0], ends = [8]> (h)\n b = MatMul (a, w3)\n c = MatMul (h, w2)\n"
            "y = Add (b, c)", weights=", float[8, 4] w3",
            opset=9), {"neurons": [4, 8]}),
        "Gather": case("Gather", _rows(
            "a = Gather <axis = 2> (h, order)\n b = MatMul (a, w3)\n c = MatMul (h, w2)\n"
            "y = Add (b, c)", weights=", float[8, 4] w3",
            constants="<int64[8] order = {3, 1, -1, 4, 1, 5, 9, 2}>"), {"neurons": [5, 6]}),
        "embedding": case("Gather", graph_text(
            "int64[N, T] x, float[9, 12] w1, float[12, 4] w2", "float[N, T, 4] y",
            "h = Gather (w1, x)\n y = MatMul (h, w2)"), neurons),
        "GatherND": case("GatherND", graph_text(
            "float[S, 10] x, int64[T, 1] i, float[10, 12] w1, float[12, 4] w2", "float[T, 4] y",
            "h = MatMul (x, w1)\n g = GatherND (h, i)\n y = MatMul (g, w2)"), neurons),
        "ScatterND": case("ScatterND", graph_text(
            "float[S, 10] x, int64[T, 1] i, float[T, 10] z, float[10, 12] w1, float[10, 12] w2, float[12, 4] w3",
            "float[S, 4] y",
            "h = MatMul (x, w1)\n u = MatMul (z, w2)\n g = ScatterND <reduction = \"add\"> (h, i, u)\n"
            "y = MatMul (g, w3)"),
            neurons),
        "Expand": case("Expand", _rows(
            "s = Shape (h)\n e = Expand (w3, s)\n z = Expand (b1, s)\n a = Add (h, z)\n c = Mul (a, e)\n"
            "y = MatMul (c, w2)",
            weights=", float[1, 1, 12] w3"), neurons),
        "Expand of shared keys": case("Expand", graph_text(
            "float[N, 5, 10] x, float[10, 24] w1, float[10, 12] w2, float[24, 4] w3", "float[N, 5, 4] y",
            "q0 = MatMul (x, w1)\n q1 = Reshape (q0, six)\n q = Transpose <perm = [0, 2, 1, 3]> (q1)\n"
            "k0 = MatMul (x, w2)\n k1 = Reshape (k0, three)\n k2 = Transpose <perm = [0, 2, 1, 3]> (k1)\n"
            "k3 = Unsqueeze (k2, at)\n k4 = Expand (k3, wide)\n k = Reshape (k4, many)\n"
            "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n s = MatMul (q, kt)\n p = Softmax <axis = -1> (s)\n"
            "m = MatMul (p, k)\n b = Transpose <perm = [0, 2, 1, 3]> (m)\n f = Reshape (b, flat)\n y = MatMul (f, w3)",
            "<int64[4] six = {0, 0, 6, 4}, int64[4] three = {0, 0, 3, 4}, int64[1] at = {2},"
            " int64[5] wide = {1, 3, 2, 5, 4}, int64[4] many = {0, 6, 5, 4}, int64[3] flat = {0, 0, 24}>"),
            {"heads": [3]}),
        "ConstantOfShape": case("ConstantOfShape", _rows(
            "z = ConstantOfShape <value = float[1] {2.0}> (shape)\n a = Mul (h, z)\n y = MatMul (a, w2)",
            constants="<int64[1] shape = {12}>"), neurons),
        "Constant": case("Constant", _rows(
            "c = Constant <value = float[12] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 2.0, 3.0}> ()\n"
            "a = Mul (h, c)\n y = MatMul (a, w2)"), neurons),
        "Tile": case("Tile", _rows(
            "a = Tile (h, twice)\n y = MatMul (a, w3)", weights=", float[24, 4] w3",
            constants="<int64[3] twice = {1, 1, 2}>"), neurons),
        "Pad": case("Pad", _rows(
            "a = Pad (h, border)\n y = MatMul (a, w3)", weights=", float[15, 4] w3",
            constants="<int64[6] border = {0, 0, 1, 0, 0, 2}>"), {"neurons": [3, 12]}, inert=True),
        "Pad of opset 10": case("Pad", _rows(
            "a = Pad <pads = [0, 0, 2, 0, 0, 2]> (h)\n y = MatMul (a, w3)", weights=", float[16, 4] w3", opset=10),
            {"neurons": [4, 12]}, inert=True),
        "Resize": case("Resize", _picture(
            "r = Resize <mode = \"nearest\"> (h, , twice)\n y = Conv (r, w2)", ", float[4, 12, 1, 1] w2",
            "float[N, 4, 16, 16] y", "<float[4] twice = {1.0, 1.0, 2.0, 2.0}>"), {"channels": [12]}),
        "Resize to sizes": case("Resize", _picture(
            "s = Shape (h)\n c = Slice (s, zero, two)\n t = Concat <axis = 0> (c, large)\n"
            "r = Resize <mode = \"nearest\"> (h, , , t)\n y = Conv (r, w2)", ", float[4, 12, 1, 1] w2",
            "float[N, 4, 16, 12] y", "<int64[1] zero = {0}, int64[1] two = {2}, int64[2] large = {16, 12}>"),
            {"channels": [12]}),
        "Upsample": case("Upsample", _picture(
            "r = Upsample <mode = \"nearest\"> (h, twice)\n y = Conv (r, w2)", ", float[4, 12, 1, 1] w2",
            "float[N, 4, 16, 16] y", "<float[4] twice = {1.0, 1.0, 2.0, 2.0}>", opset=9), {"channels": [12]}),
        "DepthToSpace": case("DepthToSpace", _picture(
            "r = DepthToSpace <blocksize = 2> (h)\n y = Conv (r, w2)", ", float[4, 3, 1, 1] w2",
            "float[N, 4, 16, 16] y"), {"channels": [3]}),
        "DepthToSpace by columns": case("DepthToSpace", _picture(
            "r = DepthToSpace <blocksize = 2, mode = \"CRD\"> (h)\n y = Conv (r, w2)", ", float[4, 3, 1, 1] w2",
            "float[N, 4, 16, 16] y"), {"channels": [3]}),
        "SpaceToDepth": case("SpaceToDepth", _picture(
            "r = SpaceToDepth <blocksize = 2> (h)\n y = Conv (r, w2)", ", float[4, 48, 1, 1] w2",
            "float[N, 4, 4, 4] y"), {"channels": [12]}),
        "channel shuffle": case("Reshape", _picture(
            "r = Reshape (h, two)\n t = Transpose <perm = [0, 2, 1, 3, 4]> (r)\n f = Reshape (t, flat)\n"
            "y = Conv (f, w2)",
            ", float[4, 12, 1, 1] w2", "float[N, 4, 8, 8] y",
            "<int64[5] two = {0, 2, 6, 8, 8}, int64[4] flat = {0, 12, 8, 8}>"), {"channels": [6]}),
    }  # fmt: skip


_HEADS = "float[N, 5, 10] x, float[10, 24] w1, float[10, 24] w2, float[10, 24] w3, float[24, 4] w4"
_SHARED = "float[N, 5, 10] x, float[10, 24] w1, float[10, 12] w2, float[10, 12] w3, float[24, 4] w4"
_QKV = "q = MatMul (x, w1)\n k = MatMul (x, w2)\n v = MatMul (x, w3)\n"


def attention() -> dict[str, Case]:
    y, end = "float[N, 5, 4] y", "\n y = MatMul (m, w4)"
    four = "\n".join(
        f"{n}2 = Reshape ({n}, {shape})\n {n}4 = Transpose <perm = [0, 2, 1, 3]> ({n}2)"
        for n, shape in (("q", "six"), ("k", "three"), ("v", "three"))
    )
    return {
        "MultiHeadAttention": Case(((MICROSOFT, "MultiHeadAttention"),), graph_text(
            f"{_HEADS}, float[72] b1, float[1, 6, 5, 5] w5", y,
            f"{_QKV}m = com.microsoft.MultiHeadAttention <num_heads = 6> (q, k, v, b1, , w5){end}"), {"heads": [6]}),
        "contrib Attention": Case(((MICROSOFT, "Attention"),), graph_text(
            "float[N, 5, 10] x, float[10, 72] w1, float[72] b1, float[24, 4] w4", y,
            f"m = com.microsoft.Attention <num_heads = 6> (x, w1, b1){end}"), {"heads": [6]}),
        "contrib Attention with sizes": Case(((MICROSOFT, "Attention"),), graph_text(
            "float[N, 5, 10] x, float[10, 60] w1, float[60] b1, float[12, 4] w4", y,
            f"m = com.microsoft.Attention <num_heads = 6, qkv_hidden_sizes = [24, 24, 12]> (x, w1, b1){end}"),
            {"heads": [6]}),
        "GroupQueryAttention": Case(((MICROSOFT, "GroupQueryAttention"),), graph_text(
            "float[N, 5, 10] x, float[10, 96] w1, float[10, 48] w2, float[10, 48] w3, float[96, 4] w4", y,
            f"l = Constant <value = int32[1] {{4}}> ()\n n = Shape <end = 1> (x)\n e = Expand (l, n)\n"
            f"t = Constant <value = int32 {{5}}> ()\n {_QKV}"
            "m, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 6, kv_num_heads = 3> (q, k, v, , , e, t)"
            f"{end}"), {"heads": [3]}),
        "Attention": Case((("", "Attention"),), graph_text(
            f"{_SHARED}, float[1, 6, 5, 5] w5", y,
            f"{_QKV}m = Attention <q_num_heads = 6, kv_num_heads = 3> (q, k, v, w5){end}", opset=23), {"heads": [3]}),
        "Attention of four axes": Case((("", "Attention"),), graph_text(
            _SHARED, y, f"{_QKV}{four}\n a = Attention (q4, k4, v4)\n b = Transpose <perm = [0, 2, 1, 3]> (a)\n"
            f"m = Reshape (b, flat){end}",
            "<int64[4] six = {0, 0, 6, 4}, int64[4] three = {0, 0, 3, 4}, int64[3] flat = {0, 0, 24}>", opset=23),
            {"heads": [3]}),
        "RotaryEmbedding": Case((("", "RotaryEmbedding"),), graph_text(
            f"{_SHARED}, float[9, 2] w5, float[9, 2] w6", y,
            "p0 = Constant <value = int64[1, 5] {0, 1, 2, 3, 4}> ()\n s = Shape (x)\n r = Slice (s, from, to)\n"
            f"p = Expand (p0, r)\n {_QKV}a = RotaryEmbedding <num_heads = 6> (q, w5, w6, p)\n"
            "b = RotaryEmbedding <num_heads = 3> (k, w5, w6, p)\n"
            f"m = Attention <q_num_heads = 6, kv_num_heads = 3> (a, b, v){end}",
            "<int64[1] from = {0}, int64[1] to = {2}>", opset=23), {"heads": [3]}),
        "contrib RotaryEmbedding": Case(((MICROSOFT, "RotaryEmbedding"),), graph_text(
            f"{_HEADS}, float[9, 2] w5, float[9, 2] w6", y,
            f"p = Constant <value = int64[1] {{0}}> ()\n {_QKV}"
            "a = com.microsoft.RotaryEmbedding <num_heads = 6> (q, p, w5, w6)\n"
            "b = com.microsoft.RotaryEmbedding (k, p, w5, w6)\n"
            f"m = com.microsoft.MultiHeadAttention <num_heads = 6> (a, b, v){end}"), {"heads": [6]}),
        "EmbedLayerNormalization": Case(((MICROSOFT, "EmbedLayerNormalization"),), graph_text(
            "int32[N, 5] x, float[9, 12] w1, float[9, 12] w2, float[9, 12] w3, float[12] w4, float[12] b1,"
            " float[12, 4] w5", "float[N, 5, 4] y",
            "h, i = com.microsoft.EmbedLayerNormalization (x, x, w1, w2, w3, w4, b1)\n y = MatMul (h, w5)"),
            {"hidden": [12]}),
    }  # fmt: skip


def movement_cases() -> dict[str, Case]:
    return {**shapes(), **attention()}
