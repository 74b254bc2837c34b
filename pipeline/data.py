# SPDX-License-Identifier: Apache-2.0
"""What `--calibration DATA` and `--evaluation DATA` point at: files and functions, read into plain examples.

A form follows from the file's suffix, or from `?format=` where the suffix does not say. Columns are named, or numbered
from 1, in the same query string: `news.csv?text=title&label=class`, `news.csv?header=no&text=2&label=1`.

    .tsv      text TAB label, or text TAB text TAB label; raw: no quoting, no header unless the mapping names columns
    .csv      quoted as RFC 4180 has it; the first row names the columns unless `header=no`
    .jsonl    one object a line               .parquet  needs `onnxpress[parquet]`
    .conll    words first, tags last, a blank line between sentences
    .txt      one text a line                 .npz      named arrays, first axis = examples; no pickle
    package.module:function                   yields str, or dicts of text and label, or dicts of arrays

Text is UTF-8, with or without a byte order mark, with LF or CRLF. Every fault is an InputError that names the file
and the line. Blank lines are accepted at the end of a table only: in the middle they are rows that lost their content.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..contracts.errors import InputError, OnnxpressError, did_you_mean
from .data_files import (
    READERS,
    ROLES,
    Example,
    any_field_size,
    describe,
    example_from,
    label_from,
    open_source,
    row_error,
)

__all__ = [
    "Dataset",
    "Example",
    "Kind",
    "labels_to_ids",
    "labels_to_scores",
    "load_dataset",
    "standard_library_docstrings",
]

Kind = Literal["text", "pairs", "words", "arrays"]


@dataclass(frozen=True)
class Dataset:
    """Examples of one kind, and where they come from.

    Attributes:
        examples: In the order of the source.
        kind: What each example holds.
        name: The file's name without its folder, or the function; goes to the manifest.
        sha256: Of the file's bytes; for a function, of the examples it yielded. `head` and `sample` keep it.
    """

    examples: tuple[Example, ...]
    kind: Kind
    name: str
    sha256: str

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def head(self, n: int) -> Dataset:
        """Return the first `n` examples, or all where there are fewer."""
        return replace(self, examples=self.examples[: max(n, 0)])

    def sample(self, n: int, seed: int) -> Dataset:
        """Return `n` examples drawn without replacement, in their original order, or all where there are fewer.

        The draw ranks positions by SHA-256 of seed and position, so it is the same on every machine and in every
        version of Python and numpy.
        """
        ranked = sorted(range(len(self)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
        return replace(self, examples=tuple(self.examples[i] for i in sorted(ranked[: max(n, 0)])))


def load_dataset(spec: str, limit: int | None = None) -> Dataset:
    """Read the data that `spec` points at; the forms are listed in this module's docstring.

    Args:
        spec: A path, with an optional query (`format`, `header=yes|no`, `extra=ignore` for rows longer than the first,
            `arrays=name,name` for .npz, and a column for each of text, pair, label, context, words, tags), or
            `package.module:function`, imported with the current folder on the path and called without arguments.
        limit: Read at most this many examples, and check no further.

    Raises:
        InputError: Nothing there, no examples, or a broken row; the message names file and line.
        MissingDependency: A .parquet file without pyarrow.
    """
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} examples leaves no data", next_step="Ask for at least one example.")
    if not os.path.exists(spec) and re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", spec):
        examples = _call(spec, limit)
        return Dataset(examples, _kind(examples, spec), spec, _digest(examples))
    source, raw = open_source(spec)
    with any_field_size():
        examples = tuple(islice(READERS[source.form](raw, source), limit))
    return Dataset(examples, _kind(examples, source.name), source.name, hashlib.sha256(raw).hexdigest())


def labels_to_ids(dataset: Dataset, id2label: Mapping[int, str] | None, num_labels: int) -> NDArray[np.int64]:
    """Return the class ids [n] of all labels, int64.

    A label that is a name in `id2label` (exactly, else in any case) is that class; otherwise it must be a whole number,
    written as one or stored as one, in 0 .. num_labels - 1.

    Raises:
        InputError: A missing, unknown or out-of-range label; names it and the known ones.
    """
    names = {name: int(number) for number, name in (id2label or {}).items()}
    folded = {name.casefold(): number for name, number in reversed(names.items())}
    known = ", ".join([f"{number} {name}" for name, number in names.items()][:30]) or f"0 to {num_labels - 1}"
    ids = np.empty(len(dataset), np.int64)
    for row, example in enumerate(dataset):
        label = example.label
        if label is None:
            raise row_error(f"{dataset.name} example {row + 1}", "no label", "Point at data that has labels.")
        word = str(label).strip()
        found = names.get(word, folded.get(word.casefold()))
        if found is None:
            number = _number(word)
            found = int(number) if number is not None and number.is_integer() else -1
        if not 0 <= found < num_labels:
            raise row_error(
                f"{dataset.name} example {row + 1}",
                f"unknown label '{label}'; the model knows {known}",
                "Map the column that holds the class: file.csv?text=title&label=class.",
            )
        ids[row] = found
    return ids


def labels_to_scores(dataset: Dataset) -> NDArray[np.float64]:
    """Return the labels as scores [n], float64 and finite; raise InputError for a label that is not such a number."""
    scores = np.empty(len(dataset), np.float64)
    for row, example in enumerate(dataset):
        score = None if example.label is None else _number(str(example.label))
        if score is None:
            found = f"expected a number as the score, found '{example.label}'"
            raise row_error(f"{dataset.name} example {row + 1}", found, "Map the column that holds the score.")
        scores[row] = score
    return scores


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in word else None


def _call(spec: str, limit: int | None) -> tuple[Example, ...]:
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        produced: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(produced, part):
                raise InputError(f"{module_name} has no '{part}'", next_step=did_you_mean(part, dir(produced)))
            produced = getattr(produced, part)
        produced = produced()
        if isinstance(produced, (str, Mapping)):
            raise TypeError("it returned one example, not a sequence of examples")
        return tuple(_item(f"{spec} example {n}", item) for n, item in enumerate(islice(produced, limit), 1))
    except OnnxpressError:
        raise
    except Exception as error:
        step = "It must be importable from here, take no arguments, and yield str, or dicts of text or of arrays."
        raise InputError(f"{spec} failed: {type(error).__name__}: {error}", next_step=step) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(here)


def _item(where: str, item: Any) -> Example:
    if isinstance(item, str):
        return Example(text=item)
    if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
        raise row_error(where, f"expected str or a dict by name, found {describe(item)}", "Yield one of these.")
    if isinstance(item.get("text"), str) or "words" in item:
        values = {"pair" if key == "text_pair" else key: value for key, value in item.items()}
        for key in values:
            if key not in ROLES:
                raise row_error(where, f"unknown key '{key}'", did_you_mean(key, ROLES))
        return example_from(where, values)
    inputs = {key: np.asarray(value) for key, value in item.items()}
    for name in ("labels", "label"):
        if name in inputs and inputs[name].ndim == 0:
            label = label_from(where, inputs.pop(name))
            break
    else:
        label = None
    if not inputs or any(array.dtype.kind in "OTmM" for array in inputs.values()):
        step = "Yield dicts of numpy arrays, one example at a time, without a batch axis."
        raise row_error(where, "expected text, or arrays of numbers", step)
    return Example(label=label, arrays=inputs)


def _kind(examples: Sequence[Example], name: str) -> Kind:
    kinds: dict[Kind, int] = {}
    for number, example in enumerate(examples, 1):
        if example.arrays is not None:
            kinds.setdefault("arrays", number)
        elif example.words is not None:
            kinds.setdefault("words", number)
        else:
            kinds.setdefault("pairs" if example.text_pair is not None else "text", number)
    if not kinds:
        raise InputError(f"{name}: no examples", next_step="Point at data with at least one example.")
    if len(kinds) > 1:
        found = " and ".join(f"{kind} (example {number})" for kind, number in kinds.items())
        raise InputError(f"{name}: mixed kinds of examples: {found}", next_step="Yield one kind only.")
    return next(iter(kinds))


def _digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of the examples: a JSON line each, and of each array its name, dtype, shape and bytes."""
    sha = hashlib.sha256()
    for example in examples:
        values = {f.name: getattr(example, f.name) for f in fields(example) if f.name != "arrays"}
        sha.update(json.dumps({k: v for k, v in values.items() if v is not None}, sort_keys=True).encode() + b"\n")
        for name, array in sorted((example.arrays or {}).items()):
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            sha.update(json.dumps([name, little.dtype.str, list(array.shape)]).encode() + b"\n" + little.tobytes())
    return sha.hexdigest()


