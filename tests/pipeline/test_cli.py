# SPDX-License-Identifier: Apache-2.0
"""The command line: exact words, exit codes, and one line for everything that a user can get wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from onnxpress.exporters import graph_file
from onnxpress.pipeline.cli import app
from onnxpress.pipeline.recipe import built_in

from .conftest import Run
from .samples import FAST

VERBS = (
    "demo", "press", "export", "validate", "benchmark", "inspect", "verify", "sign", "pack", "unpack", "recipes",
    "doctor", "handoff", "generate", "serve",
)  # fmt: skip
VERSION = metadata.version("onnxpress")
Kept = Callable[[], None]


# --- what is printed --------------------------------------------------------------------------------------------------


def test_version(onnxpress: Run) -> None:
    result = onnxpress("--version")
    assert (result.code, result.out, result.err) == (0, f"onnxpress {VERSION}\n", "")


def test_recipes_are_listed_with_what_they_are_for(onnxpress: Run) -> None:
    result = onnxpress("recipes")
    assert (result.code, result.err) == (0, "")
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.out.splitlines()}
    assert list(lines) == sorted(built_in())
    assert lines["fp32"] == (
        "The exported graph, cleaned and fused: nothing is rounded. The baseline that every other recipe has to beat."
    )
    starts = {line.index(lines[name]) for name, line in zip(lines, result.out.splitlines(), strict=True)}
    assert len(starts) == 1, "the second column is aligned"


@pytest.mark.parametrize("name", sorted(built_in()))
def test_a_recipe_is_printed_as_it_is_written(onnxpress: Run, name: str) -> None:
    result = onnxpress("recipes", name)
    assert (result.code, result.out, result.err) == (0, built_in()[name].rstrip() + "\n", "")


@pytest.mark.usefixtures("unprobed")
def test_a_printed_recipe_is_one_to_start_from(onnxpress: Run, tmp_path: Path, net: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(onnxpress("recipes", "int8-dynamic").out, "utf-8")
    assert onnxpress("press", net, "--recipe", mine, *FAST, "-o", tmp_path / "out").code == 0


def test_recipes_as_json(onnxpress: Run) -> None:
    assert sorted(json.loads(onnxpress("recipes", "--json").out)) == sorted(built_in())
    assert json.loads(onnxpress("recipes", "fp16", "--json").out)["passes"][-1] == {"pass": "cast", "to": "float16"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], prog_name="onnxpress", env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert re.search(rf"Example:\s+onnxpress {verb}\b", result.output)
    assert "--json" in result.output


def test_the_verbs_of_the_issue_are_there_and_no_others_are_undocumented() -> None:
    result = CliRunner().invoke(app, ["--help"], prog_name="onnxpress", env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert set(typer.main.get_group(app).commands) == set(VERBS)
    for verb in VERBS:
        assert verb in result.output
    assert "Exit codes: 0 accepted, 1 internal" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prss"], "No such command 'prss'. Did you mean 'press'? See: onnxpress --help"),
        (["press"], "Missing argument 'source'. See: onnxpress press --help"),
        (["press", "a.onnx", "--gat", "x"], "No such option: --gat .*--gate.* See: onnxpress press --help"),
        (["press", "a", "b"], "Got unexpected extra argument.* See: onnxpress press --help"),
        (["press", "a.onnx", "--recipe"], "Option '--recipe' requires an argument. See: onnxpress .*--help"),
        (["recipes", "int8-dynamc"], "unknown recipe 'int8-dynamc'. Did you mean 'int8-dynamic'?"),
        (["verify"], "Missing argument 'bundle'. See: onnxpress verify --help"),
        (["export", "a.onnx"], "Missing option '-o' / '--output'. See: onnxpress export --help"),
        (["demo", "--examples", "3"], "Invalid value for '--examples': .*20.* See: onnxpress demo --help"),
    ],
)
def test_usage_errors_are_one_line_with_the_next_step(onnxpress: Run, words: list[str], line: str) -> None:
    """The first half is typer's own wording, which changes with its version; ours is the one line and the next step."""
    result = onnxpress(*words)
    assert (result.code, result.out) == (2, "")
    wanted = re.escape(f"onnxpress: {line}\n").replace(re.escape(".*"), ".*")
    assert re.fullmatch(wanted, result.err, re.IGNORECASE), result.err


