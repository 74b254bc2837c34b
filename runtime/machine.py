# SPDX-License-Identifier: Apache-2.0
"""The machine that measured, as far as it explains a measurement: never its name, its user or its paths."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimddp",
    "i8mm",
)
"""The instruction sets that decide how fast int8 and bfloat16 run, as the Linux kernel names them."""


def machine() -> dict[str, Any]:
    """Describe this machine for a manifest.

    Returns:
        `cpu` (model name), `cores` (usable by this process), `memory_gib`, `os`, `arch`, `isa` (those of `ISA_FLAGS`
        that the processor has; empty where the system does not say).
    """
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": platform.system(),
        "arch": platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def usable_cores() -> int:
    """Return how many logical cores this process may use: its affinity, cut by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text(Path("/sys/fs/cgroup/cpu.max")).strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def default_threads() -> int:
    """Return one thread a physical core that this process may use: two on one core slow matrix products down."""
    return min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())


def _cpuinfo() -> dict[str, str]:
    """Return the entries of the first processor in /proc/cpuinfo; empty where there is no such file."""
    first = _text(Path("/proc/cpuinfo")).split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): " ".join(value.split()) for key, _, value in pairs}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
