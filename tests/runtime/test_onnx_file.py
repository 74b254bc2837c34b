# SPDX-License-Identifier: Apache-2.0
"""The reader of signatures and nodes, against the onnx package."""

import contextlib
import os
from pathlib import Path

import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import TensorSpec
from onnxpress.runtime import Session
from onnxpress.runtime.onnx_file import FileNode, read_onnx

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets"))
FILES = sorted(ASSETS.rglob("*.onnx")) if ASSETS.is_dir() else []
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"no .onnx files under {ASSETS}"))

BRANCHES = """
<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>
g (float[batch, 4, ?] x, bool condition, float[1] bias) => (float[m, n] y, seq(float[k]) z)
<float[1] bias = {1}>
{
    z = SequenceConstruct(x)
    [chosen] y = If (condition) <then_branch = t () => (float[a] p) { [inside] p = Neg(x) },
                                 else_branch = e () => (float[a] q) { q = com.microsoft.Gelu(x) }>
    [last] a, b = Split<axis = -1, num_outputs = 2>(x)
}
"""


def test_signature_and_nodes() -> None:
    found = read_onnx(onnx.parser.parse_model(BRANCHES).SerializeToString())
    assert found.signature.inputs == (  # bias has a value: it is no input
        TensorSpec("x", "float32", ("batch", 4, None)),
        TensorSpec("condition", "bool", ()),
    )
    assert found.signature.outputs == (TensorSpec("y", "float32", ("m", "n")), TensorSpec("z", "seq(...)", ()))
    assert [(node.op, node.domain) for node in found.nodes] == [
        ("SequenceConstruct", ""), ("If", ""), ("Neg", ""), ("Gelu", "com.microsoft"), ("Split", ""),
    ]  # fmt: skip
    assert found.nodes[2] == FileNode("Neg", "", "inside", ("p",), {})
    assert found.nodes[4] == FileNode("Split", "", "last", ("a", "b"), {"axis": -1, "num_outputs": 2})


def test_an_output_without_a_shape_is_told() -> None:
    model = onnx.parser.parse_model('<ir_version: 9, opset_import: ["": 18]> g (float x) => (float y) {y = Neg(x)}')
    assert not read_onnx(model.SerializeToString()).unshaped
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert read_onnx(model.SerializeToString()).unshaped == {"y"}


@pytest.mark.parametrize("file", FILES or [ABSENT], ids=lambda file: getattr(file, "name", "none"))
def test_real_files_as_onnx_and_onnxruntime_read_them(file: Path) -> None:
    found = read_onnx(file)
    assert found.signature.inputs == Session(file, threads=1).signature.inputs
    wanted = onnx.ModelProto.FromString(file.read_bytes()).graph
    top = [(node.op_type, tuple(node.output)) for node in wanted.node]
    ours = iter((node.op, node.outputs) for node in found.nodes)
    assert all(node in ours for node in top)  # in order, with those of subgraphs between them
    assert [spec.name for spec in found.signature.outputs] == [value.name for value in wanted.output]


@given(cut=st.integers(0, 400), noise=st.binary(max_size=30))
def test_any_bytes_are_read_or_refused(cut: int, noise: bytes) -> None:
    whole = onnx.parser.parse_model(BRANCHES).SerializeToString()
    for data in (whole[:cut], noise, whole[:cut] + noise):
        with contextlib.suppress(InputError):
            read_onnx(data)


def test_the_file_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(BRANCHES).SerializeToString())
    read_onnx(path)
    path.unlink()
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"m\.onnx cannot be loaded: it is no ONNX model"):
        read_onnx(path)
