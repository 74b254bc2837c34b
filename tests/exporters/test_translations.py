# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from onnxpress.exporters.dynamo import export_module
from onnxpress.exporters.graph_file import write


class Remainders(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size, real = x.shape[0], x.float() - 3
        by_size = (x % size, (x - 9) % size, real % size, real**size, x**size)
        return (*by_size, x % 2.5, (x - 9) % 4, real % -2.5, x**2, x**0.5, real**2)


def test_remainders_and_powers_by_sizes_and_by_numbers(tmp_path: Path) -> None:
    module = Remainders().eval()
    names = [f"y{n}" for n in range(11)]
    example = {"x": torch.randint(1, 9, (4, 3))}
    model = export_module(module, example, output_names=names, dynamic_axes={"x": {0: "n"}})
    write(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 3, 7):
        x = torch.randint(1, 9, (size, 3))
        for got, wanted in zip(session.run(None, {"x": x.numpy()}), module(x), strict=True):
            assert got.dtype == wanted.numpy().dtype
            np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


class Differences(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size, real = x.shape[0], x.float() - 3
        by_type = (1 - real, 1.5 - real, 2 - x, 1.5 - x)
        return (*by_type, size - real, size - x, torch.rsub(real, 2, alpha=3), torch.rsub(x, x * x, alpha=2))


def test_differences_from_numbers_and_sizes(tmp_path: Path) -> None:
    module = Differences().eval()
    names = [f"y{n}" for n in range(8)]
    example = {"x": torch.randint(1, 9, (4, 3))}
    model = export_module(module, example, output_names=names, dynamic_axes={"x": {0: "n"}})
    write(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randint(1, 9, (7, 3))
    for got, wanted in zip(session.run(None, {"x": x.numpy()}), module(x), strict=True):
        assert got.dtype == wanted.numpy().dtype
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)
