# SPDX-License-Identifier: Apache-2.0
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.onnx._internal import exporter

from onnxpress.exporters import aten_to_onnx
from onnxpress.exporters.aten_to_onnx import translate, translate_plainly
from onnxpress.exporters.blame import quiet
from onnxpress.exporters.capture import capture
from onnxpress.exporters.dynamo import export_module

INPUTS = {"ids": torch.randint(0, 9, (2, 5)), "mask": torch.ones(2, 5, dtype=torch.int64)}
AXES = {name: {0: "batch", 1: "sequence"} for name in INPUTS}


class Layer(nn.Module):
    """Attention with a mask, a residual in place, and a table of positions: what a transformer's graph is made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8)
        self.qkv, self.norm, self.out = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)
        self.register_buffer("places", torch.arange(64), persistent=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embedding(ids) + self.places[: ids.shape[1], None].to(torch.float32) / 64
        q, k, v = (
            t.view(*ids.shape, 2, 4).transpose(1, 2) for t in self.qkv(self.dropout(self.norm(x))).chunk(3, dim=-1)
        )
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0 + bias, dim=-1)
        x += self.out((weights @ v).transpose(1, 2).reshape(x.shape))
        return x, x.mean(1)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer().eval()


@pytest.fixture(scope="module")
def program(layer: Layer) -> Any:
    with quiet(), torch.no_grad():
        return capture(layer, INPUTS, AXES)


@pytest.fixture
def no_rules_kept() -> Iterator[None]:
    """Everything is imported that the plain way imports when it is first used, and our own rules are forgotten."""
    importlib.import_module(f"{exporter.__name__}._compat")
    aten_to_onnx._rules(20)
    aten_to_onnx._rules.cache_clear()
    yield
    aten_to_onnx._rules.cache_clear()


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.op_type != "Identity")


def test_the_quick_way_gives_the_graph_of_the_plain_one(program: Any) -> None:
    with quiet(), torch.no_grad():
        quick, plain = aten_to_onnx._quick(program, 20), translate_plainly(program, opset=20)
    assert operators(quick) == operators(plain)
    assert set(quick.graph.initializers) == set(plain.graph.initializers)
    assert quick.opset_imports == plain.opset_imports
    assert [str(v.shape) for v in quick.graph.outputs] == [str(v.shape) for v in plain.graph.outputs]


def test_names_axes_and_numbers_are_those_of_plain_torch(layer: Layer) -> None:
    """The oracle: torch's public function, given what the user says in its own words."""
    names = ["tokens", "pooled"]
    with quiet(), torch.no_grad():
        plain = torch.onnx.export(
            layer,
            tuple(INPUTS.values()),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=names,
            dynamic_shapes=tuple(AXES.values()),
            opset_version=20,
            optimize=False,
            verbose=False,
        )
    assert plain is not None
    ours = export_module(layer, INPUTS, output_names=names, dynamic_axes=AXES)
    for value, wanted in zip(
        (*ours.graph.inputs, *ours.graph.outputs), (*plain.model.graph.inputs, *plain.model.graph.outputs), strict=True
    ):
        assert (value.name, str(value.shape), value.dtype) == (wanted.name, str(wanted.shape), wanted.dtype)
    assert set(ours.graph.initializers) == set(plain.model.graph.initializers)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    feeds = {"ids": torch.randint(0, 9, (3, 3)).numpy(), "mask": mask.numpy()}
    with torch.no_grad():
        expected = layer(*(torch.from_numpy(array) for array in feeds.values()))
    for model in (ours, plain.model):
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        for got, wanted_array in zip(session.run(None, feeds), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), wanted_array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("missing", ["_core", "_decomp"])
@pytest.mark.usefixtures("no_rules_kept")
def test_without_a_private_step_the_plain_way_does_it_all(
    missing: str, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(exporter, missing)
    monkeypatch.setitem(sys.modules, f"{exporter.__name__}.{missing}", None)
    with quiet(), torch.no_grad():
        with pytest.raises(ImportError):
            aten_to_onnx._quick(program, 20)
        model = translate(program, opset=20)
    assert operators(model)["Softmax"] == 1


def test_a_private_step_that_fails_leaves_the_program_as_it_was(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*_: Any) -> None:
        raise TypeError("another signature")

    monkeypatch.setattr(aten_to_onnx, "_promote_types", changed)
    with quiet(), torch.no_grad():
        model = translate(program, opset=20)
    assert operators(model)["Softmax"] == 1
