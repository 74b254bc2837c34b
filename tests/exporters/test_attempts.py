# SPDX-License-Identifier: Apache-2.0
"""Which backend is tried when, what is said of it, and what no backend is asked for."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import ExportError, InputError, MissingDependency, OnnxpressError
from onnxpress.exporters import attempts, backends, sources
from onnxpress.exporters.exported import ExportedModel, SourceInfo
from onnxpress.exporters.graph_file import signature_of, write
from onnxpress.exporters.settings import ExportSettings
from onnxpress.runtime.session import Session

HERE = Path(__file__).parent
Outcome = OnnxpressError | None


def exported(backend: str, operator: str = "Abs") -> ExportedModel:
    text = f'<ir_version: 10, opset_import: ["": 20]> main (float[N] x) => (float[N] y) {{ y = {operator}(x) }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    source = SourceInfo("factory", "a:b", None, None, None)
    return ExportedModel(model, signature_of(model), "generic", source, export_details={"backend": backend})


def failed(message: str, backend: str | None = None, *, branches: bool = False) -> ExportError:
    error = ExportError(message, next_step="Do this.")
    error.backend, error.branches = backend, branches
    return error


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let loading a factory come to these outcomes by backend; returns the backends that are asked, as it happens."""

    def prepare(form: str = "factory", **outcomes: Outcome | ExportedModel) -> list[str]:
        asked: list[str] = []

        def load(source: str, task: str | None, settings: ExportSettings) -> ExportedModel:
            asked.append(settings.backend)
            outcome = outcomes.get(settings.backend)
            if isinstance(outcome, OnnxpressError):
                raise outcome
            return outcome or exported(settings.backend)

        monkeypatch.setattr(sources, "load", load)
        monkeypatch.setattr(sources, "form_of", lambda *_: (form, Path()))
        monkeypatch.setattr(attempts, "is_available", lambda name: name != "optimum")
        return asked

    return prepare


def prove(settings: ExportSettings | None = None, check: attempts.Check = lambda _: None, **more: Any) -> ExportedModel:
    return attempts.load_proven("a:b", None, settings or ExportSettings(), check, **more)


def rows(found: ExportedModel) -> list[tuple[str, str | None]]:
    assert all(row["seconds"] >= 0 for row in found.export_details["attempts"])
    return [(row["backend"], row["error"]) for row in found.export_details["attempts"]]


