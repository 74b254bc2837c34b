# SPDX-License-Identifier: Apache-2.0
"""Sources of the form `factories:name`, for tests that run in this folder."""

import torch
from torch import nn


def mlp() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)), {"input": torch.randn(2, 64)}


def cnn() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 40))
    return layers, {"input": torch.randn(2, 3, 8, 8)}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 48, batch_first=True)
        self.head = nn.Linear(48, 96)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.lstm(frames)[0]
        result: torch.Tensor = self.head(hidden)
        return result


def lstm() -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    torch.manual_seed(0)
    return Tagger(), {"frames": torch.randn(2, 6, 16)}, {"frames": {0: "batch", 1: "time"}}


def broken() -> None:
    raise ValueError("no weights today")


class Signed(nn.Module):
    """Takes its path by the input's values: torch.export refuses it, a script keeps both branches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x * 2 + x.mean(1, keepdim=True)
        return x.cumsum(1)


def signed() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Signed(), {"x": torch.randn(2, 64)}
