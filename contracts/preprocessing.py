# SPDX-License-Identifier: Apache-2.0
"""What preprocessing.json may say, between what reads it off a source's processor and what follows it."""

from __future__ import annotations

RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters; the position is Pillow's number, which transformers has as well."""
