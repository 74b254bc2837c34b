# SPDX-License-Identifier: Apache-2.0
"""A checkpoint larger than memory becomes an fp16 and an int4 graph: peak memory, time, what a kill leaves, proof.

    .venv/bin/python benchmarks/large_model.py [--parameters 7e9] [--folder artifacts/large] [--write]
    .venv/bin/python benchmarks/large_model.py --quick          a model of 60 million parameters: a minute

A Llama-shaped checkpoint in bf16 is made first, of random numbers (the same on every machine), in shards of 2 GB. Each
conversion runs in a process of its own, whose peak memory is that of the whole: PyTorch and transformers, the trace,
the passes, the writing. Tracing is timed apart. The rest is compared with a process that reads the checkpoint and
writes as many bytes as the conversion does; both wait until the disk has everything. Nothing is dropped from the
system's file cache. One conversion is killed in between.

Proof: every weight of each file is compared with the checkpoint; the graph is run on the
written weights, left in their file (no prepacking), beside PyTorch, which reads one layer's weights at a time: once the
checkpoint's, and once those of the file, so that rounding weights and a wrong graph can be told apart.

Needs disk for the checkpoint and both results (7e9: 33 GB), all of which is deleted in the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from markdown import environment, table, write_section

from onnxpress.contracts.process import peak_rss_mib

SHAPES = {  # width, feed-forward, layers, heads, heads of keys and values, vocabulary
    7e9: (4096, 11008, 32, 32, 32, 32000),
    1.1e9: (2048, 5632, 22, 32, 4, 32000),
    6e7: (768, 2048, 4, 12, 4, 8000),
}
KINDS = ("fp16", "int4", "int4-search")
SHARD = 2_000_000_000
POOL = (1 << 24) + 4099
"""Random numbers that all weights are cut from, at places of their own; no multiple of a row, so that no
two are alike."""


def main() -> None:
    options = parsed()
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](*options.child[1:])))
        return
    say(f"checkpoint of {options.parameters:g} parameters in {options.folder}")
    checkpoint = make_checkpoint(options.folder / "checkpoint", shape_of(options.parameters))
    try:
        facts = {kind: measured(kind, checkpoint, options) for kind in options.only}
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    text = report(checkpoint_bytes(options.parameters), facts)
    print(text)
    if options.write:
        write_section("large-model", text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, default=7e9, help="the shape nearest to it is taken")
    parser.add_argument("--quick", action="store_true", help="60 million parameters")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/large"))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=["fp16", "int4"])
    parser.add_argument("--no-proof", action="store_true", help="leave out the comparison with PyTorch")
    parser.add_argument("--keep", action="store_true", help="do not delete the folder")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.parameters = 6e7
    return options


def say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


def shape_of(parameters: float) -> tuple[int, ...]:
    return SHAPES[min(SHAPES, key=lambda size: abs(np.log(size / parameters)))]


# -------------------------------------------------------------------------------------------------------- checkpoint


def weights_of(shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, layers, heads, kv_heads, vocabulary = shape
    keys = width // heads * kv_heads
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part, size in {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}.items():
            yield f"{name}.self_attn.{part}_proj.weight", size
        for part, size in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            yield f"{name}.mlp.{part}_proj.weight", size
        yield f"{name}.input_layernorm.weight", (width,)
        yield f"{name}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def checkpoint_bytes(parameters: float) -> int:
    return sum(2 * int(np.prod(size)) for _, size in weights_of(shape_of(parameters)))


def make_checkpoint(folder: Path, shape: tuple[int, ...]) -> Path:
    """Write config.json and shards; the numbers depend on names and places alone."""
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.02)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    ones = np.full(max(shape), 0x3F80, np.uint16)  # 1.0
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, size in weights_of(shape):
        if sum(2 * int(np.prod(s)) for _, s in shards[-1]) > SHARD:
            shards.append([])
        shards[-1].append((name, size))
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard, bits, ones)
        where |= {name: file for name, _ in shard}
    write_config(folder, shape)
    index = {"metadata": {"total_size": sum(2 * int(np.prod(s)) for _, s in weights_of(shape))}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()
    return folder


def write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], bits: np.ndarray, ones: np.ndarray) -> None:
    header, start = {}, 0
    for name, size in shard:
        stop = start + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size in shard:
            left = int(np.prod(size))
            place = zlib.crc32(name.encode()) % POOL
            source = ones if len(size) == 1 else bits
            place = 0 if len(size) == 1 else place
            while left:
                piece = source[place : place + left]
                file.write(piece.tobytes())
                left, place = left - piece.size, 0


def write_config(folder: Path, shape: tuple[int, ...]) -> None:
    width, inner, layers, heads, kv_heads, vocabulary = shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# ------------------------------------------------------------------------------------------------- in other processes


def convert(kind: str, checkpoint: str, target: str, proof: str) -> dict[str, Any]:
    """Trace, press, be killed, write, prove; seconds of each, and the peak memory before the proof."""
    from onnxpress.exporters import graph_file
    from onnxpress.exporters.families.decoder import trace_decoder
    from onnxpress.exporters.streamed import export_streamed
    from onnxpress.pipeline.passes.base import run_pass

    started = time.perf_counter()
    exported = export_streamed(Path(checkpoint), "AutoModelForCausalLM", trace_decoder, opset=20)
    facts: dict[str, Any] = {"seconds_trace": time.perf_counter() - started, "peak_mib_trace": peak_rss_mib()}
    clean, fuse, last = passes(kind)
    started = time.perf_counter()
    graph, cleaned = run_pass(clean, exported.graph)
    graph, _ = run_pass(fuse, graph)
    facts["seconds_graph"] = time.perf_counter() - started

    def press() -> tuple[Any, int]:
        pressed, report = run_pass(last, graph.clone())
        written = graph_file.write(pressed, Path(target), external_from=0)
        for file in Path(target).parent.glob(f"{Path(target).name}*"):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        return report, written

    facts["killed"] = killed(press, Path(checkpoint), Path(target), 0.3 if kind == "fp16" else 0.1)
    started = time.perf_counter()
    report, facts["bytes"] = press()
    facts["seconds_weights"] = time.perf_counter() - started
    facts["peak_mib"] = peak_rss_mib()
    facts["left_over"] = sorted(path.name for path in Path(target).parent.iterdir() if path.name.startswith("."))
    facts["clamped"] = report.details.get("clamped_when_written")
    if proof == "proof":
        facts["proof"] = prove(exported, graph, cleaned.details["merged_into"], Path(target))
    return facts


def killed(press: Callable[[], Any], checkpoint: Path, target: Path, share: float) -> dict[str, Any]:
    """Fork, press there, and SIGKILL it when `share` of the checkpoint's size is written; what is there afterwards."""
    enough = share * sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    process = os.fork()
    if not process:
        press()
        os._exit(0)
    written, ended = 0.0, 0
    while not ended and written < enough:
        time.sleep(0.005)
        with contextlib.suppress(OSError):  # files come and go
            written = sum(file.stat().st_blocks * 512 for file in target.parent.rglob("*onnx_data*") if file.is_file())
        ended, _ = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    found = sorted(path.name for path in target.parent.iterdir())
    return {"in time": not ended, "written": int(written), "target": target.name in found, "found": found}


