# SPDX-License-Identifier: Apache-2.0
"""A transformers model exported without its weights, and run from them one part at a time."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaForCausalLM

from onnxpress.contracts.decoding import Decoding
from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file
from onnxpress.exporters.families.decoder import trace_decoder
from onnxpress.exporters.streamed import (
    StreamedExport,
    export_streamed,
    fake_weights,
    load_buffers,
    match_keys,
    weights_as_called,
    without_weights,
)
from onnxpress.exporters.streamed_checkpoint import INDEX, Checkpoint
from onnxpress.exporters.streamed_tensor import StreamedTensor

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    tie_word_embeddings=True,
)


@dataclass
class Subject:
    folder: Path
    original: LlamaForCausalLM
    exported: StreamedExport


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny Llama with tied embeddings, saved in bf16 in several shards, and exported."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file()
    original = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Subject(folder, original, export_streamed(folder, "AutoModelForCausalLM", trace_decoder, opset=20))


@pytest.fixture
def folder(subject: Subject, tmp_path: Path) -> Path:
    """A copy of its checkpoint, to be broken."""
    return Path(shutil.copytree(subject.folder, tmp_path / "broken"))


def rewritten(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Checkpoint:
    """The checkpoint in one file, after `edit`."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    edit(tensors)
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def empty_model() -> LlamaForCausalLM:
    with without_weights():
        model = LlamaForCausalLM(CONFIG)
    fake_weights(model)
    return model


