# SPDX-License-Identifier: Apache-2.0
"""One line a stage, on standard error, so that nobody waits in the dark and standard output stays clean."""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints `[  12.3 s] export  tracing BertModel` when a stage begins.

    Args:
        enabled: False keeps quiet (library use).
    """

    def __init__(self, *, enabled: bool = False) -> None:
        self.enabled = enabled
        self.started = time.perf_counter()

    def __call__(self, stage: str, detail: str = "") -> None:
        if self.enabled:
            elapsed = time.perf_counter() - self.started
            line = f"[{elapsed:6.1f} s] {stage:<10} {detail}".rstrip()
            if sys.stderr.isatty():
                line = f"\x1b[2m[{elapsed:6.1f} s]\x1b[0m \x1b[1m{stage:<10}\x1b[0m {detail}"
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is where progress is printed
