# SPDX-License-Identifier: Apache-2.0
"""Weights in files: whatever is done to them on the way, the numbers are those of the array."""

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import streamed_tensor
from onnxpress.exporters.streamed_tensor import Place, StreamedTensor, astype, in_order, streamed

BF16 = np.dtype(ml_dtypes.bfloat16)


def stored(path: Path, array: np.ndarray, offset: int = 5, **how: object) -> StreamedTensor:
    """`array` in a file, behind `offset` bytes and before some others."""
    path.write_bytes(b"x" * offset + array.tobytes() + b"yyy")
    place = Place(path, offset, ir.DataType.from_numpy(array.dtype), array.shape)
    return StreamedTensor(place, name="w", **how)  # type: ignore[arg-type]


def written(tensor: StreamedTensor) -> bytes:
    out = io.BytesIO()
    tensor.tofile(out)
    return out.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    dtype=st.sampled_from([np.dtype(np.float32), BF16, np.dtype(np.int64), np.dtype(np.uint8)]),
    piece=st.integers(64, 5000),
    threads=st.integers(1, 3),
)
def test_pieces_are_the_array(tmp_path: Path, shape: list[int], dtype: np.dtype, piece: int, threads: int) -> None:
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    tensor = stored(tmp_path / "f", array)
    pieces = list(tensor.pieces(piece, threads))
    assert all(0 < part.size <= piece for part in pieces)
    np.testing.assert_array_equal(np.concatenate([np.empty(0, dtype), *pieces]), array.reshape(-1))
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.tobytes() == written(tensor) == array.tobytes()
    assert tensor.nbytes == array.nbytes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(rows=st.integers(1, 200), columns=st.integers(1, 200), piece=st.integers(64, 5000), threads=st.integers(1, 3))
def test_transposed_and_converted(tmp_path: Path, rows: int, columns: int, piece: int, threads: int) -> None:
    array = np.random.default_rng(rows).standard_normal((rows, columns)).astype(BF16)
    tensor = stored(tmp_path / "f", array).converted(ir.DataType.FLOAT, astype(ir.DataType.FLOAT)).transposed("t")
    half = tensor.converted(ir.DataType.FLOAT16, astype(ir.DataType.FLOAT16))
    wanted = array.astype(np.float32).T.astype(np.float16)
    assert (half.name, half.dtype, half.shape) == ("t", ir.DataType.FLOAT16, ir.Shape([columns, rows]))
    np.testing.assert_array_equal(np.concatenate(list(half.pieces(piece, threads))), wanted.reshape(-1))
    assert written(half) == np.ascontiguousarray(wanted).tobytes()
    back = tensor.transposed()
    np.testing.assert_array_equal(back.rows(rows // 2, rows), array[rows // 2 :].astype(np.float32))


def test_a_step_is_told_where_it_is(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def note(piece: np.ndarray, start: int) -> np.ndarray:
        seen.append((start, piece.size))
        return piece

    tensor = stored(tmp_path / "f", np.arange(12, dtype=np.float32).reshape(3, 4)).converted(ir.DataType.FLOAT, note)
    list(tensor.pieces(5))
    list(tensor.transposed().pieces(6))
    assert seen == [(0, 5), (5, 5), (10, 2), (0, 6), (6, 6)]


def test_it_can_be_read_in_the_graph_as_any_tensor(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = stored(tmp_path / "f", array)
    np.testing.assert_array_equal(np.asarray(tensor), array)
    assert ir.to_proto(tensor).raw_data == array.tobytes()


def test_what_has_no_rows_or_is_no_matrix(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "f", np.zeros((2, 3, 4), np.float32))
    with pytest.raises(ValueError):
        tensor.transposed()
    with pytest.raises(ValueError):
        stored(tmp_path / "f", np.zeros((2, 3), np.float32)).transposed().rows(0, 1)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "weights.bin", np.zeros(1000, np.float32))
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(InputError, match=r"weights.bin has become shorter"):
        tensor.numpy()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"cannot read weights.bin"):
        tensor.numpy()


def test_samples_tell_tensors_apart_and_find_equal_ones(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((500, 40)).astype(np.float32)
    one, other = stored(tmp_path / "a", array), stored(tmp_path / "b", array)
    assert one.sample() == other.sample()
    assert not one.same_as(other)
    assert one.same_as(stored(tmp_path / "a", array))
    changed = stored(tmp_path / "c", array + np.float32(1))
    assert one.sample() != changed.sample()


def test_only_large_weights_of_a_data_file_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_tensor, "STREAM_FROM", 64)
    (tmp_path / "d").write_bytes(np.arange(64, dtype=np.float32).tobytes())

    def external(dtype: ir.DataType, shape: list[int], offset: int = 0) -> ir.ExternalTensor:
        return ir.ExternalTensor("d", offset, None, dtype, shape=ir.Shape(shape), name="w", base_dir=tmp_path)

    large = streamed(external(ir.DataType.FLOAT, [4, 5], 16))
    assert large is not None
    np.testing.assert_array_equal(large.numpy(), np.arange(4, 24, dtype=np.float32).reshape(4, 5))
    assert streamed(large) is large
    assert streamed(external(ir.DataType.FLOAT, [2])) is None
    assert streamed(external(ir.DataType.INT4, [400])) is None
    assert streamed(ir.tensor(np.zeros(400, np.float32))) is None
    assert streamed(None) is None


class TestInOrder:
    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_order_and_results(self, threads: int) -> None:
        def slow_at_first(number: int) -> int:
            time.sleep(0.003 / (number + 1))
            return number * number

        assert list(in_order(slow_at_first, range(20), threads)) == [n * n for n in range(20)]

    @pytest.mark.parametrize("threads", [1, 3])
    def test_no_more_is_taken_than_is_asked_for(self, threads: int) -> None:
        taken, running = [], threading.Semaphore(threads)

        def items() -> Iterator[int]:
            for number in range(100):
                taken.append(number)
                yield number

        def work(number: int) -> int:
            assert running.acquire(blocking=False)
            running.release()
            return number

        results = in_order(work, items(), threads)
        for number in range(10):
            assert next(results) == number
            assert len(taken) <= number + 1 + threads + 1
        results.close()  # type: ignore[attr-defined]
        assert len(taken) < 20

    @pytest.mark.parametrize("threads", [1, 2])
    def test_an_error_comes_through(self, threads: int) -> None:
        with pytest.raises(ZeroDivisionError):
            list(in_order(lambda n: 1 // (n - 3), range(10), threads))
