"""Tiny encoders, encoder-decoders, vision and audio towers: all base models that are no decoder.

    build("model:t5gemma", dtype=torch.bfloat16)

The configuration is reduced as for decoders; the inputs follow the model's `main_input_name` and the
arguments that its forward requires. What does not build is in `overrides.NOT_BUILT`, with the reason.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from . import models, overrides
from .models import Built, randomise, word_ids
from .reduce import merge, reduced

PREFIX = "model:"
FRAMES, SAMPLES, VIDEO = 64, 3200, 2


def names() -> list[str]:
    """ "model:<type>" for every base model whose architecture has no entry among the decoders."""
    decoders = {name.removeprefix("itt:") for name in models.names()}
    return [PREFIX + key for key in MODEL_MAPPING_NAMES if key not in decoders]


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False, seed: int = 0, **config: Any) -> Built:
    """The tiny base model `name`, with inputs; raises whatever transformers raises."""
    seed += zlib.crc32(name.encode()) % 10000
    torch.manual_seed(seed)
    key = name.removeprefix(PREFIX)
    cfg_class = CONFIG_MAPPING[key]
    kwargs = reduced(cfg_class, cfg_class(**overrides.DEFAULTS.get(key, {})))
    cfg = cfg_class(**merge(kwargs, overrides.CONFIG.get(name, {}) | config))
    entry = MODEL_MAPPING_NAMES[key]
    model = getattr(transformers, entry if isinstance(entry, str) else entry[0])(cfg)
    randomise(model, seed)
    model = model.to(dtype)
    model.train(train)
    rng = torch.Generator().manual_seed(seed)
    inputs = _inputs(model, cfg, rng)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return Built(name, model, inputs, cfg)


def _inputs(model: nn.Module, cfg: Any, rng: torch.Generator) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    required = [k for k, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = {model.main_input_name, *required}
    wanted |= {k for k in ("decoder_input_ids",) if k in parameters and getattr(cfg, "is_encoder_decoder", False)}
    inputs: dict[str, Any] = {}
    for key in parameters:
        if key in wanted and key in MAKERS:
            inputs[key] = MAKERS[key](cfg, rng)
    if "use_cache" in parameters and not getattr(cfg, "is_encoder_decoder", False):
        inputs["use_cache"] = False
    return inputs


def _vision(cfg: Any) -> Any:
    return next(v for v in (getattr(cfg, "vision_config", None), cfg) if v is not None)


def _first(cfg: Any, keys: str, default: int) -> int:
    for key in keys.split():
        value = getattr(cfg, key, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _ids(cfg: Any, rng: torch.Generator) -> Tensor:
    return word_ids(models.BATCH, models.SEQ, rng)


def _pixels(cfg: Any, rng: torch.Generator) -> Tensor:
    vision = _vision(cfg)
    size = _first(vision, "image_size input_size", 64)
    return torch.randn(models.BATCH, _first(vision, "num_channels in_channels", 3), size, size, generator=rng)


def _video(cfg: Any, rng: torch.Generator) -> Tensor:
    frames = _first(_vision(cfg), "num_frames frames_per_clip", VIDEO)
    return torch.stack([_pixels(cfg, rng) for _ in range(frames)], dim=1)


def _features(cfg: Any, rng: torch.Generator) -> Tensor:
    bins = _first(cfg, "num_mel_bins feature_size n_mels input_feat_per_channel input_dim", 80)
    return torch.randn(models.BATCH, bins, FRAMES, generator=rng)


def _wave(cfg: Any, rng: torch.Generator) -> Tensor:
    return torch.randn(models.BATCH, SAMPLES, generator=rng)


def _codec_wave(cfg: Any, rng: torch.Generator) -> Tensor:
    return torch.randn(models.BATCH, 1, SAMPLES, generator=rng)


def _boxes(cfg: Any, rng: torch.Generator) -> Tensor:
    corners = torch.randint(0, 50, (models.BATCH, models.SEQ, 2), generator=rng)
    return torch.cat([corners, corners + 10], dim=-1)


# Argument of a forward -> its value, from the configuration.
MAKERS: dict[str, Callable[[Any, torch.Generator], Any]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_features": _features,
    "input_values": _wave,
    "bbox": _boxes,
}
