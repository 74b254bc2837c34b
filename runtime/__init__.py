# SPDX-License-Identifier: Apache-2.0
"""What runs a bundle: sessions, profiles, benchmarks and verification. Needs neither torch nor transformers.

Importing this imports nothing heavy; each name is loaded when it is first used. What describes the machine is in
`onnxpress.runtime.machine`, whose function has the module's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..contracts.lazy import lazy_names

if TYPE_CHECKING:
    from .benchmark import Contender, Measurement, Setting, measure
    from .bundle import VerifyResult, hash_file, read_manifest, verify, write_sums
    from .kernels import Kernel, executed_kernels
    from .machine import default_threads
    from .profiling import NodeTime, OperatorTime, by_operator, operators_after_optimization, profile
    from .session import PROVIDERS, Session, available_providers, require_provider

__all__ = [
    "PROVIDERS",
    "Contender",
    "Kernel",
    "Measurement",
    "NodeTime",
    "OperatorTime",
    "Session",
    "Setting",
    "VerifyResult",
    "available_providers",
    "by_operator",
    "default_threads",
    "executed_kernels",
    "hash_file",
    "measure",
    "operators_after_optimization",
    "profile",
    "read_manifest",
    "require_provider",
    "verify",
    "write_sums",
]

__getattr__ = lazy_names(
    __name__,
    {
        "benchmark": ("Contender", "Measurement", "Setting", "measure"),
        "bundle": ("VerifyResult", "hash_file", "read_manifest", "verify", "write_sums"),
        "kernels": ("Kernel", "executed_kernels"),
        "machine": ("default_threads",),
        "profiling": ("NodeTime", "OperatorTime", "by_operator", "operators_after_optimization", "profile"),
        "session": ("PROVIDERS", "Session", "available_providers", "require_provider"),
    },
)
