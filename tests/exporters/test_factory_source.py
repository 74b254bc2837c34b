# SPDX-License-Identifier: Apache-2.0
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import tiny_models

from onnxpress.contracts.errors import ExportError, InputError, OnnxpressError
from onnxpress.exporters import sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.graph_file import write

numbers = itertools.count()
Write = Callable[[str], str]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the current folder; return the name it is imported under."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write_module(text: str) -> str:
        name = f"user_model_{next(numbers)}"
        Path(f"{name}.py").write_text("import torch\nfrom torch import nn\n" + dedent(text))
        return name

    yield write_module
    for name in set(sys.modules) - before:
        if name.startswith("user_"):
            del sys.modules[name]


@pytest.fixture
def load(written: Write) -> Callable[[str], ExportedModel]:
    return lambda text: sources.load(written(text) + ":make")


@pytest.fixture
def refusal(written: Write) -> Callable[..., str]:
    """The one line and the next step that a factory called `make` is refused with."""

    def refuse(text: str, error: type[OnnxpressError] = InputError, attribute: str = "make") -> str:
        with pytest.raises(error) as caught:
            sources.load(f"{written(text)}:{attribute}")
        assert caught.value.next_step
        assert "Traceback" not in str(caught.value)
        assert len(str(caught.value)) < 500
        return f"{caught.value} {caught.value.next_step}"

    return refuse


def agrees(exported: ExportedModel, folder: Path, **shapes: tuple[int, ...]) -> None:
    """Whether the graph in ONNX Runtime equals the original, on random inputs of these shapes."""
    rng = np.random.default_rng(0)
    dtypes = {spec.name: spec.dtype for spec in exported.signature.inputs}
    feeds = {
        name: rng.standard_normal(shapes[name]).astype(dtype) if "float" in dtype else rng.integers(0, 5, shapes[name])
        for name, dtype in dtypes.items()
    }
    assert exported.reference is not None
    wanted = exported.reference.run(feeds)
    got = tiny_models.run(tiny_models.session(exported, folder), feeds)
    assert list(got) == list(wanted)
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6)


LINEAR = "nn.Linear(4, 3)"


