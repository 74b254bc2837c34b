# SPDX-License-Identifier: Apache-2.0
"""A safetensors checkpoint, in one file or in shards, of which nothing but the headers is read.

Format: 8 bytes with the length of a JSON header, the header (name to type, shape, first and last byte), the numbers;
shards have `model.safetensors.index.json` beside them, which says where each name is. Reference: the format section of
the safetensors README; transformers' sharded checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil

from ..contracts.digest import sha256_of
from ..contracts.errors import InputError
from ..contracts.tasks import GENERATION
from .streamed_tensor import Place, StreamedTensor, astype

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000
_SHARE_OF_MEMORY = 0.4
"""Of the machine's, from which on a checkpoint in fp32 is streamed: a press holds the original, and sessions too."""

_COMPLETE = "Download or save the checkpoint again."

_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}


class Checkpoint(Mapping[str, Place]):
    """Name of a tensor to where it lies.

    Attributes:
        name: What messages call the folder.
        files: The files that hold tensors, in name order.
    """

    def __init__(self, name: str, places: Mapping[str, Place]) -> None:
        self.name = name
        self.files = tuple(sorted({place.path for place in places.values()}))
        self._places = dict(places)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers.

        Raises:
            InputError: There are no safetensors, a shard is missing or cut short, or a header makes no sense.
        """
        name, index = folder.resolve().name, folder / INDEX
        if index.is_file():
            return cls(name, _sharded(folder, index))
        files = sorted(folder.glob("*.safetensors"))
        if len(files) > 1 and folder / "model.safetensors" in files:
            files = [folder / "model.safetensors"]
        if len(files) != 1:
            problem = f"holds {len(files)} safetensors files and no {INDEX}" if files else "holds no safetensors"
            raise InputError(f"{name} {problem}", next_step="Save the model with save_pretrained.")
        return cls(name, _header(files[0]))

    def __getitem__(self, key: str) -> Place:
        return self._places[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        return sum(math.ceil(place.size * place.dtype.itemsize) for place in self._places.values())

    def sha256(self) -> str:
        """Over all files: reads them."""
        return sha256_of(self.files)

    def tensor(self, key: str, dtype: ir.DataType, name: str | None = None) -> StreamedTensor:
        """The tensor as `dtype`, converted when it is read."""
        found = StreamedTensor(self._places[key], name=name or key)
        return found if found.dtype == dtype else found.converted(dtype, astype(dtype))


def folder_to_stream(source: str, task: str | None, weights: str) -> Path | None:
    """The transformers folder whose weights should stay in their files; None for any other source.

    Args:
        source: As the user gave it; what is no local folder is not streamed.
        task: As the user gave it; None asks config.json.
        weights: `ExportSettings.weights`.

    Raises:
        InputError: `streamed` is asked for and not possible.
    """
    folder = Path(source)
    possible = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    if weights == "streamed":
        if not possible:
            raise InputError(
                f"{source} is no folder with config.json and safetensors, which alone can be streamed",
                next_step="Pass such a folder, or leave export.weights out.",
            )
        return folder
    if weights == "memory" or not possible or (task or _task_of(folder)) != GENERATION:
        return None
    elements = sum(place.size for place in Checkpoint.open(folder).values())
    return folder if elements * 4 > _SHARE_OF_MEMORY * float(psutil.virtual_memory().total) else None


def _task_of(folder: Path) -> str | None:
    try:
        architectures = json.loads((folder / "config.json").read_text("utf-8")).get("architectures") or [""]
    except (ValueError, AttributeError):
        return None  # whoever reads it next says what is wrong with it
    return GENERATION if str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")) else None


def _sharded(folder: Path, index: Path) -> dict[str, Place]:
    try:
        where: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index.name} is not a list of shards", next_step=_COMPLETE) from error
    headers: dict[str, dict[str, Place]] = {}
    for shard in shards:
        path = folder / str(shard)
        if Path(str(shard)).name != shard:
            raise InputError(f"{index.name} points outside its folder ({shard})", next_step=_COMPLETE)
        if not path.is_file():
            count = sum(1 for name in where.values() if name == shard)
            raise InputError(
                f"{folder.resolve().name}: the shard {shard}, with {count} weights, is missing", next_step=_COMPLETE
            )
        headers[shard] = _header(path)
    for key, shard in where.items():
        if key not in headers[shard]:
            raise InputError(f"{index.name} says that {key} is in {shard}, which lacks it", next_step=_COMPLETE)
    return {key: headers[shard][key] for key, shard in where.items()}


def _header(path: Path) -> dict[str, Place]:
    """Every tensor of one file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise InputError(f"{path.name} is not a safetensors file, or cut short", next_step=_COMPLETE)
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            return {str(key): _place(path, 8 + length, size, key, entry) for key, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the header of {path.name} cannot be read", next_step=_COMPLETE) from error


def _place(path: Path, base: int, size: int, key: str, entry: Any) -> Place:
    kind, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    start, stop = (int(n) for n in entry["data_offsets"])
    if kind not in _TYPES:
        raise InputError(
            f"{path.name}: {key} is stored as {kind}, which cannot be read here",
            next_step="Save the checkpoint in bfloat16, float16 or float32.",
        )
    dtype = _TYPES[kind]
    if min(shape, default=0) < 0 or start < 0 or stop - start != math.prod(shape) * int(dtype.itemsize):
        raise InputError(f"{path.name}: the size of {key} does not fit its shape", next_step=_COMPLETE)
    if base + stop > size:
        raise InputError(f"{path.name} is cut short at {key}", next_step=_COMPLETE)
    return Place(path, base + start, dtype, shape)
