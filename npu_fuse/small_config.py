"""Small configurations of transformers architectures, by kinds of fields and not by models.

A configuration is reduced in several ways, from small to less small, because models want relations between
their fields that no table of fields knows; `attempts` gives them in order, and the caller takes the first
whose model runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

VOCABULARY = 128
_WIDTH, _HEADS, _HEAD_DIM, _LAYERS = 64, 4, 16, 2
_MOST_KINDS_OF_LAYERS = 6
_SmallValue = Callable[[str, Any], Any]

# A configuration field, by its whole name (first match wins), and its small value. Values only shrink.
_SMALL: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|vocab_size_base", VOCABULARY),
    (r"mamba_(n|num)_heads", 8),
    (r"(.*_)?(key_value|kv|key|num_kv|kv_n)_heads", 2),
    (r"(.*_)?(num|n|attention|value|decoder|encoder)_(.*_)?heads?", _HEADS),
    (
        r"num_query_groups|num_(local_)?experts?|n_routed_experts|(.*_)num_(local_)?experts?|zero_expert_num",
        4,
    ),
    (r"num_experts_per_tok(en)?|(.*_)?top_?k(_experts|_blocks)?|moe_k|n_groups", 2),
    (
        r"n_group|n_shared_experts|num_shared_experts?|num_expert_group|topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index",
        1,
    ),
    (r"max_window_layers|num_key_value_groups|mamba_n_groups", 1),
    (
        r"(num|n|encoder|decoder)_(hidden_|encoder_|decoder_)?layers?|conf_num_hidden_layers|depth|num_blocks|layers",
        2,
    ),
    (
        r"qk_rope_head_dim|rotary_dim|index_topk|d_rel|(.*_)?rank_dim|adapter_rank|time_step_rank|mamba_dt_rank",
        8,
    ),
    (r"qk_head_dim", 24),
    (r"q_lora_rank|router_hidden_size|ple_embed_dim|rel_extent|image_size", 32),
    (
        r"(.*_)?head_?dim|(.*_)?(d_head|dim_head|head_size|d_kv|kv_channels|headdim|nope_head_dim|lora_rank)",
        _HEAD_DIM,
    ),
    (r"(.*_)?(state_size|d_state|chunk_size|lowrank)|query_pre_attn_scalar|hidden_size_per_layer_input", 16),
    (r"num_position_embeddings", 16),
    (
        r"mamba_(n|num)_heads|(.*_)?(sliding_window|window_size)(_size)?|index_block_size|patch_size|laurel_rank",
        8,
    ),
    (r"moe_(.*_)?intermediate_size|shared_experts?_intermediate_size|share_expert_dim", _WIDTH),
    (
        r"(.*_)?(intermediate|ffn_hidden|feed_forward)_size(_mlp)?|(.*_)?ffn_dim|n_inner|d_ff|dff|dim_ff",
        2 * _WIDTH,
    ),
    (r"mlp_dim|d_inner|mamba_d_ssm|projection_intermediate_size", 2 * _WIDTH),
    (r"(original_)?max_(position_embeddings|seq_len|(source|target)_positions)|n_positions|n_ctx", 128),
    (r"context_length|model_max_length|attention_chunk_size", 128),
    (
        r"(.*_)?(hidden|embedding|input|output)_(size|dim)|hidden_size_global|d_model|n_embd|dim|emb_dim",
        _WIDTH,
    ),
    (
        r"(.*_)?(embed_dim|proj_dim|projection_dim|output_dim|channels_out|lru_width)|lru_width|output_channels",
        _WIDTH,
    ),
)
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ENCODER_DECODER_DEPTHS = ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")
# Where None is the default and the model wants a number all the same.
_NEVER_NONE = re.compile(r"head_dim|num_key_value_heads|.*experts.*|moe_intermediate_size|.*top_?k.*|n_group")
_KEEPS_HEADS = re.compile(r".*head_?dim|.*(d_head|dim_head|head_size|kv_channels|headdim)")
_COUNTS_ONLY = re.compile(r".*layers?|depth|num_blocks|.*vocab_size.*|.*num_(local_)?experts?|n_routed_experts")


def attempts(config: Any, layers: int | None) -> Iterator[Callable[[], Any]]:
    """What makes small configurations of the same class, the smallest first. Each keeps every kind of layer.

    After the smallest: numbers for fields that are None; the model's own head sizes; its own widths, with few
    layers, words and experts. Each may raise, as the class of the configuration checks its fields.
    """
    for small_value in (_small_value, _small_or_missing, _small_but_heads, _few_but_wide):
        yield partial(_reduced, config, layers, small_value)


def set_depth(config: Any, layers: int) -> None:
    """Set every field that is a number of layers."""
    for name in _DEPTHS + _ENCODER_DECODER_DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, layers)


def _reduced(config: Any, layers: int | None, small_value: _SmallValue) -> Any:
    return type(config)(**_small_fields(config, layers, small_value))


def _small_fields(config: Any, layers: int | None, small_value: _SmallValue) -> dict[str, Any]:
    values = {**vars(config), **config.to_dict()}
    subs = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    keep = _kinds_of_layers(values, layers)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name in subs or name.startswith("_"):
            continue
        small = small_value(name, value)
        if name in _DEPTHS and (keep or layers):
            small = len(keep) if keep else layers
        elif isinstance(value, (list, tuple)) and keep and len(value) == _depth(values):
            small = [small_value(name, value[i]) for i in keep]
        if small is not value:
            made[name] = small
    heads, kv = made.get("num_attention_heads"), "num_key_value_heads"
    if kv in made and values.get(kv) == values.get("num_attention_heads"):
        made[kv] = heads
    if values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        made["head_dim"] = made["qk_rope_head_dim"]
    if small_value is _small_but_heads and made.get("hidden_size") and values.get("head_dim") is None:
        own = values["hidden_size"] // (values.get("num_attention_heads") or 1)
        made["hidden_size"] = max(made["hidden_size"], own * (made.get("num_attention_heads") or 1))
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        made["rope_parameters"] = _small_rope(rope, _head_dim({**values, **made}))
    for name, sub in subs.items():
        if sub is not None and hasattr(sub, "to_dict"):
            made[name] = {**_small_fields(sub, layers, small_value), "model_type": sub.model_type}
    return made


def _small_value(name: str, value: Any) -> Any:
    """The small value of a field, or `value` itself where it is to stay."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (list, tuple)) and name in ("image_size", "patch_size", "intermediate_size"):
        return [_small_value(name, v) for v in value]
    if not isinstance(value, (int, float)):
        return value
    if name in _SPECIAL_TOKENS:
        return min(value, _SPECIAL_TOKENS[name])
    if re.fullmatch(r".*(token_(id|index)|_start_id|_end_id|newline_id|patch_id)", name):
        return value if value < VOCABULARY else 40 + sum(map(ord, name)) % (VOCABULARY - 40)
    for pattern, small in _SMALL:
        if re.fullmatch(pattern, name):
            return type(value)(min(value, small))
    return value


