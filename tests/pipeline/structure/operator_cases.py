# SPDX-License-Identifier: Apache-2.0
"""One small graph for each operator with a rule, and the groups that it must have.

Weights are w and b with a number, see `samples.model_from`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A graph and what is in it.

    Attributes:
        covers: (domain, operator) that it is about.
        text: ONNX text.
        groups: Kind to the sizes of its groups, the smallest first.
        inert: Whether there are units that the outputs do not depend on.
    """

    covers: tuple[tuple[str, str], ...]
    text: str
    groups: dict[str, list[int]]
    inert: bool = False


MICROSOFT = "com.microsoft"


def graph_text(inputs: str, outputs: str, body: str, constants: str = "", opset: int = 21) -> str:
    return (
        f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>\n'
        f"net ({inputs}) => ({outputs}) {constants}\n{{\n{body}\n}}"
    )


_UNARY = (
    "Abs", "Acos", "Asin", "Atan", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor",
    "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round",
    "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh",
    "ThresholdedRelu",
)  # fmt: skip
_THROUGH = {
    "Not": ("c = Cast <to = 9> (t)", "o = Not (c)"),
    "IsInf": ("c = Log (h)", "o = IsInf (c)"),
    "IsNaN": ("c = Log (h)", "o = IsNaN (c)"),
    "BitwiseNot": ("c = Cast <to = 6> (u)", "o = BitwiseNot (c)"),
    "And": ("c = Greater (h, b2)\n d = Less (h, b3)", "o = And (c, d)"),
    "Or": ("c = Greater (h, b2)\n d = LessOrEqual (h, b3)", "o = Or (c, d)"),
    "Xor": ("c = GreaterOrEqual (h, b2)\n d = Greater (h, b3)", "o = Xor (c, d)"),
    "Equal": ("c = Floor (h)\n d = Floor (b2)", "o = Equal (c, d)"),
    "Greater": ("", "o = Greater (h, b2)"),
    "GreaterOrEqual": ("", "o = GreaterOrEqual (b2, h)"),
    "Less": ("", "o = Less (h, b2)"),
    "LessOrEqual": ("", "o = LessOrEqual (h, b2)"),
    "BitwiseAnd": ("c = Cast <to = 6> (u)\n d = Cast <to = 6> (b2)", "o = BitwiseAnd (c, d)"),
    "BitwiseOr": ("c = Cast <to = 6> (u)\n d = Cast <to = 6> (b2)", "o = BitwiseOr (c, d)"),
    "BitwiseXor": ("c = Cast <to = 6> (u)\n d = Cast <to = 6> (b2)", "o = BitwiseXor (c, d)"),
    "Where": ("c = Greater (h, b2)", "o = Where (c, h, b3)"),
    "Mod": ("", "o = Mod <fmod = 1> (h, b2)"),
    "Pow": ("c = Sigmoid (h)", "o = Pow (c, b2)"),
    "Add": ("", "o = Add (h, b2)"),
    "Sub": ("", "o = Sub (b2, h)"),
    "Mul": ("", "o = Mul (h, b2)"),
    "Div": ("", "o = Div (h, b2)"),
    "Max": ("", "o = Max (h, b2, b3)"),
    "Min": ("", "o = Min (h, b2)"),
    "Mean": ("", "o = Mean (h, b2, b3)"),
    "Sum": ("", "o = Sum (h, b2, b3)"),
    "PRelu": ("", "o = PRelu (h, b2)"),
    "Cast": ("", "o = Cast <to = 11> (h)"),
}
_WEIGHTS = "float[N, 10] x, float[10, 12] w1, float[12] b1, float[12] b2, float[12] b3, float[12, 4] w2"


def _elementwise(before: str, line: str, opset: int = 21) -> str:
    """A product, the operator on its columns, and a product that reads them; a mask of what was true counts as numbers.

    t is hit by both signs, u is large enough for whole numbers.
    """
    body = f"""
    p = MatMul (x, w1)
    h = Add (p, b1)
    t = Relu (h)
    n = Constant <value = float[1] {{9.0}}> ()
    u = Mul (h, n)
    {before}
    {line}
    f = Cast <to = 1> (o)
    s = Add (f, t)
    e = Add (s, u)
    y = MatMul (e, w2)"""
    return graph_text(_WEIGHTS, "float[N, 4] y", body, opset=opset)


