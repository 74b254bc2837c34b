# SPDX-License-Identifier: Apache-2.0
"""What only the model card needs: the Hub's front matter, what the model does not do, how its inputs are made, and a
feed for them as Python source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ...contracts.tasks import GENERIC

Json = Mapping[str, Any]

_LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "cc", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m",
    "epl-2.0", "eupl-1.2", "gemma", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-3.0", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
"""Licences that the Hub knows by name."""

_SHOWN = 3
"""Outputs whose error is told: a decoder's cache has dozens, and the logits stand first."""

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
    data |= _licence(source.get("license"))
    data["tags"] = list(dict.fromkeys(filter(None, ("onnx", "onnxruntime", "onnxpress", recipe))))
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def _licence(name: Any) -> dict[str, str]:
    """The Hub takes its own lower-case identifiers, and any other name beside `other`."""
    if not name:
        return {}
    known = str(name).lower()
    return {"license": known} if known in _LICENCES else {"license": "other", "license_name": str(name)}


def limits(manifest: Json) -> list[str]:
    """What the model does not do, and how far it is from the original."""
    found = []
    for output, errors in list((manifest.get("parity") or {}).items())[:_SHOWN]:
        if errors.get("max_abs_error") is not None:
            cosine = errors.get("cosine")
            told = f", cosine {cosine:.4f}" if cosine is not None else ""
            found.append(
                f"{output} differs from the original's by {errors['max_abs_error']:.3g} at most{told}, where measured."
            )
    length = manifest.get("max_length")
    if length and any(name in _TEXT_INPUTS for name in _inputs(manifest)):
        found.append(f"Texts are cut at {length} tokens.")
    for spec in (manifest.get("signature") or {}).get("inputs") or []:
        shape = spec.get("shape") or []
        if len(shape) > 1 and all(isinstance(dim, int) for dim in shape):
            found.append(f"{spec['name']} has one size: {' x '.join(map(str, shape))}.")
    return found + list(manifest.get("warnings") or [])


def preparation(manifest: Json) -> list[str]:
    """How texts, pictures and sound become inputs, and what proves it."""
    found = []
    tokenizer, numbers = manifest.get("tokenizer") or {}, manifest.get("preprocessing") or {}
    if tokenizer.get("golden"):
        alike = tokenizer["samples"] - len(tokenizer.get("differs") or {})
        found.append(
            f"Text: tokenizer.json alone, with its padding and truncation. {alike} of {tokenizer['samples']} texts in "
            f"{tokenizer['golden']} (accents, emoji, scripts, nothing, too long) get the ids that transformers gives."
        )
    elif tokenizer:
        found.append(f"Text: {tokenizer['reason']}.")
    if numbers.get("refused"):
        found.append(
            f"{str(numbers['kind']).capitalize()}: {numbers['refused']}; prepare inputs with the source's own code."
        )
    elif numbers:
        proof = (
            f"held against the source's own processor (largest difference {numbers['difference']:.2g}); an example is "
            f"in {numbers['golden']}"
            if numbers.get("golden")
            else "not compared with the source's own code"
        )
        found.append(f"{str(numbers['kind']).capitalize()}: the numbers in {numbers['file']}, {proof}.")
    return found


def _inputs(manifest: Json) -> list[str]:
    return [str(spec["name"]) for spec in (manifest.get("signature") or {}).get("inputs") or []]


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
