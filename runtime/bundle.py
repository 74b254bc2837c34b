# SPDX-License-Identifier: Apache-2.0
"""The reading side of a bundle: its manifest, its checksums and its golden samples. Needs no torch.

manifest.json                schema_version 1; name; variants {name: {"path": ...}}; signature;
                             files {path: {"sha256", "size"}} for all but manifest.json and SHA256SUMS;
                             golden {"index": "golden/golden.json"}
SHA256SUMS                   `<hex>  <path>` for all but itself, sorted: `sha256sum -c SHA256SUMS` reads it too
golden/golden.json           {"samples": [{"text": ...}], "tolerance": {variant: {output: {"max_abs": ...}}}}
golden/inputs.safetensors    `<sample>/<input name>`
golden/outputs.safetensors   `<sample>/<output name>`: what the reference answered
model.sig                    the signature, where there is one: over all other files, and listed in none of them
and, for what they hold, `golden_inputs` (golden/tokens.json, preprocessing.json) and `sbom` (sbom.cdx.json)
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..contracts.digest import sha256_of
from ..contracts.errors import BundleError, GateFailed, MissingDependency, did_you_mean
from .golden_inputs import check_preprocessing, check_tokens
from .sbom import check_sbom
from .session import Array, Session

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"

GoldenFiles = tuple[dict[str, Any], list[tuple[dict[str, Array], dict[str, Array]]]]
"""The golden index, and the inputs and reference outputs of each sample by name."""

_REMEDY = "Fetch the bundle again, or press it again."


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found in order.

    Attributes:
        files_checked: Files whose checksum was compared.
        samples_run: Golden samples run, summed over the variants; 0 with `run=False`.
        worst: `<variant>/<output>` -> the largest absolute difference from the reference over all samples.
        materials_checked: Files whose hash in the bill of materials was compared; 0 for a bundle without one.
        texts_read: Golden texts that `tokenizers` reads as transformers did; 0 with `run=False` or without a tokenizer.
        preprocessing: Input name -> the largest difference of golden pictures or clips, prepared again.
        skipped: What could not be checked here, and why.
    """

    files_checked: int
    samples_run: int
    worst: dict[str, float]
    materials_checked: int = 0
    texts_read: int = 0
    preprocessing: dict[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a bundle.

    Raises:
        BundleError: The folder is absent, has no manifest, or has one that cannot be read or is of another schema.
    """
    folder = Path(folder)
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise BundleError(f"there is no bundle folder {folder}", next_step=did_you_mean(folder.name, near))
    manifest = _read_json(folder, MANIFEST)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST} has schema_version {version!r}; this onnxpress reads {SCHEMA_VERSION}",
            next_step="Install the version of onnxpress that wrote the bundle.",
        )
    return manifest


def model_path(manifest: dict[str, Any], variant: str) -> str:
    """Return the path of a variant's model, relative to the bundle.

    Raises:
        BundleError: The manifest names none, or one that is no file of the bundle.
    """
    path = _inside(_entry(manifest, "variants", variant, "path"), MANIFEST)
    if path not in _entry(manifest, "files"):
        raise BundleError(f"variant '{variant}' names {path}, which is not a file of the bundle", next_step=_REMEDY)
    return path


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return sha256_of([path])


def write_sums(folder: str | Path) -> Path:
    """Write SHA256SUMS over every other file of a finished bundle and return its path.

    Raises:
        BundleError: The folder holds a link, a special file, or a name that no SHA256SUMS can hold.
    """
    folder = Path(folder)
    paths = [path for path in _plain_files(folder) if path not in (SUMS, SIGNATURE)]
    lines = [f"{hash_file(folder / path)}  {path}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")
    return folder / SUMS


def verify(folder: str | Path, *, provider: str = "cpu", run: bool = True) -> VerifyResult:
    """Check every file of a bundle, then run the golden samples through every variant, and read the golden inputs.

    Args:
        folder: The bundle.
        provider: Where to run the variants.
        run: False checks the files only.

    Raises:
        BundleError: A file is missing, changed or extra, or the bundle contradicts itself.
        GateFailed: A variant's output differs from the reference by more than its tolerance, or a golden text, picture
            or clip becomes another input.
        InputError, MissingDependency: As `Session`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files_checked = _check_files(folder, manifest)
    materials = check_sbom(folder, manifest)
    if not run:
        return VerifyResult(files_checked, 0, {}, materials)
    variants = {name: model_path(manifest, name) for name in _variants(manifest)}
    golden, samples = read_golden(folder, manifest)
    tolerance = golden["tolerance"]
    worst: dict[str, float] = {}
    for name, path in variants.items():
        session = Session(folder / path, provider=provider)
        for index, (feeds, expected) in enumerate(samples):
            _compare(name, index, session.run(feeds), expected, tolerance.get(name, {}), worst)
    for companion in manifest.get("companions", ()):
        Session(folder / _companion_path(manifest, companion), provider=provider)
    texts = check_tokens(folder, manifest)
    prepared, skipped = _prepared(folder, manifest)
    return VerifyResult(files_checked, len(samples) * len(variants), worst, materials, texts, prepared, skipped)


def _companion_path(manifest: dict[str, Any], companion: Any) -> str:
    path = _inside(_entry(companion, "path"), MANIFEST)
    if path not in manifest["files"]:
        raise BundleError(f"a companion names {path}, which is not a file of the bundle", next_step=_REMEDY)
    return path


def _prepared(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, float], tuple[str, ...]]:
    """What came of golden pictures or clips, and why they could not be prepared."""
    try:
        return check_preprocessing(folder, manifest), ()
    except MissingDependency as error:
        return {}, (error.message,)


