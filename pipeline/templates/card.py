# SPDX-License-Identifier: Apache-2.0
"""What only the model card needs: the Hub's front matter, and a feed for the model's inputs as Python source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ...contracts.tasks import GENERIC

Json = Mapping[str, Any]

_TEXT_INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def front_matter(manifest: Json) -> str:
    """Return the YAML that the Hub reads, between its rules."""
    source, task = manifest.get("source") or {}, manifest.get("task")
    recipe = (manifest.get("recipe") or {}).get("name")
    data: dict[str, Any] = {"library_name": "onnx"}
    if task and task != GENERIC:
        data["pipeline_tag"] = task
    name = str(source.get("name") or "")
    if source.get("kind") == "transformers" and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        data["base_model"] = name
    data["tags"] = list(dict.fromkeys(filter(None, ("onnx", "onnxruntime", "onnxpress", recipe))))
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def feeds(manifest: Json) -> list[dict[str, str]]:
    """Return a Python expression for each input: from the tokenizer where the bundle has one, else zeros."""
    tokenizer = "tokenizer.json" in (manifest.get("files") or {})
    found = []
    for spec in (manifest.get("signature") or {}).get("inputs") or []:
        dims = [d if isinstance(d, int) else 1 for d in spec.get("shape") or ()]
        dtype = {"string": "object", "bfloat16": "float32", "bool": "bool_"}.get(spec["dtype"], spec["dtype"])
        text = tokenizer and spec["name"] in _TEXT_INPUTS and len(dims) == 2
        copies = f" * {dims[0]}" if text and dims[0] > 1 else ""
        value = (
            f"np.array([text.{_TEXT_INPUTS[spec['name']]}]{copies}, np.{dtype})"
            if text
            else f"np.zeros({tuple(dims)}, np.{dtype})"
        )
        found.append(
            {
                "name": repr(spec["name"]),
                "value": value,
                "text": "yes" if text else "",
                "length": str(_fixed(spec) or ""),
            }
        )
    return found


def _fixed(spec: Json) -> int | None:
    last = (spec.get("shape") or [None])[-1]
    return last if isinstance(last, int) else None
