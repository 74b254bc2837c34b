# SPDX-License-Identifier: Apache-2.0
"""Shapes behind ONNX Runtime's own operators, where the inference of ONNX, which does not know them, ends.

A file that ONNX Runtime's optimizer has fused tells no shape behind its first attention. `fill_shapes` goes on from
there through what a transformer consists of; it writes nothing where it is not sure.

Reference: com.microsoft's operators in ONNX Runtime's ContribOperators.md; broadcasting in ONNX's Broadcasting.md.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from .graph import MICROSOFT, attribute, constant, dims, is_op

_Shape = tuple[int | str | None, ...]
_LIKE_FIRST = ("Dropout", "Erf", "Gelu", "Identity", "LayerNormalization", "Relu", "Sigmoid", "Softmax", "Tanh")
_LIKE_FIRST_OWN = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization")
_BROADCAST = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum")


def fill_shapes(model: ir.Model) -> None:
    """Give results of the main graph, in place, the shape and type that follow from their inputs, where absent."""
    if any(node.domain == MICROSOFT and dims(node.outputs[0]) is None for node in model.graph):
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for node in model.graph:
        if is_op(node, "Split"):
            _fill_split(node)
        elif node.inputs and node.inputs[0] is not None and dims(node.outputs[0]) is None:
            rule = _rule_for(node)
            found = rule([dims(value) for value in node.inputs if value is not None]) if rule is not None else None
            if found is not None:
                _set(node.outputs[0], found, node.inputs[0])


def _set(value: ir.Value, shape: _Shape, like: ir.Value | None) -> None:
    value.shape = ir.Shape(shape)
    value.type = value.type or (like.type if like is not None else None)


def _fill_split(node: ir.Node) -> None:
    """Split by a constant list of sizes."""
    shape, sizes = dims(node.inputs[0]), constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or sizes is None:
        return
    axis = attribute(node, "axis", 0) % len(shape)
    for value, size in zip(node.outputs, sizes.tolist(), strict=True):
        if dims(value) is None:
            _set(value, (*shape[:axis], size, *shape[axis + 1 :]), node.inputs[0])


def _rule_for(node: ir.Node) -> Callable[[list[_Shape | None]], _Shape | None] | None:
    if is_op(node, *_LIKE_FIRST) or is_op(node, *_LIKE_FIRST_OWN, domain=MICROSOFT):
        return lambda shapes: shapes[0]
    if is_op(node, *_BROADCAST):
        return _broadcast
    if is_op(node, "MatMul"):
        return _product
    return _attention if is_op(node, "MultiHeadAttention", domain=MICROSOFT) else None


def _broadcast(shapes: list[_Shape | None]) -> _Shape | None:
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    return tuple(_joint(sizes) for sizes in zip_longest(*(shape[::-1] for shape in known), fillvalue=1))[::-1]


def _joint(sizes: tuple[int | str | None, ...]) -> int | str | None:
    """The size of one axis: of numbers the one that is not 1, of names only one that all agree on."""
    numbers = {size for size in sizes if isinstance(size, int) and size != 1}
    if numbers:
        return min(numbers)
    others = {size for size in sizes if size != 1}
    return others.pop() if len(others) == 1 else None if others else 1


def _product(shapes: list[_Shape | None]) -> _Shape | None:
    left, right = shapes[0], shapes[1]
    return None if left is None or right is None or len(left) < 2 or len(right) != 2 else (*left[:-1], right[-1])


def _attention(shapes: list[_Shape | None]) -> _Shape | None:
    """MultiHeadAttention of query, key and value, each [batch, length, width]."""
    query, value = shapes[0], shapes[2] if len(shapes) > 2 else None
    return None if query is None or value is None or len(query) != 3 or len(value) != 3 else (*query[:2], value[2])
