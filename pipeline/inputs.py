# SPDX-License-Identifier: Apache-2.0
"""Inputs to compare and to time with: texts that break tokenizers, several shapes, padding on either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..contracts.decoding import Decoding
from ..contracts.errors import InputError
from ..contracts.signature import Signature, TensorSpec
from ..exporters.exported import ExportedModel
from ..runtime.benchmark import Setting
from .data import Dataset
from .decoder_inputs import decoder_feeds, decoding_of, mask_of_output, step_after
from .recipe import BenchmarkSettings, CalibrationSettings

Feeds = dict[str, np.ndarray]
UNNAMED_BATCH = "batch, unnamed"
"""Stands for a first axis of free size without a name in `shaped_inputs`."""

HARD_TEXTS = (
    "Der Bär läuft über die große Straße – naïve café, señor, Ωmega.",
    "",
    "模型压缩之后还能用吗? 今日は良い天気ですね。 안녕하세요 세계",
    "Great 👍🏽 service!!! 😀 I'd buy it again… (5/5) https://example.org/?q=a&b=c",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
    * 3,
    "ok",
)
"""Accents, nothing at all, scripts without spaces, emoji with modifiers, a long text, a short one."""


@dataclass(frozen=True)
class Case:
    """One batch on which outputs are compared.

    Attributes:
        name: For the report, such as `3 x 17, padded left`.
        feeds: Input name to array.
        text: The text behind it, for the golden samples.
        decoder: Whether the outputs belong to the last tokens of a longer sequence (see `decoder_inputs`).
    """

    name: str
    feeds: Feeds
    text: str | None = None
    decoder: bool = False

    @property
    def mask(self) -> np.ndarray | None:
        """True where a token counts, bool [batch, sequence]; None without an attention mask."""
        mask = self.feeds.get("attention_mask")
        return None if mask is None or mask.ndim != 2 else mask.astype(bool)

    def mask_for(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """Where an output of this shape counts, bool over its leading axes; None where all of it does."""
        mask = self.mask
        if mask is None or len(shape) < 2:
            return None
        if self.decoder:
            return mask_of_output(mask, shape)
        return mask if shape[:2] == mask.shape else None


def comparison_cases(exported: ExportedModel, data: Dataset | None) -> list[Case]:
    """Batches of different shapes, by tokenizer where there is one, from the data or the signature otherwise."""
    decoding = decoding_of(exported)
    if decoding is not None:
        return [Case(name, feeds, decoder=True) for name, feeds in decoder_feeds(exported, decoding, HARD_TEXTS)]
    if exported.tokenize is not None:
        return _text_cases(exported)
    if data is not None and data.kind == "arrays":
        fixed = fixed_batch(exported.signature)
        sizes = sorted({1, min(4, len(data))}) if fixed is None else [_filled(data, fixed)]
        return [Case(f"data, batch {size}", stack(exported.signature, data, 0, size)) for size in sizes]
    return _shape_cases(exported)


def golden_cases(exported: ExportedModel, data: Dataset | None) -> list[Case]:
    """Single samples that any consumer can check itself with."""
    if exported.tokenize is not None:
        tokenize = exported.tokenize
        cases = [Case(f"text {i}", tokenize([text]), text) for i, text in enumerate(HARD_TEXTS)]
        return [case for case in cases if _reads_something(case.feeds)]
    return comparison_cases(exported, data)[:2]


def _reads_something(feeds: Feeds) -> bool:
    """Whether there is anything in the main input, which stands first; a cache may well be empty."""
    return bool(next(iter(feeds.values())).size)


def benchmark_settings(exported: ExportedModel, data: Dataset | None, settings: BenchmarkSettings) -> list[Setting]:
    """Batch 1 at the data's own lengths, and the fixed, compute-bound batch: they give very different answers."""
    decoding = decoding_of(exported)
    if decoding is not None:
        return _decoder_settings(exported, decoding, settings)
    if exported.tokenize is not None:
        return _text_settings(exported, data, settings)
    fixed = fixed_batch(exported.signature)
    one, batch = fixed or 1, fixed or settings.batch
    if data is not None and data.kind == "arrays":
        one, batch = _filled(data, one), min(batch, len(data))
        starts = range(0, len(data) - one + 1, one)[: settings.rounds]
        single = [stack(exported.signature, data, start, one) for start in starts]
        many = stack(exported.signature, data, 0, batch)
    elif len(exported.known_inputs) > 1:
        by_size = sorted(exported.known_inputs, key=lambda feeds: sum(array.size for array in feeds.values()))
        single, many = [dict(by_size[0])], dict(by_size[-1])
        one, batch = _rows(single[0]), _rows(many)
    else:
        axis = _batch_axis(exported.signature)
        single = [shaped_inputs(exported, {axis: one}, seed=i) for i in range(4)]
        many = shaped_inputs(exported, {axis: batch}, seed=9)
    rows = [Setting("latency", one, _shapes(single[0]), single)]
    if _shapes(many) != rows[0].shape:
        rows.append(Setting("throughput", batch, _shapes(many), [many]))
    return rows


