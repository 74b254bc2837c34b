# SPDX-License-Identifier: Apache-2.0
"""A signature says who pressed a bundle: with the right key it holds, and one changed byte breaks it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from onnxpress.contracts.errors import BundleError, InputError, MissingDependency
from onnxpress.pipeline import signing
from onnxpress.pipeline.signing import check_signature, sign
from onnxpress.runtime.bundle import hash_file, read_manifest, verify, write_sums

from .conftest import Run, snapshot
from .samples import FAST

pytest.importorskip("model_signing", reason="extra `sign` is not installed")


def write_keys(folder: Path, name: str, private: Any, password: bytes | None = None) -> tuple[Path, Path]:
    lock = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    secret = private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock)
    public = private.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(secret)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "k", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def once(finished: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "bundle"
    shutil.copytree(finished, folder)
    sign(folder, keys[0])
    return folder


@pytest.fixture
def signed(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "copy"))


def reseal(folder: Path) -> None:
    """Make the bundle consistent again, as one would who changed it on purpose."""
    sbom = json.loads((folder / "sbom.cdx.json").read_text())
    for part in sbom["metadata"]["component"]["components"]:
        part["hashes"][0]["content"] = hash_file(folder / part["name"])
    (folder / "sbom.cdx.json").write_text(json.dumps(sbom))
    manifest = read_manifest(folder)
    for path, row in manifest["files"].items():
        row |= {"sha256": hash_file(folder / path), "size": (folder / path).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_sums(folder)


def test_a_signed_bundle_is_the_bundle_and_a_file_beside_it(
    once: Path, finished: Path, keys: tuple[Path, Path]
) -> None:
    before, after = snapshot(finished), snapshot(once)
    assert {name: data for name, data in after.items() if name != "model.sig"} == before
    assert (once / "model.sig").stat().st_mode & 0o777 == 0o644
    assert verify(once) == verify(finished)
    assert check_signature(once, None) == "signed, not checked"
    assert check_signature(finished, None) == "unsigned"
    assert check_signature(once, keys[1]) == "signed by this key"
    with pytest.raises(BundleError, match="the bundle is not signed"):
        check_signature(finished, keys[1])


def test_another_name_and_another_place_keep_it(signed: Path, keys: tuple[Path, Path]) -> None:
    moved = signed.rename(signed.with_name("moved"))
    assert check_signature(moved, keys[1]) == "signed by this key"


@pytest.mark.parametrize("name", ["README.md", "onnx/model_quantized.onnx", "golden/golden.json", "SHA256SUMS"])
def test_one_changed_byte_names_the_file(name: str, signed: Path, keys: tuple[Path, Path]) -> None:
    data = bytearray((signed / name).read_bytes())
    data[len(data) // 2] ^= 1
    (signed / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        check_signature(signed, keys[1])


def test_a_resealed_bundle_is_not_what_was_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "recipe.yaml").write_text("other: true\n")
    reseal(signed)
    verify(signed, run=False)  # hashes alone do not know
    with pytest.raises(BundleError, match=r"recipe\.yaml is not what was signed"):
        check_signature(signed, keys[1])


def test_an_added_file_is_not_what_was_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "extra.py").write_text("")
    with pytest.raises(BundleError, match=r"extra\.py"):
        check_signature(signed, keys[1])
    with pytest.raises(BundleError, match=r"extra\.py does not belong"):
        verify(signed, run=False)


def test_another_key_is_told(signed: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(BundleError, match=r"model\.sig was not made with this key"):
        check_signature(signed, other)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"mediaType": "x"}', "no json"])
def test_a_signature_that_is_none(text: str, signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "model.sig").write_text(text)
    with pytest.raises(BundleError, match=r"model\.sig"):
        check_signature(signed, keys[1])


def test_a_changed_signature_does_not_hold(signed: Path, keys: tuple[Path, Path]) -> None:
    data = json.loads((signed / "model.sig").read_text())
    data["dsseEnvelope"]["signatures"][0]["sig"] = "A" * len(data["dsseEnvelope"]["signatures"][0]["sig"])
    (signed / "model.sig").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"model\.sig"):
        check_signature(signed, keys[1])


def test_keys_that_cannot_sign_are_refused(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    locked, _ = write_keys(tmp_path, "locked", ec.generate_private_key(ec.SECP256R1()), b"secret")
    curve, _ = write_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256K1()))
    other, _ = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    before = snapshot(bundle)
    for key, words in (
        (tmp_path / "absent.pem", "no key"), (locked, "has a password"), (curve, "no private key on P-256"),
        (other, "no private key"), (keys[1], "no private key"), (bundle / "README.md", "no private key"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            sign(bundle, key)
    assert snapshot(bundle) == before
    with pytest.raises(InputError, match="no public key"):
        check_signature(bundle, keys[0])
    with pytest.raises(InputError, match="no key"):
        check_signature(bundle, tmp_path / "absent.pub")


def test_a_changed_bundle_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "recipe.yaml").write_text("")
    with pytest.raises(BundleError, match=r"recipe\.yaml was changed"):
        sign(bundle, keys[0])
    assert not (bundle / "model.sig").exists()
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_without_the_extra_the_next_step_is_to_install_it(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(signing, "import_module", absent)
    with pytest.raises(MissingDependency) as caught:
        sign(bundle, keys[0])
    assert caught.value.next_step == "pip install 'onnxpress[sign]'"
    with pytest.raises(MissingDependency):
        check_signature(bundle, keys[1])
    assert check_signature(bundle, None) == "unsigned"


def test_the_verbs(onnxpress: Run, bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert onnxpress("sign", bundle, "--key", private).code == 0
    assert onnxpress("verify", bundle).out.endswith("2 golden samples agree; signed, not checked\n")
    shown = json.loads(onnxpress("verify", bundle, "--public-key", public, "--json").out)
    assert (shown["signature"], shown["skipped"], shown["samples_run"]) == ("signed by this key", [], 2)
    (bundle / "README.md").write_text("changed")
    result = onnxpress("verify", bundle, "--public-key", public)
    assert (result.code, result.out) == (2, "")
    assert "README.md was changed" in result.error


def test_nothing_is_loaded_from_a_bundle_that_is_not_what_was_signed(
    onnxpress: Run, signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (signed / "recipe.yaml").write_text("other: true\n")
    reseal(signed)

    def session(*_: object, **__: object) -> None:
        pytest.fail("loaded")

    monkeypatch.setattr("onnxpress.runtime.bundle.Session", session)
    result = onnxpress("verify", signed, "--public-key", keys[1])
    assert result.code == 2
    assert "is not what was signed" in result.error


@pytest.mark.usefixtures("unprobed")
def test_press_signs_what_it_writes(onnxpress: Run, net: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["press", net, "-o", tmp_path / "out", *FAST]
    assert onnxpress(*words, "--sign", keys[1]).code == 2
    assert not (tmp_path / "out").exists()
    assert onnxpress(*words, "--sign", keys[0]).code == 0
    assert check_signature(tmp_path / "out", keys[1]) == "signed by this key"
    verify(tmp_path / "out")
