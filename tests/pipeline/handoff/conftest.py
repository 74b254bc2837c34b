# SPDX-License-Identifier: Apache-2.0
"""The bundles of bundles.py for every test here: fixtures of one place, so each is pressed once a run."""

from .bundles import decoder_bundle, text_bundle, vision_bundle

__all__ = ["decoder_bundle", "text_bundle", "vision_bundle"]