def test_usage_errors_as_json(onnxpress: Run) -> None:
    result = onnxpress("press", "--json")
    told = json.loads(result.out)
    assert told.pop("error").lower() == "missing argument 'source'"
    assert told == {"next_step": "See: onnxpress press --help", "exit_code": 2}
    assert (result.code, len(result.out.splitlines()), len(result.err.splitlines())) == (2, 1, 1)


def test_no_words_print_the_help(onnxpress: Run) -> None:
    result = onnxpress()
    assert result.code == 2
    assert "Usage: onnxpress" in result.out


def test_verify_says_what_it_checked(onnxpress: Run, bundle: Path) -> None:
    files = sum(1 for path in bundle.rglob("*") if path.is_file()) - 1
    result = onnxpress("verify", bundle)
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        f"{bundle}: {files} files unchanged, bill of materials agrees, 2 golden samples agree; unsigned\n"
    )
    shown = json.loads(onnxpress("verify", bundle, "--json").out)
    assert (shown["files_checked"], shown["samples_run"]) == (files, 2)
    assert list(shown["worst"]) == ["int8-dynamic/logits"]


def test_verify_names_the_changed_file(onnxpress: Run, bundle: Path) -> None:
    path = bundle / "onnx" / "model_quantized.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    result = onnxpress("verify", bundle)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "onnxpress: onnx/model_quantized.onnx was changed after the bundle was written. "
        "Fetch the bundle again, or press it again.\n"
    )


def test_verify_of_nothing(onnxpress: Run, bundle: Path) -> None:
    result = onnxpress("verify", bundle.with_name("bundel"))
    assert (result.code, result.out) == (2, "")
    assert result.err == f"onnxpress: there is no bundle folder {bundle.with_name('bundel')}. Did you mean 'bundle'?\n"


def test_doctor(onnxpress: Run) -> None:
    assert "Execution providers: cpu" in onnxpress("doctor").out
    facts = json.loads(onnxpress("doctor", "--json").out)
    assert facts["versions"]["onnxpress"] == VERSION
    assert "cpu" in facts["providers"]


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unprobed")
def test_a_failed_gate_writes_nothing_and_says_what_was_measured(
    onnxpress: Run, net: Path, bundle: Path, kept: Kept
) -> None:
    words = ["press", net, *FAST, "--force", "-o", bundle, "--gate", "size_ratio >= 100", "--gate", "cosine >= 0.5"]
    result = onnxpress(*words)
    assert result.code == 3
    kept()
    assert re.fullmatch(
        r"onnxpress: refused: size_ratio >= 100 \(measured 2\.\d+\)\. "
        r"Nothing was written\. Loosen the gate or choose a milder recipe\.",
        result.error,
    )
    assert re.search(r"size_ratio >= 100 +2\.\d+ +FAILED", result.out)
    assert re.search(r"cosine >= 0\.5 +\d[.\d]* +passed", result.out)
    assert "Bundle:" not in result.out


@pytest.mark.usefixtures("unprobed")
def test_a_failed_gate_as_json_is_one_object_with_everything_that_was_measured(
    onnxpress: Run, net: Path, tmp_path: Path
) -> None:
    result = onnxpress("press", net, *FAST, "--gate", "size_ratio >= 100", "-o", tmp_path / "out", "--json")
    told = json.loads(result.out)
    assert (result.code, told["exit_code"], told["status"]) == (3, 3, "refused")
    assert told["error"].startswith("refused: size_ratio >= 100 (measured 2.")
    assert told["next_step"].startswith("Nothing was written.")
    assert [gate["passed"] for gate in told["gates"]] == [True, False]
    assert told["gates"][1]["value"] == told["size"]["ratio"]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unprobed")
def test_a_recipe_s_own_gate_is_respected(onnxpress: Run, net: Path, tmp_path: Path) -> None:
    result = onnxpress("press", net, *FAST, "--set", "gates=[max_abs_error <= 0]", "-o", tmp_path / "out")
    assert result.code == 3
    assert "max_abs_error <= 0 (measured 0." in result.error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unprobed")
def test_a_gate_on_accuracy_with_data(onnxpress: Run, net: Path, arrays: Path, tmp_path: Path) -> None:
    words = ["press", net, *FAST, "--evaluation", arrays, "-o", tmp_path / "out", "--json"]
    accepted = json.loads(onnxpress(*words, "--gate", "accuracy >= 70").out)
    assert accepted["gates"][-1] == {"expression": "accuracy >= 70", "value": 75.0, "passed": True}
    result = onnxpress(*words, "--force", "--gate", "accuracy >= 80")
    assert (result.code, json.loads(result.out)["exit_code"]) == (3, 3)


