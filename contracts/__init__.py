# SPDX-License-Identifier: Apache-2.0
"""What exporters, runtime and pipeline share: the error tree, the signature of a model, and the task names.

Nothing here imports torch, transformers, onnx or onnxruntime.
"""