def _decoder_settings(exported: ExportedModel, decoding: Decoding, settings: BenchmarkSettings) -> list[Setting]:
    """One more token after a text, as most calls are; and a batch of whole texts, as the first ones are."""
    length = min(n for n in (settings.sequence, (exported.max_length or 10**6) - 1) if n is not None)
    step = step_after(exported, decoding, length)
    ids = np.resize(step["input_ids"], (settings.batch, length))
    return [
        Setting("latency", 1, f"1 token after {length}", [step]),
        Setting("throughput", settings.batch, f"{settings.batch} x {length} tokens", [decoding.feeds(ids, keep=1)]),
    ]


def _text_settings(exported: ExportedModel, data: Dataset | None, settings: BenchmarkSettings) -> list[Setting]:
    tokenize = exported.tokenize
    assert tokenize is not None
    texts, pairs = dataset_texts(data.head(max(settings.rounds, settings.batch)) if data else None)
    single = [tokenize([t], None if pairs is None else [pairs[i]]) for i, t in enumerate(texts[: settings.rounds])]
    lengths = [feeds["input_ids"].shape[1] for feeds in single]
    length = min(n for n in (settings.sequence, exported.max_length) if n is not None)
    # Compute-bound: every token is real, as in the busiest batch that a server would make
    longest = " ".join(texts) + " " + " ".join(HARD_TEXTS[-2:]) * 20
    many = tokenize([longest] * settings.batch, max_length=length)
    return [
        Setting("latency", 1, f"1 x own length ({min(lengths)}-{max(lengths)} tokens)", single),
        Setting("throughput", settings.batch, f"{settings.batch} x {many['input_ids'].shape[1]} tokens", [many]),
    ]


def dataset_texts(data: Dataset | None) -> tuple[list[str], list[str] | None]:
    """The texts of a dataset and, for pairs, the second ones; built-in sentences without a dataset."""
    if data is None:
        return [t for t in HARD_TEXTS if t], None
    if data.kind == "arrays":
        raise InputError("this model reads text, the data holds arrays", next_step="Give data with texts.")
    if data.kind == "words":
        return [" ".join(example.words or ()) for example in data.examples], None
    texts = [example.text or "" for example in data.examples]
    pairs = [example.text_pair or "" for example in data.examples] if data.kind == "pairs" else None
    return texts, pairs


def stack(signature: Signature, data: Dataset, start: int, count: int) -> Feeds:
    """Examples start .. start + count of an array dataset as one batch, in the dtypes that the model reads."""
    rows = [example.arrays or {} for example in data.examples[start : start + count]]
    feeds: Feeds = {}
    for spec in signature.inputs:
        if spec.name not in rows[0]:
            raise InputError(
                f"{data.name} has no array for input '{spec.name}'",
                next_step=f"It has: {', '.join(rows[0])}. Name the arrays after the inputs.",
            )
        arrays = [row[spec.name] for row in rows]
        if len({a.shape for a in arrays}) > 1:
            raise InputError(f"{data.name}: examples of '{spec.name}' differ in shape", next_step="Pad them.")
        feeds[spec.name] = np.stack(arrays).astype(spec.dtype, copy=False)
    return feeds


