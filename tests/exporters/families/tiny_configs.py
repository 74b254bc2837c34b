# SPDX-License-Identifier: Apache-2.0
"""Configurations of tiny transformers models, and the models."""

from typing import Any

import transformers

from onnxpress.contracts.tasks import TASKS

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
del VISION["vocab_size"]
CONVOLUTIONS = {
    "conv_dim": [8, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_source_positions": 20,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def tiny(model_type: str, task: str, **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **changes)
    classes = [getattr(transformers, name) for name in TASKS[task].auto_classes]
    return next(c for c in classes if type(config) in c._model_mapping).from_config(config).eval()
