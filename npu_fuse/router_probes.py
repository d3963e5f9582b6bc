"""Logits on which a router's choice is no tie, nor near one: another order of rounding must not choose otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.router_choice import SIGMOID, SOFTMAX
from npu_fuse.routers import Router
from npu_fuse.sites import MakeInput

SPREADS = (1.0, 0.25, 2.0, 0.5, 4.0)
DRAWN = 16


def untied_logits(router: Router) -> MakeInput:
    """Logits of which no two of a token tie: other values in another order for each, those rows furthest from ties."""
    choice = router.choice
    value = d.tensor(choice.x)
    assert value is not None

    def make(made: Mapping[Node, Any], shape: tuple[int, ...], index: int, generator: torch.Generator) -> torch.Tensor:
        experts, rows = shape[-1], torch.Size(shape[:-1]).numel()
        drawn = torch.randn(DRAWN * experts, generator=generator, dtype=torch.float64).to(value.dtype)
        drawn = torch.unique(drawn)
        levels = drawn[torch.linspace(0, len(drawn) - 1, experts).long()].double() * SPREADS[index % len(SPREADS)]
        rows_ = levels[torch.rand(DRAWN * rows, experts, generator=generator).argsort(-1)]
        bias = made.get(choice.bias) if choice.bias is not None else None
        apart = _distance(router, rows_, bias.double().reshape(-1) if bias is not None else None)
        made_: torch.Tensor = rows_[apart.argsort(descending=True)[:rows]].reshape(shape)
        return made_

    return make


def _distance(router: Router, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """How far a row's choice is from a tie: the smallest step between neighbours among its largest, relative."""
    kind, groups = router.choice.kind, router.choice.groups
    scores = torch.softmax(x, -1) if kind == SOFTMAX else torch.sigmoid(x) if kind == SIGMOID else x
    chosen = scores if bias is None else scores + bias
    apart = torch.full(x.shape[:1], torch.inf, dtype=x.dtype)
    if groups is not None and groups.count > 1:
        grouped = chosen.reshape(len(x), groups.count, -1)
        best = grouped.topk(2, -1).values.sum(-1) if groups.pairs else grouped.amax(-1)
        apart = _steps(best.sort(-1, descending=True).values)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(groups.kept, -1).indices, True)
        chosen = grouped.masked_fill(~kept.unsqueeze(-1), -1e300).reshape(chosen.shape)
    return torch.minimum(apart, _steps(chosen.topk(min(router.k + 1, x.shape[-1]), -1).values))


def _steps(ordered: torch.Tensor) -> torch.Tensor:
    if ordered.shape[-1] < 2:
        return torch.full(ordered.shape[:1], torch.inf, dtype=ordered.dtype)
    larger = ordered[:, :-1]
    return ((larger - ordered[:, 1:]) / larger.abs().clamp_min(1e-12)).amin(-1)
