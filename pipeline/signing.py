# SPDX-License-Identifier: Apache-2.0
"""Sign a bundle and check its signature, by `model-signing` (OpenSSF, https://github.com/sigstore/model-transparency).

model.sig is a sigstore bundle: an in-toto statement with the SHA-256 of every other file, SHA256SUMS included, signed
with an elliptic curve key (P-256, P-384 or P-521) that lies in a file. Nothing is asked of any server. It is beside
the bundle's files, not one of them: SHA256SUMS does not list it, and removing it leaves the bundle as it was.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from ..contracts.errors import BundleError, InputError, MissingDependency
from ..runtime.bundle import MANIFEST, SIGNATURE, SUMS, verify

UNSIGNED, UNCHECKED, CHECKED = "unsigned", "signed, not checked", "signed by this key"
_KEYS = "Make one: openssl ecparam -name prime256v1 -genkey -noout -out k.pem; openssl ec -in k.pem -pubout -out k.pub"


def sign(folder: Path, key: Path) -> Path:
    """Sign an unchanged bundle; an older signature is replaced. Returns the path of model.sig.

    Raises:
        BundleError: The folder is no bundle, or was changed.
        InputError: The key cannot be used.
        MissingDependency: model-signing is not installed.
    """
    config = signer(key)
    verify(folder, run=False)
    file = folder / SIGNATURE
    partial = folder.parent / f".{folder.name}.{SIGNATURE}.partial"
    hashing = _module("hashing").Config().set_ignored_paths(paths=[file], ignore_git_paths=False)
    try:
        config.set_hashing_config(hashing).sign(folder, partial)
        partial.chmod(0o644)
        partial.replace(file)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}", next_step="Check the folder.") from error
    finally:
        partial.unlink(missing_ok=True)
    return file


def signer(key: Path) -> Any:
    """What signs with a private key; asked for early, so that a bad key is told before hours of work.

    Raises:
        InputError: The file is no private key that can be used.
        MissingDependency: model-signing is not installed.
    """
    config = _module("signing").Config()
    try:
        return config.use_elliptic_key_signer(private_key=key)
    except FileNotFoundError:
        raise InputError(f"there is no key {key}", next_step=_KEYS) from None
    except TypeError as error:  # cryptography's, for a key with a password
        raise InputError(f"the key {key.name} has a password", next_step="Decrypt it first.") from error
    except Exception as error:  # what cryptography raises for what is no key is of many kinds
        raise InputError(
            f"{key.name} is no private key on P-256, P-384 or P-521 in PEM ({type(error).__name__})", next_step=_KEYS
        ) from error


def check_signature(folder: Path, key: Path | None) -> str:
    """What is known of a bundle's signature: `unsigned`, `signed, not checked` (no key), or `signed by this key`.

    Raises:
        BundleError: A key is given, and the bundle is unsigned, signed by another key, or not what was signed.
        InputError: The key cannot be used.
        MissingDependency: model-signing is not installed.
    """
    file = folder / SIGNATURE
    if key is None:
        return UNCHECKED if file.is_file() else UNSIGNED
    verifier = _verifier(key)
    if not file.is_file():
        raise BundleError(
            "the bundle is not signed", next_step="Ask for one with model.sig, or leave --public-key out."
        )
    try:
        verifier.verify(folder, file)
    except Exception as error:  # the library's, cryptography's, and protobuf's for a file that is no signature
        raise _refusal(error) from error
    return CHECKED


def _verifier(key: Path) -> Any:
    try:
        return _module("verifying").Config().use_elliptic_key_verifier(public_key=key)
    except FileNotFoundError:
        raise InputError(f"there is no key {key}", next_step="Give the signer's public key.") from None
    except MissingDependency:
        raise
    except Exception as error:  # what cryptography raises for what is no key is of many kinds
        raise InputError(f"{key.name} is no public key in PEM", next_step="Give the signer's public key.") from error


def _refusal(error: Exception) -> BundleError:
    """The library's message as one line that names the file."""
    step = "Do not use the bundle; fetch it again from its signer."
    text = str(error).replace("\\'", "'")  # it holds the repr of a list of lines
    if "Key mismatch" in text or type(error).__name__ == "InvalidSignature":
        return BundleError(f"{SIGNATURE} was not made with this key", next_step=step)
    names = re.findall(r"Hash mismatch for '([^']*)'", text)
    names += re.findall(r"(?:Extra files found in|Missing files in) model '[^']*': ([^\"'\],]+)", text)
    if names:
        # Whoever changes a file changes these two as well
        named = next((name for name in names if name not in (MANIFEST, SUMS)), names[0])
        return BundleError(f"{named} is not what was signed", next_step=step)
    return BundleError(f"{SIGNATURE} cannot be read ({type(error).__name__})", next_step=step)


def _module(name: str) -> Any:
    try:
        return import_module(f"model_signing.{name}")
    except ImportError as error:
        raise MissingDependency(
            f"signatures need model-signing and pyOpenSSL ({error})", next_step="pip install 'onnxpress[sign]'"
        ) from error
