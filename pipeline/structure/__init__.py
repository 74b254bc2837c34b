# SPDX-License-Identifier: Apache-2.0
"""The structure of a graph: which axes of which weights can be cut together, the cut itself, and its proof.

units      what is tied and what is closed
probing    all sizes, with primes for those that only the run tells
walk       one visit of every node; `rules` and its neighbours say what each operator does
groups     the result, as values; slicing
masking    the same cut as zeros: the oracle
"""

from .groups import KINDS, Cut, Group, Stays, Structure, analyze
from .masking import mask, masked_weights

__all__ = ["KINDS", "Cut", "Group", "Stays", "Structure", "analyze", "mask", "masked_weights"]
