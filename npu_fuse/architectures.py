"""A transformers architecture with random weights, small enough to be built and captured in seconds.

`build` takes a model type ("llama"), a class name ("LlamaForCausalLM"), a folder or a config.json. It never
goes to the network. The reducer knows kinds of configuration fields (widths, depths, counts of heads and
experts), not models: where a model wants a relation between its fields that the reducer breaks, it says so
and asks for a config.json, which `full=True` takes as it is.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from npu_fuse.errors import NpuFuseError

BATCH, SEQUENCE, VOCABULARY = 2, 16, 128
_WIDTH, _HEADS, _HEAD_DIM, _LAYERS = 64, 4, 16, 2
_MOST_KINDS_OF_LAYERS = 6

# A configuration field, by its whole name (first match wins), and its small value. Values only shrink.
_SMALL: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|vocab_size_base", VOCABULARY),
    (r"(.*_)?(key_value|kv|key|num_kv|kv_n)_heads", 2),
    (r"(.*_)?(num|n|attention|value|decoder|encoder)_(.*_)?heads?", _HEADS),
    (
        r"num_query_groups|num_(local_)?experts?|n_routed_experts|(.*_)num_(local_)?experts?|zero_expert_num",
        4,
    ),
    (r"num_experts_per_tok(en)?|(.*_)?top_?k(_experts|_blocks)?|moe_k|n_groups", 2),
    (r"n_group|num_expert_group|topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
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


class ArchitectureError(NpuFuseError):
    """The architecture is unknown, or cannot be built or fed."""


def build(
    target: str,
    *,
    full: bool = False,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model with random weights, in eval mode, and inputs for it (batch 2, 16 tokens).

    `full` keeps the configuration's own sizes, else it is reduced. `layers` sets the depth in either case.
    Raises `ArchitectureError`.
    """
    try:
        import transformers
    except ImportError as error:
        raise ArchitectureError(
            "architectures are built with transformers, which is not installed",
            remedy="pip install 'npu-fuse[transformers]', or give package.module:callable",
        ) from error
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        cls, config = _find(transformers, target)
        return _build(cls, config if full else _reduced(config, layers), full, layers, dtype, seed)
    except ArchitectureError:
        raise
    except Exception as error:
        remedy = (
            "give a config.json that transformers accepts"
            if full
            else "write a config.json with small sizes that fit together, and give it with --full"
        )
        raise ArchitectureError(
            f"cannot build {target!r} {'at full size' if full else 'small'}: {type(error).__name__}: {error}",
            remedy=remedy + "; or give package.module:callable",
        ) from error
    finally:
        transformers.logging.set_verbosity(quiet)


# ----------------------------------------------------------------------------------------- which architecture


def _find(transformers: Any, target: str) -> tuple[Any, Any]:
    """The model class and its configuration, at the configuration's own sizes."""
    if os.path.exists(target):
        config = transformers.AutoConfig.from_pretrained(target, local_files_only=True)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        return next(filter(None, named), None) or _class_for(transformers, config.model_type), config
    cls = getattr(transformers, target, None)
    if (
        inspect.isclass(cls)
        and hasattr(cls, "config_class")
        and issubclass(cls, transformers.PreTrainedModel)
    ):
        return cls, cls.config_class()
    if target in transformers.CONFIG_MAPPING:
        return _class_for(transformers, target), transformers.CONFIG_MAPPING[target]()
    raise ArchitectureError(f"no architecture is called {target!r}", remedy=_nearest(transformers, target))


def _class_for(transformers: Any, model_type: str) -> Any:
    """The most useful class of a model type: with a language head where there is one."""
    auto = transformers.models.auto.modeling_auto
    for task in ("FOR_CAUSAL_LM", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_MASKED_LM", ""):
        names = getattr(auto, f"MODEL_{task}_MAPPING_NAMES".replace("__", "_")).get(model_type)
        for name in (names,) if isinstance(names, str) else names or ():
            if hasattr(transformers, name):
                return getattr(transformers, name)
    raise ArchitectureError(
        f"transformers {transformers.__version__} has a configuration {model_type!r} and no model for it",
        remedy="name a class, such as LlamaForCausalLM",
    )


def _nearest(transformers: Any, target: str) -> str:
    looks_like_path = os.sep in target or target.endswith(".json")
    if looks_like_path:
        return f"there is no file or folder {os.path.abspath(target)}; nothing is downloaded"
    auto = transformers.models.auto.modeling_auto
    names = {name: name for name in transformers.CONFIG_MAPPING}
    for mapping in (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for cls in mapping.values():
            names.update({c: c for c in ((cls,) if isinstance(cls, str) else cls)})
    folded = {name.lower(): name for name in names}
    close = [folded[c] for c in difflib.get_close_matches(target.lower(), folded, n=4, cutoff=0.6)]
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return hint + "Give a model type or class of transformers, a config.json, or package.module:callable"


# ------------------------------------------------------------------------------------------------- made small


def _reduced(config: Any, layers: int | None) -> Any:
    """A small configuration of the same class. Every kind of layer in it is kept."""
    return type(config)(**_small_fields(config, layers))


def _small_fields(config: Any, layers: int | None = None) -> dict[str, Any]:
    values = {**vars(config), **config.to_dict()}
    subs = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    keep = _kinds_of_layers(values, layers)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name in subs or name.startswith("_"):
            continue
        small = _small_value(name, value)
        if name in _DEPTHS and (keep or layers):
            small = len(keep) if keep else layers
        elif isinstance(value, (list, tuple)) and keep and len(value) == _depth(values):
            small = [_small_value(name, value[i]) for i in keep]
        if small is not value:
            made[name] = small
    heads, kv = made.get("num_attention_heads"), "num_key_value_heads"
    if kv in made and values.get(kv) == values.get("num_attention_heads"):
        made[kv] = heads
    if values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        made["head_dim"] = made["qk_rope_head_dim"]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        made["rope_parameters"] = _small_rope(rope, made.get("head_dim") or _HEAD_DIM)
    for name, sub in subs.items():
        if sub is not None and hasattr(sub, "to_dict"):
            made[name] = {**_small_fields(sub, layers), "model_type": sub.model_type}
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


# ------------------------------------------------------------------------------------------- model and inputs


def _build(
    cls: Any, config: Any, full: bool, layers: int | None, dtype: torch.dtype, seed: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):  # a text model of a multimodal configuration
        subs = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
        config = next((sub for sub in subs if isinstance(sub, wanted)), config)
    if full and layers:
        for name in _DEPTHS + _ENCODER_DECODER_DEPTHS:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, layers)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).to(dtype).eval()
        return model, _inputs(model, config, dtype)


def _inputs(model: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Token ids, or what the model's main input is; and the decoder's tokens where it has a decoder."""
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    tokens = torch.randint(3, 38, (BATCH, SEQUENCE))
    made: dict[str, Any] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        made[main] = torch.randn(BATCH, getattr(config, "num_channels", 3), height, width, dtype=dtype)
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 64)
        made[main] = torch.randn(BATCH, getattr(config, "num_mel_bins", 80), frames, dtype=dtype)
    elif main == "input_values":
        made[main] = torch.randn(BATCH, 4000, dtype=dtype)
    elif main in ("input_ids", "inputs_embeds") or "input_ids" in takes:
        made["input_ids"] = tokens
    else:
        raise ArchitectureError(
            f"{type(model).__name__} takes {main!r}, for which no input is made here",
            remedy="give package.module:callable that returns (model, inputs)",
        )
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = tokens.clone()
    if "use_cache" in takes:
        made["use_cache"] = False
    return made
