# SPDX-License-Identifier: Apache-2.0
"""Token by token: decoding with a cache over the graph of a causal language model or an encoder-decoder.

    generator = Generator("artifacts/my-model")
    with generator.stream("Once upon a time", generator.defaults.changed(temperature=0.8, seed=1)) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)

A `Generator` may be used by several threads at once; each stream has caches of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...contracts.lazy import lazy_names

if TYPE_CHECKING:
    from .chunks import Chunk, Finish, Generation, Stream, Usage
    from .generator import Generator, Prompt
    from .sampling import Sampling

__all__ = ["Chunk", "Finish", "Generation", "Generator", "Prompt", "Sampling", "Stream", "Usage"]

__getattr__ = lazy_names(
    __name__,
    {
        "chunks": ("Chunk", "Finish", "Generation", "Stream", "Usage"),
        "generator": ("Generator", "Prompt"),
        "sampling": ("Sampling",),
    },
)