def passes(kind: str) -> list[Any]:
    from onnxpress.pipeline.passes.cast import CastPass
    from onnxpress.pipeline.passes.clean import Clean
    from onnxpress.pipeline.passes.fuse import Fuse
    from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights

    last: Any = CastPass()
    if kind != "fp16":
        last = QuantizeWeights(bits=4, group_size=32, gather_bits=8, clip_search=kind == "int4-search")
    return [Clean(), Fuse(optional=True), last]


def copy(checkpoint: str, target: str, size: str) -> dict[str, Any]:
    """Read the checkpoint, and write `size` bytes of it."""
    files, left, buffer = sorted(Path(checkpoint).glob("*.safetensors")), int(size), bytearray(16 << 20)
    started = time.perf_counter()
    with Path(target).open("wb") as out:
        for file in files:
            with file.open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    part = memoryview(buffer)[: min(count, left)]
                    out.write(part)
                    left -= len(part)
        while left > 0:  # the result is larger than the source
            left -= out.write(memoryview(buffer)[: min(left, len(buffer))])
        out.flush()
        os.fsync(out.fileno())
    return {"seconds": time.perf_counter() - started}


def prove(exported: Any, graph: Any, aliases: dict[str, str], target: Path) -> dict[str, Any]:
    """Compare all weights, and run graph and original."""
    import torch

    from onnxpress.contracts.decoding import Decoding
    from onnxpress.exporters import graph_file
    from onnxpress.exporters.reference import TorchReference
    from onnxpress.exporters.streamed import weights_as_called
    from onnxpress.pipeline.streamed_check import WrittenWeights

    written = WrittenWeights(target, graph, aliases)
    started = time.perf_counter()
    facts: dict[str, Any] = {"weights": written.check().to_json(), "seconds_check": time.perf_counter() - started}
    decoding = Decoding.of(graph_file.signature_of(written.written))
    assert decoding is not None
    ids = np.random.default_rng(0).integers(0, exported.model.config.vocab_size, (1, 12))
    session = mapped_session(target, exact=True)
    # Twelve tokens at once, then one more with the cache: prefill and decode
    first = decoding.feeds(ids)
    outputs = session(first)
    second = decoding.feeds(outputs["logits"][:, -1].argmax(-1)[:, None], cache=decoding.next_cache(outputs))
    ours = [outputs["logits"], session(second)["logits"]]
    del session
    traced = exported.traced
    reference = TorchReference(traced.reference, traced.inputs, traced.outputs, name="pytorch-fp32")
    torch.set_num_threads(2)
    for name, read in {"original": None, "written": written.parameter}.items():
        with weights_as_called(exported.model, exported.checkpoint, read):
            theirs = [reference.run(feeds)["logits"] for feeds in (first, second)]
        for step, one, other in zip(("prefill", "decode"), ours, theirs, strict=True):
            facts[f"{name} {step}"] = likeness(one, other)
    facts["seconds"], facts["peak_mib"] = time.perf_counter() - started, peak_rss_mib()
    return facts


