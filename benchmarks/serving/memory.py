# SPDX-License-Identifier: Apache-2.0
"""A server's resident memory over time, and whether it grows."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from .servers import Running

_BLOCKS = 10
_T_95 = 2.306
"""Student's t for 95 % with `_BLOCKS` - 2 degrees of freedom."""


class Watch:
    """Reads the resident memory every `interval` seconds while its block runs."""

    def __init__(self, server: Running, interval: float) -> None:
        self._server, self._interval = server, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.seconds: list[float] = []
        self.mib: list[float] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def tenths(self) -> list[float]:
        """The median of each tenth of the time."""
        return [float(np.median(part)) for part in np.array_split(np.asarray(self.mib), 10)]

    def _read(self) -> None:
        while not self._over.wait(self._interval):
            self.seconds.append(time.perf_counter())
            self.mib.append(self._server.rss_mib())


def slope(seconds: Sequence[float], mib: Sequence[float]) -> tuple[float, float, float]:
    """MiB an hour with its 95 % interval, over the second half: before, buffers are made for each new shape.

    Neighbouring readings are alike, so the line goes through the means of ten blocks, which hardly are.
    """
    skipped = len(seconds) // 2
    x = np.array([block.mean() for block in np.array_split(np.asarray(seconds[skipped:]) / 3600, _BLOCKS)])
    y = np.array([block.mean() for block in np.array_split(np.asarray(mib[skipped:]), _BLOCKS)])
    spread = ((x - x.mean()) ** 2).sum()
    steep = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    left = y - y.mean() - steep * (x - x.mean())
    error = _T_95 * float(np.sqrt((left**2).sum() / (_BLOCKS - 2) / spread))
    return steep, steep - error, steep + error
