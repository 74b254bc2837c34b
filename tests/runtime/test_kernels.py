# SPDX-License-Identifier: Apache-2.0
"""What the engines execute, and which of it in integers."""

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.runtime import executed_kernels

HEAD = '<ir_version: 9, opset_import: ["": 20]>'
WEIGHT = ", ".join(str(i % 13 - 6) for i in range(256))
SHARED = """ g (float[n, 16] x) => (float[n, 16] a, float[n, 16] b)
<float s = {0.05}, TYPE z = {3}, float ws = {0.02}, int8 wz = {0}, int8[16, 16] v = {W}, int8[16, 16] w = {W}>
{ q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
  vd = DequantizeLinear(v, ws, wz)  wd = DequantizeLinear(w, ws, wz)
  [first] a = MatMul(d, vd)  [second] b = MatMul(d, wd) }
""".replace("W}", WEIGHT + "}")


def model(text: str) -> bytes:
    parsed: bytes = onnx.parser.parse_model(HEAD + text).SerializeToString()
    return parsed


def test_onnxruntime_says_which_products_are_integers() -> None:
    """With int8 activations that two products share ONNX Runtime keeps both in float32; with uint8 it does not."""
    integers = executed_kernels(model(SHARED.replace("TYPE", "uint8")), "cpu", 1)
    assert sorted((k.op, k.outputs, k.integer) for k in integers if "MatMul" in k.op) == [
        ("com.microsoft.MatMulIntegerToFloat", ("a",), True),
        ("com.microsoft.MatMulIntegerToFloat", ("b",), True),
    ]
    floats = executed_kernels(model(SHARED.replace("TYPE", "int8")), "cpu", 1)
    assert sorted((k.op, k.outputs, k.integer) for k in floats if "MatMul" in k.op) == [
        ("MatMul", ("a",), False),
        ("MatMul", ("b",), False),
    ]


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_openvino_says_which_products_are_integers(kind: str) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    found = executed_kernels(model(SHARED.replace("TYPE", kind)), "openvino", 1)
    products = [kernel for kernel in found if kernel.op == "FullyConnected"]
    assert [kernel.integer for kernel in products] == [True, True]
    assert {"a", "b"} <= {name for kernel in products for name in kernel.outputs}


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_a_plain_graph_has_no_integers(tiny: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino", reason="needs the extra openvino")
    found = executed_kernels(tiny, provider, 1)
    assert not any(kernel.integer for kernel in found)
    assert "y" in {name for kernel in found for name in kernel.outputs}


def test_dynamic_quantization_is_integers_too() -> None:
    text = """ g (float[n, 16] x) => (float[n, 16] y) <float ws = {0.02}, int8 wz = {0}, int8[16, 16] w = {W}>
    { q, s, z = DynamicQuantizeLinear(x)  p = MatMulInteger(q, w, z, wz)  f = Cast<to = 1>(p)  t = Mul(s, ws)
      y = Mul(f, t) }""".replace("W}", WEIGHT + "}")
    kernels = executed_kernels(model(text), "cpu", 1)
    assert [kernel.integer for kernel in kernels if "MatMul" in kernel.op] == [True]


@pytest.mark.parametrize(("level", "integer"), [(0, False), (4, True)])
def test_blocks_of_four_bits_count_by_the_type_of_the_activations(level: int, integer: bool) -> None:
    rng = np.random.default_rng(0)
    packed = ", ".join(map(str, rng.integers(0, 256, 16 * 16).tolist()))
    scales = ", ".join(["0.1"] * 16)
    text = f"""<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> g (float[n, 32] x) => (float[n, 16] y)
    <uint8[16, 1, 16] w = {{{packed}}}, float[16] s = {{{scales}}}>
    {{ y = com.microsoft.MatMulNBits<K = 32, N = 16, bits = 4, block_size = 32, accuracy_level = {level}>(x, w, s) }}"""
    (kernel,) = executed_kernels(onnx.parser.parse_model(text).SerializeToString(), "cpu", 1)
    assert (kernel.op, kernel.integer) == ("com.microsoft.MatMulNBits", integer)


def test_what_cannot_be_asked(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'cuda' executes is not known"):
        executed_kernels(tiny, "cuda")
    with pytest.raises(InputError, match="no model file"):
        executed_kernels(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="cannot be loaded"):
        executed_kernels(b"garbage")
    with pytest.raises(InputError, match="cannot be loaded"):
        executed_kernels(b"garbage", "openvino")
