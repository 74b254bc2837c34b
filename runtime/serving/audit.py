# SPDX-License-Identifier: Apache-2.0
"""Which bundle answered which request: a log that shows when somebody has changed it.

One JSON object a line, only ever appended. Each line ends with the SHA-256 of itself and names the hash of the line
before it, so nothing in the middle can be changed, removed, added or moved without every later line telling (Haber and
Stornetta 1991). Two things no chain can show by itself: that its end was cut off, and that all of it was written anew.
Keep a hash from it elsewhere from time to time (the log prints the last one when the server stops) and ask for it.

It holds hashes of inputs and outputs, never their content. A server that is killed leaves at most a torn last line,
which the next start removes, and says so in the log.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...contracts.errors import InputError
from .events import Answer
from .logs import moment, to_json

START = "0" * 64
"""What the first line names as the hash before it."""

MOST_WAITING = 100_000
"""Lines that wait for a disk that refuses them; further ones are counted, and the count is written."""

_END = b',"hash":"'
_LONGEST = 1 << 16


def tensors_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named tensors: for each, by name, its name, dtype, shape and little-endian bytes in C order.

    Strings count as their UTF-8 bytes, each after its length.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        plain, word = _plain(array.dtype)
        digest.update(f"{name}\n{word}\n{list(array.shape)}\n".encode())
        if array.dtype.kind in "OUS":
            for item in array.reshape(-1).tolist():
                data = item if isinstance(item, bytes) else str(item).encode()
                digest.update(len(data).to_bytes(8, "little") + data)
        else:
            digest.update(np.ascontiguousarray(array, plain).data)
    return digest.hexdigest()


@lru_cache(64)
def _plain(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], str]:
    """The little-endian form of a type, and its name."""
    plain = dtype.newbyteorder("<")
    return plain, plain.name


class Audit:
    """The log, open for writing.

    Args:
        path: The file; it is made, or continued.

    Attributes:
        head: Hash of the last line.
        lines: Lines that the file has.
        failing: Why lines cannot be written now; empty when they can.

    Raises:
        InputError: Another server writes to it, or its last line was changed, or it cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.head, self.lines, self.failing, self.dropped = START, 0, "", 0
        self._records: deque[dict[str, Any]] = deque()
        self._unwritten = b""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            binary = getattr(os, "O_BINARY", 0)  # Windows would write two bytes for a line's end
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o600)
        except OSError as error:
            raise InputError(f"the audit log {path} cannot be opened: {error.strerror}") from error
        try:
            _lock(self._file, self.path)
            lost = self._continue()
        except BaseException:
            os.close(self._file)
            raise
        if lost:
            self._event("repaired", lost_bytes=lost)

    def loaded(self, model: str, bundle: str, version: str) -> None:
        """Note that a model answers with this bundle from now on."""
        self._event("loaded", model=model, bundle=bundle, version=version)

    def answered(self, answer: Answer, when: float) -> None:
        """Note an answer.

        Args:
            answer: Its tensors are hashed here.
            when: Unix time.
        """
        self._event(
            "answered",
            when,
            request=answer.request_id[:200],
            model=answer.model[:200],
            bundle=answer.bundle,
            route=answer.route,
            status=answer.status,
            input=tensors_hash(answer.inputs) if answer.inputs else None,
            output=tensors_hash(answer.outputs) if answer.outputs and answer.status < 400 else None,
        )

    def write(self) -> None:
        """Hand everything that waits to the operating system, where it outlives this process."""
        try:
            while self._unwritten or self._records or self.dropped:
                if not self._unwritten:
                    self._unwritten = self._next_lines()
                sent = os.write(self._file, self._unwritten)
                self._unwritten = self._unwritten[sent:]
            self.failing = ""
        except OSError as error:
            self.failing = error.strerror or type(error).__name__

    def sync(self) -> None:
        """Wait until the disk has it, so that it outlives a power cut."""
        try:
            os.fsync(self._file)
        except OSError as error:
            self.failing = error.strerror or type(error).__name__

    def close(self) -> None:
        """Write and sync everything, and let go of the file."""
        self.write()
        self.sync()
        os.close(self._file)

    def _event(self, event: str, when: float | None = None, **fields: Any) -> None:
        if len(self._records) >= MOST_WAITING:
            self.dropped += 1
            return
        self._records.append({"time": moment(time.time() if when is None else when), "event": event, **fields})

    def _next_lines(self) -> bytes:
        """The next lines of the file. Once made they have their place in the chain, so they are never dropped."""
        lines = [self._line(self._records.popleft()) for _ in range(min(len(self._records), 1000))]
        if not self._records and self.dropped:
            count, self.dropped = self.dropped, 0
            lines.append(self._line({"time": moment(time.time()), "event": "dropped", "count": count}))
        return b"".join(lines)

    def _line(self, record: dict[str, Any]) -> bytes:
        body = {"n": self.lines + 1, **record, "previous": self.head}
        text = to_json(body).encode()[:-1]
        self.head = _hash(text)
        self.lines += 1
        return text + _END + self.head.encode() + b'"}\n'

    def _continue(self) -> int:
        """Take up the chain where the file ends; return the bytes of a torn last line, which are cut off."""
        size = os.fstat(self._file).st_size
        os.lseek(self._file, max(size - 2 * _LONGEST, 0), os.SEEK_SET)
        tail = os.read(self._file, 2 * _LONGEST)
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn == len(tail) and size > len(tail):
            raise InputError(f"{self.path} does not end like an audit log", next_step="Start a new file.")
        last = tail[: len(tail) - torn].split(b"\n")[-2:-1]
        if last:
            record = _read(last[0])
            if record is None:
                raise InputError(
                    f"the last line of the audit log {self.path} was changed",
                    next_step="Keep the file as it is, and start a new one.",
                )
            self.head, self.lines = record["hash"], record["n"]
        if torn:
            os.ftruncate(self._file, size - torn)
        return torn


