"""Tiny encoders, encoder-decoders, vision and audio towers: all base models that are no decoder.

    build("model:t5gemma", dtype=torch.bfloat16)

The configuration is reduced as for decoders. Inputs are found by trying: the model's main input and what its
forward requires, then its other media too, in the layouts that are usual; the first that runs is taken.
`not_built.json` has the models for which nothing did, with the reason:

    python -m zoo.others [NAMES...]     (from tests/) try all again and write it
"""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from . import models, overrides
from .isolate import isolated
from .models import Built, cast, randomise, word_ids
from .reduce import merge, reduced

PREFIX = "model:"
NOT_BUILT = Path(__file__).with_name("not_built.json")
FRAMES, SAMPLES, VIDEO, GRID = 64, 3840, 2, 4


def candidates() -> list[str]:
    """ "model:<type>" for every base model whose architecture has no entry among the decoders."""
    decoders = {name.removeprefix("itt:") for name in models.names()}
    return [PREFIX + key for key in MODEL_MAPPING_NAMES if key not in decoders]


def names() -> list[str]:
    """The candidates that build and run."""
    excluded = json.loads(NOT_BUILT.read_text()) if NOT_BUILT.exists() else {}
    return [name for name in candidates() if name not in excluded]


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False, seed: int = 0) -> Built:
    """The tiny base model `name`, with inputs; raises what the last way to call it raised."""
    seed += zlib.crc32(name.encode()) % 10000
    torch.manual_seed(seed)
    cfg = make_config(name)
    if train:
        models.without_chance(cfg)
    entry = MODEL_MAPPING_NAMES[name.removeprefix(PREFIX)]
    model = getattr(transformers, entry if isinstance(entry, str) else entry[0])(cfg)
    randomise(model, seed)
    inputs = _first_that_runs(model.eval(), cfg, seed)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return Built(name, cast(model, dtype).train(train), inputs, cfg)


def make_config(name: str) -> Any:
    """The tiny configuration; the text part of an image-text model has that model's corrections."""
    key = name.removeprefix(PREFIX)
    cls = CONFIG_MAPPING[key]
    whole = overrides.CONFIG.get("itt:" + key.removesuffix("_text"), {}).get("text_config", {})
    inherited = {k: v for k, v in whole.items() if k != "model_type"} if key.endswith("_text") else {}
    kwargs = reduced(cls, cls(**overrides.DEFAULTS.get(key, {})))
    own = overrides.CONFIG.get(name, overrides.CONFIG.get("itt:" + key, {}))
    return cls(**merge(merge(kwargs, inherited), own))


def _first_that_runs(model: nn.Module, cfg: Any, seed: int) -> dict[str, Any]:
    problem: Exception | None = None
    for layout, names in _ways(model, cfg):
        rng = torch.Generator().manual_seed(seed)
        inputs = {key: MAKERS[key](cfg, rng, layout) for key in names}
        if "pixel_values" in inputs and {"grid_thw", "image_grid_thw", "pixel_position_ids"} & set(inputs):
            inputs["pixel_values"] = _patches_like(cfg, _patches(cfg, rng, layout), inputs, layout)
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False
        try:
            with torch.no_grad():
                models.first_tensor(model(**inputs))
            return inputs
        except Exception as error:
            problem = problem or error
    raise problem if problem else ValueError("no known way to call it")