# --- nothing unexpected -----------------------------------------------------------------------------------------------


def test_press_as_json_is_the_manifest(onnxpress: Run, net: Path, tmp_path: Path) -> None:
    result = onnxpress("press", net, *FAST, "-o", tmp_path / "out", "--json")
    assert result.code == 0
    assert json.loads(result.out) == json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))


@pytest.mark.usefixtures("unprobed")
def test_press_prints_where_the_bundle_is_in_lines_that_can_be_copied(
    onnxpress: Run, net: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("long-" * 20) / "[bold]a:cat:b[/x]"
    result = onnxpress("press", net, *FAST, "-o", out)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[-3:] == [
        f"Bundle:  {out}",
        f"Report:  {out / 'report.html'}",
        f"Check:   onnxpress verify {out}",
    ]
    assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize(
    ("source", "folder"),
    [("net.onnx", "net-int8-dynamic"), ("./net.onnx", "net-int8-dynamic"), ("sub/", "sub-int8-dynamic"),
     (".", "here-int8-dynamic"), ("pack.module:make", "pack.module.make-int8-dynamic"),
     ("org/name", "name-int8-dynamic")],
)  # fmt: skip
def test_the_default_folder_is_named_after_source_and_recipe(
    source: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxpress.pipeline.cli import _name_of

    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert _name_of(source, "int8-dynamic") == folder


@pytest.mark.usefixtures("unprobed")
def test_without_o_the_bundle_goes_to_artifacts(
    onnxpress: Run, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(net, tmp_path)
    assert onnxpress("press", "net.onnx", *FAST).code == 0
    assert (tmp_path / "artifacts" / "net-int8-dynamic" / "manifest.json").is_file()


def _explode(*_: object, **__: object) -> None:
    raise ZeroDivisionError("of all things\nhere")


@pytest.mark.parametrize("verb", ["press", "export", "validate", "benchmark", "inspect", "verify", "recipes", "doctor"])
def test_an_unexpected_exception_is_one_line_and_with_debug_a_traceback(
    verb: str, onnxpress: Run, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = {
        "press": "pressing.press", "export": "exporting.export_file", "validate": "verbs.validate_candidate",
        "benchmark": "verbs.benchmark_candidate", "inspect": "verbs.inspect_model", "recipes": "recipe.built_in",
        "doctor": "doctor.examine",
    }  # fmt: skip
    monkeypatch.setattr(f"onnxpress.pipeline.{targets[verb]}" if verb in targets else "onnxpress.runtime.bundle.verify",
                        _explode)  # fmt: skip
    words: dict[str, list[object]] = {
        "press": [net, "-o", tmp_path / "out"], "export": [net, "-o", tmp_path / "x.onnx"], "validate": [net, net],
        "benchmark": [net], "inspect": [net], "verify": [tmp_path],
    }  # fmt: skip
    result = onnxpress(verb, *words.get(verb, []))
    assert (result.code, result.out) == (1, "")
    line = "onnxpress: internal error: ZeroDivisionError: of all things here. Run again with --debug and report it."
    assert result.err == line + "\n"
    debug = onnxpress(verb, *words.get(verb, []), "--debug", "--json")
    assert debug.code == 1
    assert debug.err.startswith("Traceback (most recent call last):")
    assert debug.err.endswith(line + "\n")
    assert json.loads(debug.out)["exit_code"] == 1


def test_debug_keeps_the_exit_code(onnxpress: Run, tmp_path: Path) -> None:
    result = onnxpress("press", tmp_path / "absent.onnx", "--debug")
    assert (result.code, result.out) == (2, "")
    assert "Traceback (most recent call last):" in result.err
    assert result.err.splitlines()[-1].startswith("onnxpress: no such file or folder: ")


def test_an_interrupt_is_one_line(onnxpress: Run, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graph_file, "write", interrupt)
    result = onnxpress("press", net, "-o", tmp_path / "out")
    assert (result.code, result.out) == (130, "")
    assert result.error == "onnxpress: interrupted; nothing was left behind."
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_causes_no_traceback() -> None:
    command = f'"{sys.executable}" -m onnxpress.pipeline.cli recipes int8-dynamic | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
