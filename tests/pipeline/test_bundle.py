# SPDX-License-Identifier: Apache-2.0
"""A bundle is whole or not there: full disks, interrupts and kills at every point leave the target as it was."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import BundleError, GateFailed, InputError
from onnxpress.pipeline import bundle as bundle_module
from onnxpress.pipeline.bundle import Staging
from onnxpress.pipeline.inputs import Case
from onnxpress.runtime.bundle import verify

from .conftest import PROGRESS, Run, snapshot
from .samples import FAST, write_net

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")
COMMAND = [sys.executable, "-P", "-m", "onnxpress.pipeline.cli"]
ENDLESS = ["--set", "benchmark.rounds=1000000", "--set", "benchmark.max_seconds=100"]


# --- a full disk ------------------------------------------------------------------------------------------------------


def _fail_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, when: Callable[..., bool]) -> None:
    """Let `target.name` fail as on a full disk once `when` accepts its arguments."""
    original = getattr(target, name)

    def full(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, full)


def _named(*names: str) -> Callable[..., bool]:
    return lambda path, *_: Path(path).name in names


POINTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "the staging folder": (Path, "mkdir", _named("scratch")),
    "the exported graph": (ir, "save", lambda model, path, *_: "baseline" in Path(path).name),
    "the model": (ir, "save", lambda model, path, *_: "model" in Path(path).name),
    "the timing inputs": (np, "savez", lambda *_: True),
    "the recipe": (Path, "write_text", _named("recipe.yaml")),
    "golden inputs": (Path, "write_bytes", _named("inputs.safetensors")),
    "golden outputs": (Path, "write_bytes", _named("outputs.safetensors")),
    "the golden index": (Path, "write_text", _named("golden.json")),
    "the report": (Path, "write_text", _named("report.html")),
    "the manifest": (Path, "write_text", _named("manifest.json")),
    "the checksums": (Path, "write_text", _named("SHA256SUMS")),
    "the flush": (os, "fsync", lambda *_: True),
    "the rename": (bundle_module, "_exchange", lambda *_: True),
}


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_leaves_the_old_bundle(
    point: str, onnxpress: Run, net: Path, bundle: Path, kept: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _fail_at(patched, *POINTS[point])
        result = onnxpress("press", net, *FAST, "--force", "-o", bundle)
    assert (result.code, result.out) == (2, ""), result.err
    assert "No space left on device" in result.error
    assert "Free some space" in result.error
    kept()
    verify(bundle)


@pytest.mark.usefixtures("unprobed")
def test_a_full_disk_at_the_first_rename_leaves_nothing(
    onnxpress: Run, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(monkeypatch, os, "rename", lambda *_: True)
    result = onnxpress("press", net, *FAST, "-o", tmp_path / "out")
    assert result.code == 2
    assert result.error == (
        "onnxpress: cannot write out: No space left on device; nothing was left behind. Free some space."
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_processor_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from .samples import exported, quick_recipe

    (tmp_path / "tokenizer.json").write_text("{}")
    model = exported({}, processor_files={"tokenizer.json": tmp_path / "tokenizer.json"})
    _fail_at(monkeypatch, shutil, "copyfile", lambda *_: True)
    with (
        pytest.raises(InputError, match="cannot write out: No space left on device"),
        Staging(tmp_path / "out", force=False) as staging,
    ):
        bundle_module.write_bundle(staging, {}, model, quick_recipe(), [], lambda f: {}, lambda f: {}, "cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@posix
@pytest.mark.parametrize("limit", [4_000, 20_000])
def test_a_real_limit_on_what_can_be_written(limit: int, net: Path, bundle: Path, kept: Callable[[], None]) -> None:
    """The kernel refuses every byte beyond the limit: 4000 stop the model, 20000 let it pass and stop later files."""
    assert limit < (bundle / "report.html").stat().st_size
    script = f"""
        import resource, signal, sys
        import onnxpress.exporters.sources, onnxpress.pipeline.pressing  # bytecode caches are written before the limit
        from onnxpress.pipeline.cli import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        main(sys.argv[1:])
    """
    words = ["press", str(net), *FAST, "--force", "-o", str(bundle)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script), *words], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    error = [line for line in done.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert len(error) == 1, done.stderr
    assert "File too large" in error[0]
    kept()
    verify(bundle)


# --- interrupts and kills ---------------------------------------------------------------------------------------------


@pytest.fixture
def pressing(net: Path, bundle: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a press onto the bundle that would time its candidate for long, and return when it has begun to."""
    running: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        words = ["press", str(net), *ENDLESS, "--force", "-o", str(bundle)]
        # What a shell starts in the background ignores interrupts, and so would all that it starts
        heard = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        finally:
            signal.signal(signal.SIGINT, heard)
        running.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if "] benchmark " in line:
                break
        assert process.poll() is None
        time.sleep(0.1)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_middle(
    number: signal.Signals, pressing: Callable[[], subprocess.Popen[str]], kept: Callable[[], None]
) -> None:
    process = pressing()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err == "onnxpress: interrupted; nothing was left behind.\n"
    kept()


