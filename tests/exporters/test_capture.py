# SPDX-License-Identifier: Apache-2.0
import importlib
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.onnx._internal import exporter

from onnxpress.exporters import capture as capturing
from onnxpress.exporters.blame import quiet
from onnxpress.exporters.capture import WRAPPED, capture

INPUTS = {"left": torch.randn(2, 5, 4), "right": torch.randn(2, 5, 4)}
AXES = {name: {0: "batch", 1: "time"} for name in INPUTS}


class Pair(nn.Module):
    """Two inputs that are never brought together, so that nothing but their axes' names says that they are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            scaled = right * 2
        return self.linear(left), scaled


def captured(module: nn.Module) -> Any:
    with quiet(), torch.no_grad():
        return capture(module.eval(), INPUTS, AXES)


def test_axes_of_one_name_are_one_symbol_and_gradients_leave_no_block() -> None:
    program = captured(Pair())
    assert len(program.range_constraints) == 2
    assert not [node for node in program.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    assert set(program.state_dict) == {f"{WRAPPED}linear.weight", f"{WRAPPED}linear.bias"}


def test_the_second_way_and_whose_error_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []
    one_way = capturing._traced

    def traced(*arguments: Any, strict: bool) -> Any:
        tried.append(strict)
        if not strict:
            raise ValueError("the first way")
        return one_way(*arguments, strict=strict)

    monkeypatch.setattr(capturing, "_traced", traced)
    assert len(captured(Pair()).range_constraints) == 2
    assert tried == [False, True]

    class Refused(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (left if left.sum() > 0 else right,)

    with pytest.raises(ValueError, match="the first way"):
        captured(Refused())


def test_an_axis_that_the_model_fixes_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (left[0].reshape(5, 4) + right,)

    one_way, tried = capturing._traced, []

    def traced(*arguments: Any, strict: bool) -> Any:
        tried.append(strict)
        return one_way(*arguments, strict=strict)

    monkeypatch.setattr(capturing, "_traced", traced)
    with pytest.raises(Exception, match="inferred a static shape"):
        captured(Fixed())
    assert tried == [False]


@pytest.mark.parametrize("missing", ["_capture_strategies", "_flags"])
def test_without_torchs_private_strategies(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(f"{exporter.__name__}.{missing}")
    monkeypatch.delattr(exporter, missing)
    monkeypatch.setitem(sys.modules, f"{exporter.__name__}.{missing}", None)
    assert len(captured(Pair()).range_constraints) == 2
