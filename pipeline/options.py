# SPDX-License-Identifier: Apache-2.0
"""The command line's application and the options that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="onnxpress",
    help="Press a PyTorch model into the smallest, fastest .onnx that still does its job, and prove it.",
    epilog="Start with: onnxpress demo. Exit codes: 0 accepted, 1 internal, 2 bad input, 3 a gate failed, "
    "4 cannot be exported, 5 something is not installed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
SourceArgument = Annotated[
    str,
    typer.Argument(
        help="Transformers folder or hub id, package.module:factory, timm:NAME, .pt2, TorchScript archive or .onnx.",
        show_default=False,
    ),
]
Task = Annotated[str | None, typer.Option(help="What the model is for; asked of the checkpoint if absent.")]
RecipeOption = Annotated[str, typer.Option("--recipe", help="Built-in recipe or YAML file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one key: passes.0.key=value. Repeatable.")]
GateOption = Annotated[list[str] | None, typer.Option("--gate", help="Condition: 'accuracy_drop <= 0.3'. Repeatable.")]
Evaluation = Annotated[str | None, typer.Option(help="Data for the task metric: .tsv .csv .jsonl .npz, ...")]
Calibration = Annotated[str | None, typer.Option(help="Data for passes that need statistics.")]
Provider = Annotated[str, typer.Option(help="What runs the model: cpu, openvino, cuda, ...")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code in a transformers folder that needs its own.")
]
Inputs = Annotated[
    list[str] | None, typer.Option("--inputs", help="Example arrays (.npz) for a TorchScript archive. Repeatable.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a bundle that exists.")]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; one a physical core if absent.", show_default=False)]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder.", show_default=False)]


def print_result(result: Any, as_json: bool, text: str) -> None:
    """Print a result: as JSON on request, else the text."""
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)
