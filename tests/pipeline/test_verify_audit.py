# SPDX-License-Identifier: Apache-2.0
"""`verify --audit` follows the chain of a server's audit log, and counts what this bundle answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.serving.audit import Audit
from onnxpress.runtime.serving.events import Answer

from .conftest import Run


@pytest.fixture
def log(finished: Path, tmp_path: Path) -> Path:
    audit = Audit(tmp_path / "audit.jsonl")
    for number, bundle in enumerate((Bundle(finished).sha256, "f" * 64, Bundle(finished).sha256)):
        audit.answered(Answer(f"r{number}", "net", bundle, "infer", 200), 0.0)
    audit.write()
    audit.close()
    return audit.path


def test_a_whole_log_is_followed_to_its_end(onnxpress: Run, finished: Path, log: Path) -> None:
    done = onnxpress("verify", finished, "--audit", log, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["audit"]
    assert (told["answers"], told["answers_by_this_bundle"]) == (3, 2)
    again = onnxpress("verify", finished, "--audit", log, "--audit-hash", told["head"])
    assert (
        again.out.splitlines()[-1]
        == f"{log}: 3 lines in one chain, 2 of 3 answers by this bundle; last hash " + (told["head"])
    )


def test_a_changed_line_and_a_lost_end_are_found(onnxpress: Run, finished: Path, log: Path) -> None:
    head = json.loads(onnxpress("verify", finished, "--audit", log, "--json").out)["audit"]["head"]
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    done = onnxpress("verify", finished, "--audit", log, "--audit-hash", head)
    assert done.code == 2
    assert "does not hold the hash" in done.error
    log.write_bytes(lines[0] + lines[1].replace(b'"r1"', b'"rx"') + lines[2])
    assert onnxpress("verify", finished, "--audit", log).error == f"onnxpress: {log}: line 2 was changed."


def test_a_hash_without_a_log_is_refused(onnxpress: Run, finished: Path) -> None:
    assert onnxpress("verify", finished, "--audit-hash", "0" * 64).code == 2
