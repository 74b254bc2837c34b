# SPDX-License-Identifier: Apache-2.0
"""LSTM with int8 weights: com.microsoft's DynamicQuantizeLSTM, which rounds inputs and states as they come.

The ONNX operator holds W [directions, 4 * hidden, input] and R [directions, 4 * hidden, hidden]; the quantized one
holds them transposed, int8, with one scale for each of the 4 * hidden outputs of each direction.

Reference: DynamicQuantizeLSTM in ONNX Runtime's ContribOperators.md; LSTM-14 of the ONNX specification.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import MICROSOFT, add_weight, attribute, consumers, is_op, is_weight, make_node
from .matrix_weights import quantize_symmetric

_INPUTS = 8  # X, W, R, B, sequence_lens, initial_h, initial_c, P
_KEPT = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")


def why_not_recurrent(node: ir.Node, minimum_elements: int) -> str | None:
    """Why an LSTM (or GRU, RNN) stays as it is; None if its weights can be int8."""
    if not is_op(node, "LSTM"):
        return f"ONNX Runtime has no quantized {node.op_type}"
    if attribute(node, "layout", 0) != 0:
        return "DynamicQuantizeLSTM has no layout with the batch first"
    for value in node.inputs[1:3]:
        if value is None or not is_weight(value) or value.is_graph_output():
            return "the weights are not constants of the graph"
        assert value.const_value is not None
        if value.const_value.dtype != ir.DataType.FLOAT:
            return f"the weight is {value.const_value.dtype.name.lower()}, not fp32"
        if len(consumers(value)) > 1:
            return "the weight has other readers"
        if value.const_value.size < minimum_elements:
            return f"the weight has fewer than {minimum_elements} elements"
        if not np.isfinite(value.const_value.numpy()).all():
            return "the weight holds NaN or infinity"
    return None


def write_recurrent(model: ir.Model, node: ir.Node, *, bits: int) -> None:
    """Replace an LSTM; its outputs keep their names."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    inputs = [*node.inputs[:_INPUTS], *[None] * (_INPUTS - len(node.inputs))]
    for index in (1, 2):
        weight = inputs[index]
        assert weight is not None
        assert weight.const_value is not None
        array = weight.const_value.numpy()
        rows, scale = quantize_symmetric(array.reshape(-1, array.shape[2]), axis=0, bits=bits)
        inputs[index] = add_weight(model, graph, f"{weight.name}_int8", rows.reshape(array.shape).transpose(0, 2, 1))
        inputs.append(add_weight(model, graph, f"{weight.name}_scale", scale.reshape(array.shape[:2])))
        inputs.append(add_weight(model, graph, f"{weight.name}_zero_point", np.zeros(array.shape[:2], np.int8)))
    kept = {name: node.attributes[name].value for name in _KEPT if name in node.attributes}
    names = [str(output.name) for output in node.outputs]
    new = make_node("DynamicQuantizeLSTM", inputs, names, domain=MICROSOFT, attributes=kept)
    new.name = node.name
    graph.insert_before(node, new)
    for old, result in zip(node.outputs, new.outputs, strict=True):
        result.shape, result.type = old.shape, old.type
        old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    model.opset_imports.setdefault(MICROSOFT, 1)
