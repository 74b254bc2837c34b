# SPDX-License-Identifier: Apache-2.0
"""Files with data beside them: when there is one, what an old one becomes, and a disk that is full."""

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file

TEXT = """<ir_version: 8, opset_import: ["": 18]>
main (float[batch, 40] x, float[40, 30] w) => (float[batch, 30] y) { y = MatMul(x, w) }"""


def model(value: float = 1.0) -> ir.Model:
    made = ir.from_proto(onnx.parser.parse_model(TEXT))
    weight = made.graph.inputs.pop()
    weight.const_value = ir.Tensor(np.full((40, 30), value, np.float32), name="w")
    made.graph.register_initializer(weight)
    return made


def weight(path: Path) -> float:
    tensor = graph_file.read(path).graph.initializers["w"].const_value
    assert tensor is not None
    return float(tensor.numpy()[0, 0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("limit", "beside"), [(0, True), (4800, True), (4801, False), (None, False)])
def test_weights_go_beside_from_a_size_on(tmp_path: Path, limit: int | None, beside: bool) -> None:
    written = graph_file.write(model(), tmp_path / "m.onnx", external_from=limit)
    assert names(tmp_path) == (["m.onnx", "m.onnx_data"] if beside else ["m.onnx"])
    assert written == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert weight(tmp_path / "m.onnx") == 1


def test_a_lazy_weight_is_asked_for_once(tmp_path: Path) -> None:
    made, calls = model(), []

    def compute() -> ir.TensorProtocol:
        calls.append(1)
        return ir.Tensor(np.full((40, 30), 5, np.float32))

    made.graph.initializers["w"].const_value = ir.LazyTensor(compute, ir.DataType.FLOAT, ir.Shape([40, 30]), name="w")
    graph_file.write(made, tmp_path / "m.onnx", external_from=0)
    assert len(calls) == 1
    assert weight(tmp_path / "m.onnx") == 5


def test_a_new_file_takes_the_place_of_an_old_one_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    graph_file.write(model(1), target, external_from=0)
    seen = []
    replace = graph_file.os.replace  # type: ignore[attr-defined]

    def noted(source: Path, to: Path) -> None:
        replace(source, to)
        seen.append((Path(to).name, target.exists()))

    monkeypatch.setattr(graph_file.os, "replace", noted)  # type: ignore[attr-defined]
    graph_file.write(model(2), target, external_from=0)
    # Between the two moves there is no graph that could read the wrong data; onnx_ir's own move comes first
    assert seen[-2:] == [("m.onnx_data", False), ("m.onnx", True)]
    assert weight(target) == 2


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_000, 1_000))
    graph_file.write(model(), tmp_path / "small.onnx")
    with pytest.raises(InputError, match=r"cannot write m.onnx: it takes 0.0 GB, and 0.0 GB are free") as caught:
        graph_file.write(model(), tmp_path / "m.onnx", external_from=0)
    assert caught.value.next_step
    assert names(tmp_path) == ["small.onnx"]
