# SPDX-License-Identifier: Apache-2.0
"""`onnxpress doctor`: what this machine can do, and the command for what it cannot."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..contracts.errors import MissingDependency
from ..runtime.machine import machine
from ..runtime.session import available_providers, require_provider
from .demo import PACKAGE
from .versions import versions


def examine() -> dict[str, Any]:
    """Facts about the machine, providers and extras, and findings with a next step each."""
    facts = machine()
    findings: list[str] = []
    try:
        require_provider("cpu")
    except MissingDependency as error:
        findings.append(f"{error.message}. {error.next_step}")
    try:
        providers = available_providers()
    except MissingDependency:
        providers = []
    isa = set(facts["isa"])
    if "avx2" in isa and not isa & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        findings.append(
            "No VNNI: int8 kernels add products in 16 bit and may saturate. "
            "Use --set passes.quantize_dynamic.reduce_range=true."
        )
    if importlib.util.find_spec(PACKAGE) is None:
        findings.append('The demo\'s model is missing. pip install "onnxpress[demo]"')
    return {
        "versions": versions(),
        "machine": facts,
        "providers": providers,
        "int8": "fast" if isa & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} else "slow",
        "findings": findings,
    }
