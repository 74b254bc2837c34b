# SPDX-License-Identifier: Apache-2.0
"""Sparse initializers, which `onnx_ir` knows nothing of, in files that are read and written."""

from pathlib import Path

import numpy as np
import onnx.checker
import onnx_ir as ir
import onnxruntime
import pytest
from test_graph_file import WEIGHT, parsed, saved, wide

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file
from onnxpress.exporters.graph_file import SparseTensor, file_bytes, read, weight_bytes, write


def loaded(path: Path) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(path.read_bytes())


def with_sparse_weight(path: Path, places: np.ndarray | None = None, dims: tuple[int, ...] = (4, 2)) -> Path:
    """LINEAR with its weight as a sparse initializer: the ones, and where they are."""
    proto = parsed()
    del proto.graph.initializer[:]
    places = np.array([0, 3, 4, 7]) if places is None else places
    sparse = proto.graph.sparse_initializer.add(dims=dims)
    sparse.values.CopyFrom(ir.to_proto(ir.Tensor(np.ones(len(places), np.float32), name="w")))
    sparse.indices.CopyFrom(ir.to_proto(ir.Tensor(places, name="w_places")))
    return saved(path, proto)


@pytest.mark.parametrize("places", [np.array([0, 3, 4, 7]), np.array([[0, 0], [1, 1], [2, 0], [3, 1]])], ids=["1", "2"])
def test_sparse_initializers_are_read(tmp_path: Path, places: np.ndarray) -> None:
    """Places counted through, or one number an axis: ONNX allows both."""
    model = read(with_sparse_weight(tmp_path / "m.onnx", places))
    weight = model.graph.initializers["w"].const_value
    assert isinstance(weight, SparseTensor)
    np.testing.assert_array_equal(weight.numpy(), WEIGHT)
    assert weight_bytes(model) == 4 * 12


def test_sparse_tensors_are_written_sparsely(tmp_path: Path) -> None:
    model = read(saved(tmp_path / "m.onnx"))
    dense = ir.Tensor(WEIGHT, name="w")
    model.graph.initializers["w"].const_value = sparse = SparseTensor(WEIGHT, name="w")
    write(model, tmp_path / "sparse.onnx")
    assert model.graph.initializers["w"].const_value is sparse
    proto = loaded(tmp_path / "sparse.onnx")
    assert (len(proto.graph.initializer), len(proto.graph.sparse_initializer)) == (0, 1)
    onnx.checker.check_model(proto)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    session = onnxruntime.InferenceSession(tmp_path / "sparse.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ WEIGHT)
    model.graph.initializers["w"].const_value = dense
    write(model, tmp_path / "dense.onnx")
    assert not loaded(tmp_path / "dense.onnx").graph.sparse_initializer


def test_a_sparse_weight_stays_in_the_graph_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other weights go to a file of their own."""
    model = ir.from_proto(wide())
    extra = ir.Value(name="v", const_value=SparseTensor(np.eye(40, dtype=np.float32), name="v"))
    model.graph.initializers.add(extra)
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 10_000)
    assert write(model, tmp_path / "m.onnx") == file_bytes(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx_data").stat().st_size == 16_032
    assert len(loaded(tmp_path / "m.onnx").graph.sparse_initializer) == 1
    # and where the sparse ones would not fit into one file, they are dense
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 400)
    write(model, tmp_path / "m.onnx")
    assert not loaded(tmp_path / "m.onnx").graph.sparse_initializer
    assert (tmp_path / "m.onnx_data").stat().st_size == 16_032 + 6_400


@pytest.mark.parametrize(("places", "dims"), [
    (np.array([0, 3, 4, 8]), (4, 2)),
    (np.array([3, 0, 4, 7]), (4, 2)),
    (np.array([0, -3, 4, 7]), (4, 2)),
    (np.array([0, 3, 4, 7], np.int32), (4, 2)),
    (np.array([0, 1, 2, 3]), (1 << 20, 1 << 20)),
    (np.array([0, 1, 2, 3]), (1 << 62, 1 << 62)),
])  # fmt: skip
def test_hostile_sparse_weights_are_refused(tmp_path: Path, places: np.ndarray, dims: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"sparse|Sparse|not valid"):
        read(with_sparse_weight(tmp_path / "m.onnx", places, dims))


def test_a_sparse_weight_in_another_file_is_refused(tmp_path: Path) -> None:
    proto = loaded(with_sparse_weight(tmp_path / "m.onnx"))
    values = proto.graph.sparse_initializer[0].values
    values.ClearField("raw_data")
    values.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "m.bin", "offset": "0", "length": "16"}.items():
        values.external_data.add(key=key, value=value)
    (tmp_path / "m.bin").write_bytes(np.ones(4, np.float32).tobytes())
    with pytest.raises(InputError):
        read(saved(tmp_path / "m.onnx", proto))
