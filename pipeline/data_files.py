# SPDX-License-Identifier: Apache-2.0
"""The data files behind `data.load_dataset`: one reader a form, each from bytes to examples.

A reader raises InputError with the file's name and the line, and never guesses: a row that does not fit is an error.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from ..contracts.errors import InputError, MissingDependency, did_you_mean

FORMS = {".iob": "conll", ".iob2": "conll", ".bio": "conll"} | {
    "." + form: form for form in ("tsv", "csv", "jsonl", "parquet", "conll", "txt", "npz")
}
_TEXT_ROLES = ("text", "pair", "label", "context")
ROLES = (*_TEXT_ROLES, "words", "tags")
_OPTIONS = {
    "tsv": (*_TEXT_ROLES, "header", "extra"),
    "csv": (*_TEXT_ROLES, "header", "extra"),
    "jsonl": ROLES,
    "parquet": ROLES,
    "npz": ("arrays", "label"),
    "conll": (),
    "txt": (),
}
_USUAL_NAMES = {
    "text": ("text", "sentence", "sentence1"),
    "pair": ("sentence2",),
    "label": ("label", "score"),
    "words": ("words", "tokens"),
    "tags": ("tags", "ner_tags"),
}


@dataclass(frozen=True)
class Example:
    """One example. What a form does not have is None.

    Attributes:
        text: The text, or the first of a pair, or the question about `context`.
        text_pair: The second text of a pair.
        label: A class by id or by name, or a score; strings stay as the file has them.
        words: A sentence split into words, for token classification.
        tags: One tag a word, where the data has them.
        context: The passage that `text` asks about (question answering; `label` is then the answer).
        arrays: Model inputs by name, for this one example: no batch axis.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | int | float | None = None
    words: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    context: str | None = None
    arrays: Mapping[str, NDArray[Any]] | None = None


@dataclass(frozen=True)
class Source:
    """A data file, its form, and how its query maps columns to roles."""

    path: Path
    form: str
    columns: Mapping[str, str] = field(default_factory=dict)  # role -> name or number
    header: bool = False
    extra: bool = False  # rows may be longer than the first one

    @property
    def name(self) -> str:
        return self.path.name


def row_error(where: str, what: str, next_step: str) -> InputError:
    """Return the error for one place in the data: `where` is `file.tsv line 17`, `file.parquet row 3`."""
    return InputError(f"{where}: {what}", next_step=next_step)


# --- the spec ---------------------------------------------------------------------------------------------------------


def open_source(spec: str) -> tuple[Source, bytes]:
    """Return what `spec` says about a file, and the file's bytes; raise InputError where either makes no sense."""
    path_text, _, query = (spec, "", "") if os.path.exists(spec) else spec.partition("?")
    path = Path(path_text)
    options = _options(query, path.name)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such data file: {path_text}", next_step=_closest_sibling(path)) from None
    except IsADirectoryError:
        raise InputError(f"{path_text} is a folder", next_step="Point at a data file in it.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path_text}: {reason}", next_step="Point at a readable file.") from None
    form = options.pop("format", None) or FORMS.get(path.suffix.lower())
    if form is None and raw.lstrip(b"\xef\xbb\xbf").startswith(b"-DOCSTART-"):
        form = "conll"
    if form not in READERS:
        step = f"Say what it is: {path.name}?format=F, F one of {', '.join(sorted(READERS))}."
        raise InputError(f"{path.name}: unknown kind of data file", next_step=step)
    return _source(path, form, options), raw


