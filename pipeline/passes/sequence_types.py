# SPDX-License-Identifier: Apache-2.0
"""Types of values that are no tensors, which `onnx_ir`'s shape inference (1.1) declares as tensors all the same.

It takes the element type that ONNX infers and drops the sequence around it; a file with such a declaration does not
load where the value leaves a branch or a loop. What is declared already stays, so it is done after the inference.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .graph import is_op, nodes_of

_MAKE_SEQUENCES = (
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceMap",
    "SplitToSequence",
)


def correct_sequence_types(model: ir.Model) -> None:
    """Give sequences, and what branches and loops return of them, their type back."""
    for node in nodes_of(model):
        if is_op(node, *_MAKE_SEQUENCES):
            for value in node.outputs:
                if isinstance(value.type, ir.TensorType):
                    value.type, value.shape = ir.SequenceType(value.type), None
        for value, inner in _returned(node):
            if inner.type is not None and not isinstance(inner.type, ir.TensorType):
                value.type, value.shape = inner.type, None
        given = node.inputs[0].type if node.inputs and node.inputs[0] is not None else None
        if isinstance(given, ir.SequenceType | ir.OptionalType) and is_op(node, "Identity", "OptionalGetElement"):
            inner_type = (
                given.elem_type if is_op(node, "OptionalGetElement") and isinstance(given, ir.OptionalType) else given
            )
            node.outputs[0].type, node.outputs[0].shape = inner_type, None


def _returned(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """An output of If or Loop with the value that a branch or the body returns for it."""
    if is_op(node, "If"):
        for name in ("then_branch", "else_branch"):
            yield from zip(node.outputs, node.attributes[name].as_graph().outputs, strict=True)
    elif is_op(node, "Loop"):
        carried = len(node.inputs) - 2  # behind them stand the outputs that are stacked, which are tensors
        yield from zip(node.outputs[:carried], node.attributes["body"].as_graph().outputs[1 : 1 + carried], strict=True)
