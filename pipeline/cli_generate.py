# SPDX-License-Identifier: Apache-2.0
"""The verb `generate`: let a bundle's language model go on from a prompt."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..contracts.errors import InputError
from .options import BundleArgument, Debug, Json, Provider, Threads, app

if TYPE_CHECKING:
    from ..runtime.generation import Chunk, Generator, Sampling, Stream


@app.command(
    epilog='Example: onnxpress generate artifacts/my-model "Once upon a time" --max-new-tokens 100 --temperature 0.8'
)
def generate(
    bundle: BundleArgument,
    prompt: Annotated[
        str, typer.Argument(help="Text to go on from, or token ids with --tokens; - reads it from standard input.")
    ] = "",
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write at most.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token each time, higher is wilder.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among this many of the likeliest tokens; 0: all.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest that have this probability.", show_default=False)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw among those this likely beside the likeliest.", show_default=False)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: less of what was there.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text at which to stop. Repeatable.")] = None,
    beams: Annotated[int | None, typer.Option(help="Texts that beam search follows.", show_default=False)] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Token ids in and out: '1 403 407'.")] = False,
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what a language model says next, as it comes; what is not given is asked of generation_config.json."""
    from ..runtime.generation import Generator

    generator = Generator(bundle, provider=provider, threads=threads, spinning=True)
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = generator.defaults.changed(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or None,
        beams=beams,
    )
    given: str | list[int] = _ids(text) if tokens else text
    with generator.stream(given, sampling) as stream:
        if as_json:
            typer.echo(json.dumps(_whole(generator, stream, sampling), indent=2, ensure_ascii=False))
        else:
            _print(stream, as_ids=tokens)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError("--tokens takes whole numbers", next_step="Write --tokens '1 403 407'.") from None


def _print(stream: Stream, *, as_ids: bool) -> None:
    """Write each piece at once."""
    space = ""
    for chunk in stream:
        piece = space + " ".join(map(str, chunk.tokens)) if as_ids else chunk.text
        space = " "
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _whole(generator: Generator, stream: Stream, sampling: Sampling) -> dict[str, Any]:
    chunks: list[Chunk] = list(stream)
    usage = stream.usage
    return {
        "bundle": generator.bundle.sha256,
        "text": "".join(chunk.text for chunk in chunks) if generator.has_text else None,
        "tokens": [token for chunk in chunks for token in chunk.tokens],
        "finish": chunks[-1].finish,
        "prompt_tokens": usage.prompt_tokens[0],
        "prefill_tokens_per_second": round(usage.prefill_rate, 1),
        "decode_tokens_per_second": round(usage.decode_rate, 1),
        "decode_share_in_graph": round(usage.graph_seconds / usage.decode_seconds, 4) if usage.decode_seconds else None,
        "beams": sampling.beams,
        "temperature": sampling.temperature,
    }