class TestOrder:
    @pytest.mark.parametrize(
        ("form", "order"),
        [
            ("transformers", ["dynamo", "transformers", "torchscript"]),
            ("factory", ["dynamo", "torchscript", "transformers"]),
            ("timm", ["dynamo", "torchscript", "transformers"]),
            ("timm folder", ["dynamo", "torchscript", "transformers"]),
            ("torchscript", ["torchscript"]),
            ("program", ["dynamo"]),
            ("onnx", ["auto"]),
            ("onnx folder", ["auto"]),
        ],
    )
    def test_by_source(self, form: str, order: list[str], tried: Callable[..., list[str]]) -> None:
        tried(form)
        assert attempts.order("a:b", ExportSettings()) == order

    def test_what_is_installed(self, tried: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        tried("transformers")
        monkeypatch.setattr(attempts, "is_available", lambda name: name != "transformers")
        assert attempts.order("a:b", ExportSettings()) == ["dynamo", "torchscript", "optimum"]

    def test_the_users_choice_is_the_only_one(self, tried: Callable[..., list[str]]) -> None:
        asked = tried(torchscript=failed("no", "torchscript"))
        with pytest.raises(ExportError, match=r"^no$"):
            prove(ExportSettings(backend="torchscript"))
        assert asked == ["torchscript"]


class TestAttempts:
    def test_the_first_that_is_right_is_taken(self, tried: Callable[..., list[str]]) -> None:
        asked = tried("transformers")
        assert rows(prove()) == [("dynamo", None)]
        assert asked == ["dynamo"]

    def test_what_failed_is_told(self, tried: Callable[..., list[str]]) -> None:
        tried("transformers", dynamo=failed("no operator", "dynamo"), transformers=failed("nor here", "transformers"))
        told: list[tuple[str, str]] = []
        found = prove(progress=lambda stage, line: told.append((stage, line)))
        assert rows(found) == [("dynamo", "no operator"), ("transformers", "nor here"), ("torchscript", None)]
        assert told == [("export", "again, with transformers"), ("export", "again, with torchscript")]

    def test_a_graph_that_differs_is_left_for_the_next(self, tried: Callable[..., list[str]]) -> None:
        tried()

        def check(found: ExportedModel) -> None:
            if found.export_details["backend"] == "dynamo":
                raise failed("it departs by 0.3")

        assert rows(prove(check=check)) == [("dynamo", "it departs by 0.3"), ("torchscript", None)]

    def test_none_is_right(self, tried: Callable[..., list[str]]) -> None:
        tried("transformers", dynamo=failed("no operator", "dynamo"))

        def check(found: ExportedModel) -> None:
            raise failed(f"{found.export_details['backend']} departs")

        with pytest.raises(ExportError) as caught:
            prove(check=check)
        assert caught.value.message == (
            "no operator (also tried transformers: transformers departs; torchscript: torchscript departs)"
        )
        assert caught.value.next_step == "Do this."
        assert caught.value.exit_code == 4

    @pytest.mark.parametrize(
        "error", [InputError("no such file"), MissingDependency("not there"), failed("no text encoder")]
    )
    def test_what_no_backend_can_help(self, error: OnnxpressError, tried: Callable[..., list[str]]) -> None:
        asked = tried(dynamo=error)
        with pytest.raises(type(error)) as caught:
            prove()
        assert caught.value is error
        assert asked == ["dynamo"]

    def test_an_error_of_the_check_that_is_none_of_the_graph(self, tried: Callable[..., list[str]]) -> None:
        asked = tried()

        def check(_: ExportedModel) -> None:
            raise InputError("gate 'speed' is not known")

        with pytest.raises(InputError, match="gate"):
            prove(check=check)
        assert asked == ["dynamo"]

    def test_a_trace_cannot_answer_for_two_branches(self, tried: Callable[..., list[str]]) -> None:
        tried(dynamo=failed("two branches", "dynamo", branches=True))
        with pytest.raises(
            ExportError, match=r"two branches \(also tried torchscript: the graph follows one branch only; transf"
        ):
            prove()

    def test_a_graph_that_was_only_read_was_not_tried(self, tried: Callable[..., list[str]]) -> None:
        tried("onnx", auto=exported("none"))
        assert "attempts" not in prove().export_details


class TestForReal:
    @pytest.fixture(autouse=True)
    def here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(HERE)
        monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])

    @pytest.mark.parametrize(
        ("name", "reason", "sizes"), [("by_value", "data-dependent", (3, 3)), ("by_size", "another branch", (3, 51))]
    )
    def test_a_script_answers_where_torch_export_refuses(
        self, name: str, reason: str, sizes: tuple[int, int], tmp_path: Path
    ) -> None:
        def check(found: ExportedModel) -> None:
            write(found.model, tmp_path / "model.onnx")
            session = Session(tmp_path / "model.onnx", threads=1)
            assert found.reference is not None
            for sign, size in zip((1, -1), sizes, strict=True):
                feeds = {"x": np.full((size, 4), sign, np.float32)}
                np.testing.assert_allclose(session.run(feeds)["output"], found.reference.run(feeds)["output"], 1e-5)

        found = attempts.load_proven(f"branching:{name}", None, ExportSettings(), check)
        (first, error), (second, none) = rows(found)
        assert (first, second, none) == ("dynamo", "torchscript", None)
        assert reason in str(error)
        assert found.export_details["backend"] == "torchscript"

    def test_the_workarounds_have_operators_that_the_others_lack(self) -> None:
        if not backends.is_available("transformers"):
            pytest.skip("transformers has no exporters")
        found = attempts.load_proven("branching:ranks", None, ExportSettings(), lambda _: None)
        (*failed_ones, (last, none)) = rows(found)
        assert [name for name, _ in failed_ones] == ["dynamo", "torchscript"]
        assert all("aten::searchsorted" in str(error) for _, error in failed_ones)
        assert (last, none) == ("transformers", None)
        assert found.export_details["backend"] == "transformers"

    def test_hopeless(self) -> None:
        with pytest.raises(ExportError) as caught:
            attempts.load_proven("branching:hopeless", None, ExportSettings(), lambda _: None)
        text = str(caught.value)
        assert text.startswith("torch.export cannot trace the model: ")
        assert "(also tried torchscript: the model reads values of its inputs in Python (branching.py line" in text
        assert caught.value.next_step.startswith("Replace Python control flow")
        assert len(text) < 900
