# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of a Llama-shaped model in 4 bits: this project, ONNX Runtime GenAI, PyTorch in bf16.

    .venv/bin/python benchmarks/decoding.py --build        make checkpoint, bundle, GenAI's model, GenAI's environment
    .venv/bin/python benchmarks/decoding.py [--write]      measure
    .venv/bin/python benchmarks/decoding.py --quick        both, with a model of 50 million parameters: two minutes

The checkpoint has the shape of Llama-3.2-1B (1.24 billion parameters, tied embeddings) and random weights in bf16. Ours
is pressed with the recipe int4-decoder and run by `Generator`; GenAI runs what its own builder makes of the checkpoint
with `-p int4 -e cpu`; PyTorch runs transformers' `generate`. Each lives in a process of its own that waits for its
turn: a turn reads a prompt and writes tokens, greedily, one text at a time. Rounds are interleaved, figures are medians
over the rounds, with the lowest and the highest; times a peer's are medians of the ratios within each round.

Two more rows say where a difference comes from: ours with weights in pages of 4 KiB, and GenAI with weights in huge
pages, which it takes when its process is started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

A token reads all weights of the matrix products, as stored, and the cache. The memory's bandwidth is the most that a
sum over 1 GiB reached, of several tries with one and with all threads, between the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
from markdown import environment, table, write_section
from peers.environments import Environments

from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import default_threads, machine

TURNS = Path(__file__).parent / "peers" / "decode_turns.py"
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
QUICK = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
NAMES = {
    "ours": "onnxpress int4",
    "genai": "onnxruntime-genai int4",
    "pytorch": "PyTorch bf16",
    "ours, 4 KiB pages": "onnxpress int4, pages of 4 KiB",
    "genai, huge pages": "onnxruntime-genai int4, huge pages",
}


