# SPDX-License-Identifier: Apache-2.0
"""The OpenVINO consumer is compiled and really runs, in float32, on the .onnx and on OpenVINO's own format."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.exporters import graph_file
from onnxpress.pipeline.handoff import openvino as target
from onnxpress.pipeline.handoff.base import FAILED, PASSED, judge, run_tool
from onnxpress.pipeline.handoff.openvino import TARGETS
from onnxpress.runtime.opened import Bundle

from ..samples import model_from
from .javascript import broken, handed
from .native_cases import Built, build, changed, every_type, need, outputs_of

OPENVINO = TARGETS["openvino"]


@pytest.fixture(scope="module")
def built(decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("openvino")
    need("cmake", "c++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_BUILD_TYPE", "Debug")
        patch.setenv("CXXFLAGS", "-Werror")
        return build(OPENVINO, decoder_bundle, tmp_path_factory.mktemp("openvino"))


def test_a_language_model_is_run(built: Built, decoder_bundle: Bundle) -> None:
    check = built.check
    assert (check.status, check.done) == (PASSED, ("generated", "compiled", "run")), check.reason
    assert set(check.worst) == set(outputs_of(decoder_bundle))
    assert max(check.from_python.values()) < 1e-4
    assert check.versions["openvino"][0].isdigit()


@pytest.mark.parametrize("name", ["text_bundle", "vision_bundle"])
def test_every_kind_of_model_is_run(name: str, built: Built, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Both files: OpenVINO's own has the weights as they are, not in half precision."""
    bundle: Bundle = request.getfixturevalue(name)
    OPENVINO.write(bundle, tmp_path)
    for model in ("model/model.onnx", "model/model.xml"):
        done = run_tool([built.scratch / "build" / "check", model], tmp_path)
        check = judge(done, outputs_of(bundle), command="", stages=("run",), versions={})
        assert check.status == PASSED, check.reason
        assert max(check.from_python.values()) < (1e-4 if name == "vision_bundle" else 0.1)


def test_types_pass_through(built: Built, tmp_path: Path) -> None:
    """Empty tensors too. All but integers beyond 32 bits, which OpenVINO's processor plugin does not keep."""
    outputs = every_type(tmp_path)
    check = built.run(tmp_path, outputs)
    assert set(check.worst) == set(outputs), check.reason
    assert {name for name, difference in check.worst.items() if difference} == {"out/a.b/int64"}


def test_a_wrong_answer_fails(built: Built, vision_bundle: Bundle, tmp_path: Path) -> None:
    OPENVINO.write(vision_bundle, tmp_path)
    broken(vision_bundle, tmp_path, "logits")
    check = built.run(tmp_path, outputs_of(vision_bundle))
    assert (check.status, check.worst["logits"] > 90) == (FAILED, True)


def test_wrong_inputs_are_named(built: Built, tmp_path: Path) -> None:
    every_type(tmp_path)
    changed(tmp_path, lambda line: line.replace("input in/a.b/int32 int32", "input in/a.b/other int32"))
    code, message = built.told(tmp_path)
    assert code == 2
    assert "input 'in/a.b/int32' is missing" in message


ROTARY = """
<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
rotary (float[batch, sequence, 8] x, int64[batch, sequence] places, float[16, 2] w1, float[16, 2] w2)
    => (float[batch, sequence, 8] y)
{
    y = com.microsoft.RotaryEmbedding <num_heads = 2> (x, places, w1, w2)
}
"""


def test_defaults_that_openvino_does_not_know_are_written_out(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "model.onnx"
    graph_file.write(model_from(ROTARY), path)
    with pytest.raises(RuntimeError, match="RotaryEmbedding"):
        openvino.Core().compile_model(openvino.Core().read_model(path), "CPU")
    target._write_defaults(path)
    (node,) = list(graph_file.read(path).graph)
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"num_heads": 2, "interleaved": 0}
    openvino.Core().compile_model(openvino.Core().read_model(path), "CPU")
    before = path.read_bytes()
    target._write_defaults(path)
    assert path.read_bytes() == before


def test_a_model_without_such_nodes_stays_byte_for_byte(vision_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(vision_bundle.model_file().read_bytes())
    target._write_defaults(path)
    assert path.read_bytes() == vision_bundle.model_file().read_bytes()


def test_without_openvino_nothing_is_claimed(
    vision_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "is_installed", lambda: False)
    report = handed(vision_bundle, "openvino", tmp_path, check=True)
    assert report["check"]["status"] == "not run"
    assert "openvino is not installed" in report["check"]["reason"]
    assert "model/model.xml" not in report["files"]