def _lock(file: int, path: Path) -> None:
    """Two writers would break each other's chain."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(
            f"another server writes to the audit log {path}", next_step="Give each server its own file."
        ) from error


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _read(line: bytes) -> dict[str, Any] | None:
    """A line's record, or None where its hash is not its own."""
    text, mark, end = line.rpartition(_END)
    if not mark or len(end) != 66 or not end.endswith(b'"}') or end[:64] != _hash(text).encode():
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    named = isinstance(record, dict) and isinstance(record.get("n"), int) and isinstance(record.get("previous"), str)
    return record if named else None


@dataclass(frozen=True)
class AuditResult:
    """What a whole audit log says.

    Attributes:
        lines: Lines.
        answers: Answered requests.
        bundles: Bundle hash to the requests that it answered; the empty one stands for requests that no bundle did.
        dropped: Requests that were answered while the disk refused the log.
        repairs: Starts that found a torn last line.
        torn_bytes: Bytes behind the last whole line now: the server runs, or was killed.
        first: Time of the first line, ISO 8601; empty for an empty log.
        last: Time of the last line.
        head: Hash of the last line: keep it elsewhere, and a log that was cut or rewritten is found out.
    """

    lines: int
    answers: int
    bundles: dict[str, int]
    dropped: int
    repairs: int
    torn_bytes: int
    first: str
    last: str
    head: str


def check_audit(path: str | Path, *, contains: str | None = None) -> AuditResult:
    """Follow the chain from the first line to the last.

    Args:
        path: The audit log.
        contains: A hash that was seen in it before. It has to be there still.

    Raises:
        InputError: The file cannot be read, a line was changed, added, removed or moved, or the hash is not there.
    """
    seen, events, head, number, torn = Counter[str](), Counter[str](), START, 0, 0
    dropped, times, found = 0, ["", ""], contains is None or contains == START
    try:
        with open(path, "rb") as file:
            while line := file.readline(_LONGEST):
                if not line.endswith(b"\n") and len(line) < _LONGEST:
                    torn = len(line)
                    break
                record = _read(line[:-1])
                number += 1
                if record is None:
                    raise InputError(f"{path}: line {number} was changed")
                if record["previous"] != head or record["n"] != number:
                    raise InputError(f"{path}: line {number} does not follow the one before it")
                head = record["hash"]
                found = found or head == contains
                event = str(record.get("event"))
                events[event] += 1
                times = [times[0] or str(record.get("time", "")), str(record.get("time", ""))]
                if event == "answered":
                    seen[str(record.get("bundle", ""))] += 1
                dropped += int(record.get("count", 0)) if event == "dropped" else 0
    except OSError as error:
        raise InputError(f"the audit log {path} cannot be read: {error.strerror}") from error
    if not found:
        raise InputError(f"{path} does not hold the hash {contains}", next_step="It was cut off or written anew.")
    return AuditResult(
        number, events["answered"], dict(seen), dropped, events["repaired"], torn, times[0], times[1], head
    )
