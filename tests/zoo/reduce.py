"""Shrink a transformers configuration without knowing the architecture.

Every key named in `sizes.SMALL` gets its tiny value, per-layer lists keep one layer of each combination that
occurs, rotary parameters are refitted to the new head width, sub-configurations are reduced likewise.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from .sizes import DEPTH_KEYS, FIRST_TOKEN_ID, SMALL, TOKEN_ID_KEYS, TOKENS, VOCAB

Kwargs = dict[str, Any]
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_LISTS = ("image_size", "patch_size", "intermediate_size", "moe_intermediate_size")


def reduced(cls: type, base: Any, ids: Iterator[int] | None = None) -> Kwargs:
    """Keyword arguments that make `cls` the tiny relative of the configuration `base`."""
    ids = ids if ids is not None else _token_ids()
    values = {**vars(base), **base.to_dict()}
    subs = getattr(cls, "sub_configs", {})
    kwargs: Kwargs = {}
    for key, value in values.items():
        if key in subs or key.startswith("__"):
            continue
        if key in SMALL:
            kwargs.update(_scalar(key, value, values))
        elif key in TOKEN_ID_KEYS and isinstance(value, int) and value >= VOCAB:
            kwargs[key] = next(ids)
    rope_width = values.get("qk_rope_head_dim")
    if isinstance(rope_width, int) and rope_width and values.get("head_dim") == rope_width:
        kwargs["head_dim"] = kwargs["qk_rope_head_dim"]  # latent attention: the table is as wide as its rope part
    kwargs.update(_layers(base, values))
    if isinstance(values.get("rope_parameters"), dict):
        kwargs["rope_parameters"] = rope(values["rope_parameters"], kwargs.get("head_dim") or 16)
    for key in subs:
        sub = getattr(base, key, None)
        if sub is not None and hasattr(sub, "to_dict"):
            kwargs[key] = reduced(type(sub), sub, ids)
            if getattr(sub, "model_type", None):
                kwargs[key]["model_type"] = sub.model_type
    return kwargs


def merge(into: Kwargs, more: Kwargs) -> Kwargs:
    """Write `more` over `into`, dictionaries inside dictionaries too."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
    return into


def _token_ids() -> Iterator[int]:
    while True:
        yield from range(FIRST_TOKEN_ID, VOCAB - 8)


def _scalar(key: str, value: Any, values: Kwargs) -> Kwargs:
    small = SMALL[key]
    if value is None or isinstance(value, bool):
        return {key: small} if key in _SPECIAL else {}
    if isinstance(value, (list, tuple)):
        if key == "eos_token_id":
            return {key: small}
        return {key: [small] * len(value)} if key in _LISTS else {}
    if not isinstance(value, (int, float)) or (value == 0 and key not in TOKENS):
        return {}
    if key in _KV_HEADS and value == values.get("num_attention_heads"):
        small = SMALL["num_attention_heads"]  # multi-head stays multi-head
    if key in _KV_HEADS and value == 1:
        small = 1  # and multi-query stays multi-query
    return {key: type(value)(small)}


def _layers(base: Any, values: Kwargs, least: int = 2, most: int = 6) -> Kwargs:
    """Depth and per-layer lists: the first layer of each combination of list values, in order."""
    depth_key = next((k for k in DEPTH_KEYS if isinstance(getattr(base, k, None), int)), None)
    depth = getattr(base, depth_key) if depth_key else 0
    lists = {
        k: list(v) for k, v in base.to_dict().items() if isinstance(v, (list, tuple)) and len(v) == depth and depth > 2
    }
    if depth_key is None or not lists:
        return {}
    first: dict[str, int] = {}
    for i in range(depth):
        first.setdefault(json.dumps([v[i] for _, v in sorted(lists.items())], default=str), i)
    chosen = sorted(first.values())[:most]
    chosen += [i for i in range(depth) if i not in chosen][: max(0, least - len(chosen))]
    kwargs: Kwargs = {depth_key: len(chosen)}
    for key, per_layer in lists.items():
        if key in values:
            kwargs[key] = _per_layer(key, [per_layer[i] for i in sorted(chosen)])
    return kwargs


def _per_layer(key: str, kept: list[Any]) -> list[Any]:
    are_sizes = all(isinstance(v, int) and not isinstance(v, bool) and v > 16 for v in kept)
    if key in SMALL or are_sizes:
        return [SMALL.get(key, 4 if "head" in key else 64)] * len(kept)
    return kept


def rope(parameters: Kwargs, head_width: int) -> Kwargs:
    """Rotary parameters refitted to `head_width`; also the form with one set per layer type."""
    if any(isinstance(v, dict) for v in parameters.values()):
        return {k: _rope_set(v, head_width) if isinstance(v, dict) else v for k, v in parameters.items()}
    return _rope_set(parameters, head_width)


def _rope_set(parameters: Kwargs, head_width: int) -> Kwargs:
    out = copy.deepcopy(parameters)
    if out.get("mrope_section"):
        parts = len(out["mrope_section"])
        rotated = int(head_width * (out.get("partial_rotary_factor") or 1.0))
        half = max(rotated // 2, parts)
        out["mrope_section"] = [half // parts + (half % parts if i == 0 else 0) for i in range(parts)]
    if "original_max_position_embeddings" in out:
        out["original_max_position_embeddings"] = 64
    for key in ("short_factor", "long_factor"):
        if key in out:
            out[key] = [1.0] * (head_width // 2)
    return out
