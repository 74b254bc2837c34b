# SPDX-License-Identifier: Apache-2.0
"""The C# consumer is written for the very signature, and nothing about it is claimed but that its project parses."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.pipeline.handoff.base import FAILED, NOT_RUN
from onnxpress.pipeline.handoff.csharp import TARGETS
from onnxpress.runtime.opened import Bundle

CSHARP = TARGETS["csharp"]


@pytest.mark.parametrize("name", ["text_bundle", "vision_bundle", "decoder_bundle"])
def test_it_is_written_and_claims_nothing(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    CSHARP.write(bundle, tmp_path)
    check = CSHARP.check(bundle, tmp_path, tmp_path)
    assert (check.status, check.done) == (NOT_RUN, ("generated", "parsed"))
    assert "not compiled" in check.reason
    program = (tmp_path / "Program.cs").read_text("utf-8")
    assert all(f'["{spec.name}"] = Tensor.' in program for spec in bundle.signature.inputs)
    assert "{{" not in program + (tmp_path / "README.md").read_text("utf-8")
    for source in tmp_path.glob("*.cs"):
        text = source.read_text("utf-8")
        assert all(text.count(opening) == text.count(closing) for opening, closing in ("{}", "()", "[]")), source.name


@pytest.mark.parametrize(("text", "told"), [("<Project>", "is not XML"), ("<Project/>", "does not name")])
def test_a_damaged_project_fails(text: str, told: str, vision_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "Model.csproj").write_text(text, "utf-8")
    check = CSHARP.check(vision_bundle, tmp_path, tmp_path)
    assert check.status == FAILED
    assert told in check.reason