@posix
def test_kill_9_in_the_middle_leaves_the_old_bundle_and_the_next_run_cleans_up(
    pressing: Callable[[], subprocess.Popen[str]], onnxpress: Run, net: Path, bundle: Path
) -> None:
    before = snapshot(bundle)
    process = pressing()
    process.kill()
    process.communicate(timeout=30)
    partial = bundle.parent / f".{bundle.name}.{process.pid}.partial"
    assert partial.is_dir()
    assert snapshot(bundle) == before
    assert onnxpress("verify", bundle).code == 0
    assert onnxpress("press", net, *FAST, "--force", "-o", bundle).code == 0
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


# Publish `new` onto `target`, killed with -9 at the n-th line that bundle.py runs: n = 1, 2, ... until it gets through.
KILLER = """
    import os, shutil, signal, sys
    from pathlib import Path
    from onnxpress.pipeline import bundle

    os.fsync = lambda descriptor: None  # kill -9 loses no page of the kernel's cache, and this saves seconds
    work, old, new, exchange = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if exchange == "renames":
        class Libc: pass
        bundle.ctypes.CDLL = lambda *_, **__: Libc()
    count = 0
    while True:
        count += 1
        here = work / str(count)
        here.mkdir()
        if exchange != "absent":
            shutil.copytree(old, here / "net", copy_function=os.link)
        pid = os.fork()
        if pid == 0:
            staging = bundle.Staging(here / "net", force=True)
            shutil.copytree(new, staging.folder, dirs_exist_ok=True, copy_function=os.link)
            lines = 0
            def trace(frame, event, _):
                global lines
                if frame.f_code.co_filename != bundle.__file__ or frame.f_code.co_name == "_sync":
                    return None
                lines += 1
                if lines == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace
            sys.settrace(trace)
            with staging:
                staging.publish()
            sys.settrace(None)
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0:
            break
    print(count)
"""


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another net: every file in it differs from the old one."""
    from onnxpress.pipeline.pressing import press

    from .samples import quick_recipe

    folder = tmp_path_factory.mktemp("newer")
    press(str(write_net(folder / "net.onnx", seed=1)), quick_recipe(), folder / "bundle")
    return folder / "bundle"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("exchange", ["absent", "atomic", "renames"])
def test_kill_9_at_every_line_of_the_publication(exchange: str, finished: Path, newer: Path, tmp_path: Path) -> None:
    """The target is absent, the old bundle or the new one, never mixed or incomplete; and the next run cleans up."""
    words = [str(tmp_path), str(finished), str(newer), exchange]
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(KILLER), *words],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    old, new = snapshot(finished), snapshot(newer)
    assert not set(old.items()) & set(new.items()) - {("recipe.yaml", old["recipe.yaml"])}
    seen = []
    for number in range(1, int(done.stdout) + 1):
        target = tmp_path / str(number) / "net"
        found = snapshot(target) if target.exists() else None
        assert found in (None, old, new), f"line {number}: mixed"
        seen.append("absent" if found is None else "old" if found == old else "new")
        if found:
            verify(target, run=False)
        Staging(target, force=True)._clean()
        assert {p.name for p in target.parent.iterdir()} <= {"net"}
        assert (snapshot(target) if target.exists() else None) == found
    allowed = {"absent": {"absent", "new"}, "atomic": {"old", "new"}, "renames": {"old", "absent", "new"}}
    assert set(seen) == allowed[exchange] if sys.platform == "linux" else set(seen) <= {"old", "absent", "new"}
    assert seen == sorted(seen, key=["old", "absent", "new"].index), "it never goes back"
    assert len(seen) > 15


def test_an_interrupt_between_the_two_renames_puts_the_old_bundle_back(
    bundle: Path, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(bundle)
    rename = os.rename

    def interrupted(source: Any, target: Any) -> None:
        if Path(source).name == "bundle" and Path(target) == bundle and Path(source) != bundle:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(bundle_module.ctypes, "CDLL", lambda *_, **__: object())
    monkeypatch.setattr(os, "rename", interrupted)
    with Staging(bundle, force=True) as staging:
        shutil.copytree(newer, staging.folder, dirs_exist_ok=True)
        with pytest.raises(KeyboardInterrupt):
            staging.publish()
    assert snapshot(bundle) == before
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


def test_only_what_dead_runs_left_for_this_target_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".out[1].{dead.pid}.partial"]
    stays = [f".out[1].{os.getppid()}.partial", f".other.{dead.pid}.partial", ".out[1].x.partial", ".out1.5.partial"]
    for name in [*gone, *stays]:
        (tmp_path / name / "bundle").mkdir(parents=True)
    with Staging(tmp_path / "out[1]", force=False):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stays)


def test_a_signal_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Staging(tmp_path / "out", force=False):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_layout_is_the_design_s(finished: Path) -> None:
    assert sorted(snapshot(finished)) == [
        "README.md", "SHA256SUMS", "golden/golden.json", "golden/inputs.safetensors", "golden/outputs.safetensors",
        "manifest.json", "onnx/model_quantized.onnx", "recipe.yaml", "report.html", "sbom.cdx.json",
    ]  # fmt: skip
    assert all(p.stat().st_mode & 0o777 == (0o755 if p.is_dir() else 0o644) for p in finished.rglob("*"))


def test_sha256sum_reads_the_sums(finished: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=finished, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == len(snapshot(finished)) - 1


FILES = ("README.md", "golden/golden.json", "golden/inputs.safetensors", "golden/outputs.safetensors", "manifest.json",
         "onnx/model_quantized.onnx", "recipe.yaml", "report.html", "sbom.cdx.json")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_file_of_which_one_byte_changed(name: str, bundle: Path) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert name in caught.value.message


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_verify_names_the_file_that_is_missing(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing from the bundle"):
        verify(bundle)


def _golden(tmp_path: Path, reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray]) -> dict[str, Any]:
    bundle_module._write_golden(
        tmp_path, {"variants": {"v": {}}}, [Case("one", {"x": np.array(2.5, np.float32)}, "naïve 👍🏽")],
        lambda feeds: reference, lambda feeds: candidate,
    )  # fmt: skip
    text = (tmp_path / "golden" / "golden.json").read_text("utf-8")
    assert "naïve 👍🏽" in text
    result: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return result


def test_the_tolerance_is_twice_the_candidate_s_own_error(tmp_path: Path) -> None:
    golden = _golden(tmp_path, {"y": np.array([1.0, -4.0])}, {"y": np.array([1.5, -4.0])})
    assert golden["tolerance"]["v"]["y"]["max_abs"] == pytest.approx(2 * 0.5 + 1e-4 * 4 + 1e-6)


def test_scalars_keep_their_shape_in_the_golden_samples(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    _golden(tmp_path, {"y": np.array(3.0)}, {"y": np.array(3.0)})
    assert load_file(tmp_path / "golden" / "inputs.safetensors")["0/x"].shape == ()
    assert load_file(tmp_path / "golden" / "outputs.safetensors")["0/y"].shape == ()


def test_infinities_that_agree_are_no_difference(tmp_path: Path) -> None:
    values = np.array([-math.inf, 2.0, math.nan])
    golden = _golden(tmp_path, {"y": values}, {"y": values.copy()})
    assert golden["tolerance"]["v"]["y"]["max_abs"] == pytest.approx(2e-4 + 1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_candidate_that_is_not_finite_is_refused_without_any_gate(tmp_path: Path, broken: float) -> None:
    with pytest.raises(GateFailed, match=r"output 'y' is not finite where the original's is \(one\)"):
        _golden(tmp_path, {"y": np.array([1.0])}, {"y": np.array([broken])})


def test_transposed_arrays_are_stored_as_they_read(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    values = np.arange(6.0).reshape(2, 3).T
    _golden(tmp_path, {"y": values}, {"y": values})
    assert np.array_equal(load_file(tmp_path / "golden" / "outputs.safetensors")["0/y"], values)
