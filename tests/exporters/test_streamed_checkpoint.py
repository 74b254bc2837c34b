# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints by their headers: whole ones, and every way in which one can be broken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import streamed_checkpoint
from onnxpress.exporters.streamed_checkpoint import INDEX, Checkpoint, folder_to_stream

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(8, dtype=np.float16).reshape(4, 2),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.asarray(3, np.int64),
}


def sharded(folder: Path) -> Path:
    """ARRAYS in two shards."""
    names = list(ARRAYS)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: ARRAYS[name] for name in held}, folder / shard)
    where = {name: shard for shard, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def raw(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert caught.value.next_step
    assert str(folder) not in str(caught.value)
    return str(caught.value)


def test_one_file(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint) == set(ARRAYS)
    assert len(checkpoint) == 4
    assert checkpoint.nbytes == sum(array.nbytes for array in ARRAYS.values())
    for name, array in ARRAYS.items():
        tensor = checkpoint.tensor(name, ir.DataType.from_numpy(array.dtype))
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().shape == array.shape


def test_shards(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
    np.testing.assert_array_equal(checkpoint.tensor("b.weight", ir.DataType.FLOAT16).numpy(), ARRAYS["b.weight"])
    assert checkpoint.sha256() == Checkpoint.open(tmp_path).sha256()


def test_bfloat16_becomes_fp32_exactly(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((5, 7)).astype(ml_dtypes.bfloat16)
    header = {"w": {"dtype": "BF16", "shape": [5, 7], "data_offsets": [0, 70]}}
    raw(tmp_path / "model.safetensors", header, array.tobytes())
    tensor = Checkpoint.open(tmp_path).tensor("w", ir.DataType.FLOAT, "renamed")
    assert tensor.name == "renamed"
    np.testing.assert_array_equal(tensor.numpy(), array.astype(np.float32))


def test_no_weights(tmp_path: Path) -> None:
    assert "holds no safetensors" in refusal(tmp_path)


def test_files_that_nothing_explains(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "one.safetensors")
    save_file(ARRAYS, tmp_path / "two.safetensors")
    assert "2 safetensors files" in refusal(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    assert "model-2.safetensors, with 2 weights, is missing" in refusal(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weights": {}}'])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    (sharded(tmp_path) / INDEX).write_text(index)
    assert "not a list of shards" in refusal(tmp_path)


def test_an_index_that_points_elsewhere(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text('{"weight_map": {"a.weight": "../model-1.safetensors"}}')
    assert "outside its folder" in refusal(tmp_path)


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text('{"weight_map": {"c.weight": "model-1.safetensors"}}')
    assert "c.weight is in model-1.safetensors, which lacks it" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: b"", "cut short"),
        (lambda whole: whole[:20], "cut short"),
        (lambda whole: whole[:-1], "cut short at b.weight"),
        (lambda whole: b"\xff" * len(whole), "not a safetensors file"),
        (lambda whole: whole[:8] + b"!" * (len(whole) - 8), "cannot be read"),
    ],
)
def test_a_broken_file(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    save_file(dict(list(ARRAYS.items())[:2]), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(change(whole))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fit its shape"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "does not fit its shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "does not fit its shape"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "cut short at w"),
        ({"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}, "stored as C64"),
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}, "cannot be read"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, "cannot be read"),
        ([1, 2], "cannot be read"),
    ],
)
def test_an_entry_that_makes_no_sense(tmp_path: Path, entry: object, message: str) -> None:
    raw(tmp_path / "model.safetensors", {"w": entry}, b"12345678")
    assert message in refusal(tmp_path)


class TestWhatIsStreamed:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save_file(ARRAYS, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        return tmp_path

    def test_small_ones_only_when_asked(self, folder: Path) -> None:
        assert folder_to_stream(str(folder), None, "auto") is None
        assert folder_to_stream(str(folder), None, "streamed") == folder

    def test_what_takes_much_of_the_memory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streamed_checkpoint, "_SHARE_OF_MEMORY", 0.0)
        assert folder_to_stream(str(folder), None, "auto") == folder
        assert folder_to_stream(str(folder), "text-generation", "auto") == folder
        assert folder_to_stream(str(folder), "fill-mask", "auto") is None
        assert folder_to_stream(str(folder), None, "memory") is None
        for config in ('{"architectures": ["BertModel"]}', "{}", "[]", "not json"):
            (folder / "config.json").write_text(config)
            assert folder_to_stream(str(folder), None, "auto") is None

    @pytest.mark.parametrize("source", ["package.module:factory", "no/such", "model.onnx"])
    def test_other_sources_are_not(self, source: str) -> None:
        assert folder_to_stream(source, None, "auto") is None
        with pytest.raises(InputError, match="which alone can be streamed"):
            folder_to_stream(source, None, "streamed")