def _check_files(folder: Path, manifest: dict[str, Any]) -> int:
    """Compare disk, SHA256SUMS and manifest with each other; return the number of files compared."""
    present = set(_plain_files(folder)) - {SIGNATURE}
    if SUMS not in present:
        raise BundleError(f"{SUMS} is missing from the bundle", next_step=_REMEDY)
    sums = _read_sums(folder)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise BundleError(f"{MANIFEST} has no 'files'", next_step=_REMEDY)
    for path in files:
        _inside(path, MANIFEST)
    if hash_file(folder / MANIFEST) != sums.get(MANIFEST):
        raise BundleError(f"{MANIFEST} does not match {SUMS}", next_step=_REMEDY)
    problems: dict[str, str] = {}
    for path in sorted(present | set(sums) | set(files)):
        if path not in (MANIFEST, SUMS):
            problem = _problem(folder, path, path in present, sums.get(path), files.get(path))
            if problem:
                problems[path] = problem
    if problems:
        first = next(iter(problems.values()))
        others = f" ({len(problems)} files in all)" if len(problems) > 1 else ""
        raise BundleError(first + others, next_step=_REMEDY)
    return len(sums)


def _problem(folder: Path, path: str, present: bool, summed: str | None, listed: Any) -> str | None:
    """Say what is wrong with one file, or None."""
    if summed is None and listed is None:
        return f"{path} does not belong to the bundle"
    if summed is None or listed is None:
        silent = SUMS if summed is None else MANIFEST
        return f"{SUMS} and {MANIFEST} disagree: {silent} does not list {path}"
    if not present:
        return f"{path} is missing from the bundle"
    size = (folder / path).stat().st_size
    actual = hash_file(folder / path)
    same = isinstance(listed, dict) and listed.get("sha256") == actual and listed.get("size") == size
    if actual == summed and same:
        return None
    if actual != summed and not same:
        return f"{path} was changed after the bundle was written"
    return f"{SUMS if same else MANIFEST} was changed: it does not match {path}"


