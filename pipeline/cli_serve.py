# SPDX-License-Identifier: Apache-2.0
"""The verb `serve`: answer over HTTP with one bundle or several."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..contracts.errors import InputError
from .options import Debug, Json, Provider, app

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..runtime.serving.model import ServedModel

KEY_VARIABLE = "ONNXPRESS_API_KEY"

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@app.command(epilog="Example: onnxpress serve artifacts/my-model --port 8000")
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(help="Bundle folders, or NAME=FOLDER.", show_default=False),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the only bundle; its folder's if absent.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    provider: Provider = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads a batch; one, or all for a lone request, if absent.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Batches of a model at a time; as the cores allow if absent.", show_default=False),
    ] = None,
    join: Annotated[
        str,
        typer.Option(
            help="What shares a run: exact (answers stay as they are alone), tolerance (within the bundle's), never."
        ),
    ] = "exact",
    max_batch: Annotated[int, typer.Option(min=1, help="Most rows in a batch.")] = 16,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="How long a free model waits for more rows.")] = 0.0,
    queue: Annotated[int, typer.Option(min=1, help="Requests of a model that may wait; the next gets 503.")] = 256,
    deadline_ms: Annotated[float, typer.Option(min=0, help="After which a request gets 504; 0: never.")] = 30_000.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request body, MiB.")] = 32.0,
    reload_seconds: Annotated[float, typer.Option(min=0, help="How often to look for new bundles; 0: never.")] = 2.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long stopping may take.")] = 30.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients have to send; or {KEY_VARIABLE}.")
    ] = None,
    shadow: Annotated[
        list[str] | None, typer.Option(help="Bundle that requests are replayed on, or NAME=BUNDLE. Repeatable.")
    ] = None,
    shadow_share: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that is replayed.")] = 0.01,
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows in which the shadow has to agree; below, an alert.")
    ] = 0.95,
    drift_window: Annotated[int, typer.Option(min=20, help="Rows that are compared at once for drift.")] = 500,
    drift_reference: Annotated[
        str, typer.Option(help="What they are compared with: first (twice as many first rows) or golden.")
    ] = "first",
    audit: Annotated[Path | None, typer.Option(help="File that says which bundle answered each request.")] = None,
    log: Annotated[str | None, typer.Option(help="File for a JSON line a request; - for standard error.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer over HTTP: Open Inference Protocol v2, plain JSON by task, OpenAI's routes, /metrics, and a page at /.

    A bundle that fails verification is not served. A new version in its folder is taken without a lost request.
    """
    from ..runtime.serving.model import named_folders
    from ..runtime.serving.monitoring import Expectations
    from ..runtime.serving.serve import serve_bundles
    from ..runtime.serving.settings import Settings
    from ..runtime.serving.watch import Watching

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if name is not None and len(bundles) != 1:
        raise InputError("--name is for one bundle", next_step="Name several as NAME=FOLDER.")
    folders = named_folders(bundles if name is None else [f"{name}={bundles[0]}"])
    settings = Settings(
        provider=provider,
        threads=threads,
        workers=workers,
        join=join,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        queue=queue,
        deadline_ms=deadline_ms,
        max_body_mb=max_body_mb,
        reload_seconds=reload_seconds,
        drain_seconds=drain_seconds,
        api_key=_key(api_key_file),
    )
    if host not in _LOOPBACK and settings.api_key is None:
        logging.getLogger("onnxpress.serve").warning("anybody who reaches %s may ask: there is no API key", host)
    expectations = Expectations(
        window=drift_window, reference=drift_reference, reference_rows=2 * drift_window, agreement=agreement
    )
    shadows = _shadows(shadow or [], list(folders))
    watching = Watching(log=log, audit=audit, shadow=shadows, share=shadow_share, expectations=expectations)

    def told(app: FastAPI, address: str) -> None:
        typer.echo(_told(address, list(app.state.server.models.values()), as_json))

    serve_bundles(folders, settings, watching, host, port, on_ready=told)


def _told(address: str, models: list[ServedModel], as_json: bool) -> str:
    if as_json:
        versions = {model.name: model.version for model in models}
        joined = {model.name: model.current.joining.told() for model in models}
        return json.dumps({"address": address, "models": versions, "join": joined})
    lines = [f"serving {', '.join(f'{model.name} ({model.version})' for model in models)} at {address}"]
    return "\n".join([*lines, *(f"  {model.name}: {model.current.joining.told()}" for model in models)])


def _key(file: Path | None) -> str | None:
    """The API key out of a file, or of the environment, or none."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the API key's file {file} cannot be read", next_step="Check --api-key-file.") from error


def _shadows(words: list[str], names: list[str]) -> dict[str, str | Path]:
    """`NAME=BUNDLE`, or a bundle for the only model."""
    shadows: dict[str, str | Path] = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not sign:
            if len(names) != 1:
                raise InputError("--shadow does not say which model it is for", next_step="Write NAME=BUNDLE.")
            name, path = names[0], word
        if name not in names:
            raise InputError(f"--shadow names '{name}', which is not served", next_step=f"Served: {', '.join(names)}.")
        shadows[name] = path
    return shadows
