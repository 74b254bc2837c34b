# SPDX-License-Identifier: Apache-2.0
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import onnx.checker
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import TensorSpec
from onnxpress.exporters import graph_file
from onnxpress.exporters.graph_file import file_bytes, operator_counts, read, signature_of, weight_bytes, write

LINEAR = """
<ir_version: 8, opset_import: ["": 18]>
main (float[batch, 4] x) => (float[batch, 2] y)
<float[4, 2] w = {1, 0, 0, 1, 1, 0, 0, 1}>
{ p = MatMul(x, w)  y = Relu(p) }
"""


def parsed(text: str = LINEAR) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def saved(path: Path, proto: onnx.ModelProto | None = None) -> Path:
    path.write_bytes((proto or parsed()).SerializeToString())
    return path


def with_external_data(path: Path, location: str = "model.onnx_data", *, length: int = 32, text: str = LINEAR) -> Path:
    """LINEAR with its weight in another file."""
    proto = parsed(text)
    weight = proto.graph.initializer[0]
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        weight.external_data.add(key=key, value=value)
    return saved(path, proto)


WEIGHT = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)


def wide() -> onnx.ModelProto:
    """LINEAR with 1000 more outputs: onnx_ir keeps tensors below 256 bytes in the file whatever is asked."""
    proto = parsed(
        LINEAR.replace("[4, 2] w = {1, 0, 0, 1, 1, 0, 0, 1}", "[4, 1002] w = {0}").replace(
            "[batch, 2] y", "[batch, 1002] y"
        )
    )
    proto.graph.initializer[0].ClearField("float_data")
    proto.graph.initializer[0].raw_data = np.arange(4008, dtype=np.float32).tobytes()
    return proto


