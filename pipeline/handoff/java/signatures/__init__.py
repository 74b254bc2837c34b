# SPDX-License-Identifier: Apache-2.0
"""Signatures of what the consumer calls of ONNX Runtime's Java interface, to compile it without the jar."""
