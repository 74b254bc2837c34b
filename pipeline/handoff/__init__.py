# SPDX-License-Identifier: Apache-2.0
"""A bundle laid out for one consumer, with the consumer's own code, and a check that runs it on the golden samples."""

from __future__ import annotations

TARGETS: dict[str, str] = {
    "node": "node",
    "web": "web",
    "transformers.js": "transformers_js",
    "cpp": "cpp",
    "c": "c",
    "rust": "rust",
    "java": "java",
    "csharp": "csharp",
    "swift": "mobile",
    "kotlin": "mobile",
    "openvino": "openvino",
    "triton": "triton",
    "kserve": "kserve",
    "genai": "genai",
    "ray-serve": "ray_serve",
}
"""What `--to` takes, to the sub-package whose `TARGETS` holds it."""
