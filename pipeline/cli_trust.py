# SPDX-License-Identifier: Apache-2.0
"""The verbs by which a bundle is trusted: check all that can be checked of it, and sign it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import BundleArgument, Debug, Json, Provider, app, print_result

if TYPE_CHECKING:
    from ..runtime.bundle import VerifyResult


@app.command(epilog="Example: onnxpress verify artifacts/demo")
def verify(
    bundle: BundleArgument,
    provider: Provider = "cpu",
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="Check the signature with this key (PEM).", show_default=False)
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(help="Also follow the chain of an audit log of `onnxpress serve`.", show_default=False),
    ] = None,
    audit_hash: Annotated[
        str | None, typer.Option(help="A hash of that log, kept elsewhere: it must hold it still.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check hashes, bill of materials and signature, load the model, run the golden samples, read the golden texts."""
    from ..contracts.errors import InputError
    from ..runtime.bundle import verify as check
    from .signing import check_signature

    if audit_hash is not None and audit is None:
        raise InputError("--audit-hash belongs to an audit log", next_step="Name it with --audit.")
    if public_key is not None:
        check(bundle, run=False)  # before any of it is loaded
    signature = check_signature(bundle, public_key)
    result = check(bundle, provider=provider)
    shown = {**vars(result), "skipped": list(result.skipped), "signature": signature}
    lines = [f"{bundle}: {', '.join(_told(result))}; {signature}"]
    if audit is not None:
        shown["audit"], told = _audited(bundle, audit, audit_hash)
        lines.append(told)
    print_result(shown, as_json, "\n".join(lines))


def _audited(bundle: Path, log: Path, kept: str | None) -> tuple[dict[str, Any], str]:
    """Follow an audit log's chain: what it says, and the line that says it."""
    from ..runtime.opened import Bundle
    from ..runtime.serving.audit import check_audit

    result = check_audit(log, contains=kept)
    ours = result.bundles.get(Bundle(bundle, check=False).sha256, 0)
    told = f"{log}: {result.lines} lines in one chain, {ours} of {result.answers} answers by this bundle"
    return {**vars(result), "answers_by_this_bundle": ours}, f"{told}; last hash {result.head}"


def _told(result: VerifyResult) -> list[str]:
    parts = [f"{result.files_checked} files unchanged"]
    if result.materials_checked:
        parts.append("bill of materials agrees")
    parts.append(f"{result.samples_run} golden samples agree")
    if result.texts_read:
        parts.append(f"{result.texts_read} golden texts read alike")
    if result.preprocessing:
        parts.append("golden inputs prepared alike")
    return [*parts, *(f"not checked: {reason}" for reason in result.skipped)]


@app.command(epilog="Example: onnxpress sign artifacts/demo --key k.pem; check with: verify --public-key k.pub")
def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option("--key", help="Private elliptic curve key (PEM).", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sign every file of a bundle with a key of your own: writes model.sig into it."""
    from .signing import sign as run

    file = run(bundle, key)
    report: dict[str, Any] = {"signature": str(file), "bytes": file.stat().st_size}
    print_result(report, as_json, f"{file}: signed; check with: onnxpress verify {bundle} --public-key KEY")
