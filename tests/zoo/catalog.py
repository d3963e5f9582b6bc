"""Every model of the zoo by name, whatever library or mapping it comes from."""

from __future__ import annotations

from typing import Any

import torch

from . import models
from .models import Built


def names(kind: str = "all") -> list[str]:
    """Names that `build` takes: "causal", "itt", "decoders" (both) or "all"."""
    return models.names("all" if kind == "decoders" else kind)


def build(name: str, dtype: torch.dtype = torch.float32, train: bool = False, **more: Any) -> Built:
    """The tiny model `name` with inputs; see `models.build`."""
    return models.build(name, dtype, train, **more)