def calibration_batches(exported: ExportedModel, data: Dataset, settings: CalibrationSettings) -> list[Feeds]:
    """Batches without padding: examples of the same length stand together, so that no statistic sees a pad token.

    Raises:
        InputError: The data does not fit the model, or does not fill one batch of its fixed size.
    """
    chosen = data.sample(settings.examples, seed=0)
    if exported.tokenize is not None:
        texts, pairs = dataset_texts(chosen)
        single = [exported.tokenize([t], None if pairs is None else [pairs[i]]) for i, t in enumerate(texts)]
        single = [feeds for feeds in single if _reads_something(feeds)]
    elif chosen.kind == "arrays":
        single = [_unpadded(exported.signature, stack(exported.signature, chosen, i, 1)) for i in range(len(chosen))]
    else:
        raise InputError(
            f"{exported.source.name} has no tokenizer, so it cannot read texts",
            next_step="Give --calibration FILE.npz with one array an input.",
        )
    alike: dict[tuple[tuple[int, ...], ...], list[Feeds]] = {}
    for feeds in single:
        alike.setdefault(tuple(array.shape for array in feeds.values()), []).append(feeds)
    fixed = fixed_batch(exported.signature)
    size = fixed or settings.batch
    groups = [group[i : i + size] for group in alike.values() for i in range(0, len(group), size)]
    groups = [group for group in groups if fixed is None or len(group) == fixed]
    if not single:
        raise InputError(f"{data.name} holds no example with anything to read", next_step="Give at least one.")
    if not groups:
        raise InputError(
            f"{data.name}: no batch of {size} examples of one shape, the model's fixed size",
            next_step=f"Give at least {size} examples, or export with a dynamic batch.",
        )
    return [{name: _joined([feeds[name] for feeds in group]) for name in group[0]} for group in groups]


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One batch; a scalar is the same for all."""
    return np.concatenate(arrays) if arrays[0].ndim else arrays[0]


def _unpadded(signature: Signature, feeds: Feeds) -> Feeds:
    """One example without the padding at its end, where the model takes any length."""
    mask = feeds.get("attention_mask")
    spec = next((spec for spec in signature.inputs if spec.name == "attention_mask"), None)
    if mask is None or spec is None or mask.ndim != 2 or len(spec.shape) != 2 or isinstance(spec.shape[1], int):
        return feeds
    length = int(np.count_nonzero(mask))
    if length == 0 or not bool(mask[0, :length].all()):
        return feeds
    return {s.name: _cut(feeds[s.name], _along(s, spec.shape[1]), mask.shape[1], length) for s in signature.inputs}


def _along(spec: TensorSpec, name: str | None) -> list[int]:
    """The axes behind the batch that carry a name; the second one stands for those without."""
    return [axis for axis, dim in enumerate(spec.shape) if axis > 0 and dim == name and (name or axis == 1)]


def _cut(array: np.ndarray, axes: Sequence[int], full: int, length: int) -> np.ndarray:
    for axis in axes:
        if array.ndim > axis and array.shape[axis] == full:
            array = np.take(array, range(length), axis=axis)
    return array


def _text_cases(exported: ExportedModel) -> list[Case]:
    tokenize = exported.tokenize
    assert tokenize is not None
    together = tokenize([t for t in HARD_TEXTS if t])
    cases = [
        Case(f"{_shape(together)} tokens, padded right", together),
        Case("empty text", tokenize([""])),
        Case("1 token", {name: array[:1, :1] for name, array in tokenize([HARD_TEXTS[0]]).items()}),
    ]
    left = _padded_left(together)
    if left is not None:
        cases.append(Case(f"{_shape(left)} tokens, padded left", left))
    for text in HARD_TEXTS[3:5]:
        feeds = tokenize([text])
        cases.append(Case(f"{_shape(feeds)} tokens", feeds))
    return [case for case in cases if all(array.size for array in case.feeds.values())]


def _padded_left(feeds: Feeds) -> Feeds | None:
    """Move each row's padding to its front."""
    mask = feeds.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    turned = {name: array.copy() for name, array in feeds.items()}
    for row in range(mask.shape[0]):
        shift = int((mask[row] == 0).sum())
        for array in turned.values():
            array[row] = np.roll(array[row], shift)
    return turned


def _shape_cases(exported: ExportedModel) -> list[Case]:
    known = [Case(f"call {i}, {_shapes(feeds)}", dict(feeds)) for i, feeds in enumerate(exported.known_inputs, start=1)]
    return known if len(known) > 1 else [*known, *_random_cases(exported)]


def _random_cases(exported: ExportedModel) -> list[Case]:
    """Three batches of different sizes, all axes of size 1 among them; others where the original refuses these.

    A stack of convolutions has a smallest image, and a top-k a smallest choice: what the original cannot compute is
    nothing to compare with.
    """
    axes = list(exported.signature.dynamic_axes())
    if any(spec.shape[:1] == (None,) for spec in exported.signature.inputs):
        axes.insert(0, UNNAMED_BATCH)
    if not axes:
        return [Case("fixed shape", shaped_inputs(exported, {}, seed=0))]
    example = {axis: known for axis in axes if (known := _example_size(exported, axis)) is not None}
    sizes = [
        {axis: 2 + i for i, axis in enumerate(axes)},
        dict.fromkeys(axes, 1),
        {axis: 5 - (i % 3) for i, axis in enumerate(axes)},
        example,
        {axis: size + 1 for axis, size in example.items()},
        {axis: 2 * size for axis, size in example.items()},
    ]
    cases: list[Case] = []
    for seed, size in enumerate(sizes):
        name = ", ".join(f"{axis} {n}" for axis, n in size.items())
        case = Case(name, shaped_inputs(exported, size, seed=seed))
        if len(cases) < 3 and size and _computes(exported, case):
            cases.append(case)
    return cases or [Case("as in the example", shaped_inputs(exported, example, seed=0))]