class TestForms:
    def test_dict(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load("def make(): return nn.Sequential(nn.Linear(4, 3), nn.ReLU()), {'input': torch.randn(1, 4)}")
        assert exported.task == "generic"
        assert [(s.name, s.shape) for s in exported.signature.inputs] == [("input", ("batch", 4))]
        assert [(s.name, s.shape) for s in exported.signature.outputs] == [("output", ("batch", 3))]
        assert set(exported.model.graph.initializers) == {"0.weight", "0.bias"}
        assert exported.source.kind == "factory"
        assert exported.source.name.endswith(":make")
        assert exported.source.parameters == 15
        assert exported.fixed_inputs is not None
        assert exported.fixed_inputs["input"].shape == (2, 4)  # widened: an example of 1 would fix the batch
        for batch in (1, 5):
            agrees(exported, tmp_path, input=(batch, 4))

    def test_tuple_is_named_after_forward(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load("""
            class Two(nn.Module):
                def forward(self, left, right, scale=2.0):
                    return {"sum": left + right, "parts": (left * scale, right)}
            def make(): return Two(), (torch.randn(2, 4), torch.randn(2, 4))
            """)
        assert [s.name for s in exported.signature.inputs] == ["left", "right"]
        assert [s.name for s in exported.signature.outputs] == ["sum", "parts_0", "parts_1"]
        agrees(exported, tmp_path, left=(3, 4), right=(3, 4))

    def test_any_number_of_inputs(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load("""
            class Sum(nn.Module):
                def forward(self, first, *others): return first + sum(others)
            def make(): return Sum(), (torch.randn(2, 4),) * 3
            """)
        assert [s.name for s in exported.signature.inputs] == ["first", "input_1", "input_2"]
        agrees(exported, tmp_path, first=(3, 4), input_1=(3, 4), input_2=(3, 4))

    def test_by_keyword_with_gaps_lists_dicts_and_plain_values(
        self, load: Callable[[str], ExportedModel], tmp_path: Path
    ) -> None:
        exported = load("""
            class Mixed(nn.Module):
                def forward(self, a, b=None, c=None, *, more=None, factor=1.0):
                    assert b is None
                    return (a + c[0] + more["bias"]) * factor
            def make():
                x = torch.randn(2, 4)
                return Mixed(), {"factor": 3.0, "more": {"bias": x, "none": None}, "c": [x, 7], "a": x}
            """)
        assert [s.name for s in exported.signature.inputs] == ["a", "c_0", "more_bias"]
        agrees(exported, tmp_path, a=(3, 4), c_0=(3, 4), more_bias=(3, 4))

    def test_axes(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load("""
            def make():
                layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
                axes = {"input": {0: "batch", 2: "height", 3: "width"}}
                return nn.Sequential(*layers), {"input": torch.randn(1, 3, 9, 11)}, axes
            """)
        assert exported.signature.inputs[0].shape == ("batch", 3, "height", "width")
        assert list(exported.signature.dynamic_axes()) == ["batch", "height", "width"]
        for shape in ((1, 3, 9, 11), (4, 3, 32, 17)):
            agrees(exported, tmp_path, input=shape)

    def test_no_axes(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load(f"def make(): return {LINEAR}, torch.randn(1, 4), {{}}")
        assert exported.signature.inputs[0].shape == (1, 4)
        agrees(exported, tmp_path, input=(1, 4))

    def test_recurrent(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load("""
            def make():
                model = nn.LSTM(4, 8, batch_first=True)
                return model, {"input": torch.randn(2, 5, 4)}, {"input": {0: "batch", 1: "time"}}
            """)
        assert [s.name for s in exported.signature.outputs] == ["output_0", "output_1_0", "output_1_1"]
        for shape in ((1, 1, 4), (3, 12, 4)):
            agrees(exported, tmp_path, input=shape)

    def test_a_model_in_training_mode_is_exported_for_inference(
        self, load: Callable[[str], ExportedModel], tmp_path: Path
    ) -> None:
        exported = load(
            "def make(): return nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4)).train(), torch.ones(2, 4)"
        )
        agrees(exported, tmp_path, input=(3, 4))
        assert exported.reference is not None
        out = exported.reference.run({"input": np.ones((2, 4), np.float32)})["output"]
        np.testing.assert_allclose(out, 1, atol=1e-4)

    def test_float64(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load(f"def make(): return {LINEAR}.double(), torch.randn(2, 4, dtype=torch.float64)")
        assert exported.signature.inputs[0].dtype == exported.signature.outputs[0].dtype == "float64"
        agrees(exported, tmp_path, input=(3, 4))

    def test_scalars_and_gradients_among_the_inputs(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        exported = load("""
            class Scale(nn.Module):
                def forward(self, x, factor): return x * factor
            def make(): return Scale(), (torch.randn(2, 4, requires_grad=True), torch.tensor(2.0))
            """)
        assert [s.shape for s in exported.signature.inputs] == [("batch", 4), ()]
        agrees(exported, tmp_path, x=(3, 4), factor=())

    def test_outputs_that_are_inputs_weights_or_each_other(
        self, load: Callable[[str], ExportedModel], tmp_path: Path
    ) -> None:
        exported = load("""
            class Same(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.linear = nn.Linear(4, 4)
                def forward(self, x):
                    y = self.linear(x)
                    return {"x": x, "weight": self.linear.weight, "linear": y, "relu": y, "add": torch.relu(y) + 1}
            def make(): return Same(), torch.randn(2, 4)
            """)
        assert [s.name for s in exported.signature.inputs] == ["x"]
        assert [s.name for s in exported.signature.outputs] == ["x_output", "weight", "linear", "relu", "add"]
        assert set(exported.model.graph.initializers) == {"linear.weight", "linear.bias"}
        agrees(exported, tmp_path, x=(3, 4))

    def test_same_source_gives_the_same_bytes(self, written: Write, tmp_path: Path) -> None:
        name = written(f"def make():\n torch.manual_seed(0)\n return {LINEAR}, torch.randn(2, 4)")
        for file in ("a.onnx", "b.onnx"):
            write(sources.load(f"{name}:make").model, tmp_path / file)
        assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
        assert str(tmp_path).encode() not in Path("a.onnx").read_bytes()
        assert name.encode() not in Path("a.onnx").read_bytes()


class TestShapes:
    """A graph holds one path: torch.export may follow one branch of a condition on a shape without a word."""

    BRANCH = """
        class Branch(nn.Module):
            def forward(self, x):
                {check}
                return x * 2 if x.shape[0] < 10 else x
        def make(): return Branch(), torch.randn(2, 4)
        """

    def test_a_branch_on_a_size_is_refused(self, refusal: Callable[..., str]) -> None:
        said = refusal(self.BRANCH.format(check=""), ExportError)
        assert "another branch where 'batch' (axis 0 of x) exceeds 9" in said

    def test_a_limit_that_the_model_states_is_fine(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        agrees(load(self.BRANCH.format(check="assert x.shape[0] < 8")), tmp_path, x=(5, 4))

    def test_a_size_that_the_model_fixes(self, refusal: Callable[..., str]) -> None:
        said = refusal(
            """
            class Fixed(nn.Module):
                def forward(self, x): return x.reshape(2, 2, 2)
            def make(): return Fixed(), torch.randn(2, 4)
            """,
            ExportError,
        )
        assert "works only where axis 0 of its input" in said
        assert "has size 2" in said

    def test_control_flow_on_values(self, refusal: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
        said = refusal(
            """
            class Choice(nn.Module):
                def forward(self, x):
                    return x if x.sum() > 0 else -x
            def make(): return Choice(), torch.randn(2, 4)
            """,
            ExportError,
        )
        assert "line 6, in forward" in said
        assert "torch.where" in said
        assert capfd.readouterr() == ("", "")  # torch would print its half-made graph

    def test_an_operator_that_onnx_lacks(self, refusal: Callable[..., str]) -> None:
        said = refusal(
            """
            class Singular(nn.Module):
                def forward(self, x): return torch.linalg.svdvals(x)
            def make(): return Singular(), torch.randn(2, 4), {}
            """,
            ExportError,
        )
        assert "_linalg_svd" in said
        assert "Rewrite the operator" in said


class TestRefusals:
    @pytest.mark.parametrize(
        ("made", "said"),
        [
            (LINEAR, "returns Linear, not (module, inputs)"),
            (f"({LINEAR},)", "returns tuple, not (module, inputs)"),
            ("(torch.randn(2), torch.randn(2))", "not (module, inputs)"),
            ("None", "returns NoneType"),
            (f"{LINEAR}, {{}}", "the example inputs hold no tensor"),
            (f"{LINEAR}, ()", "the example inputs hold no tensor"),
            (f"{LINEAR}, None", "example inputs are NoneType"),
            (f"{LINEAR}, {{'input': [1.0]}}", "the example inputs hold no tensor"),
            (f"{LINEAR}, {{'input': {{1, 2}}}}", "input 'input' is set, which holds no tensors"),
            (f"{LINEAR}, (torch.randn(2, 4), torch.randn(2))", "2 example inputs for a forward that takes 1"),
            (f"{LINEAR}, {{'inptu': torch.randn(2, 4)}}", "input 'inptu' is no parameter of forward (input)"),
            (f"{LINEAR}, {{'inptu': torch.randn(2, 4)}}", "Did you mean 'input'?"),
            (f"{LINEAR}, torch.randn(2, 5)", "calling the module fails: RuntimeError"),
            (f"{LINEAR}, torch.randn(2, 4), {{'inpt': {{0: 'batch'}}}}", "Did you mean 'input'?"),
            (f"{LINEAR}, torch.randn(2, 4), {{'input': [0]}}", "dynamic_axes is not a dict of dicts"),
            (f"{LINEAR}, torch.randn(2, 4), {{'input': {{2: 'batch'}}}}", "which has 2 axes"),
            (f"{LINEAR}, torch.randn(2, 4), {{'input': {{-1: 'batch'}}}}", "which has 2 axes"),
            (f"{LINEAR}, torch.randn(2, 4), {{'input': {{0: 7}}}}", "has 0: 7 for 'input'"),
            (f"{LINEAR}, torch.randn(0, 4)", "axis 0 of 'input' has size 0"),
            (f"{LINEAR}, torch.randn(2, 4, dtype=torch.complex64)", "input 'input' is complex64"),
            (f"{LINEAR}, torch.randn(2, 4).bfloat16()", "input 'input' is bfloat16"),
            (f"{LINEAR}, torch.eye(4).to_sparse()", "input 'input' is sparse_coo"),
            ("nn.Bilinear(4, 4, 2), (torch.randn(2, 4), torch.randn(3, 4))", "axis 0 of 'input2' has size 3"),
        ],
    )
    def test_what_the_factory_returns(self, made: str, said: str, refusal: Callable[..., str]) -> None:
        assert said in refusal(f"def make():\n return {made}")

    @pytest.mark.parametrize(
        ("result", "said"),
        [
            ("'text'", "the module returns str, not tensors"),
            ("[x, 3]", "the module returns int, not tensors"),
            ("None", "the module returns no tensors"),
            ("{'z': torch.complex(x, x)}", "output 'z' is complex64"),
        ],
    )
    def test_what_the_module_returns(self, result: str, said: str, refusal: Callable[..., str]) -> None:
        module = f"class Odd(nn.Module):\n def forward(self, x): return {result}\n"
        assert said in refusal(f"{module}def make(): return Odd(), torch.randn(2, 4)")

    def test_order_of_a_dict_does_not_matter(self, load: Callable[[str], ExportedModel], tmp_path: Path) -> None:
        module = "class Minus(nn.Module):\n def forward(self, a, b): return a - b\n"
        exported = load(f"{module}def make(): return Minus(), {{'b': torch.ones(2, 3), 'a': torch.zeros(2, 3)}}")
        assert [s.name for s in exported.signature.inputs] == ["a", "b"]
        agrees(exported, tmp_path, a=(2, 3), b=(2, 3))

    @pytest.mark.parametrize("statement", ["raise ValueError('no weights')", "import sys; sys.exit(3)", "1 / 0"])
    def test_a_factory_that_raises(self, statement: str, refusal: Callable[..., str]) -> None:
        said = refusal(f"def make():\n {statement}")
        assert ":make raises " in said
        assert ".py line 4, in make" in said

    def test_a_module_that_raises_when_imported(self, refusal: Callable[..., str]) -> None:
        assert ".py line 3, in <module>" in refusal("raise RuntimeError('early')")
        assert "SyntaxError" in refusal("def make(:")
        said = refusal("import user_missing_dependency")
        assert "No module named 'user_missing_dependency'" in said
        assert "Install what it needs" in said

    def test_misspelt_function(self, refusal: Callable[..., str]) -> None:
        said = refusal("def make_model(): ...", attribute="make_modl")
        assert "has no function 'make_modl'" in said
        assert "Did you mean 'make_model'?" in said
        assert "has no function 'size'" in refusal("size = 3", attribute="size")

    def test_misspelt_module(self, written: Write, tmp_path: Path) -> None:
        name = written("def make(): ...")
        with pytest.raises(InputError, match=f"cannot import {name[:-1]}x") as caught:
            sources.load(f"{name[:-1]}x:make")
        assert caught.value.next_step == f"Did you mean '{name}'?"
        with pytest.raises(InputError, match="cannot import user_package"):
            sources.load("user_package.models:make")

    def test_a_task_needs_transformers(self, written: Write) -> None:
        with pytest.raises(InputError, match="needs a transformers source"):
            sources.load(f"{written('def make(): ...')}:make", task="fill-mask")


def test_an_output_axis_that_follows_an_input_is_not_declared_fixed(load: Callable[[str], ExportedModel]) -> None:
    exported = load("""
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(4, 6, batch_first=True)
            def forward(self, x):
                return self.lstm(x)[0]
        def make():
            return Net(), {"x": torch.randn(2, 5, 4)}, {"x": {0: "batch", 1: "time"}}
    """)
    assert exported.signature.outputs[0].shape == ("batch", "time", 6)
