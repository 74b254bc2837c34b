# SPDX-License-Identifier: Apache-2.0
"""`prune_vocabulary`: keep the tokens that occur in the calibration data, and cut the tokenizer to match.

A multilingual or general model brings tens of thousands of tokens that one kind of text never uses; in a small encoder
their embeddings are half of all bytes. What stays: tokens that were seen, those of `keep_file`, and whatever the
tokenizer needs to read any text at all and the kept tokens as before (see `exporters.vocabulary`). A text with a token
that went is read in smaller pieces, or as unknown.

The rest of the run follows `Plan.renumbering`: the tokenizer and the files beside it are cut, later passes calibrate on
the new ids, and the original is compared on the same tokens. Put the pass before those that quantize, and let
`calibration.examples` take all of the data: counting is cheap.

Reference: Yang et al., "TextPruner" (arXiv 2203.15996), vocabulary pruning; Abdaoui et al., "Load what you need"
(arXiv 2010.05609).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx_ir as ir
from pydantic import Field, field_validator

from ...contracts.errors import InputError, did_you_mean
from ...exporters.vocabulary import Vocabulary, read_vocabulary
from ..renumbering import TOKEN_IDS, Renumbering
from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .folding import edit_constant
from .graph import constant, consumers, initializers_of, is_op, nodes_of
from .vocabulary_readers import VocabularyReaders, renumbered, vocabulary_readers


@register("prune_vocabulary")
class PruneVocabulary(Pass):
    """Settings.

    Attributes:
        minimum_count: Tokens that occur so often in the calibration data stay.
        keep_share: Of these, the most frequent ones stay that make up this share of all occurrences.
        keep_file: File with tokens that stay as well, one a line, as the tokenizer writes them (`##ing`, `Ġthe`).
            Relative to the folder that the command runs in, since the recipe is part of the bundle.
        cut_output: Cut layers that score every token, too: outputs then count the kept tokens alone.
    """

    minimum_count: int = Field(default=1, ge=1)
    keep_share: float = Field(default=1.0, gt=0, le=1)
    keep_file: str | None = None
    cut_output: bool = False

    @field_validator("keep_file")
    @classmethod
    def _relative(cls, value: str | None) -> str | None:
        if value is not None and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive):
            raise ValueError("give a relative path: the recipe goes into the bundle, and paths of a machine must not")
        return value

    @property
    def needs(self) -> tuple[str, ...]:
        return ("tokens",)

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        assert calibration is not None
        readers = vocabulary_readers(model)
        plan = Plan(seen=len(readers.tables) + len(readers.layers), left=list(readers.problems))
        if not readers.tables and not plan.left:
            plan.left.append(Left(TOKEN_IDS, "the graph has no embedding that token ids pick rows of"))
        if not self.cut_output:
            plan.left += [Left(layer.output, _WIDTH) for layer in readers.layers]
        if plan.left:
            return plan
        vocabulary = read_vocabulary(calibration.processor_files)
        problem = _why_not(vocabulary, readers)
        if problem:
            plan.left.append(Left(str(readers.tables[0].name), problem))
            return plan
        counts = _counts(calibration, max(vocabulary.ids.values()) + 1)
        frequent = self._frequent(counts)
        kept = vocabulary.closed({*frequent, *self._listed(vocabulary), *readers.compared_ids()})
        if len(kept) == readers.rows:
            plan.left.append(Left(str(readers.tables[0].name), "every token of it has to stay"))
            return plan
        ids = np.array(sorted(kept), np.int64)
        plan.actions = _actions(readers, len(ids))
        plan.renumbering = Renumbering(ids, tuple(layer.output for layer in readers.layers))
        plan.details = _details(ids, readers.rows, counts, frequent)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        if plan.renumbering is None:
            return model
        kept = plan.renumbering.kept
        for node, index in vocabulary_readers(model).comparisons:
            old = constant(node.inputs[index])
            if old is not None and (renumbered(old, kept) != old).any():
                edit_constant(model, [(node, index)], lambda ids: renumbered(ids, kept))
        weights, narrowed = initializers_of(model), set()
        for action in plan.actions:
            _cut(weights[action["weight"]], kept, action["axis"])
            narrowed |= set(action.get("values", ()))
        for node in nodes_of(model):
            for value in node.outputs:
                if value.name in narrowed and value.shape is not None:
                    value.shape = ir.Shape([*value.shape[:-1], len(kept)])
        return model

    def _frequent(self, counts: np.ndarray) -> set[int]:
        """Tokens seen often enough, the most frequent ones up to their share."""
        order = np.argsort(-counts, kind="stable")
        before = np.cumsum(counts[order]) - counts[order]
        chosen = (counts[order] >= self.minimum_count) & (before < self.keep_share * counts.sum())
        return {int(number) for number in order[chosen]}

    def _listed(self, vocabulary: Vocabulary) -> set[int]:
        """Ids of the tokens in `keep_file`."""
        if self.keep_file is None:
            return set()
        try:
            lines = Path(self.keep_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"keep_file {self.keep_file} cannot be read", next_step="Check the path; it has to be UTF-8 text."
            ) from error
        tokens = [line for line in lines if line]
        unknown = [token for token in tokens if token not in vocabulary.ids]
        if unknown:
            raise InputError(
                f"keep_file {self.keep_file}: {unknown[0]!r} is no token of the vocabulary",
                next_step=did_you_mean(unknown[0], vocabulary.ids)
                if len(vocabulary.ids) < 100
                else "One token a line.",
            )
        return {vocabulary.ids[token] for token in tokens}


_WIDTH = "it scores every token, and its width is what consumers rely on: set cut_output to cut it as well"


def _counts(calibration: Calibration, size: int) -> np.ndarray:
    """int64 [ids]: how often each token id occurs in the calibration data."""
    counts = np.zeros(size, np.int64)
    for batch in calibration.batches:
        found = np.bincount(batch[TOKEN_IDS].ravel())
        if len(found) > size:
            raise InputError(
                f"the calibration data holds token id {len(found) - 1}, which the tokenizer does not have",
                next_step="Give texts, or ids of this model's own tokenizer.",
            )
        counts[: len(found)] += found
    return counts


def _why_not(vocabulary: Vocabulary, readers: VocabularyReaders) -> str | None:
    numbers = set(vocabulary.ids.values())
    if max(numbers) >= readers.rows:
        return f"the embedding has {readers.rows} rows, and the tokenizer has ids up to {max(numbers)}"
    strange = readers.compared_ids() - numbers
    return f"the graph compares token ids with {min(strange)}, which no token has" if strange else None


def _actions(readers: VocabularyReaders, tokens: int) -> list[dict[str, Any]]:
    """One action a weight; the embedding may be the output layer's weight as well, and is cut once."""
    actions: dict[str, dict[str, Any]] = {}
    for table in readers.tables:
        name = str(table.name)
        actions[name] = {"weight": name, "axis": 0, "role": "embedding", "rows": tokens}
    for layer in readers.layers:
        for name, axis in layer.weights.items():
            before = actions.get(name)
            action = before or {"weight": name, "axis": axis, "role": "output layer", "rows": tokens}
            actions[name] = {**action, "values": [*action.get("values", []), *layer.values]}
    return list(actions.values())


def _details(kept: np.ndarray, rows: int, counts: np.ndarray, frequent: Collection[int]) -> dict[str, Any]:
    return {
        "tokens_before": rows,
        "tokens_after": len(kept),
        "tokens_seen": int(np.count_nonzero(counts)),
        "tokens_kept_for_the_data": len(frequent),
        "occurrences_kept_percent": round(100 * float(counts[kept].sum()) / max(1, int(counts.sum())), 3),
    }


def _cut(weight: ir.Value, kept: np.ndarray, axis: int) -> None:
    """Keep these entries along one axis; what reads the weight transposed learns its shape."""
    tensor = weight.const_value
    assert tensor is not None
    array = np.take(tensor.numpy(), kept, axis=axis)
    weight.const_value = ir.Tensor(np.asarray(array, order="C"), dtype=tensor.dtype, name=weight.name)
    weight.shape = ir.Shape(array.shape)
    for reader in consumers(weight):
        if is_op(reader, "Transpose"):
            reader.outputs[0].shape = ir.Shape(array.shape[::-1])
