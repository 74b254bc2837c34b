# SPDX-License-Identifier: Apache-2.0
"""A factory for any module: a small image classifier with a dense head.

cd examples && onnxpress press convnet:build --recipe int8-dynamic -o ../artifacts/convnet
"""

import torch


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return the module and one example input a name; axis 0 becomes the dynamic batch."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 8 * 8, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    )
    return module, {"input": torch.randn(2, 3, 32, 32)}
