# SPDX-License-Identifier: Apache-2.0
"""Whole models: packed and unpacked they are the same byte for byte, and whatever happens in between is noticed."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_samples import models, tensor, values, write_small

from onnxpress.contracts.errors import InputError
from onnxpress.runtime import Session
from onnxpress.runtime.packing import (
    CODECS,
    codecs,
    container,
    is_packed,
    load_packed,
    pack,
    reader,
    unpack,
    unpack_to_memory,
    writer,
)
from onnxpress.runtime.packing.container import HEADER, HEADER_BYTES, Index, read_index, write_index
from onnxpress.runtime.packing.layout import layout_of

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[4] / "shared" / "assets"))
FILES = sorted(ASSETS.rglob("*.onnx")) if ASSETS.is_dir() else []
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"no .onnx files under {ASSETS}"))


# --- the same, byte for byte ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(models(), st.sampled_from(CODECS), st.integers(1, 2))
def test_a_model_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, model: bytes, codec: str, threads: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    source = folder / "m.onnx"
    source.write_bytes(model)
    report = pack(source, folder / "m.pack", codec=codec, level=3, threads=threads)
    assert report.bytes_before == len(model)
    assert report.bytes_after == (folder / "m.pack").stat().st_size
    assert sum(before for before, _ in report.types.values()) + report.repeated_bytes == len(model)
    assert unpack(folder / "m.pack", folder / "back.onnx", threads=threads) == [folder / "back.onnx"]
    assert (folder / "back.onnx").read_bytes() == model
    assert unpack_to_memory(folder / "m.pack", threads=threads).model.tobytes() == model


@pytest.mark.parametrize("file", FILES or [ABSENT], ids=lambda file: getattr(file, "name", "none"))
def test_a_real_model_comes_back_smaller_than_zstandard_makes_it(file: Path, tmp_path: Path) -> None:
    report = pack(file, tmp_path / "m.pack", level=3)
    whole = len(codecs.encode(file.read_bytes(), "zstd", 19)[1])
    assert report.bytes_after < 0.95 * whole
    unpack(tmp_path / "m.pack", tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["net.data", "deep/er/net.data"])
def test_external_data_comes_back_beside_the_model(tmp_path: Path, name: str) -> None:
    model = write_small(tmp_path, external=name)
    kept = {path: (tmp_path / path).read_bytes() for path in ("net.onnx", name)}
    pack(model, tmp_path / "net.pack")
    files = unpack(tmp_path / "net.pack", tmp_path / "back" / "other.onnx")
    assert files == [tmp_path / "back" / "other.onnx", tmp_path / "back" / name]
    assert [file.read_bytes() for file in files] == list(kept.values())
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(["other.onnx", name.split("/")[0]])
    assert unpack_to_memory(tmp_path / "net.pack").external[name].tobytes() == kept[name]


def test_chunks_of_several_tensors_and_tensors_of_several_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.ModelProto()
    for number, size in enumerate((40, 400, 4000, 40_000, 200, 8000)):
        model.graph.initializer.append(tensor(f"w{number}", 1, values("weights", size, number)))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr(writer, "CHUNK", 4096)
    pack(tmp_path / "m.onnx", tmp_path / "m.pack", threads=2)
    with (tmp_path / "m.pack").open("rb") as file:
        index = read_index(file, "m.pack")
    assert len(index.chunks) > 12
    assert max(chunk.size for chunk in index.chunks) == 4096
    assert unpack_to_memory(tmp_path / "m.pack").model.tobytes() == (tmp_path / "m.onnx").read_bytes()


def test_memory_stays_within_some_chunks(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    size = 1 << 22
    model.graph.initializer.extend([tensor(f"w{i}", 3, values("noise", size, i)) for i in range(6)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    tracemalloc.start()
    try:
        pack(tmp_path / "m.onnx", tmp_path / "m.pack", codec="raw", threads=2)
        unpack(tmp_path / "m.pack", tmp_path / "back.onnx", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (1 << 22) < peak < 12 << 20  # files are hashed in blocks of 4 MiB
    assert (tmp_path / "back.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_bytes_fall_for_weights_and_those_that_passes_left(tmp_path: Path) -> None:
    for kind, most in {"weights": 0.88, "pruned": 0.65, "palette": 0.20}.items():
        report = pack(write_small(tmp_path, kind=kind), tmp_path / f"{kind}.pack")
        before, after = report.types["float32"]
        assert (before, after < most * before) == (64 * 32 * 4, True), (kind, after / before)


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    noise = values("noise", 100_000, 0)
    model = onnx.ModelProto()
    model.graph.initializer.extend([tensor("a", 1, noise), tensor("b", 1, noise), tensor("c", 3, noise)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    report = pack(tmp_path / "m.onnx", tmp_path / "m.pack")
    assert report.repeated_bytes == 200_000
    assert report.bytes_after < 101_000
    unpack(tmp_path / "m.pack", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == model.SerializeToString()


def test_tensors_are_found_wherever_they_lie() -> None:
    pass_through = onnx.TensorProto(data_type=1, float_data=[1.0] * 64)
    model = onnx.ModelProto()
    model.graph.sparse_initializer.add(values=tensor("s", 1, bytes(256)), indices=tensor("i", 7, bytes(512)))
    model.graph.node.add().attribute.add(name="t").t.CopyFrom(pass_through)
    model.functions.add(name="f").node.add().attribute.add(name="t").tensors.append(tensor("f", 10, bytes(260)))
    branch = model.graph.node.add().attribute.add(name="g").g
    branch.initializer.append(tensor("b", 16, bytes(300)))
    from onnxpress.runtime.onnx_file import stored_tensors

    found = {(t.dtype, t.length) for t in stored_tensors(model.SerializeToString())}
    assert found == {("float32", 256), ("int64", 512), ("float16", 260), ("bfloat16", 300)}


# --- into a session ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", ["", "net.data"])
def test_a_packed_model_runs_without_its_files(tmp_path: Path, external: str) -> None:
    model = write_small(tmp_path, external=external)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = Session(model, threads=1).run({"x": x})["y"]
    pack(model, tmp_path / "packed" / "net.pack")
    for path in (model, tmp_path / "net.data"):
        path.unlink(missing_ok=True)
    for session in (load_packed(tmp_path / "packed" / "net.pack"), Session(str(tmp_path / "packed" / "net.pack"))):
        assert np.array_equal(session.run({"x": x})["y"], expected)
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["net.pack"]


def test_openvino_reads_it_from_memory_but_no_external_data(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pack(write_small(tmp_path), tmp_path / "net.pack")
    session = Session(tmp_path / "net.pack", provider="openvino", threads=1)
    assert session.run({"x": np.ones((1, 64), np.float32)})["y"].shape == (1, 32)
    pack(write_small(tmp_path, external="net.data"), tmp_path / "external.pack")
    with pytest.raises(InputError, match="OpenVINO takes no external data from memory") as caught:
        Session(tmp_path / "external.pack", provider="openvino")
    assert caught.value.next_step == "Unpack it first: onnxpress unpack external.pack"


def test_memory_that_does_not_suffice_is_told_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(write_small(tmp_path), tmp_path / "net.pack")
    monkeypatch.setattr(reader, "_ALWAYS_FITS", 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(InputError, match="and 1,000 are free"):
        unpack_to_memory(tmp_path / "net.pack")
    assert not is_packed(tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"net\.onnx is no packed model"):
        load_packed(tmp_path / "net.onnx")


def test_unpacking_needs_no_onnx_and_no_engine(tmp_path: Path) -> None:
    pack(write_small(tmp_path), tmp_path / "net.pack")
    script = (
        "import sys\nfrom onnxpress.runtime.packing import unpack\nunpack(sys.argv[1], sys.argv[2])\n"
        "assert not {'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'google'} & set(sys.modules)"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path / "net.pack"), str(tmp_path / "back.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- damage and hostility ---------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(write_small(tmp_path, kind="pruned"), tmp_path / "net.pack")
    return tmp_path / "net.pack"


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    kinds = {"weights": 1, "pruned": 3, "palette": 16}
    model.graph.initializer.extend([tensor(kind, code, values(kind, 400, 0)) for kind, code in kinds.items()])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    packed = tmp_path / "net.pack"
    pack(tmp_path / "m.onnx", packed)
    whole = packed.read_bytes()
    assert len(whole) < 1500
    for at in range(len(whole)):
        packed.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"net\.pack"):
            unpack_to_memory(packed, threads=1)
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        packed.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"net\.pack"):
            unpack_to_memory(packed, threads=1)
    packed.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="cut off"):
        unpack_to_memory(packed)


def test_a_damaged_file_leaves_nothing_behind(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[HEADER_BYTES + 100] ^= 1
    packed.write_bytes(data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "net.onnx").write_text("mine")
    with pytest.raises(InputError, match=r"net\.pack is damaged: its chunks were changed") as caught:
        unpack(packed, tmp_path / "out" / "net.onnx", force=True)
    assert caught.value.exit_code == 2
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"net.onnx": "mine"}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "m.pack"
    _write_raw(path, noise)
    with pytest.raises(InputError, match=r"m\.pack is damaged"):
        unpack_to_memory(path)


def _write_raw(path: Path, index: bytes, version: int = 1) -> None:
    """A file whose checksums are right, whatever the index says."""
    header = HEADER.pack(container.MAGIC, version, HEADER_BYTES, len(index), len(index), zlib.crc32(index))
    path.write_bytes(header + struct.pack("<I", zlib.crc32(header)) + index)


def _rename(index: Index, name: str) -> None:
    index.files.append(container.PackedFile(name, 0, "0" * 64))


def _grow(index: Index) -> None:
    """A terabyte out of a few bytes."""
    index.files[0] = container.PackedFile("net.onnx", 1 << 40, "0" * 64)


def _overlap(index: Index) -> None:
    first = index.streams[0].ranges[0]
    index.copies.append(container.Copy(first, first.file, first.start))


def _huge_chunk(index: Index) -> None:
    chunk = index.chunks[0]
    index.chunks[0] = container.Chunk(chunk.stream, 1 << 40, 0, 1 << 40, chunk.checksum, ((0, 1 << 40),))


def _dangling_copy(index: Index) -> None:
    index.copies.append(container.Copy(container.Range(0, 3, 5), 0, 0))


HOSTILE: dict[str, Callable[[Index], None]] = {
    "up": lambda index: _rename(index, "../evil"),
    "absolute": lambda index: _rename(index, "/etc/evil"),
    "drive": lambda index: _rename(index, "C:evil"),
    "backslash": lambda index: _rename(index, "..\\evil"),
    "twice": lambda index: _rename(index, "net.onnx"),
    "no name": lambda index: _rename(index, ""),
    "control": lambda index: _rename(index, "a\nb"),
    "no files": lambda index: index.files.clear(),
    "no chunks": lambda index: index.chunks.clear(),
    "chunk twice": lambda index: index.chunks.append(index.chunks[-1]),
    "order": lambda index: index.chunks.reverse(),
    "terabyte": _grow,
    "overlap": _overlap,
    "huge chunk": _huge_chunk,
    "dangling copy": _dangling_copy,
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_an_index_that_lies_is_refused(packed: Path, tmp_path: Path, change: Callable[[Index], None]) -> None:
    with packed.open("r+b") as file:
        index = read_index(file, "net.pack")
        change(index)
        file.seek(HEADER.unpack(file.seek(0) or file.read(HEADER.size))[2])
        file.truncate()
        write_index(index, file)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"net\.pack is damaged"):
        unpack(packed, tmp_path / "out" / "back.onnx")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_does_not_suffice_is_told_before_it_is_filled(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="and 10 are free"):
        unpack(packed, tmp_path / "back.onnx")
    assert not [path for path in tmp_path.iterdir() if "back" in path.name]


def test_a_newer_format_and_other_files_are_told_apart(tmp_path: Path) -> None:
    _write_raw(tmp_path / "m.pack", b"{}", version=2)
    with pytest.raises(InputError, match="has version 2 of the format; this onnxpress reads 1"):
        unpack(tmp_path / "m.pack")
    (tmp_path / "other").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="other is no packed model"):
        unpack(tmp_path / "other")
    with pytest.raises(InputError, match="cannot read absent"):
        unpack(tmp_path / "absent")


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def test_nothing_is_replaced_without_being_asked(tmp_path: Path) -> None:
    model = write_small(tmp_path, external="net.data")
    pack(model, tmp_path / "net.pack")
    for again in (lambda: pack(model, tmp_path / "net.pack"), lambda: unpack(tmp_path / "net.pack")):
        with pytest.raises(InputError, match="exists") as caught:
            again()
        assert caught.value.next_step == "Add --force to replace it."
    model.unlink()
    with pytest.raises(InputError, match=r"net\.data exists"):
        unpack(tmp_path / "net.pack")
    unpack(tmp_path / "net.pack", force=True)
    pack(model, tmp_path / "net.pack", force=True)
    with pytest.raises(InputError, match="is what is to be packed"):
        pack(model, tmp_path / "net.data", force=True)
    with pytest.raises(InputError, match="is what is to be unpacked"):
        unpack(tmp_path / "net.pack", tmp_path / "net.pack", force=True)
    with pytest.raises(InputError, match="is the name of its external data"):
        unpack(tmp_path / "net.pack", tmp_path / "net.data", force=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"level": 0}, "level must be from 1 to 22, not 0"),
        ({"threads": 0}, "threads must be 1 or more, not 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack(write_small(tmp_path), tmp_path / "net.pack", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "net.pack").exists()


def test_what_is_no_model_or_not_complete(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello world")
    with pytest.raises(InputError, match=r"text\.onnx cannot be loaded: it is no ONNX model"):
        pack(tmp_path / "text.onnx", tmp_path / "m.pack")
    with pytest.raises(InputError, match=r"no such file: absent\.onnx"):
        pack(tmp_path / "absent.onnx", tmp_path / "m.pack")
    model = write_small(tmp_path, external="net.data")
    data = (tmp_path / "net.data").read_bytes()
    (tmp_path / "net.data").write_bytes(data[:5000])
    with pytest.raises(InputError, match=r"net\.data is cut short"):
        pack(model, tmp_path / "m.pack")
    (tmp_path / "net.data").unlink()
    with pytest.raises(InputError, match=r"net\.data is missing"):
        pack(model, tmp_path / "m.pack")
    (tmp_path / "inner").mkdir()
    model = write_small(tmp_path / "inner", external="../net.data")
    with pytest.raises(InputError, match="points outside the model's folder"):
        pack(model, tmp_path / "m.pack")
    assert not list(tmp_path.glob("*m.pack*"))


def test_external_data_may_be_named_in_two_ways(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    (tmp_path / "d").write_bytes(values("weights", 4096, 0))
    for location, offset in (("d", 0), ("./d", 2048)):
        weight = model.graph.initializer.add(data_type=1, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", str(offset)), ("length", "2048")):
            weight.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    layout = layout_of(tmp_path / "m.onnx")
    assert [file.name for file in layout.files] == ["m.onnx", "d"]
    assert {stream.dtype: stream.length for stream in layout.streams}["float32"] == 4096


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_index", full)
    model = write_small(tmp_path)
    with pytest.raises(InputError, match=r"cannot write net\.pack: No space left on device"):
        pack(model, tmp_path / "net.pack")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_the_report_is_told_in_words_and_in_json(tmp_path: Path) -> None:
    report = pack(write_small(tmp_path), tmp_path / "net.pack")
    first, *others = report.summary().splitlines()
    assert first.startswith(f"{tmp_path / 'net.pack'}: {report.bytes_before:,} -> {report.bytes_after:,} bytes (")
    assert [line.split()[0] for line in others] == ["float32", "other"]
    data = report.to_json()
    assert data["ratio"] == report.bytes_before / report.bytes_after
    assert set(data["types"]) == {"float32", "other"}
