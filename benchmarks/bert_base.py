# SPDX-License-Identifier: Apache-2.0
"""BERT-base, random weights: who fuses it, who quantizes it, how long that takes, and what is fastest afterwards.

    .venv/bin/python benchmarks/bert_base.py [--rounds 20] [--threads N] [--write]

needs the development environment alone (no download) and about six minutes on 2 cores. `--write` puts the tables into
README.md. The peers are ONNX Runtime's `quantize_dynamic` and `onnxruntime.transformers.optimizer` and onnxscript's
`optimize_for_ort`, each called as its documentation shows. Passes and tools are timed without reading and writing files
where the tool allows that; ONNX Runtime's quantizer takes and leaves files, and its time includes them.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from markdown import environment, interval, table, write_section
from transformers import BertConfig, BertForSequenceClassification

from onnxpress.exporters import graph_file
from onnxpress.exporters.reference import TorchReference, bfloat16_is_native
from onnxpress.pipeline.metrics import tensor_errors
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, Setting, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), options.threads)
        tables = [bench.fusing(), bench.quantizing(), bench.speed(options.rounds)]
    line = environment(machine(), versions(), ("torch", "onnx", "onnxruntime", "onnxscript"))
    text = "\n\n".join([*tables, line])
    print(text)
    if options.write:
        write_section("bert-base", text)


@dataclass
class Attempt:
    """What one tool made of one graph."""

    seconds: float
    file: Path | None
    problem: str = ""


class Bench:
    """The model, its exports, and the three tables."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(num_labels=2)).eval()
        self.reference = TorchReference(_Plain(model), NAMES, ["logits"], name="pytorch-fp32")
        self.feeds = {batch: inputs(batch, 128) for batch in (1, 8)}
        self.wanted = self.reference.run(self.feeds[1])["logits"]
        self.graphs = {
            "dynamo, opset 20": self.dynamo(model, 20),
            "dynamo, opset 23": self.dynamo(model, 23),
            "TorchScript, fused by ONNX Runtime": self.torchscript_fused(model),
        }
        self.best: dict[str, Path] = {}

    def dynamo(self, model: torch.nn.Module, opset: int) -> Path:
        """`torch.onnx.export` as its documentation shows, with torch's own optimizer."""
        file = self.folder / f"dynamo_{opset}.onnx"
        say(f"exporting with dynamo, opset {opset}")
        axes = {name: {0: "batch", 1: "sequence"} for name in NAMES}
        examples = tuple(torch.from_numpy(a) for a in inputs(2, 9).values())
        program = torch.onnx.export(
            _Plain(model), examples, dynamo=True, opset_version=opset, input_names=list(NAMES),
            output_names=["logits"], dynamic_shapes=tuple(axes.values()), verbose=False,
        )  # fmt: skip
        program.save(str(file))
        return file

    def torchscript_fused(self, model: torch.nn.Module) -> Path:
        """TorchScript's export, fused by ONNX Runtime's own transformer optimizer."""
        from onnxruntime.transformers import optimizer

        say("exporting with TorchScript")
        plain, file = self.folder / "torchscript.onnx", self.folder / "torchscript_fused.onnx"
        axes = {name: {0: "batch", 1: "sequence"} for name in (*NAMES, "logits")}
        axes["logits"] = {0: "batch"}
        model.set_attn_implementation("eager")
        examples = tuple(torch.from_numpy(a) for a in inputs(2, 9).values())
        torch.onnx.export(
            _Plain(model), examples, str(plain), dynamo=False, opset_version=17, input_names=list(NAMES),
            output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
        model.set_attn_implementation("sdpa")
        fused = optimizer.optimize_model(str(plain), model_type="bert", num_heads=12, hidden_size=768, opt_level=0)
        fused.save_model_to_file(str(file))
        return file

    # --------------------------------------------------------------------------------------------------------- tables

    def fusing(self) -> str:
        """Attentions fused of 12, by each tool, on each graph that torch makes."""
        rows = []
        for label in ("dynamo, opset 20", "dynamo, opset 23"):
            for tool, fuse in self.fusers().items():
                say(f"fusing: {tool} on {label}")
                attempt = self.attempt(fuse, self.graphs[label], f"{tool}_{label}")
                fused = f"{fused_attentions(attempt.file)} of 12" if attempt.file else attempt.problem
                nodes = len(ir.load(attempt.file).graph) if attempt.file else ""
                rows.append((label, tool, fused, nodes, f"{attempt.seconds:.1f}", self.agreement(attempt.file)))
        return table(
            "**Attention fused** (BERT-base, 12 layers)",
            ("graph", "tool", "attentions fused", "nodes", "seconds", "SQNR dB against PyTorch"),
            rows,
        )

    def quantizing(self) -> str:
        """int8 dynamic quantization by ONNX Runtime and by onnxpress, on every graph."""
        rows = []
        for label, graph in self.graphs.items():
            for tool, quantize in self.quantizers().items():
                say(f"quantizing: {tool} on {label}")
                attempt = self.attempt(quantize, graph, f"{tool}_{label}")
                again = self.attempt(quantize, graph, f"{tool}_{label}_again") if attempt.file else attempt
                size = f"{graph_file.file_bytes(attempt.file) / 1e6:.1f}" if attempt.file else "–"
                same = "yes" if same_bytes(attempt.file, again.file) else "no" if attempt.file else "–"
                result = self.agreement(attempt.file) if attempt.file else attempt.problem
                seconds = f"{attempt.seconds:.1f}"
                if tool.startswith("onnxpress"):
                    self.best.setdefault(label, attempt.file or graph)
                    seconds += f" ({self.pass_seconds:.2f})"
                rows.append((label, tool, result, size, seconds, same))
        return table(
            "**int8, dynamic** (fp32: 438 MB; in brackets: the quantize_dynamic pass alone)",
            ("graph", "tool", "SQNR dB, or the error", "MB", "seconds", "same bytes twice"),
            rows,
        )

    def speed(self, rounds: int) -> str:
        """Interleaved: PyTorch, the plain graph, ONNX Runtime's int8 and ours."""
        graph = self.graphs["dynamo, opset 20"]
        contenders = [Contender("PyTorch eager fp32", "pytorch", self.reference.run)]
        if bfloat16_is_native():
            contenders.append(Contender("PyTorch eager bf16", "pytorch", self.reference.in_bfloat16().run))
        helped = self.attempt(ort_quantize_without_shapes, graph, "ort_helped")
        fused = self.attempt(self.press_fp32, graph, "ours_fp32")
        files = {
            "ONNX Runtime fp32, dynamo graph": graph,
            "ONNX Runtime fp32, after onnxpress clean and fuse": fused.file,
            "int8 by ONNX Runtime (stale shapes removed by hand)": helped.file,
            "int8 by onnxpress": self.best["dynamo, opset 20"],
        }
        for variant, file in files.items():
            if file is not None:
                contenders.append(Contender(variant, "cpu", Session(file, threads=self.threads).run))
        settings = [Setting(f"{b} x 128", b, f"{b} x 128", [feeds]) for b, feeds in self.feeds.items()]
        measured = measure(contenders, settings, rounds=rounds, max_seconds=240, threads=self.threads, progress=say)
        rows = []
        for m in measured:
            times = (f"{m.latency_ms['p50']:.0f}", f"{m.latency_ms['min']:.0f}")
            rows.append((m.shape, m.variant, *times, interval(m.ratio_to_reference)))
        return table(
            f"**Latency** ({self.threads} threads, interleaved, median of {measured[0].rounds} rounds)",
            ("input", "", "p50 ms", "min ms", "x PyTorch eager fp32 (95 %)"),
            rows,
        )

    # ---------------------------------------------------------------------------------------------------------- tools

    def fusers(self) -> dict[str, Callable[[Path, Path], None]]:
        return {"onnxruntime.transformers": ort_fuse, "onnxscript": onnxscript_fuse, "onnxpress": self.press_fp32}

    def quantizers(self) -> dict[str, Callable[[Path, Path], None]]:
        helped = "onnxruntime, stale shapes removed by hand"
        return {"onnxruntime": ort_quantize, helped: ort_quantize_without_shapes, "onnxpress": self.press_int8}

    def press_fp32(self, source: Path, target: Path) -> None:
        model, _ = run_pass(Clean(), graph_file.read(source))
        model, _ = run_pass(Fuse(), model)
        graph_file.write(model, target)

    def press_int8(self, source: Path, target: Path) -> None:
        model, _ = run_pass(Clean(), graph_file.read(source))
        model, _ = run_pass(Fuse(), model)
        model, report = run_pass(QuantizeDynamic(), model)
        self.pass_seconds = report.seconds
        graph_file.write(model, target)

    def attempt(self, tool: Callable[[Path, Path], None], source: Path, name: str) -> Attempt:
        """Run a tool, load what it wrote, and keep its error if it has one."""
        target = self.folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.onnx"
        started = time.perf_counter()
        try:
            tool(source, target)
            seconds = time.perf_counter() - started
            Session(target, threads=self.threads)
        except Exception as error:  # noqa: BLE001 - the error of a peer is a result here
            first = " ".join(str(error).split()) or type(error).__name__
            return Attempt(time.perf_counter() - started, None, f"fails: {shortened(first)}")
        return Attempt(seconds, target)

    def agreement(self, file: Path | None) -> str:
        if file is None:
            return "–"
        found = Session(file, threads=self.threads).run(self.feeds[1])["logits"]
        return f"{tensor_errors(self.wanted, found)['sqnr_db']:.1f}"


class _Plain(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits


def ort_fuse(source: Path, target: Path) -> None:
    from onnxruntime.transformers import optimizer

    fused = optimizer.optimize_model(str(source), model_type="bert", num_heads=12, hidden_size=768, opt_level=0)
    fused.save_model_to_file(str(target))


def onnxscript_fuse(source: Path, target: Path) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(ir.load(source))
    ir.save(model, target)


def ort_quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8, per_channel=True)


def ort_quantize_without_shapes(source: Path, target: Path) -> None:
    """What a user has to find out to get ONNX Runtime's quantizer through a graph of torch's."""
    proto = onnx.load(str(source))
    del proto.graph.value_info[:]
    bare = target.with_name(f"bare_{target.name}")
    onnx.save(proto, str(bare))
    ort_quantize(bare, target)


def fused_attentions(file: Path) -> int:
    kinds = ("MultiHeadAttention", "Attention", "GroupQueryAttention")
    return sum(n.op_type in kinds and n.domain == "com.microsoft" for n in ir.load(file).graph)


def inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((batch, length), np.int64)
    mask[-1, -3:] = 0
    ids = rng.integers(5, 30000, (batch, length))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((batch, length), np.int64)}


def same_bytes(one: Path | None, other: Path | None) -> bool:
    if one is None or other is None:
        return False
    return hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def shortened(text: str) -> str:
    """The telling part of a peer's error, without paths and in one table cell."""
    text = re.sub(r"\S*/\S+", "…", text).replace("|", "/")
    for known in ("Inferred shape and existing shape differ", "Unable to find data type", "QAttention"):
        at = text.find(known)
        if at >= 0:
            return text[at : at + 90]
    return text[:110]


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()