def main() -> None:
    options = parsed()
    if options.build or options.quick:
        build(options)
    rows = measured(options) if options.quick or not options.build else None
    if rows is None:
        return
    text = report(options, *rows)
    print(text)
    if options.write:
        write_section("decoding", text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", action="store_true", help="make what is missing, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds; builds it, too")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64, help="written in each turn")
    parser.add_argument("--prompt", type=int, default=128, help="tokens read in each turn")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--folder", type=Path, default=Path("artifacts/decoding"))
    parser.add_argument(
        "--genai-python", type=Path, help="a Python with onnxruntime-genai; else an environment is made"
    )
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds, options.tokens = min(options.layers, 4), min(options.rounds, 3), 16
    options.folder = options.folder / f"{'quick' if options.quick else 'llama'}-{options.layers}"
    return options


def say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- building


def genai_python(options: argparse.Namespace) -> Path:
    if options.genai_python is not None:
        return Path(options.genai_python)
    return Environments(options.folder.parent / "environments", options.threads).python("genai")


def build(options: argparse.Namespace) -> None:
    """Make the checkpoint, our bundle and GenAI's folder, where they are missing."""
    checkpoint, bundle, genai = (options.folder / name for name in ("checkpoint", "bundle", "genai"))
    if not (checkpoint / "tokenizer.json").is_file():
        say(f"checkpoint of {options.layers} layers in {checkpoint}")
        make_checkpoint(checkpoint, options)
    if not (bundle / "manifest.json").is_file():
        say("press")
        program = shutil.which("onnxpress", path=str(Path(sys.executable).parent))
        words = ["--recipe", "int4-decoder", "--set", "export.weights=streamed", "--set", "gates=[]", "-o", bundle]
        run([program, "press", checkpoint, *words], options.threads)
    if not (genai / "genai_config.json").is_file():
        say("GenAI's builder")
        words = [
            "-m",
            checkpoint,
            "-i",
            checkpoint,
            "-o",
            genai,
            "-p",
            "int4",
            "-e",
            "cpu",
            "-c",
            options.folder / "cache",
        ]
        run([genai_python(options), "-m", "onnxruntime_genai.models.builder", *words], options.threads)


def make_checkpoint(folder: Path, options: argparse.Namespace) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {**SHAPE, **(QUICK if options.quick else {}), "num_hidden_layers": options.layers}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def run(command: Sequence[object], threads: int) -> None:
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([str(word) for word in command], env=quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stderr or done.stdout).strip()[-2000:])


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass
class Row:
    """What one decoder did.

    Attributes:
        prefill, decode: Tokens a second, one number a round.
        peak_mib: Of its process.
        tokens: Of the last round.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    tokens: list[int] = field(default_factory=list)


class Decoder:
    """A process that generates when asked."""

    def __init__(self, python: Path, kind: str, folder: Path, threads: int, more: dict[str, str]) -> None:
        # torch and numpy take the threads from here; ONNX Runtime is told by decode_turns.py
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), **more}
        words = [str(python), str(TURNS), kind, str(folder), str(threads)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        self._answer()

    def turn(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{' '.join(self.process.args[1:3])} ended: see what it said above")  # type: ignore[index]


@contextmanager
def started(options: argparse.Namespace, name: str) -> Iterator[Decoder]:
    """A decoder of `NAMES`, ended when the block is."""
    say(f"load {NAMES[name]}")
    here, folder = Path(sys.executable), options.folder
    choices: dict[str, tuple[Path, str, Path, dict[str, str]]] = {
        "ours": (here, "onnxpress", folder / "bundle", {}),
        "ours, 4 KiB pages": (here, "small-pages", folder / "bundle", {}),
        "genai": (Path(), "genai", folder / "genai", {}),
        "genai, huge pages": (Path(), "genai", folder / "genai", HUGE),
        "pytorch": (here, "pytorch", folder / "checkpoint", {}),
    }
    python, kind, place, more = choices[name]
    decoder = Decoder(genai_python(options) if kind == "genai" else python, kind, place, options.threads, more)
    try:
        yield decoder
    finally:
        assert decoder.process.stdin is not None
        decoder.process.stdin.close()
        decoder.process.wait(60)


def measured(options: argparse.Namespace) -> tuple[dict[str, Row], float]:
    """All rows, and the memory's bandwidth in bytes a second."""
    numbers, bandwidth = np.random.default_rng(0), 0.0
    rows = {name: Row() for name in options.only}
    block = np.ones((1 << 30) // 8, np.int64)
    with ExitStack() as stack:
        decoders = {name: stack.enter_context(started(options, name)) for name in options.only}
        for number in range(-1, options.rounds):  # the first one warms up
            prompt = numbers.integers(2, 50_000, options.prompt).tolist()
            for name, decoder in decoders.items():
                time.sleep(0.3)  # another's worker threads may still be spinning
                said = decoder.turn(prompt, options.tokens)
                if number < 0:
                    continue
                row = rows[name]
                row.prefill.append(options.prompt / said["prefill"])
                row.decode.append((options.tokens - 1) / said["decode"])
                row.peak_mib, row.tokens = said["peak_mib"], said["tokens"]
            time.sleep(0.3)
            bandwidth = max(bandwidth, read_rate(block, options.threads))
            say(f"round {number + 1} of {options.rounds}")
    return rows, bandwidth


def read_rate(block: np.ndarray, threads: int) -> float:
    """The most bytes a second that a sum over all of it reads, with one and with all threads."""
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for count in (1, threads):
            parts = np.array_split(block, count)
            for _ in range(3):
                began = time.perf_counter()
                list(pool.map(np.sum, parts))
                best = max(best, block.nbytes / (time.perf_counter() - began))
    return best


# ------------------------------------------------------------------------------------------------------------ reporting


def report(options: argparse.Namespace, rows: dict[str, Row], bandwidth: float) -> str:
    length = options.prompt + options.tokens / 2
    sizes = {name: token_bytes(options.folder, name, length) for name in rows}
    lines = []
    for name, row in rows.items():
        rate = sizes[name] * median(row.decode)
        lines.append(
            (
                NAMES[name],
                spread(row.decode, 1),
                *(ratio(row.decode, rows[peer].decode) if peer in rows else "–" for peer in ("genai", "pytorch")),
                spread(row.prefill, 0),
                f"{row.peak_mib:.0f}",
                f"{sizes[name] / 1e9:.2f}",
                f"{rate / 1e9:.1f}",
                f"{100 * rate / bandwidth:.0f}",
            )
        )
    columns = (
        "",
        "tokens/s written",
        "x GenAI",
        "x PyTorch",
        f"tokens/s read ({options.prompt})",
        "peak MiB",
        "GB a token",
        "GB/s",
        "% of bandwidth",
    )
    title = (
        f"**Decoding** (Llama shape, {parameters(options.folder) / 1e9:.2f} billion parameters, one text, "
        f"{options.threads} threads, {options.rounds} rounds, median (lowest–highest); memory reads "
        f"{bandwidth / 1e9:.1f} GB/s)"
    )
    noise = ", ".join(
        f"{NAMES[name]} {weight_sqnr(options.folder, name):.2f}" for name in ("ours", "genai") if name in rows
    )
    note = f"Signal to noise of the rounded weights, dB: {noise}."
    return "\n\n".join([table(title, columns, lines), note, tools(options)])


def tools(options: argparse.Namespace) -> str:
    asked = "from importlib.metadata import version; print(version('onnxruntime-genai'))"
    found = subprocess.run([str(genai_python(options)), "-c", asked], capture_output=True, text=True)
    known = {**versions(), "onnxruntime-genai": found.stdout.strip() or "?"}
    return environment(machine(), known, ("torch", "transformers", "onnxruntime", "onnxruntime-genai"))


def spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def ratio(values: Sequence[float], others: Sequence[float]) -> str:
    return f"{median(a / b for a, b in zip(values, others, strict=True)):.2f}"


def graph_of(folder: Path, name: str) -> Path:
    return next((folder / "bundle" / "onnx").glob("*.onnx")) if name.startswith("ours") else folder / "genai/model.onnx"


def token_bytes(folder: Path, name: str, length: float) -> float:
    """What one token reads: the weights that matrix products multiply with, as stored, and the cache so far."""
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    keys = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * length
    if name == "pytorch":
        return 2 * parameters(folder) + 2 * keys  # tied: the embeddings are the last layer's weight
    graph = ir.load(graph_of(folder, name)).graph
    weights = [v for node in graph if node.op_type == "MatMulNBits" for v in node.inputs[1:4] if v is not None]
    return sum(tensor_of(value).nbytes for value in weights) + 4 * keys


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """A weight's bytes, where the embeddings read the same ones in another shape."""
    node = value.producer()
    found = value.const_value if node is None else node.inputs[0].const_value  # type: ignore[union-attr]
    assert found is not None
    return found


def parameters(folder: Path) -> int:
    return sum(int(np.prod(shape)) for _, shape in checkpoint_tensors(folder))


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    for file in sorted((folder / "checkpoint").glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                yield key, tuple(tensors.get_slice(key).get_shape())


def weight_sqnr(folder: Path, name: str) -> float:
    """Of the layers' down projections, against the checkpoint, in dB."""
    import torch
    from safetensors import safe_open

    signal = noise = 0.0
    products = [n for n in ir.load(graph_of(folder, name)).graph if n.op_type == "MatMulNBits"]
    for node in products:
        label = str(node.name).replace("/", ".")
        if "down_proj" not in label:
            continue
        layer = label.split("layers.")[1].split(".")[0]
        for file in sorted((folder / "checkpoint").glob("*.safetensors")):
            with safe_open(file, "torch") as tensors:
                key = f"model.layers.{layer}.mlp.down_proj.weight"
                if key in tensors.keys():  # noqa: SIM118 - no mapping
                    original = tensors.get_tensor(key).to(torch.float32).numpy()
                    signal += float(np.square(original).sum(dtype=np.float64))
                    noise += float(np.square(dequantized(node) - original).sum(dtype=np.float64))
    return float(10 * np.log10(signal / noise))


def dequantized(node: ir.Node) -> np.ndarray:
    """What a MatMulNBits of 4 bits multiplies with, float32 [out, in]."""
    codes, scales, *zeros = (tensor_of(v).numpy() for v in node.inputs[1:4] if v is not None)
    rows, blocks, _ = codes.shape
    values = nibbles(codes).reshape(rows, blocks, -1).astype(np.float32)
    middle = nibbles(zeros[0].reshape(rows, -1))[:, :blocks, None] if zeros else np.float32(8)
    return ((values - middle) * scales.reshape(rows, blocks, 1)).reshape(rows, -1)


def nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


if __name__ == "__main__":
    main()
