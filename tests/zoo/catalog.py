"""Every model of the zoo by name, whatever library or mapping it comes from."""

from __future__ import annotations

from pathlib import Path

import torch

from . import diffusion, models, others, titan
from .models import Built

KINDS = ("quarter", "causal", "itt", "decoders", "others", "libraries", "all")
QUARTER = Path(__file__).with_name("quarter.txt")


def names(kind: str = "all") -> list[str]:
    """Names that `build` takes, of one of `KINDS`; "decoders" are causal and image-text models.

    "libraries" are the models of diffusers and torchtitan, as far as those are installed. "quarter" is the
    representative quarter of the decoders that CI runs.
    """
    if kind == "quarter":
        return [line for line in QUARTER.read_text().splitlines() if line and not line.startswith("#")]
    if kind == "libraries":
        return diffusion.names() + titan.names()
    if kind == "others":
        return others.names()
    if kind == "all":
        return [name for part in ("decoders", "others", "libraries") for name in names(part)]
    return models.names("all" if kind == "decoders" else kind)


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False) -> Built:
    """The tiny model `name` with inputs."""
    if name.startswith(others.PREFIX):
        return others.build(name, dtype, train)
    if name.startswith(diffusion.PREFIX):
        return diffusion.build(name, dtype, train)
    if name.startswith(titan.PREFIX):
        return titan.build(name, dtype, train)
    return models.build(name, dtype, train)
