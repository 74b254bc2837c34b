# SPDX-License-Identifier: Apache-2.0
"""The verbs behind the bundle: hand it to another runtime, generate with it, serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .handoff import TARGETS
from .options import BundleArgument, Debug, Json, app, print_result


@app.command(epilog="Example: onnxpress handoff artifacts/my-model --to node --check -o my-model-node")
def handoff(
    bundle: BundleArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help=f"{', '.join(TARGETS)}.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write; BUNDLE-TARGET if absent.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the consumer on the golden samples.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a handoff that exists.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Lay a bundle out for another runtime, with a consumer in its language and a check against the golden samples."""
    from .handoff.handing import hand_off

    report = hand_off(bundle, to, output, check=check, force=force)
    print_result(report, as_json, _told(report))


def _told(report: dict[str, Any]) -> str:
    """What the verb prints: where it lies and what its check found."""
    check = report["check"]
    if check["status"] != "passed":
        return f"{report['folder']}: {', '.join(check['done'])}; not run: {check['reason']}"
    worst = ", ".join(f"{name} {value:.3g}" for name, value in check["from_python"].items())
    return f"{report['folder']}: run, golden samples agree; largest difference from Python: {worst}"
