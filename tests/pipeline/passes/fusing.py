# SPDX-License-Identifier: Apache-2.0
"""What the tests of all fusing rules do: fuse, count, and compare at several sizes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from pass_tools import Feeds, count, press, session, to_bytes

from onnxpress.pipeline.passes.base import PassReport
from onnxpress.pipeline.passes.fuse import Fuse


def fused_same(
    model: ir.Model, rules: dict[str, int], feeds: Iterable[Feeds], settings: Fuse | None = None, *, fewer: bool = True
) -> tuple[ir.Model, PassReport]:
    """Fuse, and see that exactly `rules` did something, nodes fell if `fewer`, and all outputs are as they were."""
    nodes = sum(count(model).values())
    model, report, before = press(settings or Fuse(), model)
    assert report.details == rules
    assert not fewer or sum(count(model).values()) < nodes
    old, new = session(before), session(model)
    for arrays in feeds:
        for one, other in zip(old.run(None, dict(arrays)), new.run(None, dict(arrays)), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)
    return model, report


def left_alone(model: ir.Model, settings: Fuse | None = None) -> list[str]:
    """Fuse, see that nothing changed, and return the reasons."""
    model, report, before = press(settings or Fuse(), model)
    assert report.changed == 0
    assert to_bytes(model) == before
    return [left.reason for left in report.left]