def elementwise() -> dict[str, Case]:
    found = {}
    for operator in _UNARY:
        text = _elementwise("c = Sigmoid (h)", f"o = {operator} (c)")
        found[operator] = Case((("", operator),), text, {"neurons": [12]})
    swish = _elementwise("c = Sigmoid (h)", "o = Swish <alpha = 0.7> (c)", opset=24)
    found["Swish"] = Case((("", "Swish"),), swish, {"neurons": [12]})
    for operator, (before, line) in _THROUGH.items():
        found[operator] = Case((("", operator),), _elementwise(before, line), {"neurons": [12]})
    for operator in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu"):
        inputs = "(h, b2)" if operator == "BiasGelu" else "(h)"
        text = _elementwise("", f"o = com.microsoft.{operator} {inputs}")
        found[f"contrib {operator}"] = Case(((MICROSOFT, operator),), text, {"neurons": [12]})
    return found


_X = "float[N, 10] x, float[10, 12] w1, float[12] b1, float[12, 4] w2"
_REDUCED = "float[N, 6, 10] x, float[10, 12] w1, float[12, 4] w2, float[1, 4] w3"
_IMAGE = "float[N, 3, 8, 8] x, float[12, 3, 3, 3] w1, float[12] b1"


def products() -> dict[str, Case]:
    found = {
        "MatMul": Case((("", "MatMul"),), graph_text(
            "float[N, T, 10] x, float[10, 12] w1, float[12, 8] w2, float[8, 4] w3", "float[N, T, 4] y",
            "h = MatMul (x, w1)\n g = MatMul (h, w2)\n y = MatMul (g, w3)"), {"neurons": [8, 12]}),
        "Gemm": Case((("", "Gemm"),), graph_text(
            "float[10, N] x, float[12, 10] w1, float[12] b1, float[12, 4] w2, float[1, 4] b2", "float[N, 4] y",
            "h = Gemm <transA = 1, transB = 1> (x, w1, b1)\n y = Gemm <beta = 0.5> (h, w2, b2)"), {"neurons": [12]}),
        "Einsum": Case((("", "Einsum"),), graph_text(
            "float[N, T, 10] x, float[10, 3, 4] w1, float[3, 4, 6] w2", "float[N, T, 6] y",
            'h = Einsum <equation = "btd,dhe->bhte"> (x, w1)\n y = Einsum <equation = "bhte,hed->btd"> (h, w2)'),
            {"neurons": [3, 4]}),
        "Conv": Case((("", "Conv"),), graph_text(
            f"{_IMAGE}, float[4, 12, 1, 1] w2, float[4] b2", "float[N, 4, 6, 6] y",
            "h = Conv (x, w1, b1)\n r = Relu (h)\n y = Conv (r, w2, b2)"), {"channels": [12]}),
        "grouped Conv": Case((("", "Conv"),), graph_text(
            f"{_IMAGE}, float[18, 4, 3, 3] w2, float[18] b2, float[18, 1, 3, 3] w3, float[4, 18, 1, 1] w4",
            "float[N, 4, 4, 4] y",
            "h = Conv (x, w1, b1)\n r = Relu (h)\n g = Conv <group = 3> (r, w2, b2)\n"
            "d = Conv <group = 18, pads = [1, 1, 1, 1]> (g, w3)\n y = Conv (d, w4)"), {"channels": [3]}),
        "ConvTranspose": Case((("", "ConvTranspose"),), graph_text(
            f"{_IMAGE}, float[12, 6, 2, 2] w2, float[6] b2, float[6, 4, 1, 1] w3, float[4] b3", "float[N, 4, 12, 12] y",
            "h = Conv (x, w1, b1)\n g = ConvTranspose <strides = [2, 2]> (h, w2, b2)\n r = Relu (g)\n"
            "y = ConvTranspose (r, w3, b3)"), {"channels": [6, 12]}),
        "grouped ConvTranspose": Case((("", "ConvTranspose"),), graph_text(
            f"{_IMAGE}, float[12, 2, 2, 2] w2, float[6] b2, float[4, 6, 1, 1] w3", "float[N, 4, 7, 7] y",
            "h = Conv (x, w1, b1)\n g = ConvTranspose <group = 3> (h, w2, b2)\n y = Conv (g, w3)"), {"channels": [3]}),
    }  # fmt: skip
    return found


