"""A small model with two sites, and what tests of whole models need around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import npu_fuse
from npu_fuse.report import SiteReport, Status

from . import helpers

WIDTH = 16


class Block(torch.nn.Module):
    """A norm and a gated MLP: two sites."""

    def __init__(self, eps: float = 1e-5, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.rand(width, generator=generator) + 0.5)
        self.up = torch.nn.Parameter(torch.randn(2 * width, width, generator=generator) / 4)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(self.norm(x), self.up).chunk(2, -1)
        return F.silu(gate) * up


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return helpers.random(shape or (2, 5, WIDTH), dtype, seed)


def compiled(model: Any, **settings: Any) -> Any:
    options = {**helpers.OPTIONS, **settings.pop("options", {})}
    return torch.compile(model, backend="npu_fuse", options=options, **settings)


def sites(op: str | None = None) -> list[SiteReport]:
    return helpers.sites(npu_fuse.reports(), op)


def statuses(op: str | None = None) -> list[Status]:
    return [site.status for site in sites(op)]


def same_training(model: Any, fast: Any, *inputs: torch.Tensor, parameters: Any = None) -> None:
    """Values and all gradients equal eager's."""
    results = []
    weights = list(parameters if parameters is not None else model.parameters())
    for called in (model, fast):
        given = [i.clone().requires_grad_() for i in inputs]
        for weight in weights:
            weight.grad = None
        y = called(*given)
        y.float().square().sum().backward()
        results.append((y, [leaf.grad for leaf in (*given, *weights)]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


def rms(x: torch.Tensor) -> torch.Tensor:
    """A bare norm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