# --- data that needs no download --------------------------------------------------------------------------------------

_DOCUMENTED = (
    "argparse",
    "ast",
    "asyncio",
    "calendar",
    "collections",
    "configparser",
    "ctypes",
    "datetime",
    "decimal",
    "email",
    "http",
    "inspect",
    "json",
    "logging",
    "multiprocessing",
    "pathlib",
    "random",
    "statistics",
    "subprocess",
    "tarfile",
    "threading",
    "unittest",
    "urllib",
    "xml",
    "zipfile",
)
_WRITTEN_IN = {"datetime": ("datetime", "_pydatetime"), "decimal": ("_pydecimal",)}
_LEAST, _SHORTEST, _LONGEST = 12, 40, 400


def standard_library_docstrings(limit: int) -> Dataset:
    """Return docstrings of Python's standard library, labelled with the module they come from; no download.

    The first paragraphs (40 to 400 characters, whitespace normalized, each text once) of the functions and classes in
    about 25 pure-Python modules with at least 12 such docstrings each. Modules take turns, so any prefix is spread
    evenly over them. The sources are parsed, never imported; the same for a given Python.

    Args:
        limit: At most this many examples; fewer where the library has fewer.

    Raises:
        InputError: `limit` is below 1, or this Python comes without the library's sources.
    """
    name = f"stdlib-docstrings-{sys.version_info.major}.{sys.version_info.minor}"
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    shelves: list[list[Example]] = []
    for module in _DOCUMENTED if limit > 0 else ():
        texts = dict.fromkeys(text for path in _module_files(root, module) for text in _docstrings(path))
        fresh = [text for text in texts if text not in seen]
        if len(fresh) >= _LEAST:
            seen.update(fresh)
            shelves.append([Example(text=text, label=module) for text in fresh])
    longest = max(map(len, shelves), default=0)
    turns = (shelf[turn] for turn in range(longest) for shelf in shelves if turn < len(shelf))
    examples = tuple(islice(turns, max(limit, 0)))
    return Dataset(examples, _kind(examples, name), name, _digest(examples))


def _module_files(root: Path, module: str) -> Iterator[Path]:
    for stem in _WRITTEN_IN.get(module, (module,)):
        inside = sorted(path.relative_to(root) for path in (root / stem).rglob("*.py"))
        yield from (root / path for path in (Path(f"{stem}.py"), *inside) if not {"test", "tests"} & set(path.parts))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return
    documented = [n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(documented, key=lambda node: node.lineno):
        text = " ".join(re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0].split())
        if _SHORTEST <= len(text) <= _LONGEST:
            yield text
