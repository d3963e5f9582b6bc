"""Tiny, seeded, random models of transformers' causal and image-text architectures, with inputs.

    build("qwen3_moe", dtype=torch.bfloat16)      # -> Built(name, model, inputs, config)

Image-text models ("itt:<type>") are run on text only. `names()` lists all. Weights are seeded and moved away
from their constant initial values (a norm weight of ones would hide a missing multiplication).
"""

from __future__ import annotations

import inspect
import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT,
)

from . import overrides
from .reduce import merge, reduced

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="transformers")

BATCH, SEQ = 2, 16
CHANCE = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_rate", "jitter")
FIRST_WORD, LAST_WORD = 3, 38  # text ids; the special ids of `sizes` lie outside


@dataclass(frozen=True)
class Built:
    """A model and the keyword arguments to call it with; `config` is its transformers configuration."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    config: Any


def names(kind: str = "all") -> list[str]:
    """ "causal", "itt" (image-text models that are not the same class as the causal one) or "all"."""
    causal = list(CAUSAL)
    image_text = ["itt:" + k for k, v in IMAGE_TEXT.items() if CAUSAL.get(k) != v]
    return {"causal": causal, "itt": image_text, "all": causal + image_text}[kind]


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    seq: int = SEQ,
    batch: int = BATCH,
    seed: int = 0,
    **config: Any,
) -> Built:
    """A tiny model `name` in `dtype`, in train or eval mode; raises whatever transformers raises."""
    seed += zlib.crc32(name.encode()) % 10000
    torch.manual_seed(seed)
    cls = _model_class(name)
    cfg = _fit(cls, make_config(name), causal=not name.startswith("itt:"))
    cfg.use_cache = False
    for key, value in config.items():
        setattr(cfg, key, value)
    if train:
        without_chance(cfg)
    model = cls(cfg)
    randomise(model, seed)
    model = cast(model, dtype).train(train)
    rng = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {"input_ids": word_ids(batch, seq, rng)}
    if {"use_cache", "kwargs"} & set(inspect.signature(model.forward).parameters):
        inputs["use_cache"] = False
    if name in INPUTS:
        inputs |= INPUTS[name](cfg, batch, seq, rng)
    return Built(name, model, inputs, cfg)


def make_config(name: str) -> Any:
    """The tiny configuration of architecture `name`."""
    key = name.removeprefix("itt:")
    cls = CONFIG_MAPPING[key]
    kwargs = reduced(cls, cls(**overrides.DEFAULTS.get(key, {})))
    return cls(**merge(kwargs, overrides.CONFIG.get(name, overrides.CONFIG.get(key, {}))))


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast what is floating-point; `Module.to` would also make complex rotary tables real."""
    names = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}
    found: nn.Module = getattr(model, names[dtype])()
    return found


def without_chance(cfg: Any) -> None:
    """Set every dropout and jitter of a configuration to zero, so that runs can be compared."""
    for key, value in list(vars(cfg).items()):
        if hasattr(value, "to_dict"):
            without_chance(value)
        elif isinstance(value, float) and any(word in key for word in CHANCE):
            setattr(cfg, key, 0.0)
        elif key == "apply_spec_augment":
            setattr(cfg, key, False)


def word_ids(batch: int, seq: int, rng: torch.Generator) -> Tensor:
    """int64 (batch, seq) token ids of ordinary words."""
    return torch.randint(FIRST_WORD, LAST_WORD, (batch, seq), generator=rng)


def first_tensor(output: Any) -> Tensor:
    """The logits of a model's output, else its first floating-point tensor."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    found = next((t for t in tensors(output) if t.is_floating_point()), None)
    if found is None:
        raise ValueError(f"no floating-point tensor in a {type(output).__name__}")
    return found


def tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "values"):
        output = list(output.values())
    return [t for item in output for t in tensors(item)] if isinstance(output, (list, tuple)) else []


def randomise(model: nn.Module, seed: int) -> None:
    """Seeded weights: matrices by fan-in, vectors and norm weights nudged off their constants."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and p.requires_grad and not _keeps_init(name.lower()):
                _randomise_one(name.lower(), p, rng)


def _keeps_init(name: str) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return leaf in ("a_log", "d", "dt_bias", "alog") or "dt_proj.bias" in name or "rope" in leaf


def _randomise_one(name: str, p: Tensor, rng: torch.Generator) -> None:
    noise = torch.randn(p.shape, generator=rng).to(p.dtype)
    is_norm = "norm" in name or "ln_" in name
    if p.dim() <= 1:
        p.add_((0.2 if is_norm or name.endswith("weight") else 0.05) * noise)
    elif "norm" in name and "proj" not in name:
        p.add_(0.2 * noise)
    elif any(word in name for word in ("embed", "wte", "wpe")):
        p.copy_(0.5 * noise)
    else:
        fan = {2: p.shape[-1], 3: min(p.shape[-1], 64)}.get(p.dim(), p[0].numel())
        p.copy_(noise / math.sqrt(max(fan, 1)))


def _model_class(name: str) -> type[nn.Module]:
    entry = IMAGE_TEXT[name[4:]] if name.startswith("itt:") else CAUSAL[name]
    found: type[nn.Module] = getattr(transformers, entry if isinstance(entry, str) else entry[0])
    return found


def _fit(cls: type, cfg: Any, causal: bool) -> Any:
    """The part of `cfg` that `cls` takes (a causal class may want the text part), set up as a decoder."""
    want = getattr(cls, "config_class", None)
    if want is not None and not isinstance(cfg, want):
        parts = [getattr(cfg, key, None) for key in getattr(cfg, "sub_configs", {})]
        parts.append(cfg.get_text_config(decoder=True))
        cfg = next((part for part in parts if isinstance(part, want)), cfg)
    if causal and hasattr(cfg, "is_decoder"):
        cfg.is_decoder = True
    if causal and getattr(cfg, "is_encoder_decoder", False):
        cfg.is_encoder_decoder = False
    return cfg


def _codebooks(cfg: Any, batch: int, seq: int, rng: torch.Generator) -> dict[str, Any]:
    return {"input_ids": word_ids(batch * cfg.num_codebooks, seq, rng)}


# Inputs beyond (batch, seq) token ids.
INPUTS: dict[str, Callable[[Any, int, int, torch.Generator], dict[str, Any]]] = {
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
}