def run(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    result: list[np.ndarray] = onnxruntime.InferenceSession(path, options).run(None, feeds)
    return result


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.next_step
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


class TestRead:
    def test_a_good_file(self, tmp_path: Path) -> None:
        model = read(saved(tmp_path / "m.onnx"))
        assert [node.op_type for node in model.graph] == ["MatMul", "Relu"]

    @pytest.mark.parametrize(
        "data", [b"", b"hello, this is a text file\n", b"\x00" * 100, bytes(range(256)) * 8, b"\x08"]
    )
    def test_no_model(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").write_bytes(data)
        assert "m.onnx" in refusal(tmp_path / "m.onnx")

    def test_random_bytes(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for size in (1, 10, 100, 1000, 100_000):
            (tmp_path / "m.onnx").write_bytes(rng.bytes(size))
            assert "m.onnx" in refusal(tmp_path / "m.onnx")

    def test_truncated_and_corrupt_anywhere(self, tmp_path: Path) -> None:
        """Either refused with one line, or still a valid model; never another exception."""
        whole = saved(tmp_path / "m.onnx").read_bytes()
        refused = 0
        for cut in range(0, len(whole), 3):
            (tmp_path / "m.onnx").write_bytes(whole[:cut])
            refusal(tmp_path / "m.onnx")
        rng = np.random.default_rng(0)
        for place in rng.integers(0, len(whole), 60):
            broken = bytearray(whole)
            broken[place] ^= 1 << int(rng.integers(0, 8))
            (tmp_path / "m.onnx").write_bytes(broken)
            try:
                read(tmp_path / "m.onnx")
            except InputError:
                refused += 1
        assert refused > 10

    def test_missing_or_a_folder(self, tmp_path: Path) -> None:
        assert "no such file: m.onnx" in refusal(tmp_path / "m.onnx")
        (tmp_path / "d.onnx").mkdir()
        assert "no such file: d.onnx" in refusal(tmp_path / "d.onnx")

    @pytest.mark.parametrize(
        "change",
        [
            ("y = Relu(p)", "y = Relu(q)"),
            ("MatMul(x, w)", "NoSuchOperator(x, w)"),
        ],
    )
    def test_what_onnx_itself_refuses(self, change: tuple[str, str], tmp_path: Path) -> None:
        assert "is not valid ONNX" in refusal(saved(tmp_path / "m.onnx", parsed(LINEAR.replace(*change))))

    def test_a_name_that_is_given_twice(self, tmp_path: Path) -> None:
        proto = parsed(LINEAR.replace("y = Relu(p)", "p = Relu(p)  y = Relu(p)"))
        assert "m.onnx" in refusal(saved(tmp_path / "m.onnx", proto))

    def test_old_opsets_are_upgraded(self, tmp_path: Path) -> None:
        text = """
        <ir_version: 3, opset_import: ["": 8]>
        main (float[N, 4] x, float[4, 2] w) => (float[N, 1, 2] y)
        <float[4, 2] w = {1, 0, 0, 1, 1, 0, 0, 1}>
        { p = MatMul(x, w)  s = Softmax<axis = 1>(p)  y = Unsqueeze<axes = [1]>(s) }
        """
        path = saved(tmp_path / "m.onnx", parsed(text))
        model = read(path)
        assert model.opset_imports[""] == graph_file.MINIMUM_OPSET
        assert [spec.name for spec in signature_of(model).inputs] == ["x"]  # an initializer is no input
        write(model, tmp_path / "new.onnx")
        x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
        np.testing.assert_allclose(run(tmp_path / "new.onnx", x=x)[0], run(path, x=x)[0], rtol=1e-6)

    def test_an_old_opset_with_external_data(self, tmp_path: Path) -> None:
        WEIGHT.tofile(tmp_path / "model.onnx_data")
        path = with_external_data(tmp_path / "m.onnx", text=LINEAR.replace('"": 18', '"": 11'))
        write(read(path), tmp_path / "new.onnx")
        x = np.ones((1, 4), np.float32)
        np.testing.assert_array_equal(run(tmp_path / "new.onnx", x=x)[0], [[2, 2]])


class TestExternalData:
    def test_stays_on_disk_until_used(self, tmp_path: Path) -> None:
        WEIGHT.tofile(tmp_path / "model.onnx_data")
        path = with_external_data(tmp_path / "m.onnx")
        weight = read(path).graph.initializers["w"].const_value
        assert isinstance(weight, ir.ExternalTensor)
        np.testing.assert_array_equal(weight.numpy(), WEIGHT)
        assert file_bytes(path) == path.stat().st_size + WEIGHT.nbytes

    @pytest.mark.parametrize("location", ["../data", "sub/../../data", "ABSOLUTE", "link"])
    def test_outside_the_folder(self, location: str, tmp_path: Path) -> None:
        folder = tmp_path / "inner"
        folder.mkdir()
        WEIGHT.tofile(tmp_path / "data")
        (folder / "link").symlink_to(tmp_path / "data")
        path = with_external_data(folder / "m.onnx", location.replace("ABSOLUTE", str(tmp_path / "data")))
        assert "points outside the model's folder" in refusal(path)

    def test_missing(self, tmp_path: Path) -> None:
        assert "its external data file model.onnx_data is missing" in refusal(with_external_data(tmp_path / "m.onnx"))

    @pytest.mark.parametrize("size", [0, 1, 31])
    def test_short(self, size: int, tmp_path: Path) -> None:
        (tmp_path / "model.onnx_data").write_bytes(b"\x00" * size)
        assert "is cut short at 'w'" in refusal(with_external_data(tmp_path / "m.onnx"))

    def test_shorter_than_the_shape(self, tmp_path: Path) -> None:
        WEIGHT.tofile(tmp_path / "model.onnx_data")
        assert "is cut short at 'w'" in refusal(with_external_data(tmp_path / "m.onnx", length=16))


class TestWrite:
    def test_same_bytes_every_time(self, tmp_path: Path) -> None:
        model = read(saved(tmp_path / "m.onnx"))
        size = write(model, tmp_path / "a.onnx")
        write(model, tmp_path / "b.onnx")
        write(read(tmp_path / "a.onnx"), tmp_path / "c.onnx")
        first = (tmp_path / "a.onnx").read_bytes()
        assert len(first) == size == file_bytes(tmp_path / "a.onnx")
        assert first == (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()
        onnx.checker.check_model(os.fspath(tmp_path / "a.onnx"))

    def test_external_data_is_taken_in(self, tmp_path: Path) -> None:
        WEIGHT.tofile(tmp_path / "model.onnx_data")
        (tmp_path / "out").mkdir()
        size = write(read(with_external_data(tmp_path / "m.onnx")), tmp_path / "out/m.onnx")
        assert os.listdir(tmp_path / "out") == ["m.onnx"]
        assert size == (tmp_path / "out/m.onnx").stat().st_size
        np.testing.assert_array_equal(run(tmp_path / "out/m.onnx", x=np.ones((1, 4), np.float32))[0], [[2, 2]])

    @pytest.mark.parametrize("large", [False, True])
    def test_a_full_disk_leaves_nothing(self, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = read(saved(tmp_path / "m.onnx"))
        target = tmp_path / "out"
        target.mkdir()
        if large:
            monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 1)

        def fail(_model: ir.Model, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(ir, "save", fail)
            with pytest.raises(InputError, match=r"cannot write m\.onnx: No space left on device"):
                write(model, target / "m.onnx")
        assert os.listdir(target) == []
        write(model, target / "m.onnx")
        np.testing.assert_array_equal(run(target / "m.onnx", x=np.ones((1, 4), np.float32))[0], [[2, 2]])

    def test_a_full_disk_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = saved(tmp_path / "m.onnx")
        old, model = path.read_bytes(), read(path)

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(ir, "save", fail)
        with pytest.raises(InputError):
            write(model, path)
        assert path.read_bytes() == old

    def test_no_such_folder(self, tmp_path: Path) -> None:
        model = read(saved(tmp_path / "m.onnx"))
        with pytest.raises(InputError, match=r"cannot write m\.onnx"):
            write(model, tmp_path / "no/m.onnx")

    def test_large_models_get_a_data_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = read(saved(tmp_path / "m.onnx", wide()))
        monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 4008 * 4)
        out = tmp_path / "out"
        out.mkdir()
        size = write(model, out / "model.onnx")
        assert sorted(os.listdir(out)) == ["model.onnx", "model.onnx_data"]
        assert (out / "model.onnx").stat().st_size < 1000
        assert size == file_bytes(out / "model.onnx") == sum(p.stat().st_size for p in out.iterdir())
        moved = Path(shutil.move(out, tmp_path / "moved"))
        x = np.ones((1, 4), np.float32)
        wanted = run(tmp_path / "m.onnx", x=x)[0]
        np.testing.assert_array_equal(run(moved / "model.onnx", x=x)[0], wanted)
        again = read(moved / "model.onnx")
        assert isinstance(again.graph.initializers["w"].const_value, ir.ExternalTensor)
        (tmp_path / "third").mkdir()
        write(again, tmp_path / "third/model.onnx")
        for name in ("model.onnx", "model.onnx_data"):
            assert (tmp_path / "third" / name).read_bytes() == (moved / name).read_bytes()

    def test_a_large_model_over_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 4008 * 4)
        write(read(saved(tmp_path / "m.onnx", wide())), tmp_path / "model.onnx")
        write(read(tmp_path / "model.onnx"), tmp_path / "model.onnx")
        x = np.ones((1, 4), np.float32)
        np.testing.assert_array_equal(run(tmp_path / "model.onnx", x=x)[0], run(tmp_path / "m.onnx", x=x)[0])

    def test_what_a_killed_run_left_is_not_published(self, tmp_path: Path) -> None:
        left = tmp_path / ".model.onnx.partial"
        left.mkdir()
        (left / "model.onnx_data").write_bytes(b"half of another model")
        path = tmp_path / "model.onnx"
        assert write(read(saved(tmp_path / "m.onnx", wide())), path) == path.stat().st_size
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "model.onnx"]

    def test_a_failure_over_a_large_model_keeps_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 4008 * 4)
        model = read(saved(tmp_path / "m.onnx", wide()))
        write(model, tmp_path / "model.onnx")
        before = (tmp_path / "model.onnx_data").read_bytes()

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(ir, "save", fail)
        with pytest.raises(InputError):
            write(model, tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx_data").read_bytes() == before


class TestFacts:
    def test_signature(self) -> None:
        text = """
        <ir_version: 8, opset_import: ["": 18]>
        main (float16[batch, 4] a, int64[] b, string[?, 2] c, bfloat16[2] d) => (float16[batch, 4] a2, int64 n)
        { a2 = Identity(a)  n = Size(c) }
        """
        signature = signature_of(ir.from_proto(parsed(text)))
        assert signature.inputs == (
            TensorSpec("a", "float16", ("batch", 4)),
            TensorSpec("b", "int64", ()),
            TensorSpec("c", "string", (None, 2)),
            TensorSpec("d", "bfloat16", (2,)),
        )
        assert [spec.name for spec in signature.outputs] == ["a2", "n"]

    def test_operators_and_weights_of_subgraphs_count(self) -> None:
        text = """
        <ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]>
        main (bool c, float[2] x) => (float[2] y)
        <float[2] w = {1, 2}>
        {
            g = com.microsoft.Gelu(x)
            y = If(c) <
                then_branch = yes () => (float[2] t) <float[3] v = {1, 2, 3}> { s = Relu(g)  t = Relu(s) },
                else_branch = no () => (float[2] e) { k = Constant<value = float[2] {1, 2}>()  e = Add(k, w) }
            >
        }
        """
        model = ir.from_proto(parsed(text))
        assert operator_counts(model) == {"Relu": 2, "Add": 1, "Constant": 1, "If": 1, "com.microsoft::Gelu": 1}
        assert next(iter(operator_counts(model))) == "Relu"
        assert weight_bytes(model) == 4 * (2 + 3 + 2)
