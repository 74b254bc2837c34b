# SPDX-License-Identifier: Apache-2.0
"""Modules that take their path in Python, as sources and for tests of single functions.

They live in a file because a script is made from source code.
"""

import torch
from torch import nn


class ByValue(nn.Module):
    """Two branches, by a value of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            result: torch.Tensor = self.linear(x)
        else:
            result = x * self.scale
        return result


class BySize(nn.Module):
    """Two branches, by the size of an axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 50:
            return x * 2
        return x + x.sum(1, keepdim=True)


class ByConstant(nn.Module):
    """One branch, by a value that the module holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale.item() > 1 and float(self.scale + 1) > 1:
            return x * self.scale
        return x


class Unscriptable(nn.Module):
    """Holds what TorchScript has no type for, around one of the branches above."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = {"a": 1, 3: sum(1 for _ in range(2))}
        if isinstance(self.inner, ByValue):
            return x if x.sum() > 0 else x * mixed[3]
        return x * 3 if x.shape[0] > 50 else x + x.sum(1, keepdim=True)


class Flat(nn.Module):
    """What stands around a user's module: it takes and returns tensors, and cannot be scripted."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.module(*inputs),)


class Ranks(nn.Module):
    """An operator that has no translation anywhere but among transformers' workarounds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x).float()


def ranks() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Ranks(), {"x": torch.randn(2, 4)}


def by_value() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return ByValue(), {"x": torch.randn(2, 4)}


def by_size() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return BySize(), {"x": torch.randn(2, 4)}


def hopeless() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Unscriptable(ByValue()), {"x": torch.randn(2, 4)}
