# SPDX-License-Identifier: Apache-2.0
"""Which memory is put into huge pages, and that what is in it stays the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnxpress.runtime import huge_pages
from onnxpress.runtime.huge_pages import blocks_of, use_huge_pages

MIB = 1 << 20


def block(start: int, mib: float, used: float = 1.0, huge: float = 0.0, kind: str = "rw-p", inode: int = 0) -> str:
    """Lines of smaps about one block of so many MiB, with the shares of it that are in use and in huge pages."""
    size = int(mib * 1024)
    return (
        f"{start:x}-{start + (size << 10):x} {kind} 00000000 00:00 {inode} \n"
        f"Size: {size} kB\nRss: {int(size * used)} kB\nAnonymous: {size} kB\n"
        f"AnonHugePages: {int(size * huge)} kB\nVmFlags: rd wr\n"
    )


def found(*texts: str, minimum: int = 2 * MIB) -> list[tuple[int, int]]:
    return list(blocks_of("".join(texts).splitlines(), minimum))


def test_a_block_is_cut_to_whole_huge_pages() -> None:
    assert found(block(3 * MIB, 8)) == [(4 * MIB, 6 * MIB)]
    assert found(block(4 * MIB, 8)) == [(4 * MIB, 8 * MIB)]


def test_several_blocks_are_told_apart() -> None:
    assert found(block(4 * MIB, 4), block(64 * MIB, 2)) == [(4 * MIB, 4 * MIB), (64 * MIB, 2 * MIB)]


@pytest.mark.parametrize(
    "left",
    [
        block(4 * MIB, 8, used=0.5),
        block(4 * MIB, 8, huge=1.0),
        block(4 * MIB, 8, kind="r--p"),
        block(4 * MIB, 8, kind="rw-s"),
        block(4 * MIB, 8, inode=77),
        block(3 * MIB, 2),
    ],
    ids=["barely used", "in huge pages already", "read-only", "shared", "of a file", "no whole huge page"],
)
def test_what_must_or_need_not_be_moved_is_left(left: str) -> None:
    assert found(left) == []
    assert found(left, block(64 * MIB, 2)) == [(64 * MIB, 2 * MIB)]


def test_small_blocks_are_left() -> None:
    assert found(block(4 * MIB, 8), minimum=9 * MIB) == []


def test_lines_of_another_kind_are_passed_over() -> None:
    assert found("nonsense\n\nRss: x kB\n", block(4 * MIB, 2)) == [(4 * MIB, 2 * MIB)]


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_memory_holds_what_it_held() -> None:
    numbers = np.arange(8 * MIB // 8)
    moved = use_huge_pages()
    assert moved >= 0
    np.testing.assert_array_equal(numbers, np.arange(8 * MIB // 8))


def test_without_a_list_of_blocks_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SMAPS", tmp_path / "absent")
    assert use_huge_pages() == 0


def test_on_other_systems_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert use_huge_pages() == 0
