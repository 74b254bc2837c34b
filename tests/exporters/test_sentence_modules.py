# SPDX-License-Identifier: Apache-2.0
"""Pooling and the layers behind it, against numpy, against a loop over the texts, and against sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.tasks import TASKS
from onnxpress.exporters import ExportSettings, sources
from onnxpress.exporters.encoder import pooling_plan
from onnxpress.exporters.sentence_modules import POOLINGS, Dense, LayerNorm, head_module

FEATURES = TASKS["feature-extraction"]


def of_one_text(kind: str, tokens: np.ndarray) -> np.ndarray:
    """What a pooling is by definition: tokens [sequence, hidden], none of them padding."""
    places = np.arange(1, len(tokens) + 1)[:, None]
    by_kind = {
        "mean": tokens.mean(0),
        "cls": tokens[0],
        "max": tokens.max(0),
        "mean_sqrt_len_tokens": tokens.sum(0) / np.sqrt(len(tokens)),
        "weightedmean": (tokens * places).sum(0) / places.sum(),
        "lasttoken": tokens[-1],
    }
    return np.asarray(by_kind[kind])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(POOLINGS)),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padding_on_either_side_does_not_count(kind: str, lengths: list[int], left: bool, seed: int) -> None:
    tokens = torch.randn(len(lengths), max(lengths), 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(lengths), max(lengths), 1)
    for row, length in enumerate(lengths):
        mask[row, -length if left else 0 : None if left else length] = 1
    if kind == "cls" and left:
        return  # tokenizers of such models pad on the right
    got = POOLINGS[kind](tokens, mask)
    for row in range(len(lengths)):
        wanted = of_one_text(kind, tokens[row][mask[row, :, 0] == 1].numpy())
        np.testing.assert_allclose(got[row].numpy(), wanted, rtol=1e-5, atol=1e-6)


def written(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


class TestLayers:
    @pytest.mark.parametrize(
        ("more", "activation"),
        [
            ({}, np.tanh),
            ({"activation_function": "torch.nn.modules.linear.Identity"}, lambda x: x),
            ({"activation_function": "torch.nn.modules.activation.ReLU", "bias": False}, lambda x: np.maximum(x, 0)),
        ],
    )
    def test_dense(self, more: dict[str, Any], activation: Any, tmp_path: Path) -> None:
        weight, bias, x = torch.randn(2, 3), torch.randn(2), torch.randn(5, 3)
        tensors = {"linear__weight": weight} | ({} if more.get("bias") is False else {"linear__bias": bias})
        layer = head_module(written(tmp_path, {"in_features": 3, "out_features": 2, **more}, **tensors), "Dense")
        wanted = activation((x @ weight.T + (0 if more.get("bias") is False else bias)).numpy())
        np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=1e-5, atol=1e-6)

    def test_residual(self) -> None:
        config = {"in_features": 3, "out_features": 3, "use_residual": True}
        layer, x = Dense(config, "it").eval(), torch.randn(2, 3)
        torch.testing.assert_close(layer(x), torch.tanh(layer.linear(x)) + x)
        assert Dense({**config, "out_features": 2}, "it")(x).shape == (2, 2)

    def test_layer_norm(self, tmp_path: Path) -> None:
        layer = head_module(written(tmp_path, {"dimension": 3}, norm__weight=torch.ones(3), norm__bias=torch.ones(3)),
                            "LayerNorm")  # fmt: skip
        assert isinstance(layer, LayerNorm)
        np.testing.assert_allclose(layer(torch.randn(4, 3)).mean(1).detach().numpy(), 1, atol=1e-5)

    @pytest.mark.parametrize(
        ("config", "tensors", "said"),
        [
            ({"in_features": 3, "out_features": 2, "activation_function": "os.system"}, {}, "the activation os.system"),
            (
                {"in_features": 3, "out_features": 2, "activation_function": "torch.load"},
                {},
                "the activation torch.load",
            ),
            ({"in_features": 3}, {}, "2_Dense cannot be read"),
            ({"in_features": 3, "out_features": 2}, {"linear__weight": torch.ones(3, 3)}, "2_Dense cannot be read"),
            ({"in_features": 3, "out_features": 2, "module_input_name": "tokens"}, {}, "it reads tokens"),
        ],
    )
    def test_what_is_refused(
        self, config: dict[str, Any], tensors: dict[str, torch.Tensor], said: str, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError) as caught:
            head_module(written(tmp_path / "2_Dense", config, **tensors), "Dense")
        assert said in str(caught.value)
        assert caught.value.next_step

    def test_a_pickle_is_not_opened(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
        with pytest.raises(InputError, match="a pickle is not opened"):
            head_module(tmp_path, "Dense")


def modules(folder: Path, *kinds: str) -> None:
    listed = [{"type": f"st.{kind}", "path": f"{i}_{kind}" if i else ""} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))


class TestPlan:
    def test_two_layers_of_one_kind_stay_two(self, tmp_path: Path) -> None:
        modules(tmp_path, "Transformer", "Pooling", "Dense", "Dense", "Normalize")
        for i, (size, out) in enumerate(((3, 4), (4, 2)), start=2):
            written(tmp_path / f"{i}_Dense", {"in_features": size, "out_features": out},
                    linear__weight=torch.ones(out, size), linear__bias=torch.ones(out))  # fmt: skip
        plan = pooling_plan(tmp_path, FEATURES, "auto")
        assert plan.head is not None
        assert [name for name, _ in plan.head.named_children()] == ["2_Dense", "3_Dense"]
        assert plan.normalize

    def test_scaling_in_between(self, tmp_path: Path) -> None:
        modules(tmp_path, "Transformer", "Pooling", "Normalize", "Dense")
        with pytest.raises(InputError, match="scales its vectors before Dense"):
            pooling_plan(tmp_path, FEATURES, "auto")

    def test_a_path_that_leaves_the_folder(self, tmp_path: Path) -> None:
        modules(tmp_path, "Transformer", "Pooling", "Dense")
        listed = (tmp_path / "modules.json").read_text().replace("2_Dense", "../2_Dense")
        (tmp_path / "modules.json").write_text(listed)
        with pytest.raises(InputError, match="a path outside the folder"):
            pooling_plan(tmp_path, FEATURES, "auto")


def test_export_with_layers(tmp_path: Path) -> None:
    """Its own pooling, a Dense and a LayerNorm end up in the graph, under their folders' names."""
    folder = tiny_models.build(tmp_path / "m", "bert", "AutoModel", num_hidden_layers=1)
    modules(folder, "Transformer", "Pooling", "Dense", "LayerNorm")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    written(folder / "2_Dense", {"in_features": 32, "out_features": 6},
            linear__weight=torch.randn(6, 32), linear__bias=torch.randn(6))  # fmt: skip
    written(folder / "3_LayerNorm", {"dimension": 6}, norm__weight=torch.ones(6), norm__bias=torch.zeros(6))
    exported = sources.load(str(folder))
    assert exported.signature.outputs[0].shape == ("batch", 6)
    assert {"head.2_Dense.linear.weight", "head.3_LayerNorm.norm.bias"} <= set(exported.model.graph.initializers)
    assert exported.tokenize is not None
    assert exported.reference is not None
    feeds = exported.tokenize(["the cat sat", "a dog"])
    got = tiny_models.run(tiny_models.session(exported, tmp_path), feeds)["sentence_embedding"]
    np.testing.assert_allclose(got, exported.reference.run(feeds)["sentence_embedding"], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(POOLINGS))
def test_as_sentence_transformers_computes_it(kind: str, tmp_path: Path) -> None:
    library, layers = (pytest.importorskip(f"sentence_transformers{part}") for part in ("", ".models"))
    folder = tiny_models.build(tmp_path / "m", "bert", "AutoModel", num_hidden_layers=1)
    parts = [layers.Transformer(str(folder)), layers.Pooling(32, pooling_mode=kind), layers.Dense(32, 8)]
    model = library.SentenceTransformer(modules=[*parts, layers.Normalize()], device="cpu")
    saved = tmp_path / "saved"
    model.save(str(saved))
    texts = ["the cat sat", "a dog", "the film was good ."]
    reference = sources.load_reference(str(saved), None, ExportSettings())
    feeds = {name: np.asarray(value) for name, value in model.tokenize(texts).items() if name in reference.input_names}
    [got] = reference.call(feeds)
    np.testing.assert_allclose(got.detach().numpy(), model.encode(texts), atol=1e-6)
