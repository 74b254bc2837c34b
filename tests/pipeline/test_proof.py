# SPDX-License-Identifier: Apache-2.0
"""A graph that does not run, or that departs from its original, is a failed export."""

from pathlib import Path

import numpy as np
import pytest

from onnxpress.contracts.errors import ExportError, InputError, MissingDependency
from onnxpress.exporters import graph_file
from onnxpress.exporters.exported import ExportedModel, SourceInfo
from onnxpress.pipeline.inputs import Case
from onnxpress.pipeline.proof import prove_export

from .samples import model_from

DOUBLE = '<ir_version: 10, opset_import: ["": 20]> main (float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }'
FIXED = """<ir_version: 10, opset_import: ["": 20]> main (float[N, 4] x) => (float[N, 4] y)
    <int64[2] shape = {2, 4}> { two = Add(x, x)  y = Reshape(two, shape) }"""


class Original:
    name = "pytorch-fp32"

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": feeds["x"] * np.float32(2)}


CASES = [Case(f"{n} rows", {"x": np.ones((n, 4), np.float32)}) for n in (2, 3)]


def prove(folder: Path, text: str = DOUBLE, *, reference: bool = True, **more: str) -> float | None:
    model = model_from(text)
    file = folder / "model.onnx"
    graph_file.write(model, file)
    exported = ExportedModel(
        model,
        graph_file.signature_of(model),
        "generic",
        SourceInfo("factory", "a:b", None, None, None),
        reference=Original() if reference else None,  # type: ignore[arg-type]
    )
    parity = prove_export(exported, file, Original().run, CASES, 1e-3, threads=1, **more)  # type: ignore[arg-type]
    return parity.worst("relative_error", lowest=False)


def test_equal(tmp_path: Path) -> None:
    assert prove(tmp_path) == 0


def test_different(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"output 'y' departs from the original by 0\.5"):
        prove(tmp_path, DOUBLE.replace("Add(x, x)", "Identity(x)"))


def test_a_size_that_was_baked_in(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the exported graph cannot be run: "):
        prove(tmp_path, FIXED)


def test_an_operator_that_the_runtime_lacks(tmp_path: Path) -> None:
    text = DOUBLE.replace('"": 20', '"": 20, "nobody": 1').replace("Add(x, x)", "nobody.Twice(x)")
    with pytest.raises(ExportError, match="the exported graph cannot be run: "):
        prove(tmp_path, text)


def test_the_users_own_graph(tmp_path: Path) -> None:
    text = DOUBLE.replace('"": 20', '"": 20, "nobody": 1').replace("Add(x, x)", "nobody.Twice(x)")
    with pytest.raises(InputError):
        prove(tmp_path, text, reference=False)


def test_a_provider_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((MissingDependency, InputError)):
        prove(tmp_path, provider="tensorrt")
