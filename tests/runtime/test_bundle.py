# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from onnxpress.contracts.errors import BundleError, GateFailed, MissingDependency, OnnxpressError
from onnxpress.runtime import VerifyResult, hash_file, read_manifest, verify, write_sums
from onnxpress.runtime.bundle import largest_difference

SAMPLES = 2


def seal(folder: Path, **changes: Any) -> None:
    """Write the manifest and SHA256SUMS over what lies in the folder, as the writer does."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    listed = [name for name in names if name not in ("manifest.json", "SHA256SUMS")]
    manifest = {
        "schema_version": 1,
        "name": "tiny",
        "variants": {"fp32": {"path": "onnx/model.onnx"}},
        "files": {n: {"sha256": hash_file(folder / n), "size": (folder / n).stat().st_size} for n in listed},
        "golden": {"index": "golden/golden.json"},
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_sums(folder)


def write_golden(folder: Path, tolerance: Any = 1e-6, shift: float = 0.0, outputs: Any = None) -> None:
    (folder / "golden").mkdir(exist_ok=True)
    index = {"samples": [{"text": None}] * SAMPLES, "tolerance": {"fp32": {"y": {"max_abs": tolerance}}}}
    (folder / "golden" / "golden.json").write_text(json.dumps(index))
    inputs, answers = {}, {}
    for i in range(SAMPLES):
        inputs[f"{i}/x"] = np.full((i + 1, 4), 1 + i, np.float32)
        inputs[f"{i}/bias"] = np.zeros(i + 1, np.int64)
        answers[f"{i}/y"] = np.full((i + 1, 2), 2 * (1 + i) + shift * i, np.float32)
    save_file(inputs, folder / "golden" / "inputs.safetensors")
    save_file(outputs or answers, folder / "golden" / "outputs.safetensors")


@pytest.fixture
def bundle(tmp_path: Path, tiny_bytes: bytes) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(tiny_bytes)
    (folder / "config.json").write_text('{"a": 1}')
    write_golden(folder)
    seal(folder)
    return folder


def test_a_whole_bundle_passes(bundle: Path) -> None:
    assert verify(bundle) == VerifyResult(files_checked=6, samples_run=2, worst={"fp32/y": 0.0})
    assert verify(str(bundle), run=False) == VerifyResult(6, 0, {})
    assert read_manifest(bundle)["name"] == "tiny"


def test_sums_are_sorted_repeatable_and_what_sha256sum_reads(bundle: Path) -> None:
    before = (bundle / "SHA256SUMS").read_bytes()
    assert write_sums(bundle).read_bytes() == before
    paths = [line.split("  ")[1] for line in before.decode().splitlines()]
    assert paths == sorted(paths)
    assert "manifest.json" in paths
    assert "SHA256SUMS" not in paths
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=bundle).returncode == 0


@pytest.mark.parametrize(
    "path",
    [
        "onnx/model.onnx",
        "config.json",
        "golden/golden.json",
        "golden/inputs.safetensors",
        "golden/outputs.safetensors",
        "manifest.json",
        "SHA256SUMS",
    ],
)
@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_one_changed_byte_is_found_and_its_file_named(bundle: Path, path: str, where: float) -> None:
    data = bytearray((bundle / path).read_bytes())
    data[int(len(data) * where)] ^= 1
    (bundle / path).write_bytes(data)
    with pytest.raises(BundleError, match=path):
        verify(bundle, run=False)


def test_changes_are_counted(bundle: Path) -> None:
    (bundle / "config.json").write_text('{"a": 2}')
    with pytest.raises(BundleError, match=r"^config.json was changed after the bundle was written$"):
        verify(bundle)
    (bundle / "onnx" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"^config.json was changed .* \(2 files in all\)$"):
        verify(bundle)


@pytest.mark.parametrize("path", ["onnx/model.onnx", "SHA256SUMS", "manifest.json", "golden/outputs.safetensors"])
def test_a_missing_file_is_named(bundle: Path, path: str) -> None:
    (bundle / path).unlink()
    with pytest.raises(BundleError, match=f"{path} is missing"):
        verify(bundle)


def test_an_extra_file_is_named(bundle: Path) -> None:
    (bundle / "onnx" / "extra.py").write_text("")
    with pytest.raises(BundleError, match=r"onnx/extra.py does not belong"):
        verify(bundle)


def test_manifest_and_sums_must_agree(bundle: Path) -> None:
    """Each of the two is consistent with the disk as far as it goes, but one lists a file less."""
    files = read_manifest(bundle)["files"]
    del files["config.json"]
    seal(bundle, files=files)
    with pytest.raises(BundleError, match=r"manifest.json does not list config.json"):
        verify(bundle)
    seal(bundle)
    lines = (bundle / "SHA256SUMS").read_text().splitlines(keepends=True)
    (bundle / "SHA256SUMS").write_text("".join(line for line in lines if "config.json" not in line))
    with pytest.raises(BundleError, match=r"SHA256SUMS does not list config.json"):
        verify(bundle)


def test_a_resealed_manifest_with_a_wrong_size_is_found(bundle: Path) -> None:
    files = read_manifest(bundle)["files"]
    files["config.json"]["size"] += 1
    seal(bundle, files=files)
    with pytest.raises(BundleError, match=r"manifest.json was changed: it does not match config.json"):
        verify(bundle)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/hostname", "onnx/../../outside", "C:/x", "a\\..\\b", "./config.json", ""]
)
def test_paths_that_leave_the_bundle_are_refused(bundle: Path, path: str) -> None:
    (bundle.parent / "outside").write_text("secret")
    files = read_manifest(bundle)["files"]
    seal(bundle, files={**files, path: {"sha256": hash_file(bundle.parent / "outside"), "size": 6}})
    with pytest.raises(BundleError, match="does not stay inside"):
        verify(bundle)
    seal(bundle, variants={"fp32": {"path": path}})
    with pytest.raises(BundleError, match="does not stay inside"):
        verify(bundle)
    seal(bundle, golden={"index": path})
    with pytest.raises(BundleError, match="does not stay inside"):
        verify(bundle)
    seal(bundle)
    with open(bundle / "SHA256SUMS", "a") as sums:
        sums.write(f"{'0' * 64}  {path}\n")
    with pytest.raises(BundleError, match="SHA256SUMS"):
        verify(bundle)


def test_links_and_pipes_are_refused(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    shutil.copy(bundle / "config.json", outside)
    (bundle / "config.json").unlink()
    (bundle / "config.json").symlink_to(outside)
    with pytest.raises(BundleError, match=r"config.json is a symbolic link"):
        verify(bundle)
    with pytest.raises(BundleError, match=r"config.json is a symbolic link"):
        write_sums(bundle)
    (bundle / "config.json").unlink()
    (bundle / "folder").symlink_to(bundle.parent, target_is_directory=True)
    with pytest.raises(BundleError, match="folder is a symbolic link"):
        verify(bundle)
    (bundle / "folder").unlink()
    os.mkfifo(bundle / "pipe")
    with pytest.raises(BundleError, match="pipe is not a regular file"):
        verify(bundle)


def test_absent_folder_suggests_its_sibling(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no bundle folder") as caught:
        read_manifest(bundle.parent / "bundel")
    assert "'bundle'" in caught.value.next_step
    with pytest.raises(BundleError, match="no bundle folder"):
        read_manifest(bundle / "no" / "such" / "place")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "manifest.json is missing"),
        ("{", "manifest.json is not valid JSON"),
        ("[]", "manifest.json is not a JSON object"),
        ("{}", "schema_version None"),
        ('{"schema_version": 2}', "schema_version 2; this onnxpress reads 1"),
        ("\udcff", "manifest.json cannot be read"),
    ],
)
def test_manifest_that_cannot_be_read(bundle: Path, text: str | None, words: str) -> None:
    (bundle / "manifest.json").unlink()
    if text is not None:
        (bundle / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match=words):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"variants": {}},
        {"variants": {"fp32": "onnx/model.onnx"}},
        {"variants": {"fp32": {"path": "absent.onnx"}}},
        {"golden": None},
        {"golden": {"index": "golden/absent.json"}},
    ],
)
def test_manifest_that_contradicts_itself(bundle: Path, changes: dict[str, Any]) -> None:
    seal(bundle, **changes)
    with pytest.raises(BundleError):
        verify(bundle)


def test_golden_mismatch_names_variant_output_value_and_tolerance(bundle: Path) -> None:
    write_golden(bundle, tolerance=0.01, shift=0.5)
    seal(bundle)
    with pytest.raises(GateFailed) as caught:
        verify(bundle)
    for word in ("'fp32'", "'y'", "sample 1", "by 0.5", "tolerance 0.01"):
        assert word in caught.value.message
    verify(bundle, run=False)


def test_difference_within_tolerance_is_reported(bundle: Path) -> None:
    write_golden(bundle, tolerance=0.5, shift=0.25)
    seal(bundle)
    assert verify(bundle).worst == {"fp32/y": 0.25}


def test_wrong_shape_and_unknown_output(bundle: Path) -> None:
    answers = {"0/y": np.zeros((1, 1), np.float32), "1/y": np.zeros((1, 1), np.float32)}
    write_golden(bundle, tolerance=100, outputs=answers)
    seal(bundle)
    with pytest.raises(GateFailed, match=r"shape \(1, 2\) instead of \(1, 1\)"):
        verify(bundle)
    write_golden(bundle, outputs={"0/z": answers["0/y"], "1/z": answers["1/y"]})
    seal(bundle)
    with pytest.raises(BundleError, match="tolerance"):
        verify(bundle)


@pytest.mark.parametrize("tolerance", [float("nan"), None, "1", -1.0])
def test_a_tolerance_that_allows_nothing(bundle: Path, tolerance: Any) -> None:
    write_golden(bundle, tolerance=tolerance)
    seal(bundle)
    with pytest.raises((BundleError, GateFailed)):
        verify(bundle)


def test_golden_samples_must_be_complete(bundle: Path) -> None:
    write_golden(bundle, outputs={"0/y": np.full((1, 2), 2, np.float32)})
    seal(bundle)
    with pytest.raises(BundleError, match="do not hold the same samples"):
        verify(bundle)
    write_golden(bundle, outputs={"y": np.zeros(1, np.float32)})
    seal(bundle)
    with pytest.raises(BundleError, match="'y'"):
        verify(bundle)
    (bundle / "golden" / "outputs.safetensors").write_bytes(b"garbage")
    seal(bundle)
    with pytest.raises(BundleError, match=r"outputs.safetensors cannot be read"):
        verify(bundle)


def test_every_variant_is_run(bundle: Path, tiny_bytes: bytes) -> None:
    (bundle / "onnx" / "model_other.onnx").write_bytes(tiny_bytes)
    seal(bundle, variants={"fp32": {"path": "onnx/model.onnx"}, "other": {"path": "onnx/model_other.onnx"}})
    with pytest.raises(BundleError, match="variant 'other'"):  # no tolerance is written for it
        verify(bundle)


def test_provider_that_is_not_installed(bundle: Path) -> None:
    from onnxpress.runtime import PROVIDERS, available_providers

    absent = sorted(set(PROVIDERS) - set(available_providers()))[0]
    with pytest.raises(MissingDependency):
        verify(bundle, provider=absent)


@pytest.mark.parametrize(
    ("actual", "reference", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([np.inf], [1.0], np.inf),
        ([1.0], [np.nan], np.inf),
        ([np.inf, -np.inf], [np.inf, -np.inf], 0.0),
        ([np.inf], [-np.inf], np.inf),
        ([np.nan], [np.nan], 0.0),
        ([], [], 0.0),
    ],
)
def test_largest_difference(actual: list[float], reference: list[float], difference: float) -> None:
    assert largest_difference(np.array(actual, np.float32), np.array(reference, np.float32)) == difference
    with np.errstate(all="raise"):
        assert largest_difference(np.array([True, False]), np.array([True, True])) == 1


def test_a_signature_beside_is_no_file_of_the_bundle(bundle: Path) -> None:
    before = (bundle / "SHA256SUMS").read_bytes()
    (bundle / "model.sig").write_text("{}")
    assert verify(bundle).files_checked == 6
    assert write_sums(bundle).read_bytes() == before


def test_the_graphs_that_work_with_the_model_are_loaded(bundle: Path, tiny_bytes: bytes) -> None:
    encoder = bundle / "onnx" / "encoder_model.onnx"
    encoder.write_bytes(tiny_bytes)
    seal(bundle, companions=[{"name": "encoder_model", "path": "onnx/encoder_model.onnx"}])
    assert verify(bundle).samples_run == SAMPLES
    encoder.write_bytes(b"no graph")
    seal(bundle, companions=[{"name": "encoder_model", "path": "onnx/encoder_model.onnx"}])
    verify(bundle, run=False)
    with pytest.raises(OnnxpressError):
        verify(bundle)
    for broken in ({"path": "onnx/absent.onnx"}, {"path": "../encoder.onnx"}, {}, "encoder"):
        seal(bundle, companions=[broken])
        with pytest.raises(BundleError):
            verify(bundle)


def test_what_cannot_be_checked_here_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise MissingDependency("reading pictures needs Pillow, which is not installed")

    monkeypatch.setattr("onnxpress.runtime.bundle.check_preprocessing", absent)
    assert verify(bundle).skipped == ("reading pictures needs Pillow, which is not installed",)