def _options(query: str, name: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict") if query else []
    except ValueError:
        pairs = [("", "")]
    if len({key for key, _ in pairs}) != len(pairs) or not all(key and value for key, value in pairs):
        raise InputError(f"{name}: cannot read '?{query}'", next_step="Write it as file.csv?text=title&label=class.")
    return dict(pairs)


def _source(path: Path, form: str, options: dict[str, str]) -> Source:
    for key in options:
        if key not in _OPTIONS[form]:
            step = did_you_mean(key, _OPTIONS[form]) or "Leave it out."
            raise InputError(f"{path.name}: a {form} file takes no '{key}'", next_step=step)
    columns = {key: value for key, value in options.items() if key not in ("header", "extra")}
    if form != "npz" and columns and not columns.keys() & {"text", "words"}:
        raise InputError(f"{path.name}: the mapping names no text", next_step="Add text=COLUMN.")
    header = options.get("header", "yes" if form == "csv" else "no")
    if form == "tsv" and "header" not in options and not all(value.isdecimal() for value in columns.values()):
        header = "yes"
    if header not in ("yes", "no") or options.get("extra", "ignore") != "ignore":
        step = "Write header=yes, header=no or extra=ignore."
        raise InputError(f"{path.name}: cannot read the query", next_step=step)
    return Source(path, form, columns, header == "yes", "extra" in options)


def _closest_sibling(path: Path) -> str:
    try:
        siblings = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in FORMS)
    except (OSError, ValueError):
        return f"There is no folder {path.parent} either; check the path."
    close = get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return did_you_mean(path.name, close or siblings[:10]) or "Check the path; there is no data file in that folder."


# --- text and tables --------------------------------------------------------------------------------------------------


def _text(raw: bytes, source: Source) -> str:
    """Decode UTF-8 and drop a byte order mark and the blank lines at the end."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise row_error(f"{source.name} line {line}", "not UTF-8 text", "Save the file as UTF-8.") from None


def _lines(raw: bytes, source: Source) -> Iterator[tuple[int, str]]:
    text = _text(raw, source)
    if text:
        yield from ((n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1))


@contextmanager
def any_field_size() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a field, which is global, for as long as a file is read."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_tsv(raw: bytes, source: Source) -> Iterator[Example]:
    return _table(((n, line.split("\t")) for n, line in _lines(raw, source)), source)


def _read_csv(raw: bytes, source: Source) -> Iterator[Example]:
    return _table(_csv_rows(raw, source), source)


def _csv_rows(raw: bytes, source: Source) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(_text(raw, source), newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        step = 'Quote a field with "…" and double the quotes inside it.'
        raise row_error(f"{source.name} line {line}", f"broken CSV: {error}", step) from None


def _table(rows: Iterable[tuple[int, list[str]]], source: Source) -> Iterator[Example]:
    width, columns = 0, dict[str, int]()
    for line, cells in rows:
        where = f"{source.name} line {line}"
        if not columns:
            width = len(cells)
            columns = _column_numbers(cells, source, where)
            if source.header:
                continue
        if len(cells) != width and not (source.extra and len(cells) > width):
            step = "Repair the row"
            step += "; extra=ignore in the query accepts longer rows." if len(cells) > width else "."
            raise row_error(where, f"expected {width} columns, found {len(cells)}", step)
        yield example_from(where, {role: cells[index] for role, index in columns.items()})


def _column_numbers(cells: list[str], source: Source, where: str) -> dict[str, int]:
    """Return the index of each role's column, from the header or from the number of columns."""
    if source.header:
        names = [cell.strip() for cell in cells]
        chosen = _columns(names, source, where)
        if twice := [name for name in chosen.values() if names.count(name) > 1]:
            raise row_error(where, f"two columns named '{twice[0]}'", "Map columns by number, or rename one.")
        return {role: names.index(name) for role, name in chosen.items()}
    if not source.columns:
        roles = {2: ("text", "label"), 3: ("text", "pair", "label")}.get(len(cells))
        if roles is None:
            found = f"expected 2 columns (text, label) or 3 (text, text, label), found {len(cells)}"
            raise row_error(where, found, f"Map them: {source.name}?header=no&text=1&label=2.")
        return {role: index for index, role in enumerate(roles)}
    for role, number in source.columns.items():
        if not number.isdecimal() or not 1 <= int(number) <= len(cells):
            found = f"{role}={number} is not a column number from 1 to {len(cells)}"
            raise row_error(where, found, "Without a header, map columns by number: header=no&text=2&label=1.")
    return {role: int(number) - 1 for role, number in source.columns.items()}


