"""Blocks that hold experts and compute something else, or that nobody may rewrite; each with the reason's words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .expert_blocks import Block, EveryExpert, Gated, MaskedLoop, Plain


class Capacity(EveryExpert):
    """Each expert takes the first few tokens only."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.router(x).softmax(-1).topk(self.k, dim=-1)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            t, j = torch.where(chosen == e)
            t, j = t[:4], j[:4]
            if len(t):
                out.index_add_(0, t, weights[t, j, None] * mlp(x[t]))
        return out.view_as(hidden)


class Jitter(MaskedLoop):
    """Noise on the router's input in training."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training:
            hidden = hidden * torch.empty_like(hidden).uniform_(0.99, 1.01)
        return super().forward(hidden)


class Counting(MaskedLoop):
    """Counts its calls in a buffer."""

    def build(self) -> None:
        super().build()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return super().forward(hidden)


class Remembering(MaskedLoop):
    """Leaves its logits in an attribute."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, logits = super().forward(hidden)
        self.last = logits
        return out, logits


class Dropping(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner, self.drop = Plain(width, inner), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.drop(self.inner(x))
        return made


class Tied(Gated):
    """Rows of one expert are normalised together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.softmax(0))


class TiedRows(EveryExpert):
    def build(self) -> None:
        super().build()
        self.mlps = nn.ModuleList(Tied(self.width, self.inner) for _ in range(self.experts_))


class Numbered(Plain):
    """Equal in structure, and one of them computes otherwise."""

    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class OneOfThemOtherwise(EveryExpert):
    def build(self) -> None:
        super().build()
        self.mlps = nn.ModuleList(Numbered(self.width, self.inner) for _ in range(self.experts_))
        self.mlps[3].factor = 1.5


class ManyTokensOtherwise(MaskedLoop):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, logits = super().forward(hidden)
        return (out * 2 if hidden.shape[0] * hidden.shape[1] > 40 else out), logits


class NextExpert(EveryExpert):
    """The matrix that follows the chosen expert's is used for the last step: no row function of one expert."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.router(x).softmax(-1).topk(self.k, dim=-1)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            t, j = torch.where(chosen == e)
            if len(t):
                other: Any = self.mlps[(e + 1) % len(self.mlps)]
                y = torch.nn.functional.silu(mlp.gate_proj(x[t])) * mlp.up_proj(x[t])
                out.index_add_(0, t, weights[t, j, None] * other.down_proj(y))
        return out.view_as(hidden)


class Median(EveryExpert):
    """A token's experts are not added but compared."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.router(x).softmax(-1).topk(self.k, dim=-1)
        out = torch.full_like(x, -1e30)
        for e, mlp in enumerate(self.mlps):
            t, j = torch.where(chosen == e)
            if len(t):
                out[t] = torch.maximum(out[t], weights[t, j, None] * mlp(x[t]))
        return out.view_as(hidden)


class DetachedWeights(MaskedLoop):
    """No gradient to the router: values alone do not show it."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from torch.nn import functional

        batch, length, width = hidden.shape
        x = hidden.view(-1, width)
        logits = self.gate(x)
        weights, chosen = torch.topk(functional.softmax(logits, dim=1), self.k, dim=-1)
        kept = weights.detach()
        out = torch.zeros_like(x)
        for e in range(self.experts_):
            t, j = torch.where(chosen == e)
            if len(t):
                out.index_add_(0, t, self.experts[e](x[t]) * kept[t, j, None])
        return out.view(batch, length, width), weights


NO_ROUTING = "no indices and weights"
LEFT: dict[str, tuple[type[Block], str]] = {
    "capacity": (Capacity, "other sizes"),
    "counting": (Counting, "writes"),
    "remembering": (Remembering, "leaves"),
    "tied rows": (TiedRows, NO_ROUTING),
    "one of them otherwise": (OneOfThemOtherwise, NO_ROUTING),
    "many tokens otherwise": (ManyTokensOtherwise, "differ"),
    "next expert": (NextExpert, NO_ROUTING),
    "largest": (Median, NO_ROUTING),
}
