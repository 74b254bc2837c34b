# SPDX-License-Identifier: Apache-2.0
"""Bundles of language models: tiny ones of transformers, exported once, and one that spells a text token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from writing_bundles import seal, spelling_bundle

from onnxpress.exporters import graph_file
from onnxpress.runtime.generation import Generator

VOCABULARY = 60
SPREAD = {"llama": 0.1, "gpt2": 0.3, "mamba": 0.1, "bart": 0.2}
"""Of the random weights: so that a model neither repeats itself nor ignores what it reads."""


@dataclass(frozen=True)
class Language:
    """A model of transformers, and its bundle."""

    model: Any
    folder: Path

    def generator(self) -> Generator:
        return Generator(self.folder, threads=1)


def configuration(name: str) -> Any:
    import transformers

    untied = {"vocab_size": VOCABULARY, "tie_word_embeddings": False}  # tied, it would repeat the last token
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    if name == "llama":
        return transformers.LlamaConfig(
            **untied, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=64,
        )  # fmt: skip
    if name == "gpt2":  # positions are looked up in a table: one too many is an error
        return transformers.GPT2Config(
            **untied, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    if name == "mamba":
        return transformers.MambaConfig(
            **untied, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2, time_step_rank=3
        )
    return transformers.BartConfig(
        **untied, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=40, **heads
    )


def export(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model with random weights, and a graph for each `name.onnx` of its bundle."""
    import torch
    import transformers

    from onnxpress.exporters.families.decoder import trace_decoder
    from onnxpress.exporters.families.encoder_decoder import trace_encoder_decoder

    torch.manual_seed(2 if name == "gpt2" else 0)
    config = configuration(name)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # spread widely enough that its layers matter
            parameter.add_(torch.randn_like(parameter) * SPREAD[name])
    model.generation_config.pad_token_id = 0
    model.config.save_pretrained(folder)
    traces = trace_encoder_decoder(model, {}) if config.is_encoder_decoder else [trace_decoder(model)]
    return model, {"model" if len(traces) == 1 else trace.name: graph_of(model, trace) for trace in traces}


def graph_of(model: Any, trace: Any) -> ir.Model:
    from onnxpress.exporters.dynamo import export_module
    from onnxpress.exporters.families.traced import plain_kernels
    from onnxpress.pipeline.passes.base import run_pass
    from onnxpress.pipeline.passes.clean import Clean

    with plain_kernels(model):
        graph = export_module(
            trace.module, trace.examples, output_names=trace.outputs, dynamic_axes=trace.axes, opset=20,
            strip_prefix=trace.prefix,
        )  # fmt: skip
    trace.finish(graph)
    return run_pass(Clean(), graph)[0]


def write_bundle(folder: Path, graphs: Mapping[str, ir.Model], longest: int | None) -> Path:
    """A bundle of the graphs, the main one first; what is in the folder already belongs to it."""
    (folder / "onnx").mkdir(exist_ok=True)
    for name, graph in graphs.items():
        graph_file.write(graph, folder / "onnx" / f"{name}.onnx")
    main, *others = graphs
    seal(
        folder,
        task="text2text-generation" if others else "text-generation",
        variants={"fp32": {"path": f"onnx/{main}.onnx"}},
        companions=[{"name": name, "path": f"onnx/{name}.onnx"} for name in others],
        signature=graph_file.signature_of(graphs[main]).to_json(),
        max_length=longest,
    )
    return folder


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Language]:
    """`llama`, `gpt2`, `mamba`, `bart`, or `llama-shared`, whose attention appends to its cache in place."""
    made: dict[str, Language] = {}
    graphs: dict[str, ir.Model] = {}

    def get(name: str) -> Language:
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp("languages") / name
        folder.mkdir()
        if name == "llama-shared":
            made[name] = Language(get("llama").model, write_bundle(folder, {"model": shared(graphs["llama"])}, 64))
            return made[name]
        model, parts = export(name, folder)
        graphs[name] = next(iter(parts.values()))
        longest = {"llama": 64, "gpt2": 32, "bart": 40}.get(name)
        made[name] = Language(model, write_bundle(folder, parts, longest))
        return made[name]

    return get


def shared(graph: ir.Model) -> ir.Model:
    from onnxpress.pipeline.passes.base import run_pass
    from onnxpress.pipeline.passes.fuse import Fuse

    return run_pass(Fuse(grouped_query=True), graph.clone())[0]


@pytest.fixture
def spelled(tmp_path: Path) -> Callable[[str], Generator]:
    """A generator of a model that writes the given text after its first character, then its end token."""
    return lambda text: Generator(spelling_bundle(tmp_path / "spelling", text), threads=1)


def sequences(count: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """Prompts of random tokens, none of them special."""
    random = np.random.default_rng(count)
    return [random.integers(5, VOCABULARY, lengths[i % len(lengths)]).tolist() for i in range(count)]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))