def _plain_files(folder: Path) -> list[str]:
    """List the files below the folder as sorted relative paths with `/`.

    Raises:
        BundleError: One is a link (which could lead out of the bundle) or not a regular file (reading a pipe never
            ends), or its name would break a line of SHA256SUMS.
    """
    found = []
    for where, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(where, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise BundleError(f"{relative} is a symbolic link; a bundle holds plain files", next_step=_REMEDY)
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise BundleError(f"{relative} is not a regular file", next_step=_REMEDY)
            found.append(_inside(relative, "the bundle"))
    return sorted(found)


def _inside(path: Any, source: str) -> str:
    """Return a relative path that stays in the bundle on any system, or raise BundleError."""
    text = path if isinstance(path, str) else ""
    parts = text.split("/")
    outside = PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or {"..", ".", ""} & set(parts)
    if outside or re.search(r"[\\\x00-\x1f\ud800-\udfff]", text):
        raise BundleError(f"{source} names the path {path!r}, which does not stay inside the bundle", next_step=_REMEDY)
    return text


def _read_sums(folder: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    for number, line in enumerate(_read_text(folder, SUMS).removesuffix("\n").split("\n"), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None or match[2] in sums:
            raise BundleError(f"{SUMS} line {number} is not '<sha256>  <path>' of a new path", next_step=_REMEDY)
        sums[_inside(match[2], SUMS)] = match[1]
    return sums


def _read_text(folder: Path, path: str) -> str:
    try:
        return (folder / path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"{path} is missing from the bundle {folder}", next_step=_REMEDY) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read", next_step=_REMEDY) from error


def _read_json(folder: Path, path: str) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(folder, path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON", next_step=_REMEDY) from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} is not a JSON object", next_step=_REMEDY)
    return data


def _entry(data: Any, *keys: str, source: str = MANIFEST) -> Any:
    """Return `data[key][key]...`, or raise BundleError naming what is not there."""
    for depth, key in enumerate(keys):
        if not isinstance(data, dict) or key not in data:
            raise BundleError(f"{source} has no '{'.'.join(keys[: depth + 1])}'", next_step=_REMEDY)
        data = data[key]
    return data


def _variants(manifest: dict[str, Any]) -> list[str]:
    variants = _entry(manifest, "variants")
    if not isinstance(variants, dict) or not variants:
        raise BundleError(f"{MANIFEST} has no variants", next_step=_REMEDY)
    return list(variants)


def read_golden(folder: Path, manifest: dict[str, Any]) -> GoldenFiles:
    """Return the golden index (`samples`, `tolerance`), and the inputs and reference outputs of each sample by name.

    Raises:
        BundleError: They are missing, cannot be read, or contradict each other.
    """
    index = _inside(_entry(manifest, "golden", "index"), MANIFEST)
    golden = _read_json(folder, index)
    tolerance, listed = _entry(golden, "tolerance", source=index), _entry(golden, "samples", source=index)
    inputs = _read_samples(folder / index, "inputs.safetensors")
    outputs = _read_samples(folder / index, "outputs.safetensors")
    count = len(listed) if isinstance(listed, list) else 0
    if not count or set(inputs) != set(range(count)) or set(outputs) != set(inputs) or not isinstance(tolerance, dict):
        raise BundleError(f"{index} and the arrays beside it do not hold the same samples", next_step=_REMEDY)
    return golden, [(inputs[i], outputs[i]) for i in range(count)]


def _read_samples(index: Path, name: str) -> dict[int, dict[str, Array]]:
    """Read the arrays beside the golden index: sample -> name -> array."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(index.parent / name)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{index.parent.name}/{name} cannot be read", next_step=_REMEDY) from error
    samples: dict[int, dict[str, Array]] = {}
    for key, array in arrays.items():
        number, slash, tensor = key.partition("/")
        if not slash or not number.isascii() or not number.isdigit():
            raise BundleError(f"{index.parent.name}/{name} holds '{key}', not '<sample>/<name>'", next_step=_REMEDY)
        samples.setdefault(int(number), {})[tensor] = array
    return samples


def _compare(
    variant: str,
    sample: int,
    actual: dict[str, Array],
    expected: dict[str, Array],
    tolerance: dict[str, Any],
    worst: dict[str, float],
) -> None:
    """Raise GateFailed for the first output outside its tolerance; otherwise raise the marks in `worst`."""
    for output, reference in expected.items():
        allowed = _entry(tolerance, output, "max_abs", source=f"the golden tolerance of variant '{variant}'")
        if not isinstance(allowed, int | float):
            raise BundleError(f"the golden tolerance of variant '{variant}', output '{output}' is no number")
        where = f"variant '{variant}', output '{output}', golden sample {sample}"
        if output not in actual:
            raise GateFailed(f"{where}: the model has no such output")
        if actual[output].shape != reference.shape:
            raise GateFailed(f"{where}: shape {actual[output].shape} instead of {reference.shape}")
        difference = largest_difference(actual[output], reference)
        if not difference <= allowed:
            raise GateFailed(
                f"{where}: differs from the reference by {difference:.6g}, tolerance {allowed:.6g}",
                next_step="Compare providers and onnxruntime versions with those in the manifest.",
            )
        worst[f"{variant}/{output}"] = max(difference, worst.get(f"{variant}/{output}", 0.0))


def largest_difference(actual: Array, reference: Array) -> float:
    """Return the largest absolute difference of two arrays of one shape, in float64.

    Two equal infinities, and two NaN, do not differ; where only one of both is finite the answer is infinite.
    """
    a, b = actual.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
