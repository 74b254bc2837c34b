# SPDX-License-Identifier: Apache-2.0
"""Factories that show how a model is called, instead of describing its inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[[nn.Module], Any]


class Mixed(nn.Module):
    """Called by keyword, with a dict that holds a list and things that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, image: torch.Tensor, mask: Any = None, *, options: dict[str, Any]) -> dict[str, Any]:
        assert mask is None
        out = self.linear(image) * options["factor"] + options["shift"]
        return {"out": out, "parts": [out + options["more"][0]]}


def mixed() -> tuple[nn.Module, Call]:
    torch.manual_seed(0)

    def call(model: nn.Module) -> None:
        for batch in (2, 5, 1, 2):
            options = {"shift": torch.randn(batch, 3), "factor": 2, "more": [torch.randn(3)]}
            model(image=torch.randn(batch, 3), mask=None, options=options)

    return Mixed(), call


def once() -> tuple[nn.Module, Call]:
    return nn.Linear(4, 2), lambda model: model(torch.randn(2, 4))


def fixed() -> tuple[nn.Module, Call, dict[str, Any]]:
    return (*once(), {})


def failing() -> tuple[nn.Module, Call]:
    def call(model: nn.Module) -> None:
        raise ValueError("not today")

    return nn.Linear(4, 2), call


def silent() -> tuple[nn.Module, Call]:
    return nn.Linear(4, 2), lambda model: None
