# SPDX-License-Identifier: Apache-2.0
"""Write a bundle: into a folder beside the target first, checked by loading it afresh, then moved into place.

At any moment, also after kill -9 or on a full disk, the target is absent, the old bundle, or the new complete one. What
a killed run leaves is a folder `.NAME.PID.partial` beside the target, which the next run for that target removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..contracts.errors import GateFailed, InputError
from ..exporters.exported import ExportedModel
from ..runtime.bundle import MANIFEST, SUMS, hash_file, largest_difference, verify, write_sums
from ..runtime.sbom import SBOM
from .golden_preprocessing import preprocessing_warnings, write_preprocessing
from .golden_tokens import tokenizer_warnings, write_tokens
from .inputs import Case
from .licence import stated_licence
from .recipe import Recipe
from .report import render_card, render_report
from .sbom import sbom_of
from .validate import Run

GOLDEN = "golden/golden.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """The folder in which a bundle grows, and its move into place. A context manager: leaving it removes the rest.

    Args:
        target: Where the bundle goes.
        force: Whether a bundle there may be replaced.
        marker: The file by which a folder is known to be one that may be replaced.
        key: Private key to sign the bundle with before it is moved, or None.

    Raises:
        InputError: The target exists (without force), is not a bundle, or its parent cannot be written.
    """

    def __init__(self, target: Path, *, force: bool, marker: str = MANIFEST, key: Path | None = None) -> None:
        self.target, self._marker, self._key = Path(os.path.abspath(target)), marker, key
        parent = self.target.parent
        self.root = parent / f".{self.target.name}.{os.getpid()}.partial"
        self.folder, self.scratch = self.root / "bundle", self.root / "scratch"
        self._made: list[Path] = []
        self._handler: Any = None
        try:
            self._check(force)
            self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(parent, self.target.name)
            shutil.rmtree(self.root, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self.scratch.mkdir()
        except OSError as error:
            self._clean()
            raise _disk_error(self.target, error) from error

    def variant_path(self, file_name: str) -> Path:
        return self.folder / "onnx" / file_name

    def publish(self) -> Path:
        """Move the finished bundle to the target in one step; returns the target."""
        if self._key is not None:
            from .signing import sign

            sign(self.folder, self._key)
        _sync(self.folder)
        try:
            if self.target.exists():
                _exchange(self.folder, self.target)
            else:
                os.rename(self.folder, self.target)
            _sync_folder(self.target.parent)
        except OSError as error:
            raise _disk_error(self.target, error) from error
        return self.target

    def __enter__(self) -> Staging:
        try:
            self._handler = signal.signal(signal.SIGTERM, _terminate)
        except ValueError:  # not in the main thread
            self._handler = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _disk_error(self.target, error) from error

    def _clean(self) -> None:
        """Remove what is left of the staging folder, and the folders above it that were made for it and are empty."""
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _check(self, force: bool) -> None:
        if not self.target.exists():
            return
        if not self.target.is_dir() or (any(self.target.iterdir()) and not (self.target / self._marker).is_file()):
            what = "a bundle" if self._marker == MANIFEST else "a handoff"
            raise InputError(
                f"{self.target.name} exists and is not {what}; it will not be replaced",
                next_step="Choose another -o.",
            )
        if not force and any(self.target.iterdir()):
            raise InputError(f"{self.target.name} exists", next_step="Add --force to replace it, or choose another -o.")


def write_bundle(
    staging: Staging,
    manifest: dict[str, Any],
    exported: ExportedModel,
    recipe: Recipe,
    golden: Sequence[Case],
    reference: Run,
    candidate: Run,
    provider: str,
    load: bool = True,
) -> None:
    """Fill the staging folder around the model that lies in it already, and verify it by loading it afresh.

    Without `load`, every hash is verified and no session is made: for a model that does not fit into this machine. Its
    tolerance allows for what a runtime that optimizes it does to fp16 (ONNX Runtime on CPUs: a hundredth, measured).
    """
    folder = staging.folder
    try:
        for name, file in exported.processor_files.items():
            shutil.copyfile(file, folder / name)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
        _write_golden(folder, manifest, golden, reference, candidate, slack=1e-4 if load else 2e-2)
        manifest["golden"] = {"index": GOLDEN}
        _write_inputs(folder, manifest, exported)
        # Bill of materials, report and card show the files' hashes and are files themselves: they list those before
        manifest["files"] = inventory(folder)
        (folder / SBOM).write_text(sbom_of(manifest), "utf-8")
        manifest["files"] = inventory(folder, manifest["files"])
        (folder / "report.html").write_text(render_report(manifest), "utf-8")
        (folder / "README.md").write_text(render_card(manifest), "utf-8")
        manifest["files"] = inventory(folder, manifest["files"])
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", "utf-8")
        write_sums(folder)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    except OSError as error:
        raise _disk_error(staging.target, error) from error
    verify(folder, provider=provider, run=load)


def _write_inputs(folder: Path, manifest: dict[str, Any], exported: ExportedModel) -> None:
    """How texts, pictures and sound are read, with proof, and the licence that the source states."""
    tokenizer = write_tokens(folder, exported)
    preprocessing = write_preprocessing(folder, exported)
    manifest |= {"tokenizer": tokenizer} if tokenizer else {}
    manifest |= {"preprocessing": preprocessing} if preprocessing else {}
    manifest.setdefault("warnings", []).extend([*tokenizer_warnings(tokenizer), *preprocessing_warnings(preprocessing)])
    licence = stated_licence(exported)
    if licence:
        manifest.setdefault("source", {})["license"] = licence


def _write_golden(
    folder: Path,
    manifest: dict[str, Any],
    golden: Sequence[Case],
    reference: Run,
    candidate: Run,
    *,
    slack: float = 1e-4,
) -> None:
    """Golden inputs, the reference's outputs, and how far the candidate is from them (doubled) as tolerance."""
    inputs: dict[str, np.ndarray] = {}
    outputs: dict[str, np.ndarray] = {}
    tolerance: dict[str, float] = {}
    for index, case in enumerate(golden):
        wanted, got = reference(case.feeds), candidate(case.feeds)
        inputs |= {f"{index}/{name}": np.asarray(array, order="C") for name, array in case.feeds.items()}
        for name, expected in wanted.items():
            outputs[f"{index}/{name}"] = np.asarray(expected, order="C")
            error = largest_difference(got[name], expected)
            if math.isinf(error):
                raise GateFailed(
                    f"refused: output '{name}' is not finite where the original's is ({case.name})",
                    next_step="Nothing was written. Choose a milder recipe.",
                )
            scale = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
            # Other processors round int8 and float sums differently: allow as much again, and float noise at least
            tolerance[name] = max(tolerance.get(name, 0.0), 2 * error + slack * float(scale) + 1e-6)
    (folder / "golden").mkdir()
    # Not save_file: on a full disk it raises an error of its own, without the reason
    (folder / "golden" / "inputs.safetensors").write_bytes(save(inputs))
    (folder / "golden" / "outputs.safetensors").write_bytes(save(outputs))
    samples = [{"name": case.name, "text": case.text} for case in golden]
    limits = {name: {"max_abs": value} for name, value in tolerance.items()}
    index_file = {"samples": samples, "tolerance": {variant: limits for variant in manifest["variants"]}}
    (folder / GOLDEN).write_text(json.dumps(index_file, indent=2, ensure_ascii=False) + "\n", "utf-8")


def inventory(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Hash and size of every file by its path, but for those that list the others; what is `known` is not read."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, SUMS))
    known, by_path = known or {}, {p.relative_to(folder).as_posix(): p for p in files}
    return {n: known.get(n) or {"sha256": hash_file(p), "size": p.stat().st_size} for n, p in by_path.items()}


def _remove_abandoned(parent: Path, name: str) -> None:
    """Delete what killed runs for this target left behind."""
    for path in parent.glob(f".{glob.escape(name)}.*.partial"):
        pid = path.name.removeprefix(f".{name}.").removesuffix(".partial")
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step (renameat2, Linux), so that the target is never absent; else in two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
        if hasattr(libc, "renameat2") and libc.renameat2(*arguments) == 0:
            return
    aside = new.with_name("old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:  # Ctrl-C too
        os.rename(aside, old)
        raise


def _sync(folder: Path) -> None:
    """Flush every file to the disk before the rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _disk_error(target: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    step = "Free some space." if error.errno in _FULL else "Choose another -o."
    return InputError(f"cannot write {target.name}: {reason}; nothing was left behind", next_step=step)
