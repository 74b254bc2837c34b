# SPDX-License-Identifier: Apache-2.0
"""Operators that torch's translation gets wrong, translated here.

torchlib (onnxscript 0.7.2) writes the second operand of `aten::remainder.Scalar` and `aten::pow.Tensor_Scalar` as a
constant, and fails where it is a dynamic size: `cell % width` in a detector's decoding. `aten::rsub`, which is `1 - x`,
it does not have at all; what torch makes of it instead, a subtraction from a number, breaks where types differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op


def _alike(tensor: Any, number: Any) -> tuple[Any, Any]:
    """A tensor and a number or size, as tensors of one type: PyTorch computes an integer with a float in float32."""
    if isinstance(number, ir.Value):
        return tensor, op.CastLike(number, tensor)
    if isinstance(number, float) and tensor.dtype.is_integer():
        tensor = op.Cast(tensor, to=ir.DataType.FLOAT)
        return tensor, ir.tensor(number, dtype=ir.DataType.FLOAT)
    return tensor, ir.tensor(number, dtype=tensor.dtype)


def _remainder(dividend: Any, divisor: Any) -> Any:
    """Python's remainder, with the divisor's sign."""
    integers = dividend.dtype.is_integer() and not isinstance(divisor, float)
    dividend, divisor = _alike(dividend, divisor)
    if integers:
        return op.Mod(dividend, divisor)
    return op.Sub(dividend, op.Mul(op.Floor(op.Div(dividend, divisor)), divisor))


def _pow(base: Any, exponent: Any) -> Any:
    return op.Pow(*_alike(base, exponent))


def _rsub(tensor: Any, number: Any, alpha: float = 1) -> Any:
    """`number - alpha * tensor`."""
    tensor, number = _alike(tensor, number)
    if alpha != 1:
        tensor = op.Mul(*_alike(tensor, alpha))
    return op.Sub(number, tensor)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.remainder.Scalar: _remainder,
    torch.ops.aten.pow.Tensor_Scalar: _pow,
    torch.ops.aten.rsub.Scalar: _rsub,
    torch.ops.aten.rsub.Tensor: _rsub,
}
"""For `custom_translation_table` of `torch.onnx.export`."""
