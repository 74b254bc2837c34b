# SPDX-License-Identifier: Apache-2.0
"""Settings that no rule gets right, by model type: path in its configuration to value, also where it is a part.

Some make up for a default that transformers leaves out, though its own model asks for it.
"""

from __future__ import annotations

from typing import Any

_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
_STAGE_HEADS = {"num_attention_heads": [1, 2, 3, 4]}
_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
_SECTIONS = {"rope_parameters.mrope_section": [4, 2, 2]}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_SAM = {"prompt_encoder_config.image_size": 32, "prompt_encoder_config.image_embedding_size": 4,
        "vision_config.output_channels": 64}  # fmt: skip
_LAYOUT = {"coordinate_size": 12, "shape_size": 8}
_LCNET = {
    "block_configs": [[[3, 16, 16, 1, True]], [[3, 16, 16, 1, False]], [[3, 16, 24, [2, 1], False],
                      [3, 24, 24, 1, True]], [[3, 24, 32, [2, 1], False]]],
    "stem_channels": [3, 8, 16],
}  # fmt: skip
_EFFICIENT = {
    "width_coefficient": 1.0, "depth_coefficient": 1.0, "num_block_repeats": [1, 1, 2, 1, 1, 1, 1],
    "in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320], "hidden_dim": 1280,
}  # fmt: skip
_DAC = {"encoder_hidden_size": 8, "decoder_hidden_size": 128, "n_codebooks": 3}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_VIBE = {"num_filters": 4, "depths": [1, 1, 1, 1, 1, 1, 1]}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 320},
    "align_vision_model": _EFFICIENT,
    "aria": {"projector_patch_to_query_dict": {"16": 8}},
    "autoformer": {**_SERIES, "moving_average": 5},
    "bamba": {"attn_layer_indices": [1]},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "bit": {"num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "canine": {"num_hash_buckets": 64, "max_position_embeddings": 128, "local_transformer_stride": 8},
    "chameleon": {"vocabulary_map": {"<image>": 150, "IMGIMGA": 151, "IMGIMGB": 152}},
    "chameleon_vqgan": {"base_channels": 32},
    "clap_audio_model": {"patch_embeds_hidden_size": 16},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "dac": _DAC,
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {**_EXPERTS, "first_k_dense_replace": 1},
    "detr": {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {**_EXPERTS, "first_k_dense_replace": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 24},
    "efficientnet": _EFFICIENT,
    "emu3": {"vocabulary_map": {"<image>": 150, "<|extra_200|>": 151, "<|visual token 000000|>": 152}},
    "emu3_vqgan": {"base_channels": 32},
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": [3, 3, 2]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "glm4v_moe_text": {"rope_parameters.mrope_section": [2, 1, 1]},
    "glm4v_text": _SECTIONS,
    "glm5_next_text": {"index_kpool": 4},
    "glm_image_text": _SECTIONS,
    "glm_ocr_text": _SECTIONS,
    "glpn": _STAGE_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 24, "num_layers_per_stack": 3},
    "hunyuan_vl_text": {"rope_parameters.xdrope_section": [2, 2, 2, 2]},
    "informer": _SERIES,
    "janus_vqgan": {"base_channels": 32},
    "kimi_linear": {"num_experts": 4},
    "layoutlmv2": _LAYOUT,
    "layoutlmv3": _LAYOUT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 96},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "lw_detr_vit": {"image_size": 64},
    "mamba2": {"num_heads": 8},
    "mgp-str": {"num_bpe_labels": 160, "num_wordpiece_labels": 160},
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "mobilevitv2": {"image_size": 64},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron": {"num_key_value_heads": 2},
    "neucodec": {"encoder_hidden_size": 8},
    "paddleocr_vl_text": _SECTIONS,
    "pp_lcnet_v4": _LCNET,
    "pvt_v2": _STAGE_HEADS,
    "qwen2_5_omni_text": _SECTIONS,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 155},
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 155},
    "qwen4_exp_text": {**_INDEXER, "ngram_vocab_size_base": 100},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"], "num_buckets": 4,
        "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8,
    },
    "sam": _SAM,
    "sam2_hiera_det_model": {"image_size": [32, 32]},
    "sam2_prompt_encoder": {"image_size": 32, "patch_size": 16},
    "sam2_vision_model": {"backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]},
    "sam3_tracker_prompt_encoder": {"image_size": 32, "patch_size": 8},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam_hq": _SAM,
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "seggpt": {"merge_index": 0},
    "step3p5": {"sliding_window": 8},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "time_series_transformer": _SERIES,
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "vibevoice_acoustic_tokenizer": _VIBE,
    "vibevoice_acoustic_tokenizer_decoder": _VIBE,
    "vibevoice_acoustic_tokenizer_encoder": _VIBE,
    "xcodec2": {"encoder_hidden_size": 8},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4,
        "attention_hidden_size": 128, "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}  # fmt: skip
