# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from onnxpress.exporters import aten_to_onnx
from onnxpress.exporters.blame import quiet
from onnxpress.exporters.capture import capture
from onnxpress.exporters.decomposition import NotCovered, decompose

Function = Callable[[Any, torch.Tensor], Any]
WIDTH = 6


class Written(nn.Module):
    """A module whose forward is a function of itself and x, float32 [batch, 6]."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.norm.running_mean = torch.randn(WIDTH)
        self.norm_again = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.function(self, x)
        return made if isinstance(made, tuple) else (made,)


def program_of(function: Function) -> tuple[Written, Any]:
    module = Written(function).eval()
    with quiet(), torch.no_grad():
        return module, capture(module, {"x": torch.randn(2, WIDTH)}, {"x": {0: "batch"}})


def decomposed(function: Function) -> torch.fx.GraphModule:
    _, program = program_of(function)
    with torch.no_grad():
        return decompose(program.graph_module, aten_to_onnx._rules(20)[1])


def targets(module: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")


def residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x)
    y += x
    return torch.relu_(y)


def of_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x).view(-1, 2, 3).transpose(1, 2)
    y.mul_(2)
    return y.reshape(-1, WIDTH)


def of_a_copy(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x)
    z = y.clone()
    z.masked_fill_(z > 0, -1.0)
    return y + z


def of_one_result(m: Any, x: torch.Tensor) -> torch.Tensor:
    best, places = m.linear(x).topk(2, dim=1)
    best /= best.sum(dim=1, keepdim=True)
    return best * places


def without_gradients(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = m.linear(x)
    with torch.autocast("cpu", enabled=False):
        y = y.float() + 1
    return y


def parts(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    left, right = m.linear(x).chunk(2, dim=1)
    return left * right, x.unflatten(1, (2, 3)).flatten(1), x.view(-1, 2, 3).reshape_as(x.view(-1, 3, 2))


def mixed_types(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ranks = torch.arange(x.shape[0])
    return ranks[:, None] * x, (x > 0) & (ranks > 0)[:, None], ranks.to(torch.int32).type_as(x), 1 - ranks, x.int() / 2


COVERED: dict[str, Function] = {
    "in place": residual,
    "in place, of a view": of_a_view,
    "in place, of a copy": of_a_copy,
    "in place, of one of two results": of_one_result,
    "blocks": without_gradients,
    "parts": parts,
    "types": mixed_types,
    "normalized": lambda m, x: m.norm_again(m.dropout(m.norm(x))),
    "renamed": lambda m, x: (m.linear(x).contiguous().detach(), x.to(torch.float32), x.clone()),
    "extremes": lambda m, x: (torch.min(x, x * 2), x.T.contiguous().T, torch.eye(WIDTH) + x.mean()),
}


@pytest.mark.parametrize("name", COVERED)
def test_the_graph_computes_what_the_module_does(name: str) -> None:
    """The quick way alone: what it does not cover would raise here."""
    module, program = program_of(COVERED[name])
    with quiet(), torch.no_grad():
        graph = aten_to_onnx._quick(program, 20)
    graph.graph.inputs[0].name = "x"
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        x = torch.randn(batch, WIDTH)
        with torch.no_grad():
            wanted = module(x.clone())
        for got, expected in zip(session.run(None, {"x": x.numpy()}), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-6)


def overwritten_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return m.linear(x)


def seen_elsewhere(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x)
    half = y[:, :3]
    y += 1
    return half


def base_seen_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x)
    y.view(-1, 2, 3).add_(1)
    return y


def part_seen_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x)
    left, _ = y.chunk(2, dim=1)
    left.add_(1)
    return y


@pytest.mark.parametrize("function", [overwritten_input, seen_elsewhere, base_seen_later, part_seen_later])
def test_memory_that_others_see_is_left_to_torch(function: Function) -> None:
    with pytest.raises(NotCovered, match="add_"):
        decomposed(function)


def test_a_later_view_sees_the_new_value() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.linear(x)
        y += 1
        return y[:, :3]

    assert targets(decomposed(function))["aten.add.Tensor"] == 1


def test_training_is_left_to_torch() -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        state = m.norm.running_mean, m.norm.running_var
        return torch.batch_norm(x, None, None, *state, training=True, momentum=0.1, eps=1e-5, cudnn_enabled=False)

    with pytest.raises(NotCovered):
        decomposed(function)


def test_what_stays_equals_torchs_own_decomposition() -> None:
    """The oracle: `run_decompositions` with the same table, apart from operators that only rename a tensor."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.dropout(m.norm(m.linear(x))).to(torch.float64).float()
        y = y.view(-1, 2, 3).transpose(1, 2).reshape(-1, WIDTH)
        y += torch.softmax(x, -1)
        return torch.where((y > 0) & (x > 0), y, 1 - x)

    from torch.onnx._internal.exporter import _fx_passes

    _, program = program_of(function)
    registry, rules = aten_to_onnx._rules(20)
    before = targets(program.graph_module)
    with quiet(), torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        ours = targets(decompose(program.graph_module, rules))
        assert targets(program.graph_module) == before  # a copy was changed
        theirs = targets(_fx_passes.decompose_with_registry(program, registry).graph_module)
    assert sum(ours.values()) < sum(theirs.values())
    alike = {"aten._unsafe_view.default": "aten.view.default", "aten.reshape.default": "aten.view.default"}
    ignored = {"aten.clone.default", "aten._assert_tensor_metadata.default"}
    counted = [
        Counter(
            {alike.get(k, k): v for k, v in found.items() if not (k in ignored or "built-in" in k or "sym_size" in k)}
        )
        for found in (ours, theirs)
    ]
    assert set(counted[0]) == set(counted[1])
    assert "aten.batch_norm.default" in before
    assert "aten.batch_norm.default" not in ours
