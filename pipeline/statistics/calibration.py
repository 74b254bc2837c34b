# SPDX-License-Identifier: Apache-2.0
"""Calibration data, and how statistics are measured on it.

Memory does not grow with the number of batches, nor with their length beyond the longest: each batch is reduced and
let go. Values that have to be fetched, and Gram matrices, are visited in groups that fit `memory_limit`; a second group
costs a second run over the data.

Padding does not count. Where the attention mask of a batch has zeros, the values are fetched and the masked positions
left out: along the axes that carry the mask's own symbolic size, or the first two where the graph does not tell.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...contracts.errors import InputError
from ...exporters import graph_file
from ...runtime.session import Session
from ..passes.graph import dims
from ..progress import Progress
from .histogram import Histogram
from .observe import Reduced, fetched, kept, kept_rows, merge, observed, read_reduced, reduce_array, unobservable
from .results import Statistics, Wanted

Feeds = Mapping[str, np.ndarray]
_Shape = tuple[int | str | None, ...]
_SAVE_EVERY_SECONDS = 20.0


class Calibration:
    """Batches of inputs for a model, measured on through ONNX Runtime.

    Args:
        batches: One dict of arrays a batch; shapes may differ from batch to batch. Any sequence does: one that makes
            its batches when they are asked for keeps memory flat however many there are.
        mask: Name of the input, [batch, sequence], that is 0 at padding; ignored where a batch has no such input.
        provider: Short name of the execution provider that computes.
        threads: By default one a usable core.
        memory_limit: Bytes that fetched values or Gram matrices may take at a time.
        cache: Folder for finished (and, after an interruption, half finished) statistics; None keeps nothing.
        reference: The graph before anything was rounded, for passes that compare with it.
        processor_files: Name to file of what lies beside the model, for passes that have to fit the tokenizer.
        progress: Told which batch is running.

    Raises:
        InputError: There are no batches.
    """

    def __init__(
        self,
        batches: Sequence[Feeds],
        *,
        mask: str = "attention_mask",
        provider: str = "cpu",
        threads: int | None = None,
        memory_limit: int = 1 << 30,
        cache: Path | None = None,
        reference: ir.Model | None = None,
        processor_files: Mapping[str, Path] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not batches:
            raise InputError("the calibration data is empty", next_step="Give at least one example.")
        self.batches, self.mask = batches, mask
        self.provider, self.threads, self.memory_limit = provider, threads, memory_limit
        self.cache, self.reference = cache, reference
        self.processor_files = dict(processor_files or {})
        self._say = progress or Progress()
        self._padded = any(self._has_padding(batch) for batch in batches)
        self._data_digest = b""

    @property
    def progress(self) -> Progress:
        """Whom to tell what is being measured."""
        return self._say

    def sample(self, count: int) -> Calibration:
        """The same, on at most `count` of the batches, evenly spaced."""
        picked = np.linspace(0, len(self.batches) - 1, min(count, len(self.batches))).astype(int)
        return Calibration(
            [self.batches[index] for index in picked],
            mask=self.mask,
            provider=self.provider,
            threads=self.threads,
            memory_limit=self.memory_limit,
            cache=self.cache,
            reference=self.reference,
            processor_files=self.processor_files,
            progress=self._say,
        )

    def run(self, model: ir.Model) -> Iterator[dict[str, np.ndarray]]:
        """The model's outputs, batch by batch."""
        with self._session(model) as session:
            for index, batch in enumerate(self.batches):
                yield _run(session, batch, index)

    def collect(self, model: ir.Model, wanted: Wanted) -> Statistics:
        """Measure `wanted` over all batches.

        Values that cannot be measured, or that reach infinity, are in `missing` with the reason.

        Raises:
            InputError: A batch does not fit the model, or a value is NaN; the message names the node.
        """
        reasons = unobservable(model, wanted)
        wanted = wanted.only(name for name in wanted.names if name not in reasons)
        found = self._collect(model, wanted) if wanted.names else Statistics()
        found.missing.update(reasons)
        return found

    def _collect(self, model: ir.Model, wanted: Wanted) -> Statistics:
        """From the cache, or measured group by group."""
        state = self._checkpoint(model, wanted)
        found, done = state.load()
        if done >= len(self.batches):
            return found
        groups = self._groups(model, wanted)
        if len(groups) == 1:
            return self._measure(model, wanted, state)
        parts = [self._checkpoint(model, group) for group in groups]
        found = Statistics()
        for group, part in zip(groups, parts, strict=True):
            found.update(self._measure(model, group, part))
        state.save(found, len(self.batches), final=True)
        for part in parts:
            part.remove()
        return found

    def gram_groups(self, model: ir.Model, names: Iterable[str]) -> list[list[str]]:
        """Cut `names` into groups whose Gram matrices fit `memory_limit` together, in order."""
        widths = {str(v.name): dims(v) for v in _values(model)}
        sizes = {}
        for name in dict.fromkeys(names):
            width = (widths.get(name) or (None,))[-1]
            sizes[name] = 16 * width * width if isinstance(width, int) else 0  # float64, and a batch's own on arrival
        return _packed(sizes, self.memory_limit)

    def shapes(self, model: ir.Model, names: Iterable[str], feeds: Feeds | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes that values have on `feeds`; by default on the largest batch. Unobservable names are left out."""
        names = list(dict.fromkeys(names))
        copy = model.clone()
        values = {str(value.name): value for value in _values(copy)}
        nodes = {name: ir.node("Shape", [values[name]]) for name in names if name in values}
        copy.graph.extend(nodes.values())
        copy.graph.outputs.clear()
        for index, node in enumerate(nodes.values()):
            node.outputs[0].name = f"onnxpress_shape_{index}"
            copy.graph.outputs.append(node.outputs[0])
        if not nodes:
            return {}
        with self._session(copy) as session:
            if feeds is None:
                index = max(range(len(self.batches)), key=lambda i: _elements(self.batches[i]))
                answers = _run(session, self.batches[index], index)
            else:
                answers = session.run(feeds)
        return {name: tuple(int(n) for n in shape) for name, shape in zip(nodes, answers.values(), strict=True)}

    def _groups(self, model: ir.Model, wanted: Wanted) -> list[Wanted]:
        """The questions, cut so that each part's memory stays below the limit."""
        whole = self._fetch(wanted, masked=self._padded)
        sizes = {group[0]: 0 for group in ([name] for name in wanted.names)}
        if whole:
            for name, shape in self.shapes(model, whole).items():
                sizes[name] += 4 * int(np.prod(shape, dtype=np.int64))
        widths = {str(v.name): dims(v) for v in _values(model)}
        for name in wanted.grams:
            width = (widths.get(name) or (None,))[-1]
            sizes[name] += 16 * width * width if isinstance(width, int) else 0
        return [wanted.only(group) for group in _packed(sizes, self.memory_limit)]

    def _fetch(self, wanted: Wanted, *, masked: bool) -> list[str]:
        return wanted.names if masked else list(dict.fromkeys([*wanted.histograms, *wanted.rows]))

    def _has_padding(self, batch: Feeds) -> bool:
        mask = batch.get(self.mask)
        return mask is not None and mask.ndim == 2 and not bool(np.all(mask))

    def _checkpoint(self, model: ir.Model, wanted: Wanted) -> _Checkpoint:
        if self.cache is None:
            return _Checkpoint(None)
        if not self._data_digest:
            self._data_digest = b"".join(_digest_feeds(batch) for batch in self.batches)
        key = hashlib.sha256(f"2 {self.mask} {self.provider} {wanted.key()} ".encode())
        key.update(_digest(model) + self._data_digest)
        return _Checkpoint(self.cache / f"{key.hexdigest()}.npz")

    def _measure(self, model: ir.Model, wanted: Wanted, state: _Checkpoint) -> Statistics:
        found, done = state.load()
        if done >= len(self.batches):
            return found
        masked = self._padded
        self._say("calibrate", f"{len(wanted.names)} values on {len(self.batches) - done} batches")
        copy, makers = observed(model, wanted, fetch=self._fetch(wanted, masked=masked))
        axes = {str(value.name): dims(value) for value in _values(model)}
        with self._session(copy) as session:
            for index in range(done, len(self.batches)):
                batch = self.batches[index]
                outputs = _run(session, batch, index)
                for name, reduced in read_reduced(wanted, outputs).items():
                    self._add(found, wanted, name, reduced, index, makers[name])
                arrays = fetched(wanted, outputs)
                del outputs
                for name in list(arrays):
                    values = arrays.pop(name)
                    keep = self._keep(batch, values, axes.get(name), axes.get(self.mask))
                    reduced = reduce_array(name, values, keep, wanted)
                    if self._add(found, wanted, name, reduced, index, makers[name]):
                        self._summarize(found, wanted, name, values, keep)
                state.save(found, index + 1)
        _settle(found, wanted)
        state.save(found, len(self.batches), final=True)
        return found

    def _add(self, found: Statistics, wanted: Wanted, name: str, reduced: Reduced, index: int, maker: str) -> bool:
        """Merge one batch's reductions, and tell whether the value still counts.

        Raises:
            InputError: It is NaN.
        """
        extremes = reduced.extremes
        if np.isnan(extremes).any():
            raise InputError(
                f"'{name}' (made by {maker}) is NaN on calibration batch {index + 1}",
                next_step="Check the calibration data, or whether the model overflows on it.",
            )
        if not np.isfinite(extremes).all():
            found.missing.setdefault(name, f"reaches infinity on calibration batch {index + 1}")
        if name not in found.missing:
            merge(found, name, reduced, wanted)
        return name not in found.missing

    def _summarize(
        self, found: Statistics, wanted: Wanted, name: str, values: np.ndarray, keep: np.ndarray | None
    ) -> None:
        """The statistics that no operator computes."""
        if name in wanted.histograms:
            flat = kept(values, keep)
            if flat.size:
                found.histograms.setdefault(name, Histogram()).add(flat)
        if name in wanted.rows:
            share = -(-wanted.row_count // len(self.batches))
            rows = kept_rows(values, keep, -1)
            if not len(rows):
                return
            picked = rows[np.linspace(0, len(rows) - 1, min(share, len(rows))).astype(int)]
            known = found.rows.get(name, picked[:0])
            if known.shape[1] != picked.shape[1]:
                found.missing[name] = "its last axis changes in size from batch to batch"
                return
            found.rows[name] = np.concatenate([known, picked])[: wanted.row_count]

    def _keep(
        self, batch: Feeds, values: np.ndarray, shape: _Shape | None, mask_shape: _Shape | None
    ) -> np.ndarray | None:
        """What counts in `values`, bool and broadcastable; None where all of it does."""
        if not self._has_padding(batch):
            return None
        mask = np.asarray(batch[self.mask]).astype(bool)
        rows, length = mask.shape
        if values.ndim == 2 and values.shape[0] == rows * length and values.shape != mask.shape:
            return mask.reshape(-1, 1)  # tokens of all rows below each other
        named = shape if shape is not None and len(shape) == values.ndim else (None,) * values.ndim
        batch_name, length_name = mask_shape if mask_shape is not None and len(mask_shape) == 2 else (None, None)
        places = [a for a, dim in enumerate(named) if a > 0 and isinstance(dim, str) and dim == length_name]
        if not places and values.shape[:2] == mask.shape:
            # Unless the graph says that the second axis is another one, whose size is the same by chance
            fixed = isinstance(named[1], int) and not isinstance(length_name, int)
            places = [] if fixed or (named[1] is not None and named[1] == batch_name) else [1]
        if not places or values.shape[0] != rows or any(values.shape[axis] != length for axis in places):
            return None
        keep = np.ones((1,) * values.ndim, bool)
        for axis in places:
            keep = keep & mask.reshape([rows if a == 0 else length if a == axis else 1 for a in range(values.ndim)])
        return keep

    @contextmanager
    def _session(self, model: ir.Model) -> Iterator[Session]:
        with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
            file = Path(folder) / "observed.onnx"
            graph_file.write(model, file)
            yield Session(file, provider=self.provider, threads=self.threads)


class _Checkpoint:
    """What a file remembers of statistics under way: all of them and how many batches they have seen."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._saved = file, time.monotonic()

    def load(self) -> tuple[Statistics, int]:
        """What was saved; nothing where there is no file or it is damaged."""
        if self._file is not None and self._file.is_file():
            with (
                suppress(*_UNREADABLE),
                self._file.open("rb") as stream,
                np.load(stream, allow_pickle=False) as arrays,
            ):
                done = int(arrays["done"])
                return Statistics.from_arrays({k: arrays[k] for k in arrays.files if k != "done"}), done
        return Statistics(), 0

    def save(self, found: Statistics, done: int, *, final: bool = False) -> None:
        if self._file is None or (not final and time.monotonic() - self._saved < _SAVE_EVERY_SECONDS):
            return
        part: Path | None = None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._file.parent, suffix=".part", delete=False) as stream:
                part = Path(stream.name)
                np.savez(stream, done=np.asarray(done), **found.to_arrays())  # type: ignore[arg-type]
            part.replace(self._file)
        except OSError as error:
            if part is not None:
                part.unlink(missing_ok=True)
            raise InputError(
                f"cannot keep calibration results in {self._file.parent}: {error.strerror or error}",
                next_step="Choose another folder for the cache, or none.",
            ) from error
        self._saved = time.monotonic()

    def remove(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)


_UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)


def _run(session: Session, batch: Feeds, index: int) -> dict[str, np.ndarray]:
    try:
        return session.run(batch)
    except InputError as error:
        raise InputError(f"calibration batch {index + 1}: {error.message}", next_step=error.next_step) from error


def _settle(found: Statistics, wanted: Wanted) -> None:
    """Every value that was asked for has its answers, or a reason."""
    for name in wanted.names:
        answers = (found.ranges, found.histograms, found.channels, found.grams, found.rows)
        if not any(name in answer for answer in answers):
            found.missing.setdefault(name, "empty on every calibration batch")
        if name in found.missing:  # what was seen before it became infinite is no statistic
            for answer in answers:
                answer.pop(name, None)


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]


def _packed(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut where the sum of their sizes would pass `limit`; one name alone may be larger."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _elements(batch: Feeds) -> int:
    return sum(int(array.size) for array in batch.values())


def _digest(model: ir.Model) -> bytes:
    """Of everything that the results depend on: nodes, attributes and weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        if value.const_value is not None:
            digest.update(f"{name} {value.const_value.dtype} {value.const_value.shape}".encode())
            digest.update(value.const_value.tobytes())
    bare = model.clone()
    for value in bare.graph.initializers.values():
        value.const_value = ir.Tensor(np.zeros(0, np.float32))
    digest.update(ir.to_proto(bare).SerializeToString(deterministic=True))
    return digest.digest()


def _digest_feeds(batch: Feeds) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
