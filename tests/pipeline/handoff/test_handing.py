# SPDX-License-Identifier: Apache-2.0
"""The verb with a target of the tests' own: what is written, what is refused, and that nothing is half-written."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.errors import BundleError, GateFailed, InputError
from onnxpress.pipeline.handoff import handing
from onnxpress.pipeline.handoff.base import Check, MissingTool, Target, judge, require_tool, run_tool
from onnxpress.pipeline.handoff.golden import write_golden
from onnxpress.runtime.opened import Bundle

READER = """
import sys
def tensors(folder):
    numbers = open(folder + "/tensors.bin", "rb").read()
    for line in open(folder + "/tensors.txt", encoding="utf-8"):
        sample, kind, name, dtype, offset, size, tolerance, rank, *dims = line.split()
        yield int(sample), kind, name, dtype, numbers[int(offset):int(offset) + int(size)], tolerance, dims[:int(rank)]
worst = {}
import array
for sample, kind, name, dtype, raw, tolerance, dims in tensors("golden"):
    if kind == "reference":
        allowed, wanted = float(tolerance), array.array("f", raw)
    if kind == "python":
        got = array.array("f", raw)
        difference = max(abs(a - b) for a, b in zip(got, wanted, strict=True)) + SHIFT
        worst[name] = max(worst.get(name, 0.0), difference)
for name, difference in worst.items():
    print(name, difference, allowed, SHIFT)
sys.exit(any(d > allowed for d in worst.values()))
"""


class _Replayer(Target):
    """A consumer that answers with what Python answered, plus a shift."""

    name, summary = "replay", "for the tests"
    shift = 0.0
    tool = ""

    def write(self, bundle: Bundle, folder: Path) -> None:
        write_golden(bundle, folder / "golden")
        (folder / "check.py").write_text(f"SHIFT = {self.shift}\n{READER}")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        if self.tool:
            require_tool(self.tool, "Install it.")
        done = run_tool([sys.executable, "check.py"], folder)
        names = [spec.name for spec in bundle.signature.outputs]
        return judge(done, names, command="python check.py", stages=("generated", "run"), versions={"replay": "1"})


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> _Replayer:
    replayer = _Replayer()
    module = types.ModuleType("onnxpress.pipeline.handoff.replay_for_tests")
    module.TARGETS = {"replay": replayer}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(handing.TARGETS, "replay", "replay_for_tests")
    return replayer


def _read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "handoff.json").read_text("utf-8"))
    return data


def test_a_handoff_is_written_checked_and_described(bundle: Path, target: _Replayer, onnxpress: Any) -> None:
    place = bundle.parent / "handed"
    done = onnxpress("handoff", bundle, "--to", "replay", "--check", "-o", place)
    assert done.code == 0, done.err
    assert "golden samples agree; largest difference from Python: logits 0" in done.out
    report = _read(place)
    assert report["check"]["status"] == "passed"
    assert report["check"]["done"] == ["generated", "run"]
    assert 0 <= report["check"]["worst"]["logits"] <= Bundle(bundle).tolerance("logits")
    assert report["bundle"]["sha256"] == Bundle(bundle).sha256
    assert set(report["files"]) == {"check.py", "golden/tensors.txt", "golden/tensors.bin"}


def test_without_check_nothing_is_claimed(bundle: Path, target: _Replayer) -> None:
    report = handing.hand_off(bundle, "replay")
    assert Path(report["folder"]).name == f"{bundle.name}-replay"
    assert report["check"]["status"] == "not run"
    assert report["check"]["reason"] == "no check was asked for (--check)"
    assert _read(Path(report["folder"])) == {k: v for k, v in report.items() if k != "folder"}


def test_wrong_answers_are_refused_and_nothing_is_written(bundle: Path, target: _Replayer) -> None:
    target.shift = 1.0
    with pytest.raises(GateFailed, match="replay consumer does not give the golden answers"):
        handing.hand_off(bundle, "replay", bundle.parent / "handed", check=True)
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_a_missing_tool_is_said_and_not_counted(bundle: Path, target: _Replayer) -> None:
    target.tool = "no-such-program"
    report = handing.hand_off(bundle, "replay", check=True)
    assert report["check"]["status"] == "not run"
    assert report["check"]["reason"] == "no-such-program is not installed. Install it."
    with pytest.raises(MissingTool):
        require_tool("no-such-program", "Install it.")


def test_what_exists_is_replaced_only_on_request(bundle: Path, target: _Replayer) -> None:
    place = bundle.parent / "handed"
    handing.hand_off(bundle, "replay", place)
    with pytest.raises(InputError, match="handed exists"):
        handing.hand_off(bundle, "replay", place)
    handing.hand_off(bundle, "replay", place, force=True)
    (bundle.parent / "mine").mkdir()
    (bundle.parent / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a handoff"):
        handing.hand_off(bundle, "replay", bundle.parent / "mine", force=True)


def test_a_changed_bundle_is_not_handed_on(bundle: Path, target: _Replayer) -> None:
    with (bundle / "report.html").open("a") as stream:
        stream.write(" ")
    with pytest.raises(BundleError, match=r"report\.html was changed"):
        handing.hand_off(bundle, "replay")


def test_unknown_targets_are_refused_with_a_suggestion(bundle: Path, onnxpress: Any) -> None:
    done = onnxpress("handoff", bundle, "--to", "nod")
    assert done.code == 2
    assert done.error == "onnxpress: unknown target 'nod'. Did you mean 'node'?"


def test_every_target_is_there_under_its_name() -> None:
    for name in handing.TARGETS:
        target = handing.target_named(name)
        assert target.name == name
        assert target.summary


def test_golden_tensors_are_what_the_index_says(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle(bundle)
    write_golden(opened, tmp_path)
    numbers = (tmp_path / "tensors.bin").read_bytes()
    rows = [line.split(" ") for line in (tmp_path / "tensors.txt").read_text("utf-8").splitlines()]
    assert {row[1] for row in rows} == {"input", "reference", "python"}
    for sample, kind, name, dtype, offset, size, tolerance, rank, *dims in rows:
        assert int(offset) % 64 == 0
        array = np.frombuffer(numbers, dtype, int(size) // np.dtype(dtype).itemsize, int(offset)).reshape(
            [int(dim) for dim in dims]
        )
        assert array.ndim == int(rank)
        golden = opened.golden[int(sample)]
        if kind == "input":
            np.testing.assert_array_equal(array, golden.inputs[name])
        elif kind == "reference":
            np.testing.assert_array_equal(array, golden.outputs[name])
            assert float(tolerance) == pytest.approx(opened.tolerance(name))
        else:
            assert np.abs(array - golden.outputs[name]).max() <= opened.tolerance(name)


def _said(text: str, code: int = 0, error: str = "") -> Check:
    import subprocess

    done = subprocess.CompletedProcess([], code, text, error)
    return judge(done, ["a", "b"], command="x", stages=("run",), versions={})


def test_a_consumer_passes_only_with_every_output_inside_its_tolerance() -> None:
    assert _said("a 0.1 0.2 0\nb 0 0.2 0\n").status == "passed"
    assert _said("noise\na 0.1 0.2 0\n").reason == "no result for b: exit code 0"
    assert _said("a 0.3 0.2 0\nb 0 0.2 0\n").status == "failed"
    assert _said("a nan 0.2 0\nb 0 0.2 0\n").status == "failed"
    assert _said("a 0.1 0.2 0\nb 0 0.2 0\n", 3, "boom\n").reason == "boom"
    assert _said("a inf 0.2 inf\nb 0 0.2 0\n").to_json()["worst"]["a"] == "inf"
