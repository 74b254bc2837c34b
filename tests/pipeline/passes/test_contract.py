# SPDX-License-Identifier: Apache-2.0
"""What `run_pass` promises for every pass."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from pass_tools import count, model_from, run, to_bytes
from pydantic import ValidationError

import onnxpress.pipeline.passes as passes
from onnxpress.contracts.errors import InputError, OnnxpressError
from onnxpress.exporters.graph_file import read, write
from onnxpress.pipeline.passes.base import Left, Pass, Plan, all_passes, pass_named, run_pass
from onnxpress.pipeline.passes.graph import add_weight, make_node
from onnxpress.pipeline.statistics import Calibration

TINY = """
<ir_version: 8, opset_import: ["": 18]>
tiny (float[batch, 2] x) => (float[batch, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
{
    h = MatMul(x, w)
    y = Relu(h)
}
"""


class Probe(Pass):
    """A pass whose plan and effect the test decides."""

    name = "probe"
    actions: int = 0
    broken: str = ""

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        if self.broken == "plan":
            raise KeyError("w")
        return Plan(seen=3, actions=[{"n": n} for n in range(self.actions)], left=[Left("h", "too small")])

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        if self.broken == "apply":
            raise ZeroDivisionError("by zero")
        if self.broken == "input":
            raise InputError("not for this model")
        relu = model.graph[-1]
        for _ in plan.actions:
            shift = add_weight(model, model.graph, "w", np.zeros(2, np.float32))
            new = make_node("Add", [relu.inputs[0], shift], ["h"])
            model.graph.insert_before(relu, new)
            relu.replace_input_with(0, new.outputs[0])
        return model


class IdleProbe(Probe):
    may_be_idle = True


def test_nothing_to_do_is_an_error_with_the_reason() -> None:
    with pytest.raises(InputError) as caught:
        run_pass(Probe(), model_from(TINY))
    assert caught.value.exit_code == 2
    assert "probe has nothing to do" in caught.value.message
    assert "too small" in caught.value.message
    assert caught.value.next_step


def test_idle_passes_report_that_they_did_nothing() -> None:
    _, report = run_pass(IdleProbe(), model_from(TINY))
    assert (report.seen, report.changed, report.nodes_before, report.nodes_after) == (3, 0, 2, 2)
    assert report.bytes_before == report.bytes_after == 16


def test_the_report_counts_nodes_and_bytes() -> None:
    model, report = run_pass(Probe(actions=2), model_from(TINY))
    assert (report.name, report.seen, report.changed) == ("probe", 3, 2)
    assert (report.nodes_before, report.nodes_after) == (2, 4)
    assert (report.bytes_before, report.bytes_after) == (16, 32)
    data = report.to_json()
    assert data["pass"] == "probe"
    assert data["left"] == [{"node": "h", "reason": "too small"}]
    assert data["seconds"] >= 0
    assert count(model)["Add"] == 2


def test_names_that_a_pass_gave_twice_are_made_unique() -> None:
    model = model_from(TINY)
    x = {"x": np.array([[1, -2]], np.float32)}
    expected = run(model, x)
    model, _ = run_pass(Probe(actions=3), model)
    names = [v.name for n in model.graph for v in n.outputs] + list(model.graph.initializers)
    assert len(names) == len(set(names))
    assert "w" in model.graph.initializers, "the weight that was there keeps its name"
    np.testing.assert_array_equal(run(model, x)[0], expected[0])


def test_nodes_in_branches_are_counted() -> None:
    model = model_from("""
        <ir_version: 8, opset_import: ["": 18]>
        g (bool c, float[n] x) => (float[n] y)
        { y = If (c) <
            then_branch = a () => (float[n] p) { p = Relu(x) },
            else_branch = b () => (float[n] q) { r = Neg(x) q = Abs(r) }
        > }
    """)
    assert run_pass(IdleProbe(), model)[1].nodes_before == 4


@pytest.mark.parametrize("where", ["plan", "apply"])
def test_an_exception_inside_names_the_pass(where: str) -> None:
    with pytest.raises(OnnxpressError, match=r"pass probe failed: (KeyError|ZeroDivisionError)") as caught:
        run_pass(Probe(actions=1, broken=where), model_from(TINY))
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is not None


def test_our_own_errors_pass_through() -> None:
    with pytest.raises(InputError, match="not for this model"):
        run_pass(Probe(actions=1, broken="input"), model_from(TINY))


def test_every_file_of_the_folder_is_found() -> None:
    folder = Path(next(iter(passes.__path__)))
    registered = {p.stem for p in folder.glob("*.py") if "@register(" in p.read_text(encoding="utf-8")}
    registered.discard("base")
    assert registered == set(all_passes())
    assert {"clean", "fuse", "quantize_dynamic", "cast"} <= registered


def test_an_unknown_name_brings_a_suggestion() -> None:
    with pytest.raises(InputError) as caught:
        pass_named("quantise_dynamic")
    assert caught.value.next_step == "Did you mean 'quantize_dynamic'?"


@pytest.mark.parametrize("name", ["clean", "fuse", "quantize_dynamic", "cast"])
def test_settings_are_frozen_and_refuse_unknown_keys(name: str) -> None:
    settings = pass_named(name)()
    with pytest.raises(ValidationError):
        type(settings).model_validate({"no_such_setting": 1})
    with pytest.raises(ValidationError):
        settings.name_of_no_field = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fuse", "quantize_dynamic", "cast"])
def test_planning_changes_nothing(name: str) -> None:
    model = model_from(TINY)
    before = to_bytes(model)
    settings = pass_named(name)(**({"minimum_elements": 0} if name == "quantize_dynamic" else {}))
    settings.plan(model)
    assert to_bytes(model) == before


def test_a_constant_in_a_data_file_is_written_into_the_new_file(tmp_path: Path) -> None:
    """Passes leave Constant nodes as they are; the file that is written must not point to the data of the old one."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[4] x) => (float[4] y) '
        "{ c = Constant<value = float[4] {0, 1, 2, 3}>() y = Add(x, c) }"
    )
    tensor = proto.graph.node[0].attribute[0].t
    (tmp_path / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    (tmp_path / "old.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "new").mkdir()
    write(read(tmp_path / "old.onnx"), tmp_path / "new" / "model.onnx")
    result = run((tmp_path / "new" / "model.onnx").read_bytes(), {"x": np.zeros(4, np.float32)})[0]
    np.testing.assert_array_equal(result, np.arange(4, dtype=np.float32))
