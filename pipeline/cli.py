# SPDX-License-Identifier: Apache-2.0
"""The command line: one verb a stage. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..contracts.errors import GateFailed, OnnxpressError
from .options import (
    Calibration,
    Debug,
    Evaluation,
    Force,
    ForceFile,
    GateOption,
    Inputs,
    Json,
    Provider,
    RecipeOption,
    Set,
    SourceArgument,
    Task,
    Threads,
    Trust,
    app,
    print_result,
)

if TYPE_CHECKING:
    from .progress import Progress
    from .recipe import Recipe

_INTERRUPTED, _INTERRUPTION = 130, "interrupted; nothing was left behind"


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from .versions import versions

        typer.echo(f"onnxpress {versions()['onnxpress']}")
        raise typer.Exit


@app.command(epilog="Example: onnxpress demo -o artifacts/demo")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder.")] = Path("artifacts/demo"),
    recipe: RecipeOption = "int8-dynamic",
    examples: Annotated[int, typer.Option(help="Docstrings to evaluate on.", min=20)] = 400,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The main job on a real model that ships in a package: all-MiniLM-L6-v2, no download."""
    from .demo import run_demo
    from .show import print_outcome

    outcome = run_demo(output, _recipe(recipe), examples, _progress())
    show = partial(print_outcome, outcome, as_json=as_json)
    _conclude(outcome.manifest, as_json, show, outcome.require_accepted)


@app.command(
    epilog="Example: onnxpress press ./my-model --recipe int8-dynamic --evaluation dev.tsv "
    "--gate 'accuracy_drop <= 0.3' -o artifacts/my-model"
)
def press(
    source: SourceArgument,
    task: Task = None,
    recipe: RecipeOption = "int8-dynamic",
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    provider: Provider = "cpu",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Bundle folder; artifacts/NAME if absent.")
    ] = None,
    gate: GateOption = None,
    set_: Set = None,
    trust_remote_code: Trust = False,
    inputs: Inputs = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps calibration statistics for the next press on the same data.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", help="Sign the bundle with this private key (PEM).", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export, compress, prove, measure, and write a bundle if every gate passes."""
    from .pressing import load_data
    from .pressing import press as run
    from .show import print_outcome

    chosen = _recipe(recipe, _settings(set_, trust_remote_code, inputs), gate)
    calibration_data, evaluation_data = load_data(calibration), load_data(evaluation, chosen.validation.examples)
    outcome = run(
        source,
        chosen,
        output or Path("artifacts") / _name_of(source, chosen.name),
        task=task,
        calibration=calibration_data,
        evaluation=evaluation_data,
        provider=provider,
        cache=cache,
        force=force,
        sign=sign,
        progress=_progress(),
    )
    show = partial(print_outcome, outcome, as_json=as_json)
    _conclude(outcome.manifest, as_json, show, outcome.require_accepted)


@app.command(epilog="Example: onnxpress export ./my-model -o my-model.onnx --set export.pooling=mean")
def export(
    source: SourceArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The .onnx file to write, or a folder: some models are two graphs.")
    ],
    task: Task = None,
    recipe: RecipeOption = "fp32",
    set_: Set = None,
    trust_remote_code: Trust = False,
    inputs: Inputs = None,
    force: ForceFile = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the fp32 graph alone, cleaned, fused and proven against the original; no bundle."""
    from .exporting import export_file

    chosen = _recipe(recipe, _settings(set_, trust_remote_code, inputs))
    result = export_file(source, output, task, chosen, force=force, progress=_progress())
    lines = [
        f"{part['file']}: {part['bytes']:,} bytes, {part['nodes']} nodes, "
        f"largest relative error {part['relative_error']:.2g}"
        for part in (result, *result.get("companions", ()))
    ]
    print_result(result, as_json, "\n".join(lines))


@app.command(epilog="Example: onnxpress validate ./my-model my-model.onnx --evaluation dev.tsv --gate 'cosine >= 0.99'")
def validate(
    source: SourceArgument,
    candidate: Annotated[Path, typer.Argument(help=".onnx file or bundle folder.", show_default=False)],
    task: Task = None,
    evaluation: Evaluation = None,
    provider: Provider = "cpu",
    gate: GateOption = None,
    set_: Set = None,
    trust_remote_code: Trust = False,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare an .onnx file or a bundle with the original, output by output."""
    from .pressing import load_data
    from .show import print_validation
    from .verbs import require_gates, validate_candidate

    settings = _recipe("fp32", _settings(set_, trust_remote_code, inputs))
    data = load_data(evaluation, settings.validation.examples)
    result = validate_candidate(source, candidate, task, data, provider, gate or [], settings, _progress())
    show = partial(print_validation, result, as_json=as_json)
    _conclude(result, as_json, show, partial(require_gates, result))


