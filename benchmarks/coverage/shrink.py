# SPDX-License-Identifier: Apache-2.0
"""From a model type's default configuration to a tiny one of the same architecture.

A default configuration describes a published checkpoint: 12 to 60 layers, widths of thousands. What makes it slow to
export is only its size; what has to be kept is everything that chooses between code paths. So sizes are set by the name
of the setting (`RULES`), the same number becomes the same number everywhere it stands for a width, and of a list with
one entry a layer those layers are kept that cover each kind once: one with a window and one without, one dense and one
sparse, an even one and one that keeps a key/value cache of its own. `exceptions.py` has the settings that no rule gets
right, by model type.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .exceptions import EXCEPTIONS

WIDTH, HEADS, HEAD, LAYERS, INNER, VOCABULARY, POSITIONS = 64, 4, 16, 2, 96, 160, 128
"""What a width, a number of heads, ... becomes when it is larger; heads times head size is the width."""

Config = Any
"""A `transformers.PreTrainedConfig`; transformers is not imported before it must be."""

_WIDTH = re.compile(
    r"^(hidden_size|d_model|n_embd|dim|hidden_dim|embed_dim|embedding_dim|emb_dim|width|\w*_hidden_size|\w*_hidden_dim|"
    r"projection_dim|\w+_projection_dim|out_hidden_size|word_embed_proj_dim|embedding_size|\w*_embedding_size|"
    r"\w+_embed_dim|\w*proj(ection)?_(size|dim)|project_dim|d_latents|hidden_size_\w+|pooler_output_size|output_dim|"
    r"output_proj_dims|lru_width|\w*classifier_proj_size|text_config_hidden_size|condition_dim|latent_size|input_dim|"
    r"adapter_(in|out)_dim|projector_(in|out)put_dim|vision_output_dim|codebook_dim|fpn_\w*size|mask_dim|vit_dim|"
    r"\w*feature_size|descriptor_dim|\w*_units|attention_hidden_size|prediction_head_size|t2u_\w*dim|\w*width|"
    r"backbone_feature_size|cross_hidden_size|reduce_dim|mamba_d_ssm|encoder_width|text_encoder_width|"
    r"\w*feat_dim|flow_size|encoder_dim|decoder_dim|lang_embed_dim|model_dim|patch_dim|mlp_channels)$"
)
_INNER = re.compile(
    r"^(\w*intermediate_(size|dim)|\w*ffn_dim|mlp_dim|d_ff|dff|dim_ff|d_inner|n_inner|ffn_hidden_size|\w*feedforward_dim|"
    r"\w*dim_feedforward|\w*linear_units|feed_forward_size|\w*_hidden_size_mlp|intermediate_size_mlp|share_expert_dim|"
    r"\w*feed_forward_hidden_size|\w*mlp_hidden_size|prompt_mid_dim|expert_ffn_hidden_size|ffn_dim\w*|fusion_hidden_size|"
    r"iou_head_hidden_dim|projection_hidden_size)$"
)
_LAYERS = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|num_blocks|depth|layers|[lxr]_layers|\w*(encoder|decoder)_layers|"
    r"num_\w+_layers|num_block_records|\w*_num_(hidden_)?layers|(\w+_)?depth|num_mel_attn_blocks|num_self_attends_per_block|"
    r"\w*postnet_layers|\w*prenet_layers|\w*predictor_layers|num_layers_per_stack|aligner_num_add_layers|\w*_layers)$"
)
_HEADS = re.compile(
    r"^(num_attention_heads|num_heads|n_heads?|\w*attention_heads|\w*_num_heads|\w*_n_heads|resampler_heads|"
    r"conf_num_attention_heads|\w+_attention_heads|attention_heads|self_attn_heads|num_query_groups)$"
)
_KV_HEADS = re.compile(r"^(\w*num_key_value_(attention_)?heads|num_kv_heads|kv_n_heads|multi_query_group_num)$")
_HEAD = re.compile(
    r"^(\w*head_dim|attention_head_size|d_kv|d_head|dim_head|resampler_dim_head|kv_channels|v_head_dim|qk_nope_head_dim|"
    r"global_head_dim|mamba_d_head|mamba_headdim|\w*_head_dim|global_pointer_head_size)$"
)
_CHANNELS = re.compile(
    r"^(\w*channels?|\w*channel_list|hidden_sizes|neck_hidden_sizes|embed_dims|conv_dim|tdnn_dim|\w*_feature_dims|"
    r"embed_dim_per_stage|encoder_hidden_sizes|base_attn_unit_dims|num_filters|\w*_dims|out_features|conv_channels|"
    r"stem_out_channels|upsample_initial_channel|\w*out_channels|\w*channel_size|\w+_channels_\w+|embed_dim|hidden_size|"
    r"decoder_hidden_size|upsample_groups|backbone_channel_list|layer_list_out_channels|aspp_out_channels)$"
)
_TOKEN = re.compile(
    r"^(\w*_token_id|\w*_token_ids|\w*_token_index|\w*token_(id|index)|\w*_index|\w+_pad_id|\w+_id|eos|bos)$"
)
_EXPERTS = re.compile(
    r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|\w*zero_expert_num|num_routed_experts)$"
)
_CHOSEN = re.compile(r"^(num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|num_selected_experts)$")
_LAYER_INDICES = re.compile(
    r"^(\w*attn_indexes|\w*attn_idxs|\w*block_indexes|\w*block_indices|deepstack_visual_indexes|moe_layers|mlp_only_layers|"
    r"cross_attention_layers|kv_source_layers|rope_scaling_layers|hybrid_layer_ids|window_block_ind\w+|ple_layer_ids|"
    r"global_attention_blocks|intermediate_layers_indices|attn_layer_indices|dense_layers|sparse_layers)$"
)
"""Lists of the numbers of layers."""
_TAPS = re.compile(
    r"^(out_indices|backbone_out_indices|extract_layers|intermediate_hidden_state_indices|spatial_target_layers)$"
)
"""Lists of the layers whose outputs are used, which have to stay as many."""

CAPS: dict[str, int] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "type_vocab_size": 4, "num_mel_bins": 80,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "o_lora_rank": 16, "index_head_dim": 16,
    "index_n_heads": 16, "index_topk": 8, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "sliding_window": 8, "attention_chunk_size": 8,
    "local_attention": 8, "sliding_window_size": 8, "max_window_layers": 1, "n_positions": POSITIONS,
    "n_ctx": POSITIONS,
    "num_queries": 10, "codebook_size": 32, "num_codebooks": 4, "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16, "num_filters": 8, "num_query_tokens": 8, "rotary_dim": 8, "state_size": 8,
    "mamba_d_state": 8, "ssm_state_size": 8, "mamba_n_heads": 8, "mamba_num_heads": 8, "time_step_rank": 4,
    "mamba_dt_rank": 4, "n_groups": 2, "chunk_size": 8, "mamba_chunk_size": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_num_heads": 4, "max_source_positions": 64, "max_target_positions": POSITIONS,
    "max_2d_position_embeddings": 1024, "num_position_embeddings": 64, "query_pre_attn_scalar": HEAD, "window_size": 4,
    "shared_expert_intermediate_size": INNER, "sliding_window_pattern": 2, "no_rope_layer_interval": 2,
    "global_attn_every_n_layers": 2, "attn_layer_period": 2, "expert_layer_period": 2, "attn_layer_offset": 1,
    "resampler_n_latents": 8, "num_latents": 16, "num_image_tokens": 16, "image_seq_length": 16,
    "num_codevectors_per_group": 32, "pos_emb_height": 8, "pos_emb_width": 8, "num_soft_tokens": 16,
    "max_rel_pos": 64, "num_denoising": 0, "attention_window": 4, "vq_codebook_size": 32, "pretrain_image_size": 32,
    "layer_group_size": 2, "moe_layer_end_index": 1, "n_shared_experts": 1, "num_expert_group": 2,
    "rel_pos_bins": 32, "posemb_grid_size": 8, "query_dim": 4, "num_pos_feats": 32,
}  # fmt: skip
"""Settings with a largest value of their own."""

WHERE_NONE = {"head_dim": HEAD, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY}
"""What some classes leave out and others work out, to the same value."""

BACKBONE: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
    "layer_type": "bottleneck", "out_indices": [1, 2, 3, 4],
}  # fmt: skip
"""In the place of a backbone out of timm, which is no dependency."""

UNCHANGED = re.compile(
    r"^(num_channels|in_chans|input_channels|id2label|label2id|output_stride|conv_stride|kernel_size|num_feature_levels|"
    r"image_input_channels|num_labels|audio_channels|spatial_merge_size|cross_attn_\w+|num_residual_layers|stem_num_channels|"
    r"num_dense_layers|vision_feature_layer|num_lstm_layers|patch_embed_input_channels|num_channels_out|feature_layer|"
    r"mask_input_channels|hop_length|freeze_at|semantic_loss_ignore_index|spatial_vision_layer|num_register\w*)$"
)


def tiny_config(model_type: str) -> Config:
    """The configuration of a tiny model of this type, as transformers makes it from a config.json.

    Raises:
        Exception: Whatever the configuration class says about a combination of settings that it does not allow.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    settings = json.loads(json.dumps(kind().to_dict(), default=str))
    small = shrink(settings, model_type)
    return kind.from_dict(small)


