# SPDX-License-Identifier: Apache-2.0
"""The audit log: whatever is done to it shows, and a killed writer loses its last line at most."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.contracts.errors import InputError
from onnxpress.runtime.serving import audit as module
from onnxpress.runtime.serving.audit import START, Audit, check_audit, tensors_hash
from onnxpress.runtime.serving.events import Answer

BUNDLE = "ab" * 32


def an_answer(number: int, bundle: str = BUNDLE) -> Answer:
    x = np.full((1, 3), number, np.float32)
    return Answer(f"r{number}", "m", bundle, "infer", 200, inputs={"x": x}, outputs={"y": x * 2})


def written(path: Path, count: int = 4) -> list[bytes]:
    log = Audit(path)
    log.loaded("m", BUNDLE, "1")
    for number in range(count):
        log.answered(an_answer(number), 1e9 + number)
    log.close()
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return written(tmp_path_factory.mktemp("audit") / "audit.jsonl")


def test_it_says_which_bundle_answered_each_request(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "audit.jsonl"
    lines = [json.loads(line) for line in written(path)]
    assert [line["event"] for line in lines] == ["loaded"] + ["answered"] * 4
    assert lines[0]["bundle"] == BUNDLE
    assert lines[2]["request"] == "r1"
    assert lines[2]["time"] == "2001-09-09T01:46:41.000+00:00"
    assert lines[2]["input"] == tensors_hash({"x": np.full((1, 3), 1, np.float32)})
    assert lines[2]["output"] == tensors_hash({"y": np.full((1, 3), 2, np.float32)})
    result = check_audit(path)
    assert (result.lines, result.answers, result.bundles) == (5, 4, {BUNDLE: 4})
    assert (result.torn_bytes, result.repairs, result.dropped) == (0, 0, 0)
    assert result.head == lines[-1]["hash"]
    assert lines[0]["previous"] == START


def test_anybody_can_follow_the_chain_with_sha_256_alone(whole: list[bytes]) -> None:
    previous = START
    for line in whole:
        text, _, end = line.rpartition(b',"hash":"')
        assert hashlib.sha256(text).hexdigest() == end[:64].decode()
        assert json.loads(line)["previous"] == previous
        previous = end[:64].decode()


def test_the_hash_of_tensors_is_of_name_type_shape_and_values() -> None:
    x = np.arange(6, dtype=np.float32)
    by_hand = hashlib.sha256(b"x\nfloat32\n[6]\n" + x.astype("<f4").tobytes()).hexdigest()
    assert tensors_hash({"x": x}) == by_hand
    assert tensors_hash({"x": x.astype(">f4")}) == by_hand
    assert tensors_hash({"x": np.stack([x, x])[0]}) == by_hand
    others = [{"y": x}, {"x": x.reshape(2, 3)}, {"x": x.view(np.int32)}, {"x": x + 1}, {"x": x, "y": x}]
    texts = [{"x": np.array(["ab", "c"], object)}, {"x": np.array(["a", "bc"], object)}]
    assert len({by_hand, *map(tensors_hash, others), *map(tensors_hash, texts)}) == 8
    assert tensors_hash({"b": x, "a": x}) == tensors_hash({"a": x, "b": x})


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_changed_byte_shows(
    whole: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(b"".join(whole))
    place = data.draw(st.integers(0, len(content) - 2))  # without the last line break, whose loss is a torn line
    content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("changed") / "audit.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"line \d+ "):
        check_audit(path)


@pytest.mark.parametrize(
    "order", [[0, 1, 3, 4], [1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0], [0, 4]]
)
def test_a_removed_moved_or_doubled_line_shows(whole: list[bytes], tmp_path: Path, order: list[int]) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(whole[i] for i in order))
    with pytest.raises(InputError, match="does not follow"):
        check_audit(path)


def test_a_cut_end_shows_to_whoever_kept_a_hash(whole: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(whole))
    kept = check_audit(path).head
    assert check_audit(path, contains=kept).lines == 5
    assert check_audit(path, contains=json.loads(whole[1])["hash"]).lines == 5
    path.write_bytes(b"".join(whole[:-1]))
    with pytest.raises(InputError, match="does not hold"):
        check_audit(path, contains=kept)


def test_a_second_start_goes_on_with_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    written(path)
    assert check_audit(path).lines == 10


@pytest.mark.parametrize("kept", [0, 1, 40, 200])
def test_a_torn_last_line_is_cut_off_and_noted(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:kept])
    assert check_audit(path).torn_bytes == kept
    written(path, 1)
    result = check_audit(path)
    assert (result.torn_bytes, result.repairs) == (0, 1 if kept else 0)
    assert result.lines == 3 + (1 if kept else 0) + 2


def test_a_log_that_holds_nothing_but_a_torn_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"n":1,"ti')
    written(path, 1)
    assert check_audit(path).lines == 3


def test_a_changed_last_line_is_not_built_upon(whole: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(whole).replace(b'"request":"r3"', b'"request":"rX"'))
    with pytest.raises(InputError, match="last line"):
        Audit(path)
    path.write_bytes(b"x" * 300_000)
    with pytest.raises(InputError, match="does not end like"):
        Audit(path)


def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    first = Audit(tmp_path / "audit.jsonl")
    with pytest.raises(InputError, match="another server"):
        Audit(tmp_path / "audit.jsonl")
    first.close()
    Audit(tmp_path / "audit.jsonl").close()


def test_bad_paths_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be opened"):
        Audit(tmp_path / "file" / "audit.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        check_audit(tmp_path / "none.jsonl")
    assert check_audit(tmp_path / "file").lines == 0


def test_a_full_disk_loses_nothing_that_fits_in_memory_and_counts_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, full = tmp_path / "audit.jsonl", os.write, [True]

    def write(file: int, data: bytes) -> int:
        if full[0]:
            full[0] = False
            return real(file, data[:25])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "MOST_WAITING", 5)
    log = Audit(path)
    log.answered(an_answer(0), 0)
    monkeypatch.setattr(os, "write", write)
    log.write()
    assert log.failing == "No space left on device"
    for number in range(1, 9):
        log.answered(an_answer(number), 0)
    monkeypatch.setattr(os, "write", real)
    log.write()
    assert not log.failing
    log.close()
    result = check_audit(path)
    assert (result.answers, result.dropped) == (6, 3)


KILLED = """
import sys
import numpy as np
from onnxpress.runtime.serving.audit import Audit
from onnxpress.runtime.serving.events import Answer
log = Audit(sys.argv[1])
x = np.ones((4, 4), np.float32)
print("writing", flush=True)
for number in range(10**9):
    log.answered(Answer(f"r{number}", "m", "b" * 64, "infer", 200, inputs={"x": x}, outputs={"y": x}), 0)
    log.write()
"""


def test_a_killed_server_leaves_a_log_that_can_be_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    until = time.monotonic() + 30
    while path.stat().st_size < 20_000 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert check_audit(path).answers > 10
    before = check_audit(path).lines
    written(path, 1)
    assert check_audit(path).lines >= before + 2