@app.command(epilog="Example: onnxpress benchmark artifacts/demo --reference ./my-model --evaluation dev.tsv")
def benchmark(
    candidate: Annotated[Path, typer.Argument(help=".onnx file or bundle folder.", show_default=False)],
    reference: Annotated[str | None, typer.Option(help="Source to compare with; interleaved in the same run.")] = None,
    task: Task = None,
    evaluation: Evaluation = None,
    provider: Provider = "cpu",
    set_: Set = None,
    trust_remote_code: Trust = False,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a candidate, interleaved with its reference: latency, throughput, load time, memory."""
    from .pressing import load_data
    from .show import print_benchmarks
    from .verbs import benchmark_candidate

    settings = _recipe("fp32", _settings(set_, trust_remote_code, inputs))
    data = load_data(evaluation, settings.validation.examples)
    rows = benchmark_candidate(candidate, reference, task, data, provider, settings, _progress())
    print_benchmarks(rows, as_json=as_json)


@app.command(epilog="Example: onnxpress inspect model.onnx")
def inspect(
    model: Annotated[Path, typer.Argument(help=".onnx file or bundle folder.", show_default=False)],
    groups: Annotated[bool, typer.Option("--groups", help="What could be pruned together, and what stays.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a model: signature, operators, weights by type, size."""
    from .show import print_inspection
    from .verbs import inspect_model

    print_inspection(inspect_model(model, groups=groups), as_json=as_json)


@app.command(epilog="Example: onnxpress pack model.onnx; writes model.onnx.pack, which Session loads as it is")
def pack(
    model: Annotated[Path, typer.Argument(help=".onnx file or bundle folder.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; MODEL.pack if absent.")
    ] = None,
    codec: Annotated[str, typer.Option(help="auto, zstd, huffman, lzw (an extra) or raw.")] = "auto",
    level: Annotated[int, typer.Option(help="Effort of zstandard.", min=1, max=22)] = 19,
    threads: Threads = None,
    force: ForceFile = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pack an .onnx file and its external data losslessly into one file."""
    from ..runtime.packing import pack as run

    file = model
    if model.is_dir():
        from .verbs import model_file

        file = model_file(model)
    # Beside a bundle, not inside: it would no longer verify
    beside = model.resolve() if model.is_dir() else model
    report = run(
        file, output or beside.with_name(f"{beside.name}.pack"), codec=codec, level=level, threads=threads, force=force
    )
    print_result(report.to_json(), as_json, report.summary())


@app.command(epilog="Example: onnxpress unpack model.onnx.pack -o model.onnx")
def unpack(
    packed: Annotated[Path, typer.Argument(help="What `onnxpress pack` wrote.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .onnx file; under its old name if absent.")
    ] = None,
    threads: Threads = None,
    force: ForceFile = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Restore a packed model, byte for byte, with its external data beside it."""
    from ..runtime.packing import unpack as run

    files = run(packed, output, threads=threads, force=force)
    sizes = {str(file): file.stat().st_size for file in files}
    told = [f"{name}: {size:,} bytes, as they were" for name, size in sizes.items()]
    print_result({"files": sizes}, as_json, "\n".join(told))


@app.command(epilog="Example: onnxpress recipes int8-dynamic > my-recipe.yaml")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe as YAML.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the built-in recipes, or print one to start from."""
    from ..contracts.errors import InputError, did_you_mean
    from .recipe import built_in, load_recipe

    texts = built_in()
    if name is not None:
        if name not in texts:
            raise InputError(f"unknown recipe '{name}'", next_step=did_you_mean(name, texts))
        typer.echo(json.dumps(load_recipe(name).to_json(), indent=2) if as_json else texts[name].rstrip())
        return
    lines = {n: " ".join(x.lstrip("# ") for x in t.splitlines() if x.startswith("#")) for n, t in texts.items()}
    width = max(map(len, lines)) + 2
    print_result(lines, as_json, "\n".join(f"{n:<{width}}{line}" for n, line in lines.items()))


@app.command(epilog="Example: onnxpress doctor")
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this machine can do: versions, providers, instruction sets, and what is missing."""
    from .doctor import examine
    from .show import print_doctor

    print_doctor(examine(), as_json=as_json)


# Behind the verbs above, so that --help lists them in the order in which one uses them
from . import cli_deploy, cli_generate, cli_serve, cli_trust  # noqa: E402, F401


def _recipe(name: str, overrides: list[str] | None = None, gates: list[str] | None = None) -> Recipe:
    from .recipe import load_recipe

    return load_recipe(name, overrides or [], gates or [])


def _settings(overrides: list[str] | None, trust_remote_code: bool, inputs: list[str] | None) -> list[str]:
    """The options that are short for a `--set`, behind those that the user wrote."""
    settings = list(overrides or [])
    if trust_remote_code:
        settings.append("export.trust_remote_code=true")
    if inputs:
        settings.append(f"export.inputs={json.dumps(inputs)}")
    return settings


def _progress() -> Progress:
    from .progress import Progress

    return Progress(enabled=True)


def _name_of(source: str, recipe: str) -> str:
    path = Path(source)
    name = path.resolve().name if path.is_dir() else source.rstrip("/")  # `.` has no name of its own
    name = name.partition("@")[0] if name.startswith("timm:") else name
    last = name.replace(":", ".").rsplit("/", 1)[-1]
    if path.suffix in (".onnx", ".pt2", ".pt", ".ts", ".jit"):
        last = last.removesuffix(path.suffix)
    return f"{last or 'model'}-{recipe}"


class _Refused(GateFailed):
    """A gate failed; with --json, what was measured and the error are one object."""

    def __init__(self, error: GateFailed, result: dict[str, Any]) -> None:
        super().__init__(error.message, next_step=error.next_step)
        self.result = result


def _conclude(
    result: dict[str, Any], as_json: bool, show: Callable[[], None], require_gates: Callable[[], None]
) -> None:
    """Show a result, and fail if a gate did: a table comes before the error, JSON is left to the error."""
    if not as_json:
        show()
    try:
        require_gates()
    except GateFailed as error:
        raise _Refused(error, result) from None
    if as_json:
        show()


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run, and turn every error into one line, its next step and its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    debug, as_json = "--debug" in words, "--json" in words
    for library in () if debug else ("onnx_ir", "onnxscript"):  # a line a node that they leave as it is
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        command = typer.main.get_command(app)
        code = command.main(args=words, prog_name="onnxpress", standalone_mode=False)
        if code == _INTERRUPTED:  # typer has caught the interrupt, and says nothing
            code = _fail(_INTERRUPTION, "", _INTERRUPTED, as_json)
    except KeyboardInterrupt:
        code = _fail(_INTERRUPTION, "", _INTERRUPTED, as_json)
    except OnnxpressError as error:
        if debug:
            traceback.print_exc()
        result = error.result if isinstance(error, _Refused) else None
        code = _fail(error.message, error.next_step, error.exit_code, as_json, result)
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except Exception as error:  # noqa: BLE001 - the last resort: one line, not a traceback
        code = _from_click(error, as_json)
        if code is None:
            if debug:
                traceback.print_exc()
            reason = f"internal error: {type(error).__name__}: {error}"
            code = _fail(reason, "Run again with --debug and report it.", 1, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _from_click(error: Exception, as_json: bool) -> int | None:
    """The exit code of click's own exceptions (usage errors, aborts), or None for anything else."""
    kind = {cls.__name__ for cls in type(error).__mro__}
    if "Abort" in kind and isinstance(error.__cause__, EOFError):  # a file that ended early, not the user
        return _fail(
            f"internal error: EOFError: {error.__cause__}", "Run again with --debug and report it.", 1, as_json
        )
    if "Abort" in kind:
        return _fail(_INTERRUPTION, "", _INTERRUPTED, as_json)
    if "NoArgsIsHelpError" in kind:
        typer.echo(getattr(error, "message", str(error)))
        return 2
    if "ClickException" in kind:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        context = getattr(error, "ctx", None)
        step = f"See: {context.command_path} --help" if context is not None else "See: onnxpress --help"
        return _fail(text.rstrip("."), step, 2, as_json)
    if "Exit" in kind:
        return int(getattr(error, "exit_code", 0))
    return None


def _fail(message: str, next_step: str, code: int, as_json: bool, result: dict[str, Any] | None = None) -> int:
    """Print the one line, on standard error; with --json also as an object, with `result`, on standard output."""
    message = " ".join(message.split())
    if as_json:
        told = {"error": message, "next_step": next_step, "exit_code": code, **(result or {})}
        print(json.dumps(told, ensure_ascii=False))  # noqa: T201
    print(f"onnxpress: {message}{'' if message.endswith(('.', '?')) else '.'} {next_step}".rstrip(), file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    main()
