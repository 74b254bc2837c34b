# SPDX-License-Identifier: Apache-2.0
"""Take com.microsoft operators apart that hold weights or slow kernels, so that the other rules can work on them.

ONNX Runtime's own optimizer writes these into files; a quantizer that looks for MatMul and Gather then finds a third of
the model missing.

Reference: Attention, EmbedLayerNormalization, SkipLayerNormalization in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import MICROSOFT, add_weight, attribute, dims, is_op, is_weight, make_node, replace_node, replace_value


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _used(node: ir.Node, index: int) -> bool:
    if index >= len(node.outputs):
        return False
    return bool(node.outputs[index].uses()) or node.outputs[index].is_graph_output()


def match_attention(node: ir.Node) -> ir.Node | str | None:
    """com.microsoft's Attention, if MultiHeadAttention can do the same on a MatMul's result."""
    if not is_op(node, "Attention", domain=MICROSOFT):
        return None
    shape = dims(_input(node, 1))
    sizes = list(attribute(node, "qkv_hidden_sizes", []))
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int):
        return "the weight's shape is not known"
    if _input(node, 4) is not None or _input(node, 6) is not None or _used(node, 1):
        return "keeps a cache of past keys"
    if sizes and len(set(sizes)) != 1:
        return "query, key and value have different widths"
    if attribute(node, "do_rotary", 0) or attribute(node, "unidirectional", 0):
        return "rotary or causal attention"
    if _input(node, 3) is not None and not _known_mask(_input(node, 3)):
        return "its mask is not [batch, sequence]"
    return node


def _known_mask(mask: ir.Value | None) -> bool:
    """[batch, sequence], or the lengths [batch] that EmbedLayerNormalization gives."""
    shape, maker = dims(mask), mask.producer() if mask is not None else None
    if shape is not None:
        return len(shape) == 2
    return maker is not None and maker.op_type == "EmbedLayerNormalization" and maker.outputs[1] is mask


def write_attention(model: ir.Model, node: ir.Node) -> None:
    """Attention(x, W, b, mask) -> MultiHeadAttention(Split(x W + b), mask)."""
    graph, weight = node.graph, dims(node.inputs[1])
    assert isinstance(graph, ir.Graph)
    assert weight is not None
    assert isinstance(weight[1], int)
    name = str(node.outputs[0].name)
    new = [make_node("MatMul", [node.inputs[0], node.inputs[1]], [f"{name}_qkv"])]
    if _input(node, 2) is not None:
        new.append(make_node("Add", [new[-1].outputs[0], node.inputs[2]], [f"{name}_qkv_bias"]))
    sizes = add_weight(model, graph, f"{name}_split", np.full(3, weight[1] // 3, np.int64))
    names = [f"{name}_{part}" for part in ("query", "key", "value")]
    new.append(make_node("Split", [new[-1].outputs[0], sizes], names, attributes={"axis": -1}))
    attributes: dict[str, int | float] = {"num_heads": int(attribute(node, "num_heads", 1))}
    for key in ("scale", "mask_filter_value"):
        if key in node.attributes:
            attributes[key] = float(attribute(node, key, 0.0))
    inputs = [*new[-1].outputs, None, _input(node, 3), _input(node, 5)]
    new.append(make_node("MultiHeadAttention", inputs, [f"{name}_fused"], domain=MICROSOFT, attributes=attributes))
    model.opset_imports[MICROSOFT] = 1
    replace_node(node, new)


def match_embedding(node: ir.Node) -> ir.Node | str | None:
    """com.microsoft's EmbedLayerNormalization, which holds the word embeddings."""
    if not is_op(node, "EmbedLayerNormalization", domain=MICROSOFT):
        return None
    if not all(is_weight(_input(node, i)) for i in (2, 3)):
        return "the embeddings are not constants"
    if _used(node, 1) and _input(node, 7) is None:
        return "gives lengths without having a mask"
    if _used(node, 2):
        return "its sum is read by others"
    return node


def write_embedding(model: ir.Model, node: ir.Node) -> None:
    """Gathers, their sum, and the standard LayerNormalization; the lengths become a count of the mask's ones."""
    graph, name = node.graph, str(node.outputs[0].name)
    assert isinstance(graph, ir.Graph)
    ids, segments, words, positions, kinds, gamma, beta, mask, position_ids = (_input(node, i) for i in range(9))
    new = [make_node("Gather", [words, ids], [f"{name}_words"])]
    parts = [new[-1].outputs[0]]
    if position_ids is not None:
        new.append(make_node("Gather", [positions, position_ids], [f"{name}_positions"]))
    else:
        zero = add_weight(model, graph, f"{name}_zero", np.asarray(0, np.int64))
        one = add_weight(model, graph, f"{name}_one", np.asarray(1, np.int64))
        new.append(make_node("Shape", [ids], [f"{name}_sizes"]))
        new.append(make_node("Gather", [new[-1].outputs[0], one], [f"{name}_length"], attributes={"axis": 0}))
        new.append(make_node("Range", [zero, new[-1].outputs[0], one], [f"{name}_places"]))
        new.append(make_node("Gather", [positions, new[-1].outputs[0]], [f"{name}_positions"]))
    parts.append(new[-1].outputs[0])
    if kinds is not None and segments is not None:
        new.append(make_node("Gather", [kinds, segments], [f"{name}_kinds"]))
        parts.append(new[-1].outputs[0])
    if _used(node, 1):
        new += _lengths(model, node, mask)
    new.append(make_node("Sum", parts, [f"{name}_sum"]))
    attributes = {"axis": -1, "epsilon": float(attribute(node, "epsilon", 1e-12))}
    new.append(
        make_node("LayerNormalization", [new[-1].outputs[0], gamma, beta], [f"{name}_norm"], attributes=attributes)
    )
    replace_node(node, new)


def _lengths(model: ir.Model, node: ir.Node, mask: ir.Value | None) -> list[ir.Node]:
    graph, old = node.graph, node.outputs[1]
    assert isinstance(graph, ir.Graph)
    axis = add_weight(model, graph, f"{old.name}_axis", np.ones(1, np.int64))
    cast = make_node("Cast", [mask], [f"{old.name}_ones"], attributes={"to": int(ir.DataType.INT32)})
    count = make_node("ReduceSum", [cast.outputs[0], axis], [f"{old.name}_count"], attributes={"keepdims": 0})
    count.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    replace_value(old, count.outputs[0])
    return [cast, count]


def match_skip_norm(node: ir.Node) -> ir.Node | str | None:
    """com.microsoft's SkipLayerNormalization, whose CPU kernel is slower than the two that it replaces."""
    if not is_op(node, "SkipLayerNormalization", domain=MICROSOFT):
        return None
    return "gives mean or deviation" if _used(node, 1) or _used(node, 2) else node


def write_skip_norm(model: ir.Model, node: ir.Node) -> None:
    """SkipLayerNormalization(x, skip, gamma, beta, bias) -> LayerNormalization(Sum(x, skip, bias))."""
    name = str(node.outputs[0].name)
    terms = [v for v in (node.inputs[0], node.inputs[1], _input(node, 4)) if v is not None]
    total = make_node("Sum", terms, [f"{name}_sum"])
    if _used(node, 3):
        replace_value(node.outputs[3], total.outputs[0])
    attributes = {"axis": -1, "epsilon": float(attribute(node, "epsilon", 1e-12))}
    scaled = [total.outputs[0], node.inputs[2], _input(node, 3)]
    norm = make_node("LayerNormalization", scaled, [f"{name}_norm"], attributes=attributes)
    replace_node(node, [total, norm])
