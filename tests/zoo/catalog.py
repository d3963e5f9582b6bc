"""Every model of the zoo by name, whatever library or mapping it comes from."""

from __future__ import annotations

from pathlib import Path

import torch

from . import models, others
from .models import Built

KINDS = ("quarter", "causal", "itt", "decoders", "others", "all")
QUARTER = Path(__file__).with_name("quarter.txt")


def names(kind: str = "all") -> list[str]:
    """Names that `build` takes, of one of `KINDS`; "decoders" are causal and image-text models.

    "quarter" is the representative quarter of them that CI runs.
    """
    if kind == "quarter":
        return [line for line in QUARTER.read_text().splitlines() if line and not line.startswith("#")]
    if kind == "others":
        return others.names()
    return models.names("all" if kind == "decoders" else kind) + (others.names() if kind == "all" else [])


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False) -> Built:
    """The tiny model `name` with inputs."""
    if name.startswith(others.PREFIX):
        return others.build(name, dtype, train)
    return models.build(name, dtype, train)
