# SPDX-License-Identifier: Apache-2.0
"""One tiny model for all runtime tests: y = Relu(x @ w + b)."""

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

TINY = """
<ir_version: 8, opset_import: ["": 18]>
tiny (float[batch, 4] x, int64[batch] bias) => (float[batch, 2] y)
<float[4, 2] w = {1, 0, 0, 1, 1, 0, 0, 1}>
{
    product = MatMul(x, w)
    one = Constant<value_ints = [1]>()
    column = Unsqueeze(bias, one)
    shift = Cast<to = 1>(column)
    sum = Add(product, shift)
    y = Relu(sum)
}
"""


@pytest.fixture(scope="session")
def tiny_bytes() -> bytes:
    model: bytes = onnx.parser.parse_model(TINY).SerializeToString()
    return model


@pytest.fixture
def tiny(tmp_path: Path, tiny_bytes: bytes) -> Path:
    path = tmp_path / "tiny.onnx"
    path.write_bytes(tiny_bytes)
    return path


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    return {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.array([0, 1, -100])}
