# SPDX-License-Identifier: Apache-2.0
"""Weights in memory pages of 2 MiB instead of 4 KiB, so that reading all of them for each token waits less.

A decoder reads every weight once a token, in order. With pages of 4 KiB the processor looks up where the next page lies
250,000 times a GB, and its prefetching ends at each. Linux gives large pages to who asks (setting `madvise`, the
default of most distributions, of transparent_hugepage), and ONNX Runtime does not ask. So this asks for it, once a
session has been made: the pages of large blocks that are in use are put together where they are, without a change to
any address. Elsewhere than on Linux, or where the kernel will not, nothing happens.

References: MADV_HUGEPAGE, MADV_COLLAPSE (Linux 6.1) in madvise(2); smaps in proc_pid_smaps(5).
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_PAGE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25
_SMAPS = Path("/proc/self/smaps")
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)")
_FIELD = re.compile(r"^(Rss|AnonHugePages): +(\d+) kB")
_IN_USE = 0.9
"""A block that is used less is left alone: collapsing fills what was never touched with zeros."""


def use_huge_pages(minimum: int = _PAGE) -> int:
    """Put the large blocks of this process's memory into huge pages.

    Takes about a second for 2 GB. Calling it again costs a millisecond: what is in huge pages stays.

    Args:
        minimum: Smallest block, in bytes.

    Returns:
        Bytes that are in huge pages now and were not before; 0 where the system has none.
    """
    if sys.platform != "linux":
        return 0
    try:
        with _SMAPS.open(encoding="ascii", errors="replace") as lines:
            blocks = list(blocks_of(lines, minimum))
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    done = 0
    for start, length in blocks:
        advised = madvise(start, length, _HUGEPAGE) == 0
        if advised and madvise(start, length, _COLLAPSE) == 0:
            done += length
    return done


def blocks_of(lines: Iterable[str], minimum: int) -> Iterator[tuple[int, int]]:
    """Start and length, in whole huge pages, of anonymous private memory that is in use and in small pages.

    Args:
        lines: Of /proc/PID/smaps.
        minimum: Smallest length, in bytes.
    """
    start = stop = used = 0
    for line in lines:
        head = _HEAD.match(line)
        if head is not None:
            anonymous = head[3].startswith("rw") and head[3].endswith("p") and head[4] == "0"
            start, stop = (int(head[1], 16), int(head[2], 16)) if anonymous else (0, 0)
            continue
        field = _FIELD.match(line)
        if field is None or stop == 0:
            continue
        size = int(field[2]) << 10
        if field[1] == "Rss":
            used = size
            continue
        first, last = -(-start // _PAGE) * _PAGE, stop // _PAGE * _PAGE
        if last - first >= minimum and used >= _IN_USE * (stop - start) and size < last - first:
            yield first, last - first
