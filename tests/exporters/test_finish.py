# SPDX-License-Identifier: Apache-2.0
"""What a tracer's graph is turned into, on graphs written by hand."""

import onnx.parser
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onnxpress.contracts.errors import ExportError
from onnxpress.exporters.finish import at_size, finish, resized


def graph(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> main {text}'))
    for node in model.graph.all_nodes():
        node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/somebody/model.py", line 3, in forward'
    return model


class Cut(nn.Module):
    """[batch, time, 4] -> the sums, all but the first step's, one row, all in one row."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.sum(-1), x[:, 1:].sum(-1), x[:1].sum(-1), x.flatten()


AXES = {"x": {0: "batch", 1: "time"}}
INPUTS = {"x": torch.arange(24.0).reshape(2, 3, 4)}


def finished(shapes: str, module: nn.Module | None = None) -> list[str]:
    model = graph(
        f"(float[s1,s2,4] x) => ({shapes}) {{ "
        + " ".join(f"{name} = Identity(x)" for name in ("a", "b", "c", "d"))
        + " }"
    )
    for value in model.graph.outputs:  # ONNX's text has no sums of names
        assert value.shape is not None
        value.shape = ir.Shape([f"{str(d)[:-2]} - 1" if str(d).endswith("_1") else d for d in value.shape])
    finish(model, module or Cut(), INPUTS, output_names=["p", "q", "r", "u"], dynamic_axes=AXES)
    assert str(model.graph.inputs[0].shape) == "[batch,time,4]"
    assert [v.name for v in model.graph.outputs] == ["p", "q", "r", "u"]
    assert not any(node.metadata_props for node in model.graph.all_nodes())
    return [str(v.shape).replace(" ", "") for v in model.graph.outputs]


class TestSizes:
    def test_names_of_the_tracer(self) -> None:
        assert finished("float[s1,s2] a, float[s1,s2_1] b, float[1,s2] c, float[u0] d") == [
            "[batch,time]", "[batch,time-1]", "[1,time]", "[None]",
        ]  # fmt: skip

    def test_sizes_of_the_example(self) -> None:
        assert finished("float[2,3] a, float[2,2] b, float[1,3] c, float[24] d") == [
            "[batch,time]", "[batch,None]", "[1,time]", "[None]",
        ]  # fmt: skip

    def test_names_that_say_nothing(self) -> None:
        assert finished("float[Add_dim_0,Add_dim_2] a, float[N,M] b, float[K,L] c, float[U] d") == [
            "[batch,time]", "[batch,M]", "[K,time]", "[U]",
        ]  # fmt: skip

    def test_a_module_that_takes_one_size(self) -> None:
        class Fixed(Cut):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                if x.shape != (2, 3, 4):
                    raise ValueError("no")
                return super().forward(x)

        assert finished("float[2,3] a, float[2,2] b, float[1,3] c, float[24] d", Fixed()) == [
            "[2,3]", "[2,2]", "[1,3]", "[24]",
        ]  # fmt: skip

    def test_another_number_of_outputs(self) -> None:
        model = graph("(float[2,3,4] x) => (float[2,3,4] y) { y = Identity(x) }")
        with pytest.raises(ExportError, match="the graph has 1 outputs, but the model returns 2"):
            finish(model, nn.Identity(), INPUTS, output_names=["y", "z"], dynamic_axes=AXES)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
def test_resized(batch: int, time: int, size: int) -> None:
    inputs = {"x": torch.randn(batch, time), "y": torch.randn(time), "z": torch.randn(3)}
    axes = {"x": {0: "batch", 1: "time"}, "y": {0: "time"}}
    changed = resized(inputs, axes, "time", size)
    assert [tuple(t.shape) for t in changed.values()] == [(batch, size), (size,), (3,)]
    for name in ("x", "y"):
        for step in range(size):
            assert torch.equal(changed[name][..., step], inputs[name][..., step % time])
    assert tuple(inputs["x"].shape) == (batch, time)


def test_at_size() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 5:
                raise ValueError("too long")
            return x.sum()

    inputs, axes = {"x": torch.ones(2)}, {"x": {0: "batch"}}
    assert at_size(Sum(), inputs, axes, "batch", 5) == 5
    assert at_size(Sum(), inputs, axes, "batch", 6) is None
