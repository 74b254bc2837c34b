# SPDX-License-Identifier: Apache-2.0
"""Rounding weights to few bits, in numpy alone: formats and packing, scales, HQQ, AWQ, GPTQ."""
