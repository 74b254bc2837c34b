# SPDX-License-Identifier: Apache-2.0
"""The graph of a language model, or both of an encoder-decoder, and the way in which its tokens are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...contracts.decoding import INPUT_IDS, KEEP, MASK, POSITIONS, Decoding, growing_axis, present_of
from ...contracts.errors import InputError
from ..huge_pages import use_huge_pages
from ..onnx_file import read_onnx
from ..onnxruntime_engine import OnnxRuntimeEngine
from ..opened import Bundle
from ..packing.reader import is_packed
from ..session import Array, Session
from .chunks import Cancellation
from .padding import Padded
from .steps import LOGITS, BoundSteps, CopiedSteps, Device, SharedSteps, Steps, WholeSteps, grows

ENCODER = "encoder_model"
_ENCODER_MASK = "encoder_attention_mask"
_FED = {INPUT_IDS, MASK, POSITIONS, KEEP}


class Graphs:
    """What a bundle's language model consists of.

    Args:
        bundle: The bundle.
        variant: Which of its variants.
        provider: A key of `runtime.PROVIDERS`.
        threads: Threads that one operator may use.
        spinning: Of the decoder's session, see `Session`.

    Attributes:
        decoder: The graph that writes.
        encoder: The graph that reads the prompt, of an encoder-decoder.
        vocabulary: Tokens that the model knows.
        shared: Whether the graph appends to one buffer, which is bound as past and as present.

    Raises:
        InputError: The bundle is no language model.
    """

    def __init__(
        self, bundle: Bundle, *, variant: str | None, provider: str, threads: int | None, spinning: bool
    ) -> None:
        signature = bundle.signature
        outputs = {spec.name: spec for spec in signature.outputs}
        inputs = {spec.name: spec for spec in signature.inputs}
        companion = bundle.companion_file(ENCODER)
        if INPUT_IDS not in inputs or LOGITS not in outputs or len(outputs[LOGITS].shape) != 3:
            raise _no_language_model(bundle)
        decoding = Decoding.of(signature)
        if decoding is None and bundle.task != "text-generation":
            raise _no_language_model(bundle)
        self._decoding = decoding
        self.vocabulary = _vocabulary(outputs[LOGITS].shape[-1], bundle)
        self._require_known(bundle, set(inputs), companion)
        self.decoder = bundle.session(variant, provider=provider, threads=threads, spinning=spinning)
        self.encoder = Session(companion, provider=provider, threads=threads) if companion is not None else None
        self.shared = self._appends(bundle, bundle.model_file(variant))
        if provider == "cpu":
            use_huge_pages()

    def begin(
        self, rows: Sequence[Sequence[int]], room: int, pad: int, longest: int | None, cancellation: Cancellation
    ) -> Steps:
        """A batch, ready to start.

        Args:
            rows: Token ids of each prompt.
            room: New tokens at most.
            pad: What padding consists of.
            longest: Positions that the model has, or None.
            cancellation: Interrupts a run.

        Raises:
            InputError: The prompts have several lengths, and this graph takes only one.
        """
        if self._decoding is None:
            return WholeSteps(self.decoder, rows, pad, longest)
        batch = self._batch(self._decoding, rows, room, pad, longest)
        if not isinstance(self.decoder.engine, OnnxRuntimeEngine):
            return CopiedSteps(self.decoder, self._decoding, batch)
        if self.shared and all(growing_axis(spec) == 2 for spec in self._decoding.caches):
            return SharedSteps(self.decoder, self._decoding, batch, cancellation)
        return BoundSteps(self.decoder, self._decoding, batch, cancellation)

    def begin_encoded(
        self, start: int, encoded: Mapping[str, Array], beams: int, room: int, cancellation: Cancellation
    ) -> Steps:
        """Let the encoder read, and a batch of the decoder, each row `beams` times, ready to start.

        Args:
            start: The token that the decoder begins with.
            encoded: The encoder's inputs by name; see `encoder_inputs`.
            beams: Rows of the decoder for each row of the encoder.
            room: New tokens at most.
            cancellation: Interrupts a run.
        """
        assert self.encoder is not None
        assert self._decoding is not None
        fed = [name for name in self._decoding.inputs if ".encoder." in name]
        wanted = {name: output for name in fed if (output := present_of(name)) is not None}
        outputs = self.encoder.run(encoded, list(wanted.values()))
        fixed = {name: np.repeat(outputs[output], beams, axis=0) for name, output in wanted.items()}
        rows = len(next(iter(fixed.values())))
        if _ENCODER_MASK in self._decoding.inputs:
            fixed[_ENCODER_MASK] = np.repeat(encoded[MASK], beams, axis=0)
        batch = self._batch(self._decoding, [[start]] * rows, room, 0, None)
        if not isinstance(self.decoder.engine, OnnxRuntimeEngine):
            return CopiedSteps(self.decoder, self._decoding, batch, fixed)
        device = Device(self.decoder.provider)
        values: dict[str, Any] = {name: device.value(array) for name, array in fixed.items()}
        return BoundSteps(self.decoder, self._decoding, batch, cancellation, values)

    def encoder_inputs(self, prompts: Sequence[Sequence[int] | Mapping[str, Array]], pad: int) -> dict[str, Array]:
        """What the encoder reads: token ids padded on the right with their mask, or arrays joined into a batch.

        Raises:
            InputError: Prompts of both kinds, or arrays whose shapes differ.
        """
        assert self.encoder is not None
        specs = {spec.name: spec for spec in self.encoder.signature.inputs}
        arrays = [prompt for prompt in prompts if isinstance(prompt, Mapping)]
        rows = [list(prompt) for prompt in prompts if not isinstance(prompt, Mapping)]
        if rows and (INPUT_IDS not in specs or arrays):
            raise InputError(
                f"the encoder reads {', '.join(specs)}, not text", next_step="Give its inputs as arrays (in Python)."
            )
        if rows:
            return Padded(rows, 0, specs, pad=pad, left=False).first()
        if any(set(prompt) != set(specs) for prompt in arrays):
            raise InputError(f"a prompt has to have the arrays {', '.join(specs)}")
        try:
            return {name: np.concatenate([prompt[name] for prompt in arrays]) for name in specs}
        except ValueError as error:
            raise InputError("the prompts' arrays have several shapes", next_step="Give one at a time.") from error

    def decoder_room(self, config: Mapping[str, Any]) -> int | None:
        """New tokens that an encoder-decoder's positions have room for behind the first, or None without a limit."""
        limit = config.get("max_target_positions", config.get("max_position_embeddings"))
        return limit - 1 if isinstance(limit, int) and limit > 1 else None

    def _batch(
        self, decoding: Decoding, rows: Sequence[Sequence[int]], room: int, pad: int, longest: int | None
    ) -> Padded:
        if self.shared and len({len(row) for row in rows}) > 1 and not self._only_grows():
            raise InputError(
                "this graph keeps states and appends to its cache, so that prompts of a batch have to be of one length",
                next_step="Give them one at a time.",
            )
        return Padded(
            rows, room, decoding.inputs, pad=pad, left=not self.shared, longest=longest, whole_mask=grows(decoding)
        )

    def _only_grows(self) -> bool:
        return self._decoding is not None and all(growing_axis(spec) is not None for spec in self._decoding.caches)

    def _appends(self, bundle: Bundle, file: Path) -> bool:
        """Whether attention over the caches is GroupQueryAttention, which wants padding on the right."""
        if is_packed(file):  # its nodes are compressed
            return any("GroupQueryAttention" in name for name in bundle.manifest.get("operators", {}))
        return any(node.op == "GroupQueryAttention" for node in read_onnx(file).nodes)

    def _require_known(self, bundle: Bundle, inputs: set[str], companion: Path | None) -> None:
        caches = set(self._decoding.present) if self._decoding is not None else set()
        crossing = {name for name in inputs if ".encoder." in name or name == _ENCODER_MASK}
        if crossing and companion is None:
            raise InputError(
                f"{bundle.name} is a decoder without its encoder", next_step="Press the model again, both graphs of it."
            )
        unknown = sorted(inputs - _FED - caches - crossing)
        if unknown:
            raise InputError(f"{bundle.name} also reads {', '.join(unknown)}, which are not made of text")


def _vocabulary(size: int | str | None, bundle: Bundle) -> int:
    known = size if isinstance(size, int) else bundle.config.get("vocab_size")
    return int(known) if known else 2**31


def _no_language_model(bundle: Bundle) -> InputError:
    return InputError(
        f"{bundle.name} is a model for {bundle.task}, not a language model that writes",
        next_step="Give a bundle for text-generation, or of an encoder-decoder.",
    )
