# SPDX-License-Identifier: Apache-2.0
"""transformers' cache layers of state-space models, where the installed version has them."""

from __future__ import annotations

from typing import Any

try:
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
except ImportError:  # transformers 4.57, which optimum's environment has: no model there keeps its states in a cache

    class LinearAttentionLayer:  # type: ignore[no-redef]
        """No layer is one of these."""

        def __init__(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError("the installed transformers has no caches of states")

    class LinearAttentionAndFullAttentionLayer(LinearAttentionLayer):  # type: ignore[no-redef]
        """No layer is one of these either."""


__all__ = ["LinearAttentionAndFullAttentionLayer", "LinearAttentionLayer"]
