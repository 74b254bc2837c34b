# SPDX-License-Identifier: Apache-2.0
"""Reading values of the inputs in Python is found; reading shapes and constants is not."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from branching import ByConstant, BySize, ByValue, Flat
from torch import nn

from onnxpress.exporters.branches import values_read


class Reader(nn.Module):
    def __init__(self, read: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.read(x)
        return x


def shown(module: nn.Module) -> set[str]:
    return set(values_read(module.eval(), {"x": torch.arange(8.0).reshape(2, 4)}).values())


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: 1 if (x > 2).any() else 0,
        lambda x: x[0, 0].item(),
        lambda x: int(x.mean()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: 2 in x,
        lambda x: [float(v) for v in x[0]],
        lambda x: list(range(9))[x[0, 1].long()],
        lambda x: torch.zeros(3).copy_(x[0, :3]).tolist(),  # through memory that began as a constant
        lambda x: bool(x.view(-1)[0]),
    ],
)
def test_values(read: Callable[[torch.Tensor], Any]) -> None:
    assert any(line.startswith("test_branches.py line ") for line in shown(Reader(read)))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.shape[0] > 1 and x.dim() == 2 and len(x),
        lambda x: x.numel() and x.dtype == torch.float32 and x.is_floating_point(),
        lambda x: torch.arange(x.shape[1]).tolist(),
        lambda x: torch.ones(3).sum().item(),
        lambda x: torch.where(x > 0, x, -x),
        lambda x: torch.arange(x[0, 2].long()),  # PyTorch reads it, a tracer can follow
    ],
)
def test_no_values(read: Callable[[torch.Tensor], Any]) -> None:
    assert not shown(Reader(read))


def test_modules() -> None:
    [line] = shown(Flat(ByValue()))
    assert re.fullmatch(r"branching.py line \d+, in forward", line)
    assert not shown(Flat(BySize()))
    assert not shown(ByConstant())


def test_a_module_that_fails() -> None:
    def fail(x: torch.Tensor) -> None:
        if x.sum() > 0:
            raise ValueError("no")

    assert any("in fail" in line for line in shown(Reader(fail)))
    assert torch.is_grad_enabled()