def likeness(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    a, b = ours.astype(np.float64).reshape(-1), theirs.astype(np.float64).reshape(-1)
    return {
        "cosine": float(a @ b / np.sqrt((a @ a) * (b @ b))),
        "relative": float(np.abs(a - b).max() / np.abs(b).max()),
        "top1": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def mapped_session(file: Path, *, exact: bool) -> Any:
    """Runs a graph whose weights stay in their file: nothing prepacked, folded or cast when it is loaded.

    Args:
        file: The graph.
        exact: MatMulNBits multiplies in fp32 instead of rounding activations to 8 bits.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    proto, beside = onnx.load(file, load_external_data=False), file.with_name("exact.onnx")
    for node in proto.graph.node if exact else ():
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(proto, beside)
    session = onnxruntime.InferenceSession(beside, options)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


CHILDREN = {"convert": convert, "copy": copy}


def child(*arguments: str) -> dict[str, Any]:
    """Run one of the above in a process of its own."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"{' '.join(arguments[:2])}: {result}")
    return result


def command(*arguments: str) -> list[str]:
    return [sys.executable, __file__, "--child", *arguments]


# ------------------------------------------------------------------------------------------------------- measurements


def measured(kind: str, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One conversion, between two copies of as many bytes."""
    folder = options.folder / kind
    folder.mkdir(parents=True, exist_ok=True)
    target, dump = folder / "model.onnx", folder / "copy"
    facts = child("convert", kind, str(checkpoint), str(target), "none" if options.no_proof else "proof")
    copies = []
    for _ in range(2):
        copies.append(child("copy", str(checkpoint), str(dump), str(facts["bytes"]))["seconds"])
        dump.unlink()
    facts["seconds_copy"] = min(copies)
    if not options.keep:
        shutil.rmtree(folder)
    return facts


def report(source: int, facts: dict[str, dict[str, Any]]) -> str:
    rows = []
    for kind, fact in facts.items():
        share = fact["seconds_weights"] / fact["seconds_copy"]
        rows.append(
            (
                kind,
                f"{source / 1e9:.2f}",
                f"{fact['bytes'] / 1e9:.2f}",
                f"{fact['peak_mib']:.0f}",
                f"{fact['seconds_trace']:.0f}",
                f"{fact['seconds_graph']:.1f}",
                f"{fact['seconds_weights']:.1f}",
                f"{fact['seconds_copy']:.1f}",
                f"{share:.2f}",
                "no file, a draft that the next run removes"
                if not fact["killed"]["target"] and not fact["left_over"]
                else "a half",
            )
        )
    columns = (
        "",
        "GB read",
        "GB written",
        "peak MiB",
        "s tracing",
        "s graph",
        "s weights",
        "s copying",
        "ratio",
        "a kill leaves",
    )
    parts = [table("**Larger than memory** (Llama-shaped, bf16, random weights)", columns, rows)]
    proven = {kind: fact["proof"] for kind, fact in facts.items() if "proof" in fact}
    if proven:
        parts.append(table("**Proof**", PROOF_COLUMNS, [proof_row(kind, proof) for kind, proof in proven.items()]))
    from onnxpress.pipeline.versions import versions
    from onnxpress.runtime.machine import machine

    return "\n\n".join([*parts, environment(machine(), versions(), ("torch", "transformers", "onnxruntime"))])


PROOF_COLUMNS = (
    "",
    "weights equal to the source's",
    "weights rounded (SQNR dB, most steps off)",
    "logits, PyTorch with the written weights: largest difference, prefill / decode",
    "logits, PyTorch with the checkpoint: cosine, prefill / decode",
)


def proof_row(kind: str, proof: dict[str, Any]) -> tuple[str, ...]:
    weights = proof["weights"]
    rounded = f"{weights['rounded']} ({weights['sqnr_db']}, {weights['worst_step']})" if weights["rounded"] else "–"
    graph = " / ".join(f"{100 * proof[f'written {step}']['relative']:.3f} %" for step in ("prefill", "decode"))
    quality = " / ".join(f"{proof[f'original {step}']['cosine']:.5f}" for step in ("prefill", "decode"))
    return kind, str(weights["identical"]), rounded, graph, quality


if __name__ == "__main__":
    main()