def _columns(names: Sequence[str], source: Source, where: str) -> dict[str, str]:
    """Return the name of each role's column: the mapped ones, or the usual names that are there."""
    for name in source.columns.values():
        if name not in names:
            step = did_you_mean(name, [n[:40] for n in names[:40]]) + (
                " Columns by number need header=no." if name.isdecimal() else ""
            )
            raise row_error(where, f"no column '{name}'", step)
    usual = {
        role: next((name for name in candidates if name in names), "") for role, candidates in _USUAL_NAMES.items()
    }
    chosen = dict(source.columns) or {role: name for role, name in usual.items() if name}
    if not source.columns and "text" in chosen:
        chosen = {role: name for role, name in chosen.items() if role in _TEXT_ROLES}
    if not chosen.keys() & {"text", "words"}:
        known = ", ".join(name[:30] for name in names[:20])
        step = f"Map them: {source.name}?text=COLUMN&label=COLUMN, or by number with header=no."
        raise row_error(where, f"no text among the columns {known}", step)
    return chosen


def _read_jsonl(raw: bytes, source: Source) -> Iterator[Example]:
    columns: dict[str, str] = {}
    for line, content in _lines(raw, source):
        where = f"{source.name} line {line}"
        try:
            row = json.loads(content)
            if "\\u" in content:
                json.dumps(
                    row, ensure_ascii=False
                ).encode()  # refuses half of a surrogate pair, as every tokenizer does
        except (ValueError, RecursionError) as error:
            raise row_error(where, f"broken JSON: {error}", "Write one JSON object a line.") from None
        if not isinstance(row, dict):
            raise row_error(where, "expected a JSON object", "Write one JSON object a line.")
        columns = columns or _columns(list(row), source, where)
        yield _row(where, row, columns)


def _read_parquet(raw: bytes, source: Source) -> Iterator[Example]:
    try:
        from pyarrow import parquet
    except ImportError:
        step = 'pip install "onnxpress[parquet]"'
        raise MissingDependency(f"{source.name}: reading .parquet needs pyarrow", next_step=step) from None
    try:
        table = parquet.ParquetFile(io.BytesIO(raw))
        columns = _columns(list(table.schema_arrow.names), source, source.name)
        batches = table.iter_batches(columns=sorted(set(columns.values())))
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield _row(f"{source.name} row {number}", row, columns)
    except (ValueError, OSError, NotImplementedError) as error:  # pyarrow's own errors derive from these
        raise InputError(f"{source.name}: broken parquet file: {error}", next_step="Write the file anew.") from None


def _row(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    for name in columns.values():
        if name not in row:
            raise row_error(where, f"no '{name}'", "Every row needs the columns that the first one has.")
    return example_from(where, {role: row[name] for role, name in columns.items()})


def example_from(where: str, values: Mapping[str, Any]) -> Example:
    """Check the values of one row, by role, and make an example of them."""
    texts = {role: values.get(role) for role in ("text", "pair", "context")}
    for role, value in texts.items():
        if role in values and not isinstance(value, str):
            raise row_error(where, f"expected a string as {role}, found {describe(value)}", "Repair the row.")
    words, tags = (_strings(where, role, values[role]) if role in values else None for role in ("words", "tags"))
    if tags is not None and words is None:
        raise row_error(where, "tags without words", "Map the words too: words=COLUMN.")
    if words is not None and (not words or (tags is not None and len(tags) != len(words))):
        found = f"{len(words)} words" + (f" but {len(tags)} tags" if tags is not None else "")
        raise row_error(where, found, "Give every sentence at least one word, and every word one tag.")
    label = label_from(where, values["label"]) if "label" in values else None
    return Example(texts["text"], texts["pair"], label, words, tags, texts["context"])


def _strings(where: str, role: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, (str, int)) for v in value):
        raise row_error(where, f"expected a list of strings as {role}, found {describe(value)}", "Repair the row.")
    return tuple(str(v) for v in value)


