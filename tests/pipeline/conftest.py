# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, and one net, one data file and one finished bundle for all tests to copy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from onnxpress.runtime.benchmark import Contender, Setting, measure

from .samples import quick_recipe, write_arrays, write_net

PROGRESS = re.compile(r"\[ *\d+\.\d s\] \w+( .*)?")


@dataclass(frozen=True)
class Result:
    """What a command came to: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that is not progress; fails where there are none or several."""
        lines = [line for line in self.err.splitlines() if not PROGRESS.fullmatch(line)]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("onnxpress: ")
        return lines[0]


Run = Callable[..., Result]


@pytest.fixture
def onnxpress(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process, through the entry point that the installed script calls."""
    from onnxpress.pipeline.cli import main

    def run(*words: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_net(tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_arrays(tmp_path_factory.mktemp("data") / "dev.npz")


@pytest.fixture(scope="session")
def finished(net: Path, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the net; not to be changed."""
    from onnxpress.pipeline.pressing import load_data, press

    folder = tmp_path_factory.mktemp("finished") / "net"
    outcome = press(str(net), quick_recipe(), folder, evaluation=load_data(str(arrays)))
    assert outcome.folder == folder
    return folder


def strip_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the fresh processes that measure load time and memory: half a second a press, and more with torch."""

    def without_probes(contenders: Sequence[Contender], settings: Sequence[Setting], **options: Any) -> Any:
        return measure([replace(c, probe=None) for c in contenders], settings, **options)

    monkeypatch.setattr("onnxpress.pipeline.pressing.measure", without_probes)


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    strip_probes(monkeypatch)


@pytest.fixture
def bundle(finished: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "target" / "bundle"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def kept(bundle: Path) -> Callable[[], None]:
    """Asserts, when called, that the bundle is as it was and that nothing lies beside it."""
    before, beside = snapshot(bundle), sorted(bundle.parent.iterdir())

    def check() -> None:
        assert snapshot(bundle) == before
        assert sorted(bundle.parent.iterdir()) == beside

    return check