def norms() -> dict[str, Case]:
    hidden = (
        "float[N, 10] x, float[10, 12] w1, float[12] w2, float[12] b2, float[12, 4] w3, float[10, 12] w4, float[12] b3"
    )

    def norm(line: str, *, opset: int = 21) -> str:
        return graph_text(hidden, "float[N, 4] y", f"h = MatMul (x, w1)\n{line}\n y = MatMul (g, w3)", opset=opset)

    def skip(line: str) -> str:
        body = f"h0 = MatMul (x, w1)\n h2 = MatMul (x, w4)\n h = Unsqueeze (h0, one)\n k = Unsqueeze (h2, one)\n{line}"
        end = "\n a = Add (g, s)\n y = MatMul (a, w3)"
        return graph_text(hidden, "float[N, 1, 4] y", body + end, "<int64[1] one = {1}>")

    channels = f"{_IMAGE}, float[12] w2, float[12] b2, float[4, 12, 1, 1] w3, float[12] b3, float[12] b4"
    groups = f"{_IMAGE}, float[3] w2, float[3] b2, float[12] w4, float[12] b4, float[4, 12, 1, 1] w3"
    layer = Case
    return {
        "LayerNormalization": layer((("", "LayerNormalization"),), norm(
            "g = LayerNormalization <axis = -1> (h, w2, b2)"), {"hidden": [12]}),
        "RMSNormalization": layer((("", "RMSNormalization"),), norm(
            "g = RMSNormalization <axis = -1> (h, w2)", opset=23), {"hidden": [12]}),
        "SimplifiedLayerNormalization": layer((("", "SimplifiedLayerNormalization"),), norm(
            "g = SimplifiedLayerNormalization <axis = -1> (h, w2)"), {"hidden": [12]}),
        "SkipLayerNormalization": layer(((MICROSOFT, "SkipLayerNormalization"),), skip(
            "g, m, v, s = com.microsoft.SkipLayerNormalization (h, k, w2, b2, b3)"), {"hidden": [12]}),
        "SkipSimplifiedLayerNormalization": layer(((MICROSOFT, "SkipSimplifiedLayerNormalization"),), skip(
            "g, m, v, s = com.microsoft.SkipSimplifiedLayerNormalization (h, k, w2, b2)"), {"hidden": [12]}),
        "BatchNormalization": layer((("", "BatchNormalization"),), graph_text(channels, "float[N, 4, 6, 6] y",
            "h = Conv (x, w1, b1)\n v = Abs (b4)\n g = BatchNormalization (h, w2, b2, b3, v)\n y = Conv (g, w3)"),
            {"channels": [12]}),
        "InstanceNormalization": layer((("", "InstanceNormalization"),), graph_text(channels, "float[N, 4, 6, 6] y",
            "h = Conv (x, w1, b1)\n g = InstanceNormalization (h, w2, b2)\n y = Conv (g, w3)"), {"channels": [12]}),
        "GroupNormalization": layer((("", "GroupNormalization"),), graph_text(groups, "float[N, 4, 6, 6] y",
            "h = Conv (x, w1, b1)\n g = GroupNormalization <num_groups = 3> (h, w4, b4)\n y = Conv (g, w3)"),
            {"channels": [3]}),
        "GroupNormalization of opset 18": layer((("", "GroupNormalization"),), graph_text(groups, "float[N, 4, 6, 6] y",
            "h = Conv (x, w1, b1)\n g = GroupNormalization <num_groups = 3> (h, w2, b2)\n y = Conv (g, w3)", opset=18),
            {"channels": [3]}),
    }  # fmt: skip


