# SPDX-License-Identifier: Apache-2.0
"""Seconds to export a module: ours against `torch.onnx.export`, the first time in a process and the next.

    .venv/bin/python benchmarks/export_speed.py [--rounds 3] [--threads 1] [--quick] [--write]

BERT-base, a Llama of 12 layers (768 wide, 12 heads that share 4 keys, cache in and out) and ViT-base, built from their
configurations with random weights, each as a flat module of tensors with dynamic axes. Every export runs in a process
of its own, which builds the module before the clock starts and exports it twice; the contenders take turns. What comes
out is run in ONNX Runtime on inputs of other sizes than those that were traced and compared with PyTorch. `--quick`
takes models of two narrow layers, one round.

torch's optimizer is part of `dynamo=True`; the row `unoptimized` is without it. What it does there, `clean` does here.

Prediction, before anything was changed, from the stages of the plain export (half of the time in decomposing, a sixth
in the optimizer, a tenth in type promotion): without these three 3 times faster on BERT-base and ViT, 5 times on the
Llama, whose sizes are formulas that every one of these stages computes again.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown import environment, table, write_section

from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine

MODELS = {"bert": "BERT-base", "llama": "Llama, 12 layers", "vit": "ViT-base"}
CONTENDERS = {
    "dynamo": "torch.onnx.export(dynamo=True)",
    "unoptimized": "the same, optimize=False",
    "torchscript": "torch.onnx.export(dynamo=False)",
    "onnxpress": "onnxpress",
    "cleaned": "onnxpress, and the pass clean",
}


@dataclass(frozen=True)
class Subject:
    """A flat module and how it is called.

    Attributes:
        module: Takes the inputs in order and returns a tuple of tensors.
        axes: Input name to {axis: symbol}.
        outputs: Names.
        example: Makes the inputs for sizes by symbol.
        trailing: How many of the inputs are the `*past` of the module's signature.
    """

    module: Any
    axes: Mapping[str, Mapping[int, str]]
    outputs: list[str]
    example: Callable[[Mapping[str, int]], dict[str, Any]]
    trailing: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="models of two narrow layers, one round")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child, options.quick, options.threads)))
        return
    text = tables(1 if options.quick else options.rounds, options.quick, options.threads)
    print(text)
    if options.write:
        write_section("export-speed", text)


def tables(rounds: int, quick: bool, threads: int) -> str:
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(rounds):
        for model in MODELS:
            for contender in CONTENDERS:
                print(f"... {number + 1}/{rounds} {model} {contender}", file=sys.stderr, flush=True)
                found.setdefault((model, contender), []).append(spawn(model, contender, quick, threads))
    rows = []
    for model, title in MODELS.items():
        usual = found[model, "dynamo"]
        for contender, label in CONTENDERS.items():
            runs = found[model, contender]
            cells = []
            for key in ("first", "next"):
                seconds = statistics.median(run[key] for run in runs)
                # Ratios within a round, so that what slows a round down slows down both
                ratio = statistics.median(a[key] / b[key] for a, b in zip(usual, runs, strict=True))
                cells += [f"{seconds:.1f}", f"{ratio:.1f}"]
            rows.append((title, label, *cells, f"{runs[0]['nodes']:.0f}", f"{runs[0]['difference']:.0e}"))
    heading = f"**Export, seconds** ({threads} threads, {rounds} rounds{', tiny models' if quick else ''})"
    columns = ["", "", "first", "x faster", "next", "x faster", "nodes", "largest difference to PyTorch"]
    return (
        table(heading, columns, rows)
        + "\n\n"
        + environment(machine(), versions(), ("torch", "transformers", "onnxscript"))
    )


def spawn(model: str, contender: str, quick: bool, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", model, contender, "--threads", str(threads)]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(model: str, contender: str, quick: bool, threads: int) -> dict[str, float]:
    import torch

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    subject = {"bert": bert, "llama": llama, "vit": vit}[model](quick)
    inputs = subject.example({"batch": 2, "sequence": 3, "past": 5})
    seconds, made = [], None
    for _ in range(2):
        started = time.perf_counter()
        made = export(contender, subject, inputs)
        seconds.append(time.perf_counter() - started)
    return {"first": seconds[0], "next": seconds[1], **checked(made, subject)}


def export(contender: str, subject: Subject, inputs: dict[str, Any]) -> Any:
    """An `onnx_ir.Model`, or bytes of a file where the exporter writes one itself."""
    import io

    import torch

    if contender in ("onnxpress", "cleaned"):
        from onnxpress.exporters.dynamo import export_module
        from onnxpress.pipeline.passes.base import run_pass
        from onnxpress.pipeline.passes.clean import Clean

        graph = export_module(subject.module, inputs, output_names=subject.outputs, dynamic_axes=subject.axes)
        return run_pass(Clean(), graph)[0] if contender == "cleaned" else graph
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": subject.outputs, "verbose": False}
    if contender == "torchscript":
        file = io.BytesIO()
        torch.onnx.export(
            subject.module, tuple(inputs.values()), file, dynamo=False, dynamic_axes=dict(subject.axes), **names
        )
        return file.getvalue()
    shapes: tuple[Any, ...] = tuple(dict(subject.axes[name]) for name in inputs)
    if subject.trailing:
        shapes = (*shapes[: -subject.trailing], shapes[-subject.trailing :])
    program = torch.onnx.export(
        subject.module,
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes=shapes,
        optimize=contender == "dynamo",
        **names,
    )
    return program.model


def checked(made: Any, subject: Subject) -> dict[str, float]:
    """Nodes, and the largest difference to PyTorch at other sizes than the traced ones."""
    import numpy as np
    import onnxruntime
    import torch

    from onnxpress.exporters import graph_file

    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        if isinstance(made, bytes):
            file.write_bytes(made)
            made = graph_file.read(file)
        else:
            graph_file.write(made, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for sizes in ({"batch": 1, "sequence": 9, "past": 0}, {"batch": 3, "sequence": 1, "past": 4}):
            feeds = subject.example(sizes)
            taken = {value.name for value in session.get_inputs()}
            got = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items() if name in taken})
            with torch.no_grad():
                wanted = subject.module(*feeds.values())
            largest = max(largest, *(float(np.abs(a - b.numpy()).max()) for a, b in zip(got, wanted, strict=True)))
    return {"nodes": len(list(made.graph)), "difference": largest}


def bert(quick: bool) -> Subject:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(attn_implementation="eager", **(small if quick else {})))

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return (self.model(input_ids, attention_mask, token_type_ids).logits,)

    names = ("input_ids", "attention_mask", "token_type_ids")

    def example(sizes: Mapping[str, int]) -> dict[str, Any]:
        shape = (sizes["batch"], sizes["sequence"])
        ids, ones = torch.randint(0, 999, shape), torch.ones(shape, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ones, "token_type_ids": torch.zeros_like(ids)}

    return Subject(Flat().eval(), {name: {0: "batch", 1: "sequence"} for name in names}, ["logits"], example)


def vit(quick: bool) -> Subject:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(attn_implementation="eager", **({**small, "image_size": 32, "patch_size": 8} if quick else {}))
    model = ViTForImageClassification(config)

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return (self.model(pixel_values).logits,)

    def example(sizes: Mapping[str, int]) -> dict[str, Any]:
        return {"pixel_values": torch.randn(sizes["batch"], 3, config.image_size, config.image_size)}

    return Subject(Flat().eval(), {"pixel_values": {0: "batch"}}, ["logits"], example)


def llama(quick: bool) -> Subject:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    layers, heads, width, shared = (2, 4, 32, 2) if quick else (12, 12, 768, 4)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        intermediate_size=width * 8 // 3,
        vocab_size=1000 if quick else 32000,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            cache = DynamicCache()
            for layer in range(layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            found = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            return (found.logits, *(t for layer in found.past_key_values.layers for t in (layer.keys, layer.values)))

    pairs = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    past = [f"past_key_values.{pair}" for pair in pairs]
    axes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "sequence"},
        **{name: {0: "batch", 2: "past"} for name in past},
    }

    def example(sizes: Mapping[str, int]) -> dict[str, Any]:
        batch, length, before = sizes["batch"], sizes["sequence"], sizes["past"]
        return {
            "input_ids": torch.randint(0, 999, (batch, length)),
            "attention_mask": torch.ones(batch, before + length).long(),
            "position_ids": torch.arange(before, before + length)[None].repeat(batch, 1),
            **{name: torch.randn(batch, shared, before, width // heads) for name in past},
        }

    outputs = ["logits", *(f"present.{pair}" for pair in pairs)]
    return Subject(Flat().eval(), axes, outputs, example, trailing=len(past))


if __name__ == "__main__":
    main()
