# SPDX-License-Identifier: Apache-2.0
"""A bundle opened for use: what a server, a generator or a handoff asks of it, with every path checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..contracts.errors import BundleError, InputError, did_you_mean
from ..contracts.signature import Signature
from .bundle import MANIFEST, SUMS, GoldenFiles, hash_file, model_path, read_golden, read_manifest, verify
from .session import Array, Session
from .text import TextEncoder

TOKENIZER, CONFIG = "tokenizer.json", "config.json"
PREPROCESSING = "preprocessing.json"


@dataclass(frozen=True)
class GoldenSample:
    """One input that the bundle carries with the reference's answer.

    Attributes:
        name: For messages, such as `text 0`.
        text: What was tokenized, or None.
        inputs: Input name to array, as the graph takes them.
        outputs: Output name to what the reference answered.
    """

    name: str
    text: str | None
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class Bundle:
    """A bundle folder, opened.

    Args:
        folder: The bundle.
        check: Compare every file with its hash first (no session is made); False trusts the folder.

    Attributes:
        folder: Where it lies.
        manifest: manifest.json.

    Raises:
        BundleError: The folder is no bundle, or a file is missing, changed or extra.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if check:
            verify(self.folder, run=False)

    @property
    def name(self) -> str:
        """The manifest's name, or the folder's."""
        return str(self.manifest.get("name") or self.folder.resolve().name)

    @property
    def task(self) -> str:
        """A name from `contracts.tasks`, or `generic`."""
        return str(self.manifest.get("task", "generic"))

    @cached_property
    def sha256(self) -> str:
        """What names this bundle and no other: the hash of SHA256SUMS, which holds the hash of every file."""
        return hash_file(self.folder / SUMS)

    @property
    def variants(self) -> list[str]:
        """The variants' names, the main one first."""
        return list(self.manifest["variants"])

    def model_file(self, variant: str | None = None) -> Path:
        """The `.onnx` of a variant; of the first one without a name.

        Raises:
            InputError: There is no such variant.
            BundleError: The manifest names no file of the bundle.
        """
        name = variant or next(iter(self.manifest.get("variants") or [""]))
        if variant is not None and variant not in self.manifest.get("variants", {}):
            raise InputError(f"{self.name} has no variant '{variant}'", next_step=did_you_mean(variant, self.variants))
        return self.folder / model_path(self.manifest, name)

    def companion_file(self, name: str) -> Path | None:
        """A graph that the model works with (`encoder_model` of an encoder-decoder), or None."""
        for companion in self.manifest.get("companions", ()):
            path = self.folder / str(companion.get("path", ""))
            if companion.get("name") == name and path.resolve().is_relative_to(self.folder.resolve()):
                return path
        return None

    @cached_property
    def signature(self) -> Signature:
        """Inputs and outputs of the main variant."""
        try:
            return Signature.from_json(self.manifest["signature"])
        except (KeyError, TypeError) as error:
            raise BundleError(f"{MANIFEST} has no readable signature", next_step="Press it again.") from error

    @property
    def max_length(self) -> int | None:
        """Longest sequence in tokens, or None without a limit."""
        length = self.manifest.get("max_length")
        return length if isinstance(length, int) else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty where the bundle has none."""
        return self._json(CONFIG)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty where the bundle has none."""
        return self._json("generation_config.json")

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """preprocessing.json, which `ImageEncoder` and `AudioEncoder` read; empty where the bundle has none."""
        return self._json(PREPROCESSING)

    @cached_property
    def labels(self) -> dict[int, str]:
        """`id2label` of config.json; empty where there is none."""
        return {int(number): str(label) for number, label in (self.config.get("id2label") or {}).items()}

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """Text to the model's inputs, cut at the model's limit, or None where the bundle has no tokenizer.json."""
        return self.text_encoder(self.max_length)

    def text_encoder(self, limit: int | None) -> TextEncoder | None:
        """`encoder` with another limit in tokens; None cuts nothing."""
        return TextEncoder(self.folder, self.signature, limit) if (self.folder / TOKENIZER).is_file() else None

    def session(
        self,
        variant: str | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        spinning: bool = False,
    ) -> Session:
        """Load a variant; see `Session`."""
        return Session(self.model_file(variant), provider=provider, threads=threads, spinning=spinning)

    @cached_property
    def _golden_files(self) -> GoldenFiles:
        """See `read_golden`: read once, since every output of every sample asks for its tolerance."""
        return read_golden(self.folder, self.manifest)

    @cached_property
    def golden(self) -> tuple[GoldenSample, ...]:
        """The golden samples."""
        index, arrays = self._golden_files
        rows = zip(index["samples"], arrays, strict=True)
        return tuple(
            GoldenSample(str(row.get("name", i)), row.get("text"), inputs, outputs)
            for i, (row, (inputs, outputs)) in enumerate(rows)
        )

    def tolerance(self, output: str, variant: str | None = None) -> float:
        """How far a variant's output may be from the golden one, absolute.

        Raises:
            BundleError: The golden index says nothing about it.
        """
        index, _ = self._golden_files
        try:
            return float(index["tolerance"][variant or self.variants[0]][output]["max_abs"])
        except (KeyError, TypeError, ValueError):
            raise BundleError(
                f"the golden index has no tolerance for '{output}'", next_step="Press it again."
            ) from None

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.is_file():
            return {}
        try:
            data = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise BundleError(f"{name} is not JSON", next_step="Press it again.") from error
        return data if isinstance(data, dict) else {}
