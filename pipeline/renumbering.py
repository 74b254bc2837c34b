# SPDX-License-Identifier: Apache-2.0
"""Token ids that mean something else than they did: what a pass that cuts the vocabulary leaves behind.

From there on the candidate is fed with new ids. The original is given the same tokens under their old ids, which exist
for all of them, so that both are compared on the same tokens, whatever the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

TOKEN_IDS = "input_ids"
"""The input of a graph, and the array of a tokenizer, that holds token ids."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Renumbering:
    """The tokens that a cut vocabulary keeps.

    Attributes:
        kept: int64 [tokens], ascending: old ids, each in the place of its new one.
        outputs: Graph outputs whose last axis counts tokens and was cut alike.
    """

    kept: np.ndarray
    outputs: tuple[str, ...] = ()

    def then(self, later: Renumbering) -> Renumbering:
        """Both cuts as one; `later` names tokens by the new ids of this one."""
        return Renumbering(self.kept[later.kept], tuple(dict.fromkeys((*self.outputs, *later.outputs))))

    def reading_new_ids(self, run: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
        """The original, fed with new ids."""
        return lambda feeds: run({**feeds, TOKEN_IDS: self.kept[feeds[TOKEN_IDS]].astype(feeds[TOKEN_IDS].dtype)})

    def with_cut_outputs(self, run: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
        """The original, answering about the kept tokens alone where its outputs count tokens."""
        return lambda feeds: {
            name: array[..., self.kept] if name in self.outputs else array for name, array in run(feeds).items()
        }