def _ways(model: nn.Module, cfg: Any) -> Iterator[tuple[int, list[str]]]:
    """(layout, argument names) to try, the least first."""
    parameters = inspect.signature(model.forward).parameters
    required = {k for k, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    wanted = {model.main_input_name, *required}
    if getattr(cfg, "is_encoder_decoder", False):
        wanted.add("decoder_input_ids")
    for names in (wanted, wanted | MEDIA):
        for layout in range(LAYOUTS):
            yield layout, [key for key in parameters if key in names and key in MAKERS]


def _first(cfg: Any, keys: str, default: int) -> int:
    """The first of `keys` that is a number, in the configuration or in its vision or audio part."""
    parts = [cfg, *(getattr(cfg, f"{part}_config", None) for part in ("vision", "audio", "encoder", "backbone"))]
    for part in parts:
        for key in keys.split():
            value = getattr(part, key, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _ids(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return word_ids(models.BATCH, models.SEQ, rng)


def _pixels(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    size = (_first(cfg, "image_size input_size", 64), 64, 224)[layout]
    channels = _first(cfg, "num_channels in_channels in_chans", 3)
    return torch.randn(models.BATCH, channels, size, size, generator=rng)


def _video(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    frames = _first(cfg, "num_frames frames_per_clip", VIDEO)
    return torch.stack([_pixels(cfg, rng, layout) for _ in range(frames)], dim=1)


def _patches(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    """Flattened patches (images · rows · columns, channels · frames · patch²) of towers with a grid."""
    patch = _first(cfg, "patch_size", 8)
    width = _first(cfg, "num_channels in_channels in_chans", 3) * patch * patch
    width *= _first(cfg, "temporal_patch_size patch_temporal tubelet_size", 1)
    return torch.randn(models.BATCH * GRID * GRID, width, generator=rng)


def _patches_like(cfg: Any, patches: Tensor, inputs: dict[str, Any], layout: int) -> Tensor:
    """Patches as a tower takes them: flat, one image a row, or as small images (channels first or last)."""
    if "pixel_position_ids" in inputs:
        return patches.reshape(models.BATCH, GRID * GRID, -1)
    side = _first(cfg, "patch_size", 8)
    if layout == 1:
        return patches.reshape(patches.shape[0], -1, side, side)
    if layout == 2:
        side *= _first(cfg, "spatial_merge_size", 1)
        channels = _first(cfg, "num_channels in_channels in_chans", 3)
        return patches[:, :1].expand(-1, side * side * channels).reshape(-1, side, side, channels)
    return patches


def _grid(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return torch.tensor([[1, GRID, GRID]] * models.BATCH)


def _features(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    """Spectrogram (batch, bins, frames), or (batch, frames, bins), of 64 frames or of the model's own number."""
    keys = "num_mel_bins feature_size n_mels input_feat_per_channel input_feat_size mel_bins input_dim"
    bins = _first(cfg, keys, 128)
    frames = 2 * _first(cfg, "max_source_positions", FRAMES) if layout == 2 else FRAMES
    shape = (models.BATCH, frames, bins) if layout == 1 else (models.BATCH, bins, frames)
    return torch.randn(shape, generator=rng)


def _frames_mask(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return torch.ones(models.BATCH, FRAMES, dtype=torch.bool)


def _no_mask(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return torch.zeros(models.BATCH, FRAMES, dtype=torch.bool)


def _time_first(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return _features(cfg, rng, 1)


def _wave(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    shape = (models.BATCH, 1, SAMPLES) if layout == 1 else (models.BATCH, SAMPLES * (1 + 9 * (layout == 2)))
    return torch.randn(shape, generator=rng)


def _boxes(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    corners = torch.randint(0, 50, (models.BATCH, models.SEQ, 2), generator=rng)
    return torch.cat([corners, corners + 10], dim=-1)


def _embeddings(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    """Computed embeddings (batch, sequence, width), or the patches of a tower that calls them hidden states."""
    if layout == 0:
        return _patches(cfg, rng, layout)
    width = _first(cfg, "hidden_size d_model embed_dim", 64)
    shape = (models.BATCH, models.SEQ, width) if layout == 1 else (models.BATCH, width, models.SEQ)
    return torch.randn(shape, generator=rng)


def _positions_2d(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([row, column], dim=-1).reshape(1, -1, 2).repeat(models.BATCH, 1, 1)


def _series(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return torch.randn(models.BATCH, _first(cfg, "context_length", 64), generator=rng)


def _no_padding(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return torch.zeros(_series(cfg, rng, layout).shape)


def _frequency(cfg: Any, rng: torch.Generator, layout: int) -> Tensor:
    return torch.zeros(models.BATCH, 1, dtype=torch.long)


LAYOUTS = 3
MEDIA = frozenset(("input_ids", "pixel_values", "input_features", "input_values", "bbox", "decoder_input_ids"))
# Argument of a forward -> its value, from the configuration, in one of three layouts.
MAKERS: dict[str, Callable[[Any, torch.Generator, int], Any]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_features": _features,
    "input_values": _wave,
    "audio_mel": _time_first,
    "audio_mel_mask": _no_mask,
    "input_features_mask": _frames_mask,
    "bbox": _boxes,
    "hidden_states": _embeddings,
    "embeddings": _embeddings,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "pixel_position_ids": _positions_2d,
    "past_values": _series,
    "past_values_padding": _no_padding,
    "freq": _frequency,
}


def _check(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    built = build(name)
    return {"inputs": {k: list(v.shape) for k, v in built.inputs.items() if isinstance(v, Tensor)}}


def main(chosen: list[str]) -> None:
    """Try to build `chosen` (all if empty) and write those that fail into not_built.json."""
    reasons = json.loads(NOT_BUILT.read_text()) if NOT_BUILT.exists() else {}
    for name, result in isolated(_check, chosen or candidates(), timeout=90, processes=1):
        reasons.pop(name, None)
        if "error" in result:
            reasons[name] = " ".join(result["error"].split())[:200]
        print(name, result.get("inputs", reasons.get(name)), result.get("where", ""), flush=True)
        NOT_BUILT.write_text(json.dumps(dict(sorted(reasons.items())), indent=1) + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
