"""Tiny transformers of diffusers: the denoisers of image and video models, with their rotary tables.

    build("diffusers:flux", dtype=torch.bfloat16)

Needs diffusers (with pillow). Each has one or two blocks, heads of 16 and the class's own defaults otherwise.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .models import Built, cast, randomise

PREFIX = "diffusers:"
WORDS, SIDE, BATCH = 8, 4, 2
Inputs = Callable[[torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Spec:
    """A class of diffusers, the arguments that make it tiny, and inputs for it."""

    cls: str
    config: dict[str, Any]
    inputs: Inputs


def names() -> list[str]:
    """All, if diffusers is installed."""
    return [PREFIX + key for key in SPECS] if importlib.util.find_spec("diffusers") else []


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False) -> Built:
    """The tiny model `name` and its inputs; raises ImportError without diffusers."""
    import diffusers

    spec = SPECS[name.removeprefix(PREFIX)]
    seed = zlib.crc32(name.encode()) % 10000
    torch.manual_seed(seed)
    model = getattr(diffusers, spec.cls)(**spec.config)
    randomise(model, seed)
    inputs = spec.inputs(torch.Generator().manual_seed(seed))
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return Built(name, cast(model, dtype).train(train), inputs, model.config)


def _tokens(channels: int, ids: int, pooled: bool = False) -> Inputs:
    """Latents as tokens with their 2-D positions, words with theirs (Flux and its relatives)."""

    def make(rng: torch.Generator) -> dict[str, Any]:
        rows = torch.zeros(SIDE * SIDE, ids)
        rows[:, 1] = torch.arange(SIDE).repeat_interleave(SIDE)
        rows[:, 2] = torch.arange(SIDE).repeat(SIDE)
        inputs = {
            "hidden_states": torch.randn(BATCH, SIDE * SIDE, channels, generator=rng),
            "encoder_hidden_states": torch.randn(BATCH, WORDS, 32, generator=rng),
            "timestep": torch.full((BATCH,), 0.5),
            "img_ids": rows,
            "txt_ids": torch.zeros(WORDS, ids),
        }
        return inputs | ({"pooled_projections": torch.randn(BATCH, 32, generator=rng)} if pooled else {})

    return make


def _latents(channels: int, frames: int = 0, **more: Any) -> Inputs:
    """Latents (batch, channels, [frames,] height, width) and words; `more` are shapes of further inputs."""

    def make(rng: torch.Generator) -> dict[str, Any]:
        shape = (BATCH, channels, *([frames] if frames else []), 2 * SIDE, 2 * SIDE)
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(shape, generator=rng),
            "encoder_hidden_states": torch.randn(BATCH, WORDS, 32, generator=rng),
            "timestep": torch.full((BATCH,), 5),
        }
        return inputs | {key: value(rng) if callable(value) else value for key, value in more.items()}

    return make


def _random(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: torch.randn(shape, generator=rng)


def _ones(dtype: torch.dtype = torch.bool) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: torch.ones(BATCH, WORDS, dtype=dtype)


def _size(rng: torch.Generator) -> Tensor:
    return torch.tensor([[64.0, 64.0]] * BATCH)


def _ltx(rng: torch.Generator) -> dict[str, Any]:
    grid = {"num_frames": 2, "height": SIDE, "width": SIDE}
    return {
        "hidden_states": torch.randn(BATCH, 2 * SIDE * SIDE, 16, generator=rng),
        "encoder_hidden_states": torch.randn(BATCH, WORDS, 32, generator=rng),
        "timestep": torch.full((BATCH,), 5),
        "encoder_attention_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
        **grid,
    }


def _qwen(rng: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(BATCH, SIDE * SIDE, 16, generator=rng),
        "encoder_hidden_states": torch.randn(BATCH, WORDS, 32, generator=rng),
        "encoder_hidden_states_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
        "timestep": torch.full((BATCH,), 0.5),
        "img_shapes": [[(1, SIDE, SIDE)]] * BATCH,
    }


_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_FLUX = {**_HEADS, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
_VIDEO = {**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 32, "ffn_dim": 64, "num_layers": 1}

SPECS: dict[str, Spec] = {
    "flux": Spec(
        "FluxTransformer2DModel", {**_FLUX, "in_channels": 16, "pooled_projection_dim": 32}, _tokens(16, 3, pooled=True)
    ),
    "flux2": Spec(
        "Flux2Transformer2DModel",
        {**_FLUX, "in_channels": 16, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
        _tokens(16, 4),
    ),
    "longcat_image": Spec(
        "LongCatImageTransformer2DModel",
        {**_FLUX, "in_channels": 16, "pooled_projection_dim": 32},
        _tokens(16, 3),
    ),
    "ovis_image": Spec("OvisImageTransformer2DModel", {**_FLUX, "in_channels": 16, "out_channels": 16}, _tokens(16, 3)),
    "qwen_image": Spec(
        "QwenImageTransformer2DModel",
        {**_HEADS, "num_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8), "in_channels": 16}
        | {"out_channels": 4},
        _qwen,
    ),
    "wan": Spec("WanTransformer3DModel", _VIDEO, _latents(4, frames=2)),
    "skyreels_v2": Spec("SkyReelsV2Transformer3DModel", _VIDEO, _latents(4, frames=2)),
    "hunyuan_video": Spec(
        "HunyuanVideoTransformer3DModel",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
        | {"num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 32, "rope_axes_dim": (4, 4, 8)}
        | {"guidance_embeds": False},
        _latents(4, frames=2, encoder_attention_mask=_ones(), pooled_projections=_random(BATCH, 32)),
    ),
    "ltx": Spec(
        "LTXVideoTransformer3DModel",
        {**_HEADS, "in_channels": 16, "out_channels": 16, "cross_attention_dim": 32, "num_layers": 2}
        | {"caption_channels": 32},
        _ltx,
    ),
    "sd3": Spec(
        "SD3Transformer2DModel",
        {**_HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "qk_norm": "rms_norm"}
        | {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32}
        | {"pos_embed_max_size": 8},
        _latents(4, pooled_projections=_random(BATCH, 32)),
    ),
    "lumina2": Spec(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1}
        | {"num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 4, 8)}
        | {"axes_lens": (32, 32, 32), "cap_feat_dim": 32},
        _latents(4, encoder_attention_mask=_ones()),
    ),
    "cogview4": Spec(
        "CogView4Transformer2DModel",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 32}
        | {"time_embed_dim": 32, "condition_dim": 16, "rope_axes_dim": (8, 8), "sample_size": 8},
        _latents(4, original_size=_size, target_size=_size, crop_coords=_size),
    ),
    "mochi": Spec(
        "MochiTransformer3DModel",
        {**_HEADS, "in_channels": 4, "num_layers": 2, "pooled_projection_dim": 32, "text_embed_dim": 32}
        | {"time_embed_dim": 16, "max_sequence_length": WORDS},
        _latents(4, frames=2, encoder_attention_mask=_ones()),
    ),
}
