"""Tiny language models of torchtitan: two layers of its debug configurations.

    build("titan:llama3", dtype=torch.bfloat16)

Needs torchtitan and triton, which it imports on any device. Its attention (FlexAttention, compiled by itself) is
replaced by scaled dot product attention, so that a CPU runs it; norms, rotations and gates are torchtitan's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import BATCH, SEQ, Built, cast, randomise, word_ids

PREFIX = "titan:"
LAYERS = 2
# Name -> (package, flavour).
FLAVOURS = {
    "llama3": ("llama3", "debugmodel"),
    "qwen3": ("qwen3", "debugmodel"),
    "qwen3_moe": ("qwen3", "debugmodel_moe"),
    "deepseek_v3": ("deepseek_v3", "debugmodel"),
    "kimi_k2_7": ("kimi_k2_7", "debugmodel"),
}


class PlainAttention(nn.Module):
    """Causal attention over (batch, length, heads, width)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)


def names() -> list[str]:
    """All, if torchtitan and triton are installed."""
    there = all(importlib.util.find_spec(package) for package in ("torchtitan", "triton"))
    return [PREFIX + key for key in FLAVOURS] if there else []


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False) -> Built:
    """The tiny model `name` and its inputs; raises ImportError without torchtitan."""
    family, flavour = FLAVOURS[name.removeprefix(PREFIX)]
    package = importlib.import_module(f"torchtitan.models.{family}")
    tables = [value for key, value in vars(package).items() if key.endswith("_configs")]
    make = next(table[flavour] for table in tables if isinstance(table, dict))
    wanted = make.__code__.co_varnames[: make.__code__.co_argcount]
    known = {"attn_backend": "flex", "moe_comm_backend": "standard"}
    config = make(**{key: known[key] for key in wanted if key in known})
    config.layers = config.layers[:LAYERS]
    seed = zlib.crc32(name.encode()) % 10000
    torch.manual_seed(seed)
    model = config.build()
    model.init_states()
    for module in model.modules():
        if hasattr(module, "inner_attention"):
            module.inner_attention = PlainAttention()
    randomise(model, seed)
    inputs = {"tokens": word_ids(BATCH, SEQ, torch.Generator().manual_seed(seed))}
    return Built(name, cast(model, dtype).train(train), inputs, config)
