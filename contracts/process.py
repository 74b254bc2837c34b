# SPDX-License-Identifier: Apache-2.0
"""What this process has used so far."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_mib() -> float:
    """Return the highest resident memory of this process so far, in MiB.

    On Linux this is VmHWM, not getrusage's ru_maxrss: the latter is carried over fork and exec, so that a probe
    started from a process that holds 600 MiB reports 600 MiB (measured) whatever it does itself.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