def _small_or_missing(name: str, value: Any) -> Any:
    if value is None and _NEVER_NONE.fullmatch(name):
        return next((small for pattern, small in _SMALL if re.fullmatch(pattern, name)), None)
    return _small_value(name, value)


def _small_but_heads(name: str, value: Any) -> Any:
    return value if value is not None and _KEEPS_HEADS.fullmatch(name) else _small_or_missing(name, value)


def _few_but_wide(name: str, value: Any) -> Any:
    small = _COUNTS_ONLY.fullmatch(name) or name in _SPECIAL_TOKENS or "token" in name or value is None
    return _small_or_missing(name, value) if small else value


def _head_dim(values: Mapping[str, Any]) -> int:
    width, heads = values.get("hidden_size") or _WIDTH, values.get("num_attention_heads") or _HEADS
    return int(values.get("head_dim") or width // heads)


def _depth(values: Mapping[str, Any]) -> int:
    return next((values[k] for k in _DEPTHS if isinstance(values.get(k), int)), 0)


def _kinds_of_layers(values: Mapping[str, Any], layers: int | None) -> list[int]:
    """Which layers to keep so that each combination of per-layer settings is there; [] if there are none."""
    depth = _depth(values)
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == depth > _LAYERS]
    if not lists:
        return []
    first = {str([v[i] for v in lists]): i for i in reversed(range(depth))}
    keep = sorted(first.values())[:_MOST_KINDS_OF_LAYERS]
    wanted = layers or max(len(keep), _LAYERS)
    keep += [i for i in range(depth) if i not in keep][: max(wanted - len(keep), 0)]
    return sorted(keep[:wanted])


def _small_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary settings whose lists have one entry for each frequency, or sum to their number."""
    made = copy.deepcopy(rope)
    for part in [made, *(v for v in made.values() if isinstance(v, dict))]:
        half = int(head_dim * (part.get("partial_rotary_factor") or 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if name in part:
                part[name] = [1.0] * half
        if part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = 64
        if part.get("mrope_section"):
            count = len(part["mrope_section"])
            part["mrope_section"] = [half - half // count * (count - 1)] + [half // count] * (count - 1)
    return made
