# SPDX-License-Identifier: Apache-2.0
"""Memory and load of NVIDIA's GPUs, asked of the driver's own library (NVML), so that nothing has to be installed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Gpu:
    """One GPU now.

    Attributes:
        number: Its place in the driver's order.
        used: Bytes of memory in use, by everybody.
        total: Bytes of memory.
        load: Share of the last sampling period in which a kernel ran, 0 to 1.
    """

    number: int
    used: int
    total: int
    load: float


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):  # nvmlUtilization_t
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


@lru_cache(1)
def _library() -> Any:
    """NVML, initialized; None where there is no driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def gpus() -> list[Gpu]:
    """Every GPU that answers; empty where there is none."""
    library = _library()
    count = ctypes.c_uint(0)
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    found = []
    for number in range(count.value):
        device, memory, utilization = ctypes.c_void_p(), _Memory(), _Utilization()
        if library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(device)) != 0:
            continue
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
            continue
        library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(utilization))  # refused in a slice: stays 0
        found.append(Gpu(number, int(memory.used), int(memory.total), utilization.gpu / 100))
    return found
