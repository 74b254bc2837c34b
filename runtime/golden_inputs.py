# SPDX-License-Identifier: Apache-2.0
"""How a bundle proves its reading of texts, pictures and sound: what the source's own processor made of some examples.

golden/tokens.json               {"tokenizer": class, "samples": [{"name", "texts", "pairs" (or null), "limit" (or
                                 null), "input_ids", "attention_mask", "token_type_ids"}]}: each sample is one batch,
                                 cut at `limit` tokens and padded to the longest text in it
golden/preprocessing.safetensors `<name>/picture` uint8 [rows, columns, 3] or `<name>/clip` float32 [samples], and
                                 `<name>/<input>`: what the processor gave for it, without the batch axis
golden/picture.png, clip.wav     one of these examples as a file

The manifest names the samples that `tokenizers` alone is known to read differently (`tokenizer.differs`); all others
have to agree exactly, and pictures and sound within `preprocessing.tolerance`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import BundleError, GateFailed
from ..contracts.signature import Signature, TensorSpec
from .audio import AudioSteps
from .images import ImageSteps
from .session import Array
from .text import TextEncoder

GOLDEN_TOKENS = "golden/tokens.json"
GOLDEN_ARRAYS = "golden/preprocessing.safetensors"
COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
EVERYTHING = Signature(tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in COLUMNS), ())
"""A signature that reads all that a tokenizer gives."""


def differing(folder: Path, samples: list[dict[str, Any]]) -> dict[str, str]:
    """The names of the samples that `TextEncoder` reads differently with this folder's files, and how."""
    encoder = TextEncoder(folder, EVERYTHING)
    found = {}
    for sample in samples:
        encoder.set_limit(sample["limit"])
        read = encoder(sample["texts"], sample["pairs"])
        wrong = [name for name in COLUMNS if read[name].tolist() != sample[name]]
        if wrong:
            found[str(sample["name"])] = _first_difference(read[wrong[0]].tolist(), sample[wrong[0]], wrong[0])
    return found


def _first_difference(read: list[list[int]], wanted: list[list[int]], name: str) -> str:
    for row, (ours, theirs) in enumerate(zip(read, wanted, strict=False)):
        for position, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            if one != other:
                return f"{name}[{row}][{position}] is {one} instead of {other}"
        if len(ours) != len(theirs):
            return f"{name}[{row}] has {len(ours)} tokens instead of {len(theirs)}"
    return f"{name} has {len(read)} rows instead of {len(wanted)}"


def check_tokens(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Read the golden texts again; returns how many agree. 0 where the bundle has none.

    Raises:
        GateFailed: One is read differently, and the manifest does not say so.
        BundleError: The file cannot be read.
    """
    facts = _facts(manifest, "tokenizer")
    if not facts.get("golden"):
        return 0
    try:
        samples = json.loads((folder / GOLDEN_TOKENS).read_text("utf-8"))["samples"]
        found = differing(folder, samples)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{GOLDEN_TOKENS} cannot be read", next_step="Press it again.") from error
    unknown = [name for name in found if name not in (facts.get("differs") or {})]
    if unknown:
        raise GateFailed(
            f"the tokenizer reads the golden text '{unknown[0]}' differently: {found[unknown[0]]}",
            next_step="Compare the version of `tokenizers` with the one in the manifest.",
        )
    return len(samples) - len(found)


def check_preprocessing(folder: Path, manifest: Mapping[str, Any]) -> dict[str, float]:
    """Prepare the golden pictures or clips again; returns the largest difference of each input, empty without any.

    Raises:
        GateFailed: One differs by more than the bundle's tolerance.
        BundleError: A file cannot be read.
        MissingDependency: Pillow is not installed.
    """
    facts = _facts(manifest, "preprocessing")
    if not facts.get("golden"):
        return {}
    tolerance = facts.get("tolerance")
    if not isinstance(tolerance, int | float):
        raise BundleError("manifest.json has no tolerance for 'preprocessing'", next_step="Press it again.")
    numbers = _read_numbers(folder)
    try:
        worst = largest_differences(folder, numbers, _read_arrays(folder))
    except (KeyError, TypeError, ValueError) as error:  # numbers or arrays that are not what they should be
        raise BundleError(f"{GOLDEN_ARRAYS} does not fit preprocessing.json", next_step="Press it again.") from error
    for name, difference in worst.items():
        if not difference <= tolerance:
            raise GateFailed(
                f"the golden {numbers['kind']} gives another '{name}': by {difference:.3g}, tolerance {tolerance:.3g}",
                next_step="Compare the versions of Pillow and numpy with those in the manifest.",
            )
    return worst


def largest_differences(
    folder: Path, numbers: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Array]]
) -> dict[str, float]:
    """How far the numbers are from the source's own processor: input name to the largest difference over all examples.

    Args:
        folder: Where the numbers' other files lie.
        numbers: A preprocessing.json.
        arrays: Example to its arrays: `picture` or `clip`, and the inputs that the processor made of it.
    """
    worst: dict[str, float] = {}
    image = ImageSteps(numbers) if numbers["kind"] == "image" else None
    audio = None if image else AudioSteps(numbers, folder)
    for example in arrays.values():
        if image is not None:
            made = {image.input: image(example["picture"])}
        else:
            assert audio is not None
            made = {name: array[0] for name, array in audio([example["clip"]]).items()}
        for name, array in made.items():
            wanted = example.get(name)
            same = wanted is not None and array.shape == wanted.shape
            far = float(np.abs(array - wanted).max(initial=0.0)) if same and wanted is not None else float("inf")
            worst[name] = max(worst.get(name, 0.0), far)
    return worst


def _facts(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    facts = manifest.get(name) or {}
    if not isinstance(facts, Mapping):
        raise BundleError(f"'{name}' in manifest.json is not an object", next_step="Press it again.")
    return facts


def _read_numbers(folder: Path) -> dict[str, Any]:
    try:
        numbers = json.loads((folder / "preprocessing.json").read_text("utf-8"))
        if numbers["kind"] in ("image", "audio"):
            return dict(numbers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError("preprocessing.json cannot be read", next_step="Press it again.") from error
    raise BundleError(f"preprocessing.json is of kind {numbers['kind']!r}", next_step="Press it again.")


def _read_arrays(folder: Path) -> dict[str, dict[str, Array]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(folder / GOLDEN_ARRAYS)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{GOLDEN_ARRAYS} cannot be read", next_step="Press it again.") from error
    examples: dict[str, dict[str, Array]] = {}
    for key, array in stored.items():
        name, _, tensor = key.partition("/")
        examples.setdefault(name, {})[tensor] = array
    return examples
