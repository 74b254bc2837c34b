# SPDX-License-Identifier: Apache-2.0
"""What rules refuse: (domain, operator) that it is about where nothing of it is ever followed, text, reason."""

from __future__ import annotations

from .operator_cases import MICROSOFT, graph_text

_X = "float[N, 10] x, float[10, 12] w1, float[12] b1, float[12, 4] w2"
_Y = "float[N, 4] y"


def _made(operator: str, line: str, opset: int = 21) -> tuple[tuple[str, str], str, str]:
    """An operator whose result has the width of h, which is read from h."""
    body = f"h = MatMul (x, w1)\n{line}\n f = Cast <to = 1> (o)\n a = Add (h, f)\n y = MatMul (a, w2)"
    reasons = {"Size": "its number of elements is computed with", "Range": "its length is computed with"}
    return (
        ("", operator),
        graph_text(_X, _Y, body, "<int64 zero = {0}, int64 one = {1}>", opset),
        reasons.get(operator, f"{operator} has no rule"),
    )


REFUSED: dict[str, tuple[tuple[str, str] | None, str, str]] = {
    "Size": _made("Size", "o = Size (h)"),
    "OneHot": _made("OneHot", "v = Constant <value = float[2] {0.0, 1.0}> ()\n i = Cast <to = 7> (h)\n"
                    "d = Constant <value = int64 {12}> ()\n t = Constant <value = int64[1] {2}> ()\n"
                    "k = OneHot (i, d, v)\n o = ReduceMax <keepdims = 0> (k, t)"),
    "Range": _made("Range", "s = Shape <start = 1> (h)\n e = Squeeze (s)\n o = Range (zero, e, one)"),
    "NonZero": _made("NonZero", "n = NonZero (h)\n o = ReduceMax <keepdims = 0> (n)"),
    "EyeLike": _made("EyeLike", "o = EyeLike (h)"),
    "RandomNormalLike": (("", "RandomNormalLike"), graph_text(
        _X, _Y, "h = MatMul (x, w1)\n o = RandomNormalLike (h)\n a = Add (h, o)\n y = MatMul (a, w2)"), "o is random"),
    "RandomUniformLike": (("", "RandomUniformLike"), graph_text(
        _X, _Y, "h = MatMul (x, w1)\n o = RandomUniformLike (h)\n a = Add (h, o)\n y = MatMul (a, w2)"), "o is random"),
    "Bernoulli": (("", "Bernoulli"), graph_text(
        _X, _Y, "h = MatMul (x, w1)\n s = Sigmoid (h)\n o = Bernoulli (s)\n y = MatMul (o, w2)"), "o is random"),
    "RandomNormal": (("", "RandomNormal"), graph_text(
        _X, _Y, "h = MatMul (x, w1)\n o = RandomNormal <shape = [12]> ()\n a = Add (h, o)\n y = MatMul (a, w2)"),
        "Add joins it with an axis whose size only the run tells"),
    "RandomUniform": (("", "RandomUniform"), graph_text(
        _X, _Y, "h = MatMul (x, w1)\n o = RandomUniform <shape = [12]> ()\n a = Add (h, o)\n y = MatMul (a, w2)"),
        "Add joins it with an axis whose size only the run tells"),
    "FusedMatMul": ((MICROSOFT, "FusedMatMul"), graph_text(
        _X, _Y, "h = com.microsoft.FusedMatMul (x, w1)\n a = Relu (h)\n y = MatMul (a, w2)"),
        "FusedMatMul has no rule"),
    "BiasSplitGelu": ((MICROSOFT, "BiasSplitGelu"), graph_text(
        "float[N, 5, 10] x, float[10, 12] w1, float[12] b1, float[6, 4] w2", "float[N, 5, 4] y",
        "h = MatMul (x, w1)\n a = com.microsoft.BiasSplitGelu (h, b1)\n y = MatMul (a, w2)"),
        "BiasSplitGelu has no rule"),
    "an output": (None, graph_text(_X, f"{_Y}, float[N, 12] h", "h = MatMul (x, w1)\n y = MatMul (h, w2)"),
                  "it is an output of the graph"),
    "a softmax over it": (None, graph_text(
        _X, _Y, "h = MatMul (x, w1)\n a = Softmax <axis = 1> (h)\n y = MatMul (a, w2)"), "Softmax over it"),
    "a softmax of opset 12 over it": (None, graph_text(
        "float[N, T, 10] x, float[10, 12] w1, float[12, 4] w2", "float[N, T, 4] y",
        "h = MatMul (x, w1)\n a = Softmax <axis = 1> (h)\n y = MatMul (a, w2)", opset=12), "Softmax over it"),
    "a maximum over it": (None, graph_text(
        "float[N, 10] x, float[10, 12] w1", "float[N] y",
        "h = MatMul (x, w1)\n y = ReduceMax <keepdims = 0> (h, one)", "<int64[1] one = {1}>"), "ReduceMax over it"),
    "a length that is returned": (None, graph_text(
        _X, f"{_Y}, int64[2] s", "h = MatMul (x, w1)\n s = Shape (h)\n y = MatMul (h, w2)"),
        "it is an output of the graph"),
    "a length multiplied with what the run tells": (None, graph_text(
        "float[N, T, 10] x, float[10, 12] w1", "float[N, S] y",
        "h = MatMul (x, w1)\n s = Shape (h)\n n = ReduceProd <keepdims = 1> (s)\n o = Reshape (h, n)\n"
        "y = Unsqueeze (o, at)", "<int64[1] at = {0}>"), "its length is computed with"),
    "positions that are computed": (None, graph_text(
        "float[N, 10] x, int64[1] e, float[10, 12] w1", "float[N, S] y",
        "h = MatMul (x, w1)\n y = Slice (h, zero, e, one)", "<int64[1] zero = {0}, int64[1] one = {1}>"),
        "Slice at computed positions"),
    "Einsum with dots": (None, graph_text(
        _X, _Y, 'h = MatMul (x, w1)\n y = Einsum <equation = "...i,ij->...j"> (h, w2)'),
        "Einsum '...i,ij->...j' has no rule"),
    "an If": (None, graph_text(
        f"{_X}, bool c", _Y,
        "h = MatMul (x, w1)\n a = If (c) <then_branch = g1 () => (float[N, 12] o) { o = Relu (h) },"
        " else_branch = g2 () => (float[N, 12] o) { o = Neg (h) }>\n y = MatMul (a, w2)"), "If has no rule"),
}  # fmt: skip