def label_from(where: str, value: Any) -> str | int | float:
    """Return a label as a plain str, int or finite float; raise InputError for an empty one or anything else."""
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if value is None or (isinstance(value, str) and not value.strip()):
        raise row_error(where, "empty label", "Fill it in, or remove the row.")
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise row_error(where, f"expected a name or a number as label, found {describe(value)}", "Repair the row.")
    return value


def describe(value: Any) -> str:
    """Return the type and the beginning of a value, for an error message."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]}"


def _read_conll(raw: bytes, source: Source) -> Iterator[Example]:
    """Yield sentences: the first column is the word, the last one its tag (CoNLL-2003, Tjong Kim Sang & De Meulder)."""
    words: list[str] = []
    tags: list[str] = []
    width = 0
    for line, content in _lines(raw, source):
        cells = [cell for cell in content.split("\t" if "\t" in content else " ") if cell]
        if cells and cells[0] != "-DOCSTART-":
            width = width or len(cells)
            if len(cells) != width or width < 2:
                found = f"expected {max(width, 2)} columns, found {len(cells)}"
                raise row_error(f"{source.name} line {line}", found, "Write the word first and its tag last.")
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            yield Example(words=tuple(words), tags=tuple(tags))
            words, tags = [], []
    if words:
        yield Example(words=tuple(words), tags=tuple(tags))


def _read_txt(raw: bytes, source: Source) -> Iterator[Example]:
    return (Example(text=line) for _, line in _lines(raw, source) if line.strip())


# --- arrays -----------------------------------------------------------------------------------------------------------


def _read_npz(raw: bytes, source: Source) -> Iterator[Example]:
    arrays = _npz_arrays(raw, source)
    wanted = source.columns["arrays"].split(",") if "arrays" in source.columns else list(arrays)
    labelled = source.columns.get("label") or next((n for n in ("labels", "label") if n in arrays), None)
    for name in [*wanted, labelled]:
        if name is not None and name not in arrays:
            raise row_error(source.name, f"no array '{name}'", did_you_mean(name, arrays))
    inputs = {name: arrays[name] for name in wanted if name != labelled}
    used = inputs if labelled is None else inputs | {labelled: arrays[labelled]}
    sizes = {name: len(array) if array.ndim else -1 for name, array in used.items()}
    if not inputs or len(set(sizes.values())) != 1 or -1 in sizes.values():
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in used.items())
        step = f"Choose arrays with one row an example: {source.name}?arrays=NAME,NAME&label=NAME."
        raise row_error(source.name, f"the first axes do not agree, or there is no input: {found}", step)
    for row in range(next(iter(sizes.values()))):
        label = None if labelled is None else label_from(f"{source.name} row {row + 1}", arrays[labelled][row])
        yield Example(label=label, arrays={name: np.asarray(array[row]) for name, array in inputs.items()})


# What numpy, zipfile and zlib raise on bytes that are no .npz, a truncated one, an encrypted one, or one with objects.
_BROKEN_NPZ = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError),
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error),
)


def _npz_arrays(raw: bytes, source: Source) -> dict[str, NDArray[Any]]:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}
    except _BROKEN_NPZ as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    step = "Write it with numpy.savez(path, name=array), without objects."
    raise InputError(f"{source.name}: not an .npz of plain arrays: {reason}", next_step=step)


READERS: dict[str, Callable[[bytes, Source], Iterator[Example]]] = {
    "tsv": _read_tsv,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "conll": _read_conll,
    "txt": _read_txt,
    "npz": _read_npz,
}
