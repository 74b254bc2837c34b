# SPDX-License-Identifier: Apache-2.0
"""Lossless packing: size and speed beside zstandard, gzip and ZipNN, for 13 models stored in nine ways.

    .venv/bin/python benchmarks/packing.py [--models magika silero] [--quick] [--workdir FOLDER] [--write]

Each model's weights become `.onnx` files of initializers alone: as float32, float16 and bfloat16; as int8 (symmetric,
one scale a channel) and int4 (symmetric, groups of 32, two in a byte) with their scales; and with the smallest 50 and
80 % of each matrix zeroed, as float32 and int8. Matrices of more than two million weights (MiniLM's vocabulary) are cut
to their first two million, so that it takes ten minutes.

zstandard (level 19) and gzip (level 9) pack the whole file. ZipNN packs the weights of the main type laid end to end,
which is the form that it is made for; the other bytes are added as zstandard packs them. Everything runs on one thread;
times are those of the processor, the best of several runs for decoders, into memory. Ours compares the SHA-256 of what
comes out, which takes a third of its time. Needs ONNXPRESS_ASSETS, and a package index for ZipNN's own environment
(--workdir keeps it). `--quick`: the smallest models.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np
import onnx
import torch
import zstandard
from markdown import environment, table, write_section
from onnx import numpy_helper
from peers.assets import find
from peers.environments import PACKAGES, Environments
from safetensors.numpy import load_file

from onnxpress.pipeline.demo import demo_model
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine
from onnxpress.runtime.packing import pack, unpack_to_memory

Array = np.ndarray
Result = TypeVar("Result")
LARGE = 100_000
"""Bytes from which what a packed file says about itself, about 250 bytes, no longer counts."""

LARGEST = 1 << 21
"""Weights of a matrix beyond which it is cut."""

PEERS = ("zstd -19", "gzip -9", "ZipNN")
OURS = ("auto", "huffman", "lzw")
ZIPNN_TYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


# ------------------------------------------------------------------------------------------------------------- weights


def safetensors_file(path: Path) -> list[Array]:
    return [array.astype(np.float32) for array in load_file(path).values() if array.dtype.kind == "f"]


def state_dict(path: Path) -> list[Array]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved)
    return [value.float().numpy() for value in saved.values() if value.is_floating_point()]


def graph_weights(path: Path) -> list[Array]:
    """The float32 tensors of a graph, those of constants and branches included."""

    def walk(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from walk(attribute.g)

    arrays = [numpy_helper.to_array(tensor) for tensor in walk(onnx.load(path).graph)]
    return [array for array in arrays if array.dtype == np.float32]


MODELS: dict[str, Callable[[], list[Array]]] = {
    "mnist": lambda: graph_weights(find("onnx_zoo") / "ort_examples" / "c_cxx__MNIST__mnist.onnx"),
    "fastestdet": lambda: graph_weights(find("fastestdet") / "example" / "onnx-runtime" / "FastestDet.onnx"),
    "ultralight RFB": lambda: graph_weights(find("ultralight_face/models/onnx") / "version-RFB-320_simplified.onnx"),
    "ultralight slim": lambda: graph_weights(find("ultralight_face/models/onnx") / "version-slim-320.onnx"),
    "stories260K": lambda: safetensors_file(find("stories260K") / "derived" / "hf" / "model.safetensors"),
    "resnet20": lambda: state_dict(find("cifar_resnet") / "resnet20-12fca82f.th"),
    "resnet44": lambda: state_dict(find("cifar_resnet") / "resnet44-014dd654.th"),
    "silero": lambda: graph_weights(find("silero_vad") / "silero_vad.onnx"),
    "magika": lambda: graph_weights(find("magika_onnx") / "standard_v2_1" / "model.onnx"),
    "rxnmapper": lambda: state_dict(find("rxnmapper_albert") / "pytorch_model.bin"),
    "squeezenet": lambda: state_dict(next(find("squeezenet_v1.0/derived").glob("*.pth"))),
    "minilm-sst2": lambda: safetensors_file(find("minilm-sst2") / "model.safetensors"),
    "all-MiniLM-L6": lambda: safetensors_file(demo_model() / "model.safetensors"),
}
SMALLEST = ("mnist", "fastestdet", "stories260K")


def pruned(array: Array, share: float) -> Array:
    if array.ndim < 2:
        return array
    threshold = np.sort(np.abs(array), axis=None)[min(array.size - 1, int(share * array.size))]
    return np.where(np.abs(array) < threshold, np.float32(0), array)


def int8(array: Array) -> list[Array]:
    if array.ndim < 2:
        return [array]
    scale = np.abs(array).max(axis=tuple(range(1, array.ndim)), keepdims=True) / 127
    scale[scale == 0] = 1
    return [np.rint(array / scale).astype(np.int8), scale.ravel()]


def int4(array: Array) -> list[Array]:
    if array.ndim < 2 or array.size % 32:
        return [array]
    groups = array.reshape(-1, 32)
    scale = np.abs(groups).max(axis=1, keepdims=True) / 7
    scale[scale == 0] = 1
    codes = (np.rint(groups / scale) + 8).astype(np.uint8).reshape(-1, 2)
    return [codes[:, 0] | codes[:, 1] << 4, scale.ravel()]


def half(array: Array) -> list[Array]:
    return [np.clip(array, -65504, 65504).astype(np.float16)]


FORMS: dict[str, tuple[str, Callable[[Array], list[Array]]]] = {
    "fp32": ("float32", lambda array: [array]),
    "fp16": ("float16", half),
    "bf16": ("bfloat16", lambda array: [array.astype(ml_dtypes.bfloat16)]),
    "int8": ("int8", int8),
    "int4": ("uint8", int4),
    "fp32 50 %": ("float32", lambda array: [pruned(array, 0.5)]),
    "fp32 80 %": ("float32", lambda array: [pruned(array, 0.8)]),
    "int8 50 %": ("int8", lambda array: int8(pruned(array, 0.5))),
    "int8 80 %": ("int8", lambda array: int8(pruned(array, 0.8))),
}
"""How the weights are stored -> the type that most of them get, and what makes it."""

CODES = {"float32": 1, "uint8": 2, "int8": 3, "float16": 10, "bfloat16": 16}


def write_model(weights: list[Array], form: str, path: Path) -> tuple[bytes, bytes]:
    """Write the file; return the weights of the main type end to end, and all other bytes."""
    main, make = FORMS[form]
    model = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="weights"))
    laid, rest = [], []
    for number, array in enumerate(weights):
        for suffix, part in zip(("weight", "scale"), make(array), strict=False):
            code, data = CODES[part.dtype.name], np.ascontiguousarray(part).tobytes()
            name = f"layer.{number}.{suffix}"
            model.graph.initializer.append(onnx.TensorProto(name=name, data_type=code, dims=part.shape, raw_data=data))
            (laid if part.dtype.name == main else rest).append(data)
            rest.append(name.encode())
    path.write_bytes(model.SerializeToString())
    return b"".join(laid), b"".join(rest)


def cut(array: Array) -> Array:
    if array.size <= LARGEST:
        return array
    return array[: max(1, LARGEST * len(array) // array.size)]


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Found:
    """What one packer makes of one file: bytes, and seconds each way."""

    size: int
    encode: float
    decode: float


@dataclass
class Bench:
    """Runs every packer on a file."""

    folder: Path
    environments: Environments
    repeats: int
    results: dict[tuple[str, str], dict[str, Found]] = field(default_factory=dict)
    raw: dict[tuple[str, str], int] = field(default_factory=dict)

    def measure(self, model: str, weights: list[Array]) -> None:
        """Pack all forms of a model with all packers."""
        path, jobs = self.folder / "weights.onnx", {}
        for form in FORMS:
            laid, rest = write_model(weights, form, path)
            jobs[form] = (FORMS[form][0], laid, rest)
            data = path.read_bytes()
            found = {name: self.ours(path, data, name) for name in OURS}
            compressor, decompressor = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
            found["zstd -19"] = self.timed(data, compressor.compress, decompressor.decompress)
            found["gzip -9"] = self.timed(data, lambda raw: gzip.compress(raw, 9), gzip.decompress)
            self.results[model, form], self.raw[model, form] = found, len(data)
        for form, its in zip(FORMS, self.zipnn(jobs), strict=True):
            found = self.results[model, form]
            found["ZipNN"] = its
            best = min(found[name].size for name in PEERS)
            print(f"... {model}, {form}: {found['auto'].size / best:.4f} of the best", file=sys.stderr, flush=True)

    def ours(self, path: Path, data: bytes, codec: str) -> Found:
        target = self.folder / "weights.pack"
        started = time.process_time()
        report = pack(path, target, codec=codec, threads=1, force=True)
        encoding = time.process_time() - started
        seconds, model = self.best(lambda: unpack_to_memory(target, threads=1).model)
        assert model.tobytes() == data
        return Found(report.bytes_after, encoding, seconds)

    def timed(self, data: bytes, encode: Callable[[bytes], bytes], decode: Callable[[bytes], bytes]) -> Found:
        started = time.process_time()
        packed = encode(data)
        encoding = time.process_time() - started
        seconds, back = self.best(lambda: decode(packed))
        assert back == data
        return Found(len(packed), encoding, seconds)

    def zipnn(self, jobs: dict[str, tuple[str, bytes, bytes]]) -> list[Found]:
        """One process for all forms: it imports torch."""
        words: list[object] = []
        for number, (dtype, laid, _) in enumerate(jobs.values()):
            file = self.folder / f"{number}.bin"
            file.write_bytes(laid)
            words += [ZIPNN_TYPES.get(dtype, "float8_e4m3fn"), file]
        said = json.loads(self.environments.run("zipnn", "pack_zipnn.py", self.repeats, *words))
        others = [len(zstandard.ZstdCompressor(level=19).compress(rest)) for _, _, rest in jobs.values()]
        return [Found(x["bytes"] + more, x["encode"], x["decode"]) for x, more in zip(said, others, strict=True)]

    def best(self, work: Callable[[], Result]) -> tuple[float, Result]:
        """The best of `repeats` runs, or of half a second of them: those of small files are disturbed more easily."""
        least, begun, runs = float("inf"), time.process_time(), 0
        while runs < self.repeats or (self.repeats > 1 and time.process_time() - begun < 0.5):
            started = time.process_time()
            result = work()
            least, runs = min(least, time.process_time() - started), runs + 1
        return least, result


# -------------------------------------------------------------------------------------------------------------- tables


def totals(bench: Bench) -> str:
    """Each form over all models: sizes, then speeds."""
    names = (*OURS, *PEERS)
    sizes, decode, encode = [], [], []
    for form in FORMS:
        keys = [key for key in bench.results if key[1] == form]
        raw = sum(bench.raw[key] for key in keys)

        def total(name: str, what: str, keys: list[tuple[str, str]] = keys) -> float:
            return sum(getattr(bench.results[key][name], what) for key in keys)

        sizes.append((form, f"{raw / 1e6:.1f}", *(f"{100 * total(name, 'size') / raw:.1f}" for name in names)))
        decode.append((form, *(f"{raw / total(name, 'decode') / 1e6:.0f}" for name in names)))
        encode.append((form, *(f"{raw / total(name, 'encode') / 1e6:.1f}" for name in names)))
    heads = ("**ours**", "ours, huffman", "ours, lzw", *PEERS)
    return "\n\n".join(
        [
            table("**Packed size**, % of the files of all models together", ("", "MB", *heads), sizes),
            table("**Decoding**, MB of what comes out a second of one core", ("", *heads), decode),
            table("**Encoding**, MB of what goes in a second of one core", ("", *heads), encode),
        ]
    )


def by_model(bench: Bench) -> str:
    """Ours beside the best of the others, for each model and form."""
    models = list(dict.fromkeys(model for model, _ in bench.results))
    rows = []
    for model in models:
        cells = []
        for form in FORMS:
            found, raw = bench.results[model, form], bench.raw[model, form]
            best = min(found[name].size for name in PEERS)
            cells.append(f"{100 * found['auto'].size / raw:.1f} ({100 * best / raw:.1f})")
        rows.append((model, *cells))
    behind = {key: found["auto"].size / min(found[name].size for name in PEERS) for key, found in bench.results.items()}
    worst = max(behind, key=lambda key: behind[key])
    large = [ratio for key, ratio in behind.items() if bench.raw[key] >= LARGE]
    title = f"**By model**: ours, and in brackets the best of {', '.join(PEERS)}. At worst {behind[worst]:.3f} of it"
    title += f" ({worst[0]}, {worst[1]}, {bench.raw[worst] / 1e3:.0f} kB)"
    if large:
        title += f"; {max(large):.3f} for files from {LARGE // 1000} kB"
    return table(title, ("", *FORMS), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="only these")
    parser.add_argument("--quick", action="store_true", help="the smallest models, one run each")
    parser.add_argument("--workdir", type=Path, help="folder that keeps ZipNN's environment")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    options = parser.parse_args()
    names = options.models or (SMALLEST if options.quick else list(MODELS))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.workdir:
            options.workdir.mkdir(parents=True, exist_ok=True)
        environments = Environments(options.workdir or folder, 1)
        bench = Bench(folder, environments, 1 if options.quick else 5)
        for name in names:
            weights = [cut(array) for array in MODELS[name]() if array.size]
            bench.measure(name, weights)
    zipnn = next(package for package in PACKAGES["zipnn"] if package.startswith("zipnn"))
    about = environment(machine(), versions(), ("numpy",))
    text = "\n\n".join([totals(bench), by_model(bench), f"{about[:-1]}, zstandard {zstandard.__version__}, {zipnn}."])
    print(text)
    if options.write:
        write_section("packing", text)


if __name__ == "__main__":
    main()
