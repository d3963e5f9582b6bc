"""Every model of the zoo by name, whatever library or mapping it comes from."""

from __future__ import annotations

import torch

from . import models, others
from .models import Built

KINDS = ("causal", "itt", "decoders", "others", "all")


def names(kind: str = "all") -> list[str]:
    """Names that `build` takes, of one of `KINDS`; "decoders" are causal and image-text models."""
    if kind == "others":
        return others.names()
    return models.names("all" if kind == "decoders" else kind) + (others.names() if kind == "all" else [])


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False) -> Built:
    """The tiny model `name` with inputs."""
    if name.startswith(others.PREFIX):
        return others.build(name, dtype, train)
    return models.build(name, dtype, train)
