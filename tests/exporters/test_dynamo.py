# SPDX-License-Identifier: Apache-2.0
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.tasks import TASKS
from onnxpress.exporters import encoder
from onnxpress.exporters.dynamo import export_module
from onnxpress.exporters.encoder import PoolingPlan, pooling_plan
from onnxpress.exporters.reference import TorchReference, bfloat16_is_native, flat_outputs, named_outputs

FEATURES = TASKS["feature-extraction"]


class Tied(nn.Module):
    """A table that is read twice, under two names, and a parameter that is called like an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.head(self.embedding(ids)),)


class TestExport:
    @pytest.mark.parametrize("opset", [19, 20, 21, 22, 24])
    def test_opset_is_honoured(self, opset: int) -> None:
        module = nn.Sequential(nn.LayerNorm(4), nn.GELU()).eval()
        axes = {"input": {0: "batch"}}
        graph = export_module(module, {"input": torch.randn(2, 4)}, output_names=["y"], dynamic_axes=axes, opset=opset)
        assert graph.opset_imports == {"": opset}

    def test_tied_weights_are_stored_once_under_their_first_name(self) -> None:
        graph = export_module(
            Tied().eval(),
            {"ids": torch.zeros(2, 3, dtype=torch.int64)},
            output_names=["logits"],
            dynamic_axes={"ids": {0: "batch", 1: "sequence"}},
        ).graph
        assert set(graph.initializers) == {"embedding.weight", "head.bias"}
        assert [str(v.shape) for v in (*graph.inputs, *graph.outputs)] == ["[batch,sequence]", "[batch,sequence,7]"]

    def test_silence_and_settings_as_before(self, capfd: pytest.CaptureFixture[str]) -> None:
        logging.disable(logging.DEBUG)
        try:
            module = nn.Linear(4, 3).eval()
            export_module(module, {"input": torch.randn(2, 4)}, output_names=["y"], dynamic_axes={})
            assert logging.root.manager.disable == logging.DEBUG
        finally:
            logging.disable(logging.NOTSET)
        assert torch.is_grad_enabled()
        assert capfd.readouterr() == ("", "")


class TestPooling:
    def test_settings_and_files(self, tmp_path: Path) -> None:
        assert pooling_plan(tmp_path, FEATURES, "auto") == PoolingPlan("none")
        assert pooling_plan(tmp_path, FEATURES, "mean") == PoolingPlan("mean")
        tiny_models.write_sentence_files(tmp_path)
        assert pooling_plan(tmp_path, FEATURES, "auto") == PoolingPlan("mean", normalize=True)
        assert pooling_plan(tmp_path, FEATURES, "cls") == PoolingPlan("cls", normalize=True)
        assert pooling_plan(tmp_path, FEATURES, "none") == PoolingPlan("none")
        assert pooling_plan(tmp_path, TASKS["fill-mask"], "auto") == PoolingPlan("none")
        with pytest.raises(InputError, match="pooling is for feature-extraction, not fill-mask"):
            pooling_plan(tmp_path, TASKS["fill-mask"], "mean")

    @pytest.mark.parametrize(
        ("settings", "kind"),
        [
            ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
            ({"pooling_mode": "mean"}, "mean"),
            ({"pooling_mode_max_tokens": True}, "max"),
            ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
            ({"pooling_mode": "lasttoken"}, "lasttoken"),
            ({"pooling_mode": ["cls", "mean"]}, None),
            ({"pooling_mode": "median"}, None),
            ({"nothing": 1}, None),
        ],
    )
    def test_kinds(self, settings: dict[str, Any], kind: str | None, tmp_path: Path) -> None:
        tiny_models.write_sentence_files(tmp_path, normalize=False, **settings)
        if kind:
            assert pooling_plan(tmp_path, FEATURES, "auto") == PoolingPlan(kind)
        else:
            with pytest.raises(InputError, match="not known here"):
                pooling_plan(tmp_path, FEATURES, "auto")

    @pytest.mark.parametrize("text", ["{", "[]", "[1]", "null", '{"a": 1}', '[{"type": 1}]'])
    @pytest.mark.parametrize("file", ["modules.json", "1_Pooling/config.json"])
    def test_broken_files(self, file: str, text: str, tmp_path: Path) -> None:
        tiny_models.write_sentence_files(tmp_path)
        (tmp_path / file).write_text(text)
        if (file, text) == ("modules.json", "[]"):
            assert pooling_plan(tmp_path, FEATURES, "auto") == PoolingPlan("none")
            return
        with pytest.raises(InputError) as caught:
            pooling_plan(tmp_path, FEATURES, "auto")
        assert caught.value.next_step

    def test_modules_that_are_not_known(self, tmp_path: Path) -> None:
        (tmp_path / "modules.json").write_text(
            '[{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "2"}]'
        )
        with pytest.raises(InputError, match="modules that are not known here: Dense"):
            pooling_plan(tmp_path, FEATURES, "auto")
        assert pooling_plan(tmp_path, FEATURES, "mean") == PoolingPlan("mean")

    def test_mean_leaves_padding_out_and_survives_rows_of_padding(self) -> None:
        class Tokens(nn.Module):
            def forward(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
                return {"last_hidden_state": input_ids[..., None].float()}

        module = encoder.Encoder(Tokens(), PoolingPlan("mean"), FEATURES.outputs)
        ids = torch.tensor([[1, 3, 100], [7, 7, 7]])
        mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
        assert module(ids, mask)[0].tolist() == [[2.0], [0.0]]
        assert module(ids)[0].tolist()[1] == [7.0]


class TestReference:
    def reference(self) -> TorchReference:
        torch.manual_seed(0)
        return TorchReference(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), ["x"], ["y"], name="pytorch-fp32")

    def test_bfloat16_is_a_copy_that_differs_little(self) -> None:
        reference = self.reference()
        feeds = {"x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)}
        wanted = reference.run(feeds)["y"]
        twin = reference.in_bfloat16()
        assert twin.name == "pytorch-bf16"
        got = twin.run(feeds)["y"]
        assert got.dtype == wanted.dtype == np.float32
        assert 0 < np.abs(got - wanted).max() < 0.05
        np.testing.assert_array_equal(reference.run(feeds)["y"], wanted)
        assert isinstance(bfloat16_is_native(), bool)

    def test_device(self) -> None:
        """The path to another device, on the only one that every machine has."""
        reference = self.reference()
        feeds = {"x": np.ones((1, 4), np.float32)}
        wanted = reference.run(feeds)["y"]
        moved = reference.to("cpu")
        assert moved is reference
        np.testing.assert_array_equal(moved.run(feeds)["y"], wanted)
        assert moved.in_bfloat16().device == "cpu"

    def test_integers_and_float64_stay_what_they_are(self) -> None:
        reference = TorchReference(nn.Identity(), ["x"], ["y"], name="identity")
        for dtype in (np.int64, np.int32, np.bool_, np.float64, np.float16):
            array = np.ones((2, 3), dtype).T  # not contiguous
            out = reference.run({"x": array})["y"]
            assert out.dtype == dtype
            np.testing.assert_array_equal(out, array)

    def test_forms_of_outputs(self) -> None:
        from transformers.modeling_outputs import BaseModelOutputWithPooling, QuestionAnsweringModelOutput

        a, b = torch.zeros(1), torch.ones(1)
        assert flat_outputs(a) == [a]
        assert [n for n, _ in named_outputs((a, b))] == ["output_0", "output_1"]
        assert [n for n, _ in named_outputs([a])] == ["output"]
        assert [n for n, _ in named_outputs({"y": a, "off": None, "z": (a, {"w": b})})] == ["y", "z_0", "w"]
        output: Any = BaseModelOutputWithPooling(last_hidden_state=a, pooler_output=b)
        assert dict(named_outputs(output)) == {"last_hidden_state": a, "pooler_output": b}
        output = QuestionAnsweringModelOutput(start_logits=a, end_logits=b)
        assert flat_outputs(output) == [a, b]
        for wrong in (None, (), {}, "text", 3, [a, "text"], np.zeros(1), iter([a])):
            with pytest.raises(TypeError, match="the module returns"):
                flat_outputs(wrong)
