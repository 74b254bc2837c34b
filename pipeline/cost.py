# SPDX-License-Identifier: Apache-2.0
"""What a graph costs to run: multiply-adds by node, from the shapes that its values have on real inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .passes.graph import attribute, is_op, nodes_of

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""Operators whose cost is counted: everything else is small beside them."""

Shapes = Mapping[str, tuple[int, ...]]


def values_to_measure(model: ir.Model) -> list[str]:
    """The values whose shapes `multiply_adds` needs."""
    names = []
    for node in nodes_of(model):
        if is_op(node, *PRODUCTS):
            names += [str(value.name) for value in (node.inputs[0], node.inputs[1], node.outputs[0]) if value]
    return list(dict.fromkeys(names))


def multiply_adds(model: ir.Model, shapes: Shapes) -> dict[ir.Node, int]:
    """Multiply-adds of every product whose shapes are known.

    Args:
        model: The graph.
        shapes: Value name to shape, as `Calibration.shapes` returns them; constants bring their own.
    """

    def shape(value: ir.Value | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(int(n) for n in value.const_value.shape.numpy())
        return shapes.get(str(value.name))

    found = {}
    for node in nodes_of(model):
        if not is_op(node, *PRODUCTS):
            continue
        left, right, out = shape(node.inputs[0]), shape(node.inputs[1]), shape(node.outputs[0])
        if left is not None and right is not None and out is not None:
            found[node] = _of(node, left, right, out)
    return found


def _of(node: ir.Node, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> int:
    def size(dims: tuple[int, ...]) -> int:
        return int(np.prod(dims, dtype=np.int64))

    if is_op(node, "Conv"):
        return size(out) * size(right[1:])  # [M, C / group, kernel...]
    if is_op(node, "ConvTranspose"):
        return size(left) * size(right[1:])  # [C, M / group, kernel...]
    if is_op(node, "Gemm"):
        return size(out) * left[0 if attribute(node, "transA", 0) else 1]
    return size(out) * left[-1]
