# SPDX-License-Identifier: Apache-2.0
import getpass
import json
import os
import socket
from pathlib import Path

import pytest

from onnxpress.runtime import default_threads
from onnxpress.runtime import machine as module
from onnxpress.runtime.machine import ISA_FLAGS, machine, usable_cores


def test_says_what_explains_a_measurement_and_nothing_private() -> None:
    found = machine()
    assert set(found) == {"cpu", "cores", "memory_gib", "os", "arch", "isa"}
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert set(found["isa"]) <= set(ISA_FLAGS)
    text = json.dumps(found)
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}' not in text
    assert str(Path.home()) not in text
    assert "/" not in text


def fake_system(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(module, "_text", lambda path: files.get(str(path), ""))


def test_x86_and_arm_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_system(
        monkeypatch, {"/proc/cpuinfo": "model name\t: Some  CPU\nflags\t\t: fpu avx2 avx512_vnni\n\nmodel name: B\n"}
    )
    assert machine()["cpu"] == "Some CPU"
    assert machine()["isa"] == ["avx2", "avx512_vnni"]
    fake_system(monkeypatch, {"/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"})
    assert machine()["isa"] == ["asimddp", "i8mm"]
    fake_system(monkeypatch, {})
    assert machine()["isa"] == []
    assert machine()["cpu"]


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("", 8), ("9999999 100000", 8)]
)
def test_a_containers_quota_counts(quota: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_system(monkeypatch, {"/sys/fs/cgroup/cpu.max": quota + "\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores() == cores


def test_default_threads_are_physical_cores_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= default_threads() <= usable_cores()
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    for physical, expected in [(4, 4), (64, 8), (None, 8)]:
        monkeypatch.setattr("psutil.cpu_count", lambda logical, physical=physical: physical)
        assert default_threads() == expected
