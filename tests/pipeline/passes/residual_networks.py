# SPDX-License-Identifier: Apache-2.0
"""Small residual networks in ONNX's text form, whole, without some branches, or with branches multiplied by zero."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from pass_tools import Array, normal
from static_tools import network

from onnxpress.pipeline.statistics import Calibration

WIDTH, INNER = 8, 16
TOKENS = "float[n, t, 8] x"


def weights(layers: int = 3) -> dict[str, Array]:
    """Of every layer: queries, keys, values, output; feed-forward up and down; two norms."""
    found: dict[str, Array] = {}
    for layer in range(layers):
        for index, name in enumerate(("q", "k", "v", "o")):
            found[f"l{layer}_{name}"] = normal(WIDTH, WIDTH, seed=10 * layer + index, scale=0.3)
        found[f"l{layer}_up"] = normal(WIDTH, INNER, seed=10 * layer + 5, scale=0.3)
        found[f"l{layer}_down"] = normal(INNER, WIDTH, seed=10 * layer + 6, scale=0.3)
        for index, norm in enumerate(("g1", "g2")):
            found[f"l{layer}_{norm}"] = 1 + normal(WIDTH, seed=10 * layer + 7 + index, scale=0.2)
    return {**found, "first": 1 + normal(WIDTH, seed=99, scale=0.2), "last": 1 + normal(WIDTH, seed=98, scale=0.2),
            "head": normal(WIDTH, 4, seed=97), "nothing": normal(1, scale=0.0)}  # fmt: skip


def transformer(
    style: str, layers: int = 3, *, without: Collection[str] = (), zero: Collection[str] = (), outputs: str = ""
) -> ir.Model:
    """An encoder with one head.

    Args:
        style: `pre` (norms before branches) or `post` (norms behind the sums).
        layers: How many.
        without: Branches that are not there: `a1` is the attention of layer 1, `f1` its feed-forward. In `post`, their
            norms are not there either.
        zero: Branches that are multiplied by zero.
        outputs: Of the graph, beside the logits.
    """
    lines = ["s = LayerNormalization<axis = -1>(x, first)"]
    stream = "s"
    for layer in range(layers):
        for branch, norm in ((f"a{layer}", f"l{layer}_g1"), (f"f{layer}", f"l{layer}_g2")):
            if branch in without:
                continue
            entry = stream if style == "post" else f"{branch}_in"
            if style == "pre":
                lines.append(f"{entry} = LayerNormalization<axis = -1>({stream}, {norm})")
            lines += _attention(layer, entry) if branch[0] == "a" else _feed_forward(layer, entry)
            if branch in zero:
                lines.append(f"{branch}_no = Mul({branch}, nothing)")
            lines.append(f"{branch}_sum = Add({stream}, {branch}{'_no' if branch in zero else ''})")
            stream = f"{branch}_sum"
            if style == "post":
                lines.append(f"{branch}_out = LayerNormalization<axis = -1>({stream}, {norm})")
                stream = f"{branch}_out"
    lines += [f"e = LayerNormalization<axis = -1>({stream}, last)", "y = MatMul(e, head)"]
    return network(TOKENS, "\n".join(lines), f"float[n, t, 4] y{outputs}", weights(layers))


def _attention(layer: int, entry: str) -> list[str]:
    """Softmax(Q K^T) V O, results named after the layer."""
    a = f"a{layer}"
    return [
        f"{a}_q = MatMul({entry}, l{layer}_q)",
        f"{a}_k = MatMul({entry}, l{layer}_k)",
        f"{a}_v = MatMul({entry}, l{layer}_v)",
        f"{a}_t = Transpose<perm = [0, 2, 1]>({a}_k)",
        f"{a}_scores = MatMul({a}_q, {a}_t)",
        f"{a}_p = Softmax<axis = -1>({a}_scores)",
        f"{a}_c = MatMul({a}_p, {a}_v)",
        f"{a} = MatMul({a}_c, l{layer}_o)",
    ]


def _feed_forward(layer: int, entry: str) -> list[str]:
    f = f"f{layer}"
    return [f"{f}_h = MatMul({entry}, l{layer}_up)", f"{f}_r = Relu({f}_h)", f"{f} = MatMul({f}_r, l{layer}_down)"]


def data(batches: int = 3) -> Calibration:
    """Batches of two sequences of different lengths."""
    return Calibration([{"x": normal(2, 3 + i, WIDTH, seed=50 + i)} for i in range(batches)], threads=1)
