# SPDX-License-Identifier: Apache-2.0
"""Kinds of transformers models: what is traced for each, with which example inputs, under which names."""
