# SPDX-License-Identifier: Apache-2.0
"""Models made up of tensors of every type and kind of content; they need not run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from hypothesis import strategies as st
from onnx import TensorProto

WIDTHS = {
    TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2, TensorProto.DOUBLE: 8, TensorProto.INT8: 1,
    TensorProto.UINT8: 1, TensorProto.INT16: 2, TensorProto.UINT16: 2, TensorProto.INT32: 4, TensorProto.UINT32: 4,
    TensorProto.INT64: 8, TensorProto.UINT64: 8, TensorProto.BOOL: 1, TensorProto.COMPLEX64: 8,
    TensorProto.COMPLEX128: 16, TensorProto.FLOAT8E4M3FN: 1, TensorProto.FLOAT8E5M2: 1, TensorProto.INT4: 1,
    TensorProto.UINT4: 1,
}  # fmt: skip
"""Element type -> bytes an element; two of int4 in one."""

KINDS = ("noise", "weights", "pruned", "palette", "zeros", "counting")

SMALL = """
<ir_version: 8, opset_import: ["": 18]>
net (float[batch, 64] x) => (float[batch, 32] y) { y = MatMul(x, w) }
"""


def values(kind: str, size: int, seed: int) -> bytes:
    """Some bytes of a kind: float32 weights and those that passes make of them, noise, or a pattern."""
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal(size // 4 + 4) / 16).astype(np.float32)
    if kind == "noise":
        return rng.bytes(size)
    if kind == "pruned":
        weights[np.abs(weights) < 0.05] = 0
        weights[::7] = -0.0
    if kind == "palette":
        weights = np.round(weights * 16) / np.float32(16)
    if kind == "zeros":
        return bytes(size)
    if kind == "counting":
        return (np.arange(size) % 251).astype(np.uint8).tobytes()
    return weights.tobytes()[:size]


def tensor(name: str, data_type: int, data: bytes) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=data_type, dims=[len(data) // WIDTHS[data_type]], raw_data=data)


@st.composite
def models(draw: st.DrawFn) -> bytes:
    """The bytes of a model with tensors in its initializers, in constants, in a branch and in a function."""
    model = onnx.parser.parse_model(SMALL)
    branch = onnx.GraphProto(name="branch")
    model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH, g=branch)
    constant = model.graph.node.add(op_type="Constant").attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    function = model.functions.add(name="f").node.add(op_type="Constant").attribute.add(name="value")
    places = (model.graph.initializer, model.graph.node[0].attribute[-1].g.initializer)
    for number in range(draw(st.integers(0, 6))):
        data_type = draw(st.sampled_from(sorted(WIDTHS)))
        size = draw(st.integers(0, 600)) * WIDTHS[data_type]
        data = values(draw(st.sampled_from(KINDS)), size, draw(st.integers(0, 3)))
        draw(st.sampled_from(places)).append(tensor(f"w{number}", data_type, data))
        constant.t.CopyFrom(tensor("c", data_type, data[::-1]))
        function.t.CopyFrom(onnx.TensorProto(data_type=1, float_data=np.frombuffer(data[: len(data) & -4], "<f4")))
    written: bytes = model.SerializeToString()
    return written


def write_small(folder: Path, *, external: str = "", kind: str = "weights") -> Path:
    """A model that runs: y = x @ w with w float32 [64, 32], which may lie in a file of its own."""
    model = onnx.parser.parse_model(SMALL)
    data = values(kind, 64 * 32 * 4, 0)
    weight = onnx.TensorProto(name="w", data_type=1, dims=[64, 32])
    if external:
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "4096"), ("length", str(len(data)))):
            weight.external_data.add(key=key, value=value)
        (folder / external).parent.mkdir(parents=True, exist_ok=True)
        (folder / external).write_bytes(bytes(4096) + data + b"the end")
    else:
        weight.raw_data = data
    model.graph.initializer.append(weight)
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path