def _example_size(exported: ExportedModel, axis: str) -> int | None:
    for spec in exported.signature.inputs:
        if axis in spec.shape and spec.name in (exported.fixed_inputs or {}):
            return int((exported.fixed_inputs or {})[spec.name].shape[spec.shape.index(axis)])
    return None


def _computes(exported: ExportedModel, case: Case) -> bool:
    """Whether the original, where it is another than the graph, takes these inputs."""
    try:
        if exported.reference is not None:
            exported.reference.run(case.feeds)
    except InputError:
        return False
    return True


def shaped_inputs(exported: ExportedModel, sizes: Mapping[str, int], *, seed: int) -> Feeds:
    """Random inputs after the signature; example inputs set the scale of floats and the range of integers.

    Args:
        exported: Its signature, and for a factory its example inputs.
        sizes: Axis name to size; an axis that is not in it is as long as in the example, or 2.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    made = {spec.name: _random(spec, exported.fixed_inputs, sizes, rng) for spec in exported.signature.inputs}
    examples = exported.fixed_inputs or {}
    for spec in exported.signature.inputs:
        if spec.name in examples and np.issubdtype(made[spec.name].dtype, np.integer):
            limit = _highest(spec, exported.signature, examples, made)
            made[spec.name] = np.minimum(made[spec.name], limit)
    return made


def _highest(spec: TensorSpec, signature: Signature, examples: Mapping[str, np.ndarray], made: Feeds) -> int:
    """The largest value that an integer input may take beside the other inputs, as far as the example tells.

    Edges name nodes, and lengths count steps: what stays within another input's dynamic axis in the example, an axis
    that the input does not have itself, stays within it at other sizes.
    """
    highest = int(examples[spec.name].max(initial=0))
    limit = int(made[spec.name].max(initial=0))
    for other in (other for other in signature.inputs if other.name in examples):
        for axis, dim in enumerate(other.shape):
            size = examples[other.name].shape[axis]
            if isinstance(dim, str) and dim not in spec.shape and highest <= size:
                limit = min(limit, made[other.name].shape[axis] - (1 if highest < size else 0))
    return limit


def _random(
    spec: TensorSpec, examples: Mapping[str, np.ndarray] | None, sizes: Mapping[str, int], rng: np.random.Generator
) -> np.ndarray:
    example = (examples or {}).get(spec.name)
    shape: list[int] = []
    for axis, dim in enumerate(spec.shape):
        known = example.shape[axis] if example is not None else 2
        name = dim if dim is not None else UNNAMED_BATCH if axis == 0 else ""
        shape.append(name if isinstance(name, int) else sizes.get(name, known))
    seen = example if example is not None and example.size else None
    if spec.name == "attention_mask":
        return np.ones(shape, dtype=spec.dtype)
    if spec.dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if spec.dtype == "string":
        raise InputError(f"input '{spec.name}' is text", next_step="Give example inputs with --evaluation FILE.npz.")
    if np.issubdtype(np.dtype(spec.dtype), np.integer):
        low, high = (int(seen.min()), int(seen.max())) if seen is not None else (0, 1)
        return rng.integers(low, high + 1, shape).astype(spec.dtype)
    mean, spread = (float(seen.mean()), float(seen.std()) or 1.0) if seen is not None else (0.0, 1.0)
    return (mean + spread * rng.standard_normal(shape)).astype(spec.dtype)


def fixed_batch(signature: Signature) -> int | None:
    """The size of the first input's first axis where the graph fixes it; None where any batch fits."""
    first = signature.inputs[0].shape[0] if signature.inputs and signature.inputs[0].shape else 1
    return first if isinstance(first, int) else None


def _batch_axis(signature: Signature) -> str:
    """What the graph calls its batch: the first input's first axis, whatever its name."""
    first = signature.inputs[0].shape[0] if signature.inputs and signature.inputs[0].shape else None
    return first if isinstance(first, str) else UNNAMED_BATCH


def _rows(feeds: Feeds) -> int:
    first = next(iter(feeds.values()))
    return int(first.shape[0]) if first.ndim else 1


def _filled(data: Dataset, batch: int) -> int:
    """Return `batch`, or raise InputError where the data does not fill one."""
    if len(data) < batch:
        raise InputError(
            f"{data.name} has {len(data)} examples, the model reads batches of {batch}",
            next_step=f"Give a multiple of {batch} examples, or export with a dynamic batch.",
        )
    return batch


def _shape(feeds: Feeds) -> str:
    return " x ".join(str(n) for n in next(iter(feeds.values())).shape)


def _shapes(feeds: Feeds) -> str:
    shapes = ["x".join(str(n) for n in array.shape) or "scalar" for array in feeds.values()]
    return ", ".join(shapes[:4] + (["..."] if len(shapes) > 4 else []))  # a cache has two for each layer
