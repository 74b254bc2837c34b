# SPDX-License-Identifier: Apache-2.0
"""Models that users bring and nobody planned for, through the command line: what works, and what is said where not.

Every refusal has an exit code, one line with the submodule and the line of the user's file, and a next step.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import onnxruntime
import pytest

from onnxpress.exporters.graph_file import read
from onnxpress.pipeline.cli import main

numbers = itertools.count()
PROGRESS = re.compile(r"\[ *\d+\.\d s\] \w+( .*)?")

HEAD = """\
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.part = nn.ModuleDict({"attn": part})
    def forward(self, x):
        return self.part["attn"](self.first(x))
"""
FIRST = HEAD.count("\n") + 1
"""The line of the written file at which a test's own text begins."""

Export = Callable[..., Path]
Refused = Callable[..., str]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write_module(text: str) -> str:
        name = f"user_bad_{next(numbers)}"
        Path(f"{name}.py").write_text(HEAD + dedent(text).lstrip("\n"), encoding="utf-8")
        return name

    yield write_module
    for name in {name for name in sys.modules if name.startswith("user_bad_")} - before:
        del sys.modules[name]


def _run(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code, and what is said on standard error beside the progress."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    lines = capfd.readouterr().err.splitlines()
    return ended.value.code, [line for line in lines if not PROGRESS.fullmatch(line)]


@pytest.fixture
def export(written: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> Export:
    """The file that a model is exported to; nothing may be said on the way."""

    def run(text: str) -> Path:
        code, said = _run(["export", f"{written(text)}:make", "-o", "model.onnx", "--force"], capfd)
        assert (code, said) == (0, [])
        return Path("model.onnx").resolve()

    return run


@pytest.fixture
def refused(written: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> Refused:
    """The one line that a model is refused with, its file called `model.py`."""

    def run(code: int, text: str, *, backend: str = "dynamo") -> str:
        name = written(text)
        words = ["export", f"{name}:make", "-o", "model.onnx", "--set", f"export.backend={backend}"]
        found, said = _run(words, capfd)
        assert (found, len(said)) == (code, 1), said
        assert not Path("model.onnx").exists()
        return said[0].removeprefix("onnxpress: ").replace(name, "model")

    return run


def outputs(file: Path, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found: list[np.ndarray] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found


class TestRefused:
    def test_a_loop_whose_end_depends_on_the_data(self, refused: Refused) -> None:
        said = refused(
            4,
            """
            class Loop(nn.Module):
                def forward(self, x):
                    for _ in range(int(x.sum())):
                        x = x + 1
                    return x
            def make(): return Net(Loop()), torch.ones(2, 4)
            """,
        )
        assert said.startswith("torch.export cannot trace part.attn (Loop): GuardOnDataDependentSymNode: ")
        assert f" (model.py line {FIRST + 2}, in forward). " in said
        assert said.endswith("Replace Python control flow that depends on tensor values by torch.where or torch.cond.")

    def test_a_custom_operator(self, refused: Refused) -> None:
        said = refused(
            4,
            """
            @torch.library.custom_op("onnxpress_tests::twice", mutates_args=())
            def twice(x: torch.Tensor) -> torch.Tensor: return x * 2
            @twice.register_fake
            def _(x): return torch.empty_like(x)
            class Twice(nn.Module):
                def forward(self, x): return twice(x)
            def make(): return Net(Twice()), torch.ones(2, 4)
            """,
        )
        assert said == (
            "the operator onnxpress_tests::twice in part.attn (Twice) has no translation to ONNX "
            f"(model.py line {FIRST + 5}, in forward). Rewrite the operator that is named with ones that ONNX has, or "
            "try a newer opset (--set export.opset=23)."
        )

    def test_sparse_tensors_inside(self, refused: Refused) -> None:
        said = refused(
            4,
            """
            class Sparse(nn.Module):
                def forward(self, x): return torch.sparse.mm(x.to_sparse(), x.T)
            def make(): return Net(Sparse()), torch.ones(2, 4)
            """,
        )
        assert said.startswith("torch.export cannot trace part.attn (Sparse): UnsupportedOperatorException: aten._to_")
        assert f"(model.py line {FIRST + 1}, in forward). Rewrite the operator" in said

    def test_every_backend_says_why(self, refused: Refused) -> None:
        said = refused(
            4,
            """
            class Singular(nn.Module):
                def forward(self, x): return torch.linalg.svdvals(x)
            def make(): return Net(Singular()), torch.ones(2, 4), {}
            """,
            backend="auto",
        )
        where = f"in part.attn (Singular) has no translation to ONNX (model.py line {FIRST + 1}, in forward)"
        assert said.startswith(f"the operator aten::_linalg_svd {where} (also tried torchscript: ")

    @pytest.mark.parametrize("call", ["x + torch.rand_like(x)", "self.count.add_(1) + x"])
    def test_another_result_each_time(self, call: str, refused: Refused) -> None:
        said = refused(
            2,
            f"""
            class Changing(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.register_buffer("count", torch.zeros(1))
                def forward(self, x): return {{"y": {call}}}
            def make(): return Net(Changing()), torch.ones(2, 4)
            """,
        )
        assert said == (
            "model:make: output 'y' differs when the module is called again with the same inputs. Take what it draws "
            "at random, or keeps from call to call, as an input; return what it keeps."
        )

    def test_float64_where_the_runtime_has_no_kernel(self, refused: Refused) -> None:
        said = refused(
            4,
            """
            def make():
                return nn.Conv1d(4, 4, 3).double(), torch.randn(2, 4, 5, dtype=torch.float64)
            """,
        )
        assert said.startswith("the exported graph cannot be run: ")
        assert "Could not find an implementation for Conv" in said
        assert said.endswith("return module.float() and float32 inputs, or try another --provider.")


class TestMadeToWork:
    def test_a_size_that_depends_on_the_data_is_no_input_s_size(self, export: Export) -> None:
        """Seen: both are equal in every comparison, so that the slice is taken for one of everything, and removed."""
        file = export("""
            class Cut(nn.Module):
                def forward(self, x):
                    count = int(x.abs().sum().item())
                    return x[:count] * 2
            def make(): return Cut(), torch.full((3, 4), 2.0)
            """)
        for value, rows in ((2.0, 5), (0.11, 2), (0.0, 0)):
            x = np.full((5, 4), value, np.float32)
            np.testing.assert_array_equal(outputs(file, x)[0], x[:rows] * 2)

    def test_complex_numbers_inside(self, export: Export) -> None:
        file = export("""
            class Turned(nn.Module):
                def forward(self, x):
                    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
                    z = z * torch.polar(torch.ones(2), torch.arange(2.0))
                    return torch.view_as_real(z).flatten(-2), torch.fft.rfft(x).abs()
            def make(): return Turned(), torch.randn(2, 4)
            """)
        x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
        turned, spectrum = outputs(file, x)
        pairs = x.reshape(3, 2, 2)
        wanted = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.arange(2))
        np.testing.assert_allclose(turned[:, ::2] + 1j * turned[:, 1::2], wanted, atol=1e-5)
        np.testing.assert_allclose(spectrum, np.abs(np.fft.rfft(x)), atol=1e-5)

    def test_tensors_of_size_0(self, export: Export) -> None:
        file = export("""
            class Empty(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.register_buffer("none", torch.zeros(0, 4))
                def forward(self, x, past): return torch.cat([self.none, past[:, 0], x]), x[:0]
            def make():
                return Empty(), (torch.ones(2, 4), torch.ones(2, 0, 4).transpose(0, 1)[:, :1]), {"x": {0: "batch"}}
            """)
        joined, nothing = outputs(file, np.ones((3, 4), np.float32), np.ones((0, 1, 4), np.float32))
        assert (joined.shape, nothing.shape) == ((3, 4), (0, 4))

    def test_odd_names(self, export: Export) -> None:
        file = export("""
            class Odd(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.add_module("größe-α β/γ", nn.Linear(4, 4))
                    self.add_module("a:b", nn.Linear(4, 4))
                def forward(self, x_ä):
                    y = self._modules["a:b"](self._modules["größe-α β/γ"](x_ä))
                    return {"out put/ö:0": y, "": y * 2, "two\\nlines": y * 3}
            def make(): return Odd(), torch.randn(2, 4)
            """)
        graph = read(file).graph
        assert set(graph.initializers) >= {"größe-α β/γ.weight", "größe-α β/γ.bias", "a:b.weight", "a:b.bias"}
        assert [value.name for value in graph.inputs] == ["x_ä"]
        assert [value.name for value in graph.outputs] == ["out put/ö:0", "output", "two_lines"]
        first, second, third = outputs(file, np.ones((1, 4), np.float32))
        np.testing.assert_allclose(second + first, third, rtol=1e-5)

    def test_shared_modules_and_tied_weights_are_stored_once(self, export: Export) -> None:
        file = export("""
            class Tied(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.table = nn.Embedding(97, 64)
                    self.layer = self.again = nn.Linear(64, 64)
                    self.head = nn.Linear(64, 97, bias=False)
                    self.head.weight = self.table.weight
                def forward(self, ids): return self.head(self.again(self.layer(self.table(ids))))
            def make(): return Tied(), torch.zeros(2, 3, dtype=torch.int64)
            """)
        assert {n: v.shape.numpy() for n, v in read(file).graph.initializers.items() if v.shape.rank() == 2} == {
            "table.weight": (97, 64),
            "layer.weight.T": (64, 64),
        }

    def test_a_module_that_writes_into_its_input(self, export: Export) -> None:
        file = export("""
            class Writing(nn.Module):
                def forward(self, x):
                    x += 1
                    return x * 2
            def make(): return Writing(), torch.ones(2, 4)
            """)
        x = np.ones((3, 4), np.float32)
        np.testing.assert_array_equal(outputs(file, x)[0], np.full((3, 4), 4, np.float32))