def along_axes() -> dict[str, Case]:
    found = {}
    for operator in ("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2"):
        body = f"h = MatMul (x, w1)\n r = {operator} <keepdims = 1> (h, last)\n g = MatMul (h, w2)\n y = Add (g, r)"
        kind = "hidden" if operator == "ReduceMean" else "neurons"
        text = graph_text(_REDUCED, "float[N, 6, 4] y", body, "<int64[1] last = {-1}>")
        found[operator] = Case((("", operator),), text, {kind: [12]})
    for operator in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp"):
        inner = "Sigmoid" if operator == "ReduceLogSum" else "Tanh"
        body = f"h = MatMul (x, w1)\n a = {inner} (h)\n r = {operator} <keepdims = 0> (a, middle)\n y = MatMul (r, w2)"
        text = graph_text(_REDUCED, "float[N, 4] y", body, "<int64[1] middle = {1}>")
        found[operator] = Case((("", operator),), text, {"neurons": [12]})
    for operator in ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum"):
        call = "CumSum (h, middle)" if operator == "CumSum" else f"{operator} <axis = 1> (h)"
        body = f"h = MatMul (x, w1)\n a = {call}\n y = MatMul (a, w2)"
        text = graph_text(_REDUCED, "float[N, 6, 4] y", body, "<int64 middle = {1}>")
        found[operator] = Case((("", operator),), text, {"neurons": [12]})
    for operator in ("ArgMax", "ArgMin"):
        body = f"h = MatMul (x, w1)\n a = {operator} <axis = 1> (h)\n f = Cast <to = 1> (a)\n g = Add (f, h)\n"
        text = graph_text(_REDUCED, "float[N, 6, 4] y", f"{body} y = MatMul (g, w2)")
        found[operator] = Case((("", operator),), text, {"neurons": [12]})
    body = "h = MatMul (x, w1)\n v, i = TopK <axis = 1> (h, two)\n y = MatMul (v, w2)"
    text = graph_text(_REDUCED, "float[N, 2, 4] y", body, "<int64[1] two = {2}>")
    found["TopK"] = Case((("", "TopK"),), text, {"neurons": [12]})
    body = "h = MatMul (x, w1)\n a = Transpose <perm = [2, 0, 1]> (h)\n r = Trilu (a)\n"
    text = graph_text("float[6, 7, 10] x, float[10, 12] w1, float[12, 4] w2", "float[6, 7, 4] y",
                  f"{body} b = Transpose <perm = [1, 2, 0]> (r)\n y = MatMul (b, w2)")  # fmt: skip
    found["Trilu"] = Case((("", "Trilu"),), text, {"neurons": [12]})
    for operator in ("AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        shape = "" if operator.startswith("Global") else "<kernel_shape = [2, 2]>"
        body = f"h = Conv (x, w1, b1)\n p = {operator} {shape} (h)\n y = Conv (p, w2)"
        size = 1 if operator.startswith("Global") else 5
        text = graph_text(f"{_IMAGE}, float[4, 12, 1, 1] w2", f"float[N, 4, {size}, {size}] y", body)
        found[operator] = Case((("", operator),), text, {"channels": [12]})
    return found


def rounded() -> dict[str, Case]:
    body = """
    scale = Abs (b1)
    rounded = QuantizeLinear <axis = 1> (w1, scale)
    weight = DequantizeLinear <axis = 1> (rounded, scale)
    h = MatMul (x, weight)
    y = MatMul (h, w2)"""
    dynamic = """
    n = Constant <value = float[1] {40.0}> ()
    large = Mul (w3, n)
    few = Mul (w4, n)
    integers = Cast <to = 3> (large)
    offsets = Cast <to = 3> (few)
    h0 = MatMul (x, w1)
    a, s, z = DynamicQuantizeLinear (h0)
    p = MatMulInteger (a, integers, z, offsets)
    f = Cast <to = 1> (p)
    g = Mul (f, s)
    y = MatMul (g, w2)"""
    whole = "float[N, 10] x, float[10, 12] w1, float[12, 8] w3, float[8] w4, float[8, 4] w2"
    return {
        "MatMulInteger": Case((("", "DynamicQuantizeLinear"), ("", "MatMulInteger")),
                              graph_text(whole, "float[N, 4] y", dynamic), {"neurons": [8, 12]}),
        "QuantizeLinear": Case((("", "QuantizeLinear"), ("", "DequantizeLinear")),
                               graph_text(_X, "float[N, 4] y", body), {"neurons": [12]}),
    }  # fmt: skip


def recurrent() -> dict[str, Case]:
    found = {}
    for operator, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        inputs = (
            f"float[T, N, 10] x, float[10, 8] w1, float[2, {gates * 6}, 8] w2, float[2, {gates * 6}, 6] w3,"
            f" float[2, {gates * 12}] b1, float[6, 4] w4"
        )
        body = f"""
    h = MatMul (x, w1)
    all, last = {operator} <hidden_size = 6, direction = "bidirectional"> (h, w2, w3, b1)
    s = ReduceSum <keepdims = 0> (all, one)
    e = ReduceSum <keepdims = 0> (last, zero)
    a = Add (s, e)
    y = MatMul (a, w4)"""
        text = graph_text(inputs, "float[T, N, 4] y", body, "<int64[1] one = {1}, int64[1] zero = {0}>")
        found[operator] = Case((("", operator),), text, {"recurrent": [6, 8]})
    return found


def operator_cases() -> dict[str, Case]:
    """All that compute; those that move elements and attention are in files of their own."""
    return {**elementwise(), **products(), **norms(), **along_axes(), **rounded(), **recurrent()}