class TestExport:
    def test_weights_are_left_in_the_checkpoint(self, subject: Subject) -> None:
        tensors = {name: value.const_value for name, value in subject.exported.graph.graph.initializers.items()}
        parameters = dict(subject.original.named_parameters())
        assert parameters.keys() <= tensors.keys()
        assert all(isinstance(tensors[name], StreamedTensor) for name in parameters)
        assert not any(isinstance(getattr(tensor, "raw", None), FakeTensor) for tensor in tensors.values())
        for name, parameter in parameters.items():
            np.testing.assert_array_equal(tensors[name].numpy(), parameter.detach().numpy())

    def test_what_is_computed_is_computed(self, subject: Subject) -> None:
        frequencies = subject.exported.graph.graph.initializers["model.rotary_emb.inv_freq"].const_value
        assert frequencies is not None
        wanted = subject.original.model.rotary_emb.inv_freq
        np.testing.assert_array_equal(frequencies.numpy(), wanted.numpy())

    def test_the_graph_agrees_with_pytorch(self, subject: Subject, tmp_path: Path) -> None:
        graph = subject.exported.graph
        graph_file.write(graph, tmp_path / "m.onnx", external_from=0)
        assert (tmp_path / "m.onnx_data").is_file()
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        names = [output.name for output in session.get_outputs()]
        decoding = Decoding.of(graph_file.signature_of(graph))
        assert decoding is not None
        ids = np.arange(12).reshape(2, 6) % 60
        with torch.no_grad():
            whole = subject.original(torch.from_numpy(ids)).logits.numpy()
        first = dict(zip(names, session.run(names, decoding.feeds(ids[:, :4])), strict=True))
        feeds = decoding.feeds(ids[:, 4:], cache=decoding.next_cache(first))
        second = dict(zip(names, session.run(names, feeds), strict=True))
        logits = np.concatenate([first["logits"], second["logits"]], axis=1)
        np.testing.assert_allclose(logits, whole, atol=2e-6, rtol=1e-5)

    def test_details_say_how(self, subject: Subject) -> None:
        details = subject.exported.details
        assert details["weights"] == "streamed"
        assert details["unused_weights"] == []
        assert details["streamed_bytes"] == sum(2 * p.numel() for p in subject.original.parameters())

    def test_a_configuration_that_is_none(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        with pytest.raises(InputError, match="cannot build broken"):
            export_streamed(folder, "AutoModelForCausalLM", trace_decoder, opset=20)

    def test_a_missing_shard_is_found_before_anything_is_built(self, folder: Path) -> None:
        sorted(folder.glob("*.safetensors"))[-1].unlink()
        with pytest.raises(InputError, match="is missing"):
            export_streamed(folder, "AutoModelForCausalLM", trace_decoder, opset=20)


class TestMatching:
    def test_shared_weights_have_one_place(self, subject: Subject) -> None:
        keys = match_keys(empty_model(), Checkpoint.open(subject.folder))
        assert keys["lm_head.weight"] == keys["model.embed_tokens.weight"] == "model.embed_tokens.weight"

    def test_a_checkpoint_of_the_model_without_its_head(self, folder: Path) -> None:
        def without_prefix(tensors: dict[str, Any]) -> None:
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        keys = match_keys(empty_model(), rewritten(folder, without_prefix))
        assert keys["model.norm.weight"] == "norm.weight"

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda t: t.pop("model.norm.weight"), "has no weights for model.norm.weight"),
            (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight, though"),
            (
                lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
                r"model.norm.weight is \[31\] in the weights, but \[32\]",
            ),
            (
                lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}),
                "holds model.layers.2.mlp.up_proj.weight, of which",
            ),
        ],
    )
    def test_what_does_not_fit(self, folder: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
        checkpoint = rewritten(folder, edit)
        with pytest.raises(InputError, match=message) as caught:
            match_keys(empty_model(), checkpoint)
        assert caught.value.next_step

    def test_other_weights_are_no_obstacle(self, folder: Path) -> None:
        match_keys(empty_model(), rewritten(folder, lambda t: t.update({"other_head.weight": torch.zeros(3)})))


class TestWithoutWeights:
    def test_no_memory_and_right_shapes(self) -> None:
        with without_weights():
            layers = torch.nn.Sequential(*(torch.nn.Linear(1 << 13, 1 << 13) for _ in range(200)))  # 54 GB
        assert all(parameter.is_meta for parameter in layers.parameters())
        fake_weights(layers)
        assert all(isinstance(parameter, FakeTensor) for parameter in layers.parameters())
        assert layers(torch.zeros(2, 1 << 13)).shape == (2, 1 << 13)

    def test_everything_is_as_before_afterwards(self) -> None:
        before = torch.nn.Module.register_parameter
        with pytest.raises(ZeroDivisionError), without_weights():
            raise ZeroDivisionError
        assert torch.nn.Module.register_parameter is before
        assert not torch.nn.Linear(2, 2).weight.is_meta

    def test_buffers_of_the_checkpoint_are_read(self, tmp_path: Path) -> None:
        norm = torch.nn.BatchNorm1d(3)
        norm.running_mean = torch.tensor([1.0, 2.0, 3.0])
        norm.num_batches_tracked = torch.tensor(7)
        save_file(norm.state_dict(), tmp_path / "model.safetensors")
        with without_weights():
            empty = torch.nn.BatchNorm1d(3)
        load_buffers(empty, Checkpoint.open(tmp_path))
        assert empty.running_mean is not None
        assert empty.running_mean.tolist() == [1, 2, 3]
        assert int(empty.num_batches_tracked or 0) == 7
        with without_weights():
            other = torch.nn.BatchNorm1d(4)
        with pytest.raises(InputError, match=r"running_mean is \[3\] in the weights, but \[4\]"):
            load_buffers(other, Checkpoint.open(tmp_path))


class TestWeightsAsCalled:
    @pytest.fixture
    def ids(self) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            yield torch.arange(10).reshape(2, 5)

    def test_it_is_the_original(self, subject: Subject, ids: torch.Tensor) -> None:
        model = subject.exported.model
        with weights_as_called(model, subject.exported.checkpoint):
            logits = model(ids).logits
        torch.testing.assert_close(logits, subject.original(ids).logits, rtol=0, atol=0)
        assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        assert isinstance(model(ids).logits, FakeTensor)

    def test_one_part_at_a_time(self, subject: Subject, ids: torch.Tensor) -> None:
        model, most = subject.exported.model, 0

        def count(*_: object) -> None:
            nonlocal most
            real = sum(p.numel() for p in model.parameters() if not isinstance(p, FakeTensor))
            most = max(most, real)

        with weights_as_called(model, subject.exported.checkpoint):
            handles = [part.register_forward_pre_hook(count) for part in model.modules()]
            model(ids)
        for handle in handles:
            handle.remove()
        assert 0 < most <= 60 * 32

    def test_other_numbers_can_stand_for_the_checkpoints(self, subject: Subject, ids: torch.Tensor) -> None:
        model = subject.exported.model

        def read(name: str) -> np.ndarray | None:
            return np.zeros(32, np.float32) if name == "model.norm.weight" else None

        with weights_as_called(model, subject.exported.checkpoint, read):
            assert not model(ids).logits.any()

    def test_an_error_lets_go_too(self, subject: Subject) -> None:
        model = subject.exported.model
        with pytest.raises(IndexError), weights_as_called(model, subject.exported.checkpoint):
            model(torch.tensor([[1000]]))
        assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())


def test_the_trace_is_of_the_configured_opset(subject: Subject) -> None:
    assert subject.exported.graph.opset_imports[""] == 20
    assert isinstance(subject.exported.graph, ir.Model)
    assert json.loads(json.dumps(subject.exported.details)) == subject.exported.details
