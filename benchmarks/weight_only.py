# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantization: error of one layer, perplexity of a language model, time and memory on BERT-base.

    .venv/bin/python benchmarks/weight_only.py [--only layer perplexity bert] [--write]

layer       one 512 x 512 MatMul, 4 bits in groups of 32, calibrated on 2,048 rows, measured on 2,048 others, beside
            ONNX Runtime's MatMulNBitsQuantizer, called as its documentation shows; fp32 activations.
perplexity  stories260K (a Llama with 260 thousand parameters) on tinyshakespeare, 160 windows of 256 tokens, calibrated
            on 128 windows of another part, embeddings of 8 bits; needs ONNXPRESS_ASSETS. The model was trained on other
            texts, so that its perplexity may fall by chance: its divergence from fp32, in brackets, does not.
bert        GPTQ, 4 bits in groups of 32, on BERT-base (random weights) with 64 samples of 128 tokens, in a process of
            its own; one that only reads the file, and one that only measures (Gram matrices together at most 512 MiB),
            are the comparison.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from markdown import environment, table, write_section

from onnxpress.contracts.process import peak_rss_mib
from onnxpress.exporters import graph_file
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights
from onnxpress.pipeline.statistics import Calibration, Wanted
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
SIZE, ROWS = 512, 2048
WINDOW, WINDOWS, CALIBRATION_WINDOWS = 256, 160, 128
METHODS = ("rtn", "hqq", "awq", "gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("layer", "perplexity", "bert"))
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    parser.add_argument("--child", nargs=2, metavar=("WHO", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.child:
        print(json.dumps(bert_child(*options.child)))
        return
    parts = {"layer": layer_table, "perplexity": perplexity_table, "bert": bert_table}
    tables = [make() for name, make in parts.items() if name in (options.only or parts)]
    text = "\n\n".join([*tables, environment(machine(), versions(), ("torch", "onnxruntime", "numpy"))])
    print(text)
    if options.write:
        write_section("weight-only", text)


def say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- one layer


def layer_table() -> str:
    """SQNR of the output of one layer, for two kinds of activations."""
    kinds = {"correlated": 0.0, "correlated, channels of different size": 1.0}
    columns = {}
    for kind, spread in kinds.items():
        layer = Layer(spread)
        columns[kind] = {name: layer.decibel(make) for name, make in layer.contenders().items()}
    rows = [(name, *(columns[kind][name] for kind in kinds)) for name in next(iter(columns.values()))]
    return table("**One layer** (512 x 512, 4 bits, groups of 32): SQNR of the output, dB", ("", *kinds), rows)


class Layer:
    """A model of one MatMul, with data."""

    def __init__(self, spread: float) -> None:
        random = np.random.default_rng(0)
        mix = random.standard_normal((SIZE, SIZE)) * np.exp(-np.arange(SIZE) / 100)[:, None] / np.sqrt(SIZE)
        size = np.exp(spread * random.standard_normal(SIZE))

        def rows() -> np.ndarray:
            noise = 0.05 * random.standard_normal((ROWS, SIZE))
            drawn: np.ndarray = ((random.standard_normal((ROWS, SIZE)) @ mix + noise) * size).astype(np.float32)
            return drawn

        self.weight = (0.05 * random.standard_normal((SIZE, SIZE))).astype(np.float32)
        self.seen, self.unseen = rows(), rows()
        text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[n, {SIZE}] x) => (float[n, {SIZE}] y)
            <float[{SIZE}, {SIZE}] w> {{ y = MatMul(x, w) }}"""
        self.proto = onnx.parser.parse_model(text.replace(f"<float[{SIZE}, {SIZE}] w>", ""))
        self.proto.graph.initializer.append(onnx.numpy_helper.from_array(self.weight, "w"))
        self.proto.graph.node[0].name = "product"

    def contenders(self) -> dict[str, Callable[[], bytes]]:
        from onnxruntime.quantization import matmul_nbits_quantizer as peer

        found: dict[str, Callable[[], bytes]] = {}
        for symmetric, kind in ((True, "symmetric"), (False, "asymmetric")):
            default = peer.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, accuracy_level=0)
            found[f"ONNX Runtime, Default, {kind}"] = lambda c=default, s=symmetric: self.theirs(c, s)
            found[f"ONNX Runtime, GPTQ, {kind}"] = lambda s=symmetric: self.theirs(self.gptq_config(), s)
        found["ONNX Runtime, k_quant"] = lambda: self.theirs(peer.KQuantWeightOnlyQuantConfig(), False)
        found["ONNX Runtime, HQQ"] = lambda: self.theirs(peer.HQQWeightOnlyQuantConfig(block_size=32), False)
        for symmetric, kind in ((True, "symmetric"), (False, "asymmetric")):
            found[f"onnxpress, rtn without search, {kind}"] = lambda s=symmetric: self.ours("rtn", s, clip_search=False)
            for method in METHODS:
                found[f"onnxpress, {method}, {kind}"] = lambda m=method, s=symmetric: self.ours(m, s)
        return found

    def gptq_config(self) -> Any:
        from onnxruntime.quantization import CalibrationDataReader
        from onnxruntime.quantization import matmul_nbits_quantizer as peer

        batches = iter([{"x": part} for part in np.split(self.seen, 16)])

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(batches, None)

            def rewind(self) -> None:
                pass

        return peer.GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader())

    def theirs(self, config: Any, symmetric: bool) -> bytes:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        model = onnx.ModelProto.FromString(self.proto.SerializeToString())
        quantizer = MatMulNBitsQuantizer(
            model, bits=4, block_size=32, is_symmetric=symmetric, accuracy_level=0, algo_config=config
        )
        with redirect_stdout(io.StringIO()):  # a bar of progress
            quantizer.process()
        data: bytes = quantizer.model.model.SerializeToString()
        return data

    def ours(self, method: str, symmetric: bool, **options: Any) -> bytes:
        model = ir.from_proto(self.proto)
        data = Calibration([{"x": part} for part in np.split(self.seen, 16)])
        settings = QuantizeWeights(method=method, symmetric=symmetric, accuracy_level=0, **options)  # type: ignore[arg-type]
        model, _ = run_pass(settings, model, data if settings.needs or method == "rtn" else None)
        result: bytes = ir.to_proto(model).SerializeToString()
        return result

    def decibel(self, make: Callable[[], bytes]) -> str:
        try:
            got = Session(make(), threads=default_threads()).run({"x": self.unseen})["y"]
        except Exception as error:  # noqa: BLE001 - the error of a peer is a result here
            return f"fails: {type(error).__name__}"
        expected = self.unseen.astype(np.float64) @ self.weight
        return f"{10 * np.log10((expected**2).sum() / ((got - expected) ** 2).sum()):.2f}"


# ------------------------------------------------------------------------------------------------------- perplexity


def perplexity_table() -> str:
    """stories260K, exported here, pressed by every method, read by ONNX Runtime."""
    folder = ASSETS / "stories260K"
    if not folder.is_dir():
        return f"(perplexity: no stories260K under {ASSETS.name})"
    text = (ASSETS / "data_text" / "tinyshakespeare.txt").read_text("utf-8")
    tokens = np.asarray(Tokenizer(folder / "tok512.bin").encode(text))
    windows = tokens[: len(tokens) // (WINDOW - 1) * (WINDOW - 1)].reshape(-1, WINDOW - 1)
    windows = np.concatenate([np.ones((len(windows), 1), np.int64), windows], axis=1)  # each begins with <s>
    data, seen = windows[:WINDOWS], windows[-CALIBRATION_WINDOWS:]
    model = Language(seen)
    reference = model.log_probabilities(data)
    fp32 = f"{perplexity(reference, data):.1f}"
    rows: list[tuple[object, ...]] = [("fp32", "", f"{model.bytes / 1e3:.0f}", *[fp32] * 5)]

    def cell(language: Language) -> str:
        found = language.log_probabilities(data)
        return f"{perplexity(found, data):.1f} ({1000 * divergence(reference, found):.1f})"

    for bits in (8, 4, 3):
        for group in (32, 64):
            cells = []
            for method in METHODS:
                say(f"perplexity: {bits} bits, groups of {group}, {method}")
                cells.append(cell(model.pressed(bits, group, method, 1)))
            rounded = model.pressed(bits, group, "gptq", 4)
            last = "–" if bits == 3 else cell(rounded)
            rows.append((f"{bits} bits", group, f"{rounded.bytes / 1e3:.0f}", *cells, last))
    columns = ("", "group", "kB of weights", *METHODS, "gptq, 8 bit activations")
    title = "**Perplexity** of stories260K on tinyshakespeare (divergence from fp32, thousandths of a nat a token)"
    return table(title, columns, rows)


def perplexity(log_probabilities: np.ndarray, windows: np.ndarray) -> float:
    """Of each token after the first of its window, given those before it."""
    right = np.take_along_axis(log_probabilities[:, :-1], windows[:, 1:, None], axis=-1)
    return float(np.exp(-right.mean(dtype=np.float64)))


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference || other), mean over all tokens."""
    return float((np.exp(reference) * (reference - other)).sum(axis=-1, dtype=np.float64).mean())


def language_model() -> tuple[Any, dict[str, Any], dict[str, dict[int, str]]]:
    """The factory that `onnxpress.exporters` calls: token ids to logits, no cache."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = ASSETS / "stories260K" / "derived" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}

    ids = torch.ones((2, 9), dtype=torch.int64)
    return Logits().eval(), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}}


class Language:
    """The exported language model, and what passes make of it."""

    def __init__(self, seen: np.ndarray, pressed: ir.Model | None = None) -> None:
        self.seen, model = seen, pressed
        if model is None:
            from onnxpress.exporters.factory_source import export_factory
            from onnxpress.exporters.settings import ExportSettings

            sys.path.insert(0, str(Path(__file__).parent))
            model = export_factory("weight_only:language_model", ExportSettings()).model
            for settings in (Clean(), Fuse()):
                model, _ = run_pass(settings, model)
        self.file, self.bytes = ir.to_proto(model).SerializeToString(), graph_file.weight_bytes(model)

    def pressed(self, bits: int, group: int, method: str, level: int) -> Language:
        settings = QuantizeWeights(
            bits=bits,  # type: ignore[arg-type]
            group_size=group,  # type: ignore[arg-type]
            method=method,  # type: ignore[arg-type]
            accuracy_level=level,  # type: ignore[arg-type]
            gather_bits=8,
            minimum_elements=1024,
        )
        data = Calibration([{"input_ids": part} for part in np.split(self.seen, 16)]) if settings.needs else None
        model, _ = run_pass(settings, ir.from_proto(onnx.ModelProto.FromString(self.file)), data)
        return Language(self.seen, model)

    def log_probabilities(self, windows: np.ndarray) -> np.ndarray:
        """float32 [windows, tokens, vocabulary]"""
        session, found = Session(self.file, threads=default_threads()), []
        for part in np.array_split(windows, -(-len(windows) // 16)):
            logits = session.run({"input_ids": part})["logits"]
            logits -= logits.max(axis=-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            found.append(logits)
        return np.concatenate(found)


class Tokenizer:
    """The byte pair encoding of a llama2.c `tok512.bin`: [longest][score, length, bytes] for each token."""

    def __init__(self, file: Path) -> None:
        data, at = file.read_bytes(), 4
        self.ids: dict[str, int] = {}
        self.scores: list[float] = []
        while at < len(data):
            score, length = struct.unpack_from("fi", data, at)
            self.ids.setdefault(data[at + 8 : at + 8 + length].decode("utf-8"), len(self.scores))
            self.scores.append(score)
            at += 8 + length
        self.known: dict[str, list[int]] = {}
        self.texts = {number: text for text, number in self.ids.items()}

    def encode(self, text: str) -> list[int]:
        """Ids without <s>; no merge goes beyond a word."""
        found: list[int] = []
        for word in re.findall(r"\n| ?[^ \n]+| ", " " + text):
            if word not in self.known:
                self.known[word] = self._merged(list(self._letters(word)))
            found += self.known[word]
        return found

    def _letters(self, word: str) -> Iterator[int]:
        for letter in word:
            if letter in self.ids:
                yield self.ids[letter]
            else:
                yield from (byte + 3 for byte in letter.encode("utf-8"))

    def _merged(self, ids: list[int]) -> list[int]:
        while True:
            pairs = [self.ids.get(self.texts[a] + self.texts[b], -1) for a, b in pairwise(ids)]
            best = max(range(len(pairs)), key=lambda i: (pairs[i] >= 0, self.scores[pairs[i]]), default=None)
            if best is None or pairs[best] < 0:
                return ids
            ids[best : best + 2] = [pairs[best]]


# -------------------------------------------------------------------------------------------------------- BERT-base


def bert_table() -> str:
    """Time and peak memory of GPTQ, each measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bert.onnx"
        write_bert(file)
        size = file.stat().st_size / 2**20
        rows = []
        for who, label in (("read", "read the file"), ("measure", "and measure all Gram matrices"), ("gptq", "GPTQ")):
            say(f"bert: {who}")
            command = [sys.executable, __file__, "--child", who, str(file)]
            answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            cells = (f"{answer['seconds']:.0f}", f"{answer['cpu']:.0f}", f"{answer['peak']:.0f}")
            rows.append((label, *cells, f"{answer['peak'] / size:.2f}", answer.get("result", "")))
    columns = ("", "seconds", "CPU seconds", "peak MiB", "x file", "")
    title = f"**GPTQ on BERT-base** ({size:.0f} MiB, 64 samples of 128 tokens, 4 bits, groups of 32)"
    return table(title, columns, rows)


def write_bert(file: Path) -> None:
    """Random weights, exported by dynamo, cleaned and fused; `bert_base` has the exporter."""
    import torch
    from bert_base import Bench
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    bench = object.__new__(Bench)
    bench.folder = file.parent
    model = graph_file.read(bench.dynamo(BertForSequenceClassification(BertConfig(num_labels=2)).eval(), 20))
    for settings in (Clean(), Fuse()):
        model, _ = run_pass(settings, model)
    graph_file.write(model, file)


def bert_child(who: str, file: str) -> Mapping[str, object]:
    model = graph_file.read(Path(file))
    random = np.random.default_rng(0)
    batches = []
    for _ in range(8):
        mask = np.ones((8, 128), np.int64)
        ids = random.integers(5, 30000, (8, 128))
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros((8, 128), np.int64)})
    data = Calibration(batches, threads=default_threads(), memory_limit=512 << 20)
    started, answer = (time.perf_counter(), time.process_time()), {}
    if who == "measure":
        names = list(dict.fromkeys(str(n.inputs[0].name) for n in model.graph if n.op_type in ("MatMul", "Gemm")))
        for group in data.gram_groups(model, names):
            data.collect(model, Wanted(grams=group))
    if who == "gptq":
        model, report = run_pass(QuantizeWeights(method="gptq"), model, data)
        layers = [x for x in report.details["layers"].values() if "rtn_output_sqnr_db" in x]
        gain = np.mean([x["output_sqnr_db"] - x["rtn_output_sqnr_db"] for x in layers])
        answer["result"] = f"{len(layers)} products, {gain:.1f} dB above rounding on average"
    seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    return {**answer, "seconds": seconds, "cpu": cpu, "peak": peak_rss_mib()}


if __name__ == "__main__":
    main()