def shrink(settings: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Settings of a default configuration (`to_dict`), made small; sub-configurations too."""
    return _Shrinker(settings).config(settings, model_type)


def _put(settings: dict[str, Any], path: str, value: object) -> None:
    """Set `text_config.hidden_size`; None of a path's parts has to be there before."""
    *parents, last = path.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[last] = value


class _Shrinker:
    """Remembers which numbers stand for widths and which small number stands for a special token, in all parts."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.widths = {value for key, value in _numbers(settings) if _WIDTH.match(key) and value > WIDTH}
        vocabularies = [value for key, value in _numbers(settings) if key == "vocab_size"]
        self.vocabulary = min([VOCABULARY, *(v for v in vocabularies if v)])
        self.tokens: dict[int, int] = {}

    def config(self, settings: Mapping[str, Any], model_type: str) -> dict[str, Any]:
        declared = _declared(model_type)
        taps = next((v for k, v in settings.items() if _TAPS.match(k) and isinstance(v, list)), [])
        layers = _Layers(settings, max(LAYERS, len(taps)) if _main_layers(settings)[1] > len(taps) else LAYERS)
        small: dict[str, Any] = {}
        for key, value in settings.items():
            if declared is not None and key not in declared and key not in ("model_type", "out_indices"):
                continue  # worked out from the others; it will be again
            if key in ("stage_names", "out_features", "transformers_version", "architectures"):
                continue
            small[key] = self.value(key, value, settings, layers)
        for path, value in EXCEPTIONS.get(model_type, {}).items():
            _put(small, path, value)
        return small

    def value(self, key: str, value: Any, settings: Mapping[str, Any], layers: _Layers) -> Any:
        if isinstance(value, dict):
            return self.mapping(key, value, settings)
        if value is None:
            return WHERE_NONE.get(key)
        if UNCHANGED.match(key) or isinstance(value, bool | str):
            return value
        if isinstance(value, float):
            return _float(key, value)
        if isinstance(value, list):
            return self.sequence(key, value, settings, layers)
        if key == layers.key:
            return len(layers.kept)
        return self.number(key, int(value), settings)

    def mapping(self, key: str, value: dict[str, Any], settings: Mapping[str, Any]) -> Any:
        if key in ("id2label", "label2id"):
            return value if len(value) <= 3 else dict(list(value.items())[:3])
        if value.get("model_type") == "timm_backbone":
            taken = value.get("out_indices") or [4]
            return {**BACKBONE, "out_indices": [i if i > 0 else 5 + i for i in taken][-4:]}
        if "model_type" in value:
            return self.config(value, str(value["model_type"]))
        if key.startswith("rope_"):
            return _rope(value, settings)
        return self.config(value, "")

    def number(self, key: str, value: int, settings: Mapping[str, Any]) -> int:
        if key in CAPS and not (key == "window_size" and _hierarchical(settings)):
            return min(value, CAPS[key])
        if _hierarchical(settings) and key in ("embed_dim", "window_size"):
            return 16 if key == "embed_dim" else 2  # the window has to fit the last stage
        for pattern, change in _NUMBERS:
            if pattern.match(key):
                return change(self, key, value, settings)
        return WIDTH if value in self.widths and value >= 256 else value

    def sequence(self, key: str, value: list[Any], settings: Mapping[str, Any], layers: _Layers) -> list[Any]:
        if _LAYER_INDICES.match(key):
            return layers.indices(value)
        if _TAPS.match(key):
            return value if _hierarchical(settings) else _spread_taps(value, len(layers.kept))
        if layers.is_per_layer(key, value):
            value = [value[i] for i in layers.kept]
        if key in ("depths", "layer_depths") or key.startswith("stage_num"):
            return [min(int(v), 2 if i == 0 else 1) for i, v in enumerate(value)]
        return [
            self.value(key, v, settings, _NO_LAYERS)
            if isinstance(v, list)
            else v
            if isinstance(v, bool | str | float | dict) or v is None
            else self.entry(key, v, settings)
            for v in value
        ]

    def entry(self, key: str, value: int, settings: Mapping[str, Any]) -> int:
        if key in ("num_heads", "num_attention_heads", "num_attention_heads_per_stage"):
            least = min(settings[key])
            return value // least * 2 if all(v % least == 0 for v in settings[key]) else value
        if _CHANNELS.match(key) or _WIDTH.match(key):
            return self.channels(value)
        return self.number(key, value, settings)

    def channels(self, value: int) -> int:
        """Widths of a convolutional network: an eighth, and at least 8; the colours of an image stay 3."""
        if value in self.widths:
            return WIDTH
        return value if value <= 8 else max(8, -(-value // 64) * 8)

    def token(self, value: int) -> int:
        """The last tokens of the vocabulary stand for those that are beyond it."""
        if value < self.vocabulary // 4:
            return value
        return self.tokens.setdefault(value, self.vocabulary - 1 - len(self.tokens))


def _head(shrinker: _Shrinker, key: str, value: int, settings: Mapping[str, Any]) -> int:
    rope = settings.get("qk_rope_head_dim")
    small_rope = min(rope or 0, CAPS["qk_rope_head_dim"])
    if rope and key == "head_dim" and value == rope:
        return small_rope
    if rope and (key == "qk_head_dim" or value == rope + settings.get("qk_nope_head_dim", 0)):
        return HEAD + small_rope
    return min(value, HEAD)


def _heads(shrinker: _Shrinker, key: str, value: int, settings: Mapping[str, Any]) -> int:
    return value if value in (1, 2) else HEADS if value >= HEADS else 2


def _kv_heads(shrinker: _Shrinker, key: str, value: int, settings: Mapping[str, Any]) -> int:
    """As many as there are heads, one, or a number between."""
    name = next(
        (k for k in (key.replace("key_value", "attention"), "num_attention_heads", "n_heads") if k in settings), ""
    )
    heads = settings.get(name)
    return value if value <= 1 else HEADS if isinstance(heads, int) and value >= heads else 2


def _image(shrinker: _Shrinker, key: str, value: int, settings: Mapping[str, Any]) -> int:
    return 64 if _hierarchical(settings) else 32


def _patch(shrinker: _Shrinker, key: str, value: int, settings: Mapping[str, Any]) -> int:
    return min(value, 8) if not _hierarchical(settings) else value


_NUMBERS: Sequence[tuple[re.Pattern[str], Callable[[_Shrinker, str, int, Mapping[str, Any]], int]]] = (
    (_KV_HEADS, _kv_heads),
    (_HEADS, _heads),
    (_HEAD, _head),
    (_EXPERTS, lambda s, k, v, c: min(v, 4)),
    (_CHOSEN, lambda s, k, v, c: min(v, 2)),
    (re.compile(r"^(image_size|img_size|input_size|resolution)$"), _image),
    (re.compile(r"^patch_size$"), _patch),
    (re.compile(r"^(\w*vocab_size\w*|num_embeddings)$"), lambda s, k, v, c: min(v, VOCABULARY)),
    (re.compile(r"^\w*max_(source_|target_)?(position\w*|seq_len|length)$"), lambda s, k, v, c: min(v, POSITIONS)),
    (_INNER, lambda s, k, v, c: min(v, INNER)),
    (_WIDTH, lambda s, k, v, c: min(v, WIDTH)),
    (_LAYERS, lambda s, k, v, c: min(v, LAYERS)),
    (_TOKEN, lambda s, k, v, c: s.token(v) if v >= 0 else v),
    (_CHANNELS, lambda s, k, v, c: s.channels(v)),
)


class _Layers:
    """Which layers of a stack are kept: the first ones, and one of each kind that the lists tell apart."""

    def __init__(self, settings: Mapping[str, Any], least: int) -> None:
        self.key, self.count = _main_layers(settings)
        lists = [v for k, v in settings.items() if isinstance(v, list) and self.is_per_layer(k, v)]
        lists += [
            [i in v for i in range(self.count)]
            for k, v in settings.items()
            if _LAYER_INDICES.match(k) and isinstance(v, list)
        ]
        kinds = [tuple(json.dumps(entries[i]) for entries in lists) for i in range(self.count)]
        firsts = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
        self.kept = firsts[:6]
        for i in range(self.count):
            if len(self.kept) >= min(least, self.count):
                break
            if i not in self.kept:
                self.kept = sorted([*self.kept, i])

    def is_per_layer(self, key: str, value: Sequence[Any]) -> bool:
        named = re.search(r"layer|type|pattern|per_layer|^sliding_windows$|intermediate_size|hidden_size", key)
        return self.count > 1 and len(value) == self.count and bool(named or self.count > 8) and not _TAPS.match(key)

    def indices(self, chosen: Sequence[Any]) -> list[int]:
        return [new for new, old in enumerate(self.kept) if old in chosen]


def _main_layers(settings: Mapping[str, Any]) -> tuple[str, int]:
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth", "layers"):
        value = settings.get(key)
        if isinstance(value, int) and value > 0 and not _hierarchical(settings):
            return key, value
    return "", 0


_NO_LAYERS = _Layers({}, 0)


def _hierarchical(settings: Mapping[str, Any]) -> bool:
    """Whether it has stages whose resolution falls, as convolutional networks and Swin have."""
    return any(isinstance(settings.get(k), list) for k in ("depths", "hidden_sizes", "embed_dims", "neck_hidden_sizes"))


def _spread_taps(value: Sequence[int], layers: int) -> list[int]:
    """As many taps as before, on the layers that are left; those counted from the end stay."""
    positions = range(layers - len(value) + 1, layers + 1)
    return [v if v < 0 else max(p, 0) for v, p in zip(value, positions, strict=True)]


def _float(key: str, value: float) -> float:
    # Weights of 0.02 at this width would leave all that a layer computes below the residual's rounding
    return 0.1 if key in ("initializer_range", "init_std") and 0 < value < 0.1 else value


def _rope(value: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: the lengths shrink with the positions, the sections add up to half of what is rotated."""
    small: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, dict):
            small[key] = _rope(entry, settings)
        elif key == "mrope_section":
            rotated = int(HEAD * float(value.get("partial_rotary_factor") or 1.0)) // 2
            small[key] = _parts(rotated, len(entry))
        elif key in ("original_max_position_embeddings", "max_position_embeddings"):
            small[key] = min(int(entry), POSITIONS // 2 if key.startswith("original") else POSITIONS)
        elif key in ("short_factor", "long_factor"):
            small[key] = list(entry[: HEAD // 2])
        else:
            small[key] = entry
    return small


def _parts(total: int, count: int) -> list[int]:
    return [total - (count - 1) * (total // count), *[total // count] * (count - 1)]


def _declared(model_type: str) -> set[str] | None:
    """The settings that the configuration takes; None for a plain dictionary."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    kind = CONFIG_MAPPING[model_type]
    other_names = {name for pair in kind.attribute_map.items() for name in pair}
    return {field.name for field in dataclasses.fields(kind)} | other_names


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value
