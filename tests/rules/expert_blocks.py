"""Blocks of experts as people write them: loops that branch on data. Classes take (width, inner, experts, k)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Gated(nn.Module):
    """silu(gate) · up, three projections with names of the caller's choice."""

    def __init__(self, width: int, inner: int, names: tuple[str, str, str] = ("w1", "w3", "w2"), bias: bool = False):
        super().__init__()
        self.names = names
        for name, (a, b) in zip(names, ((width, inner), (width, inner), (inner, width)), strict=True):
            self.add_module(name, nn.Linear(a, b, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, n) for n in self.names)
        return down(F.silu(gate(x)) * up(x))


class Plain(nn.Module):
    """Two layers and a ReLU, dropout in between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.lift, self.drop, self.fold = nn.Linear(width, inner), nn.Dropout(0.0), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fold(self.drop(F.relu(self.lift(x))))


class Block(nn.Module):
    def __init__(self, width: int = 16, inner: int = 24, experts: int = 6, k: int = 2) -> None:
        super().__init__()
        self.experts_, self.k, self.width, self.inner = experts, k, width, inner
        self.build()

    def build(self) -> None:
        self.gate = nn.Linear(self.width, self.experts_, bias=False)
        self.experts = nn.ModuleList(Gated(self.width, self.inner) for _ in range(self.experts_))


class MaskedLoop(Block):
    """One-hot mask, hit experts only, torch.where, index_add_; returns the router's logits too."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, width = hidden.shape
        x = hidden.view(-1, width)
        logits = self.gate(x)
        weights, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros((batch * length, width), dtype=x.dtype)
        mask = F.one_hot(chosen, num_classes=self.experts_).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            j, t = torch.where(mask[e].squeeze(0))
            rows = self.experts[e](x[None, t].reshape(-1, width)) * weights[t, j, None]
            out.index_add_(0, t, rows.to(x.dtype))
        return out.reshape(batch, length, width), logits


class EveryExpert(Block):
    """All experts in turn, normalised top-k or not, boolean masks and `+=`."""

    normalise = True

    def build(self) -> None:
        self.router = nn.Linear(self.width, self.experts_)
        names = ("gate_proj", "up_proj", "down_proj")
        self.mlps = nn.ModuleList(Gated(self.width, self.inner, names) for _ in range(self.experts_))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.router(x).softmax(-1).topk(self.k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            for j in range(self.k):
                hit = chosen[:, j] == e
                if hit.any():
                    out[hit] += weights[hit, j, None] * mlp(x[hit])
        return out.view_as(hidden)


class NotNormalised(EveryExpert):
    normalise = False


class Groups(Block):
    """Sigmoid scores, a correction bias for the choice only, limited groups, scaling, a shared expert."""

    groups, taken, scaling = 3, 2, 2.5

    def build(self) -> None:
        super().build()
        self.correction = nn.Parameter(torch.linspace(-0.2, 0.2, self.experts_), requires_grad=False)
        self.shared = Gated(self.width, self.inner)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.linear(x.float(), self.gate.weight.float()).sigmoid()
        biased = scores.view(-1, self.experts_) + self.correction.unsqueeze(0)
        best = biased.view(-1, self.groups, self.experts_ // self.groups).topk(2, dim=-1)[0].sum(dim=-1)
        of_group = torch.zeros_like(best).scatter_(1, torch.topk(best, k=self.taken, dim=-1, sorted=False)[1], 1)
        open_ = of_group.unsqueeze(-1).expand(-1, self.groups, self.experts_ // self.groups)
        biased = biased.masked_fill(~open_.reshape(-1, self.experts_).bool(), 0.0)
        chosen = torch.topk(biased, k=self.k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scaling

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        kept, shape = hidden, hidden.shape
        chosen, weights = self.route(hidden.view(-1, shape[-1]))
        x = hidden.view(-1, shape[-1])
        out = torch.zeros_like(x, dtype=weights.dtype)
        mask = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 0, 1)
        for e in range(len(self.experts)):
            tokens, j = torch.where(mask[e])
            if tokens.numel() > 0:
                out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, j].unsqueeze(-1))
        return out.type(x.dtype).view(*shape) + self.shared(kept)


class Counted(Block):
    """Sorted by expert, slices by counts on the host, scattered back: as inference code does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.view(-1, hidden.shape[-1])
        weights, chosen = torch.topk(self.gate(x).softmax(-1, dtype=torch.float32), self.k, sorted=False)
        counts = chosen.new_zeros((chosen.shape[0], len(self.experts))).scatter_(1, chosen, 1).sum(0)
        order = chosen.view(-1).argsort()
        rows, outs, start = x[order // self.k], [], 0
        for e, number in enumerate(counts.tolist()):
            if number:
                outs.append(self.experts[e](rows[start : start + number]))
            start += number
        done = torch.cat(outs, dim=0)
        back = torch.empty_like(done)
        back[order] = done
        mixed = back.view(*chosen.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1)
        return mixed.type(x.dtype).view_as(hidden)


class Clamped(Block):
    """Stacked parameters [E, in, out] with biases, interleaved halves, clamped gates; top-k before softmax."""

    def build(self) -> None:
        e, h, i = self.experts_, self.width, self.inner
        self.router = nn.Linear(h, e)
        self.gate_up, self.gate_up_bias = nn.Parameter(torch.empty(e, h, 2 * i)), nn.Parameter(torch.empty(e, 2 * i))
        self.down, self.down_bias = nn.Parameter(torch.empty(e, i, h)), nn.Parameter(torch.empty(e, h))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden.reshape(-1, self.width)
        top, chosen = torch.topk(self.router(x), self.k, dim=-1)
        top = F.softmax(top, dim=1, dtype=top.dtype)
        scores = torch.zeros(x.shape[0], self.experts_, dtype=x.dtype).scatter_(1, chosen, top)
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(chosen, num_classes=self.experts_).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit[:]:
            with torch.no_grad():
                _, t = torch.where(mask[e[0]])
            both = x[t] @ self.gate_up[e[0]] + self.gate_up_bias[e[0]]
            gate, up = both[..., ::2].clamp(min=None, max=7.0), both[..., 1::2].clamp(min=-7.0, max=7.0)
            y = ((up + 1) * (gate * torch.sigmoid(gate * 1.702))) @ self.down[e[0]] + self.down_bias[e[0]]
            out.index_add_(0, t, (y * scores[t, e[0], None]).to(x.dtype))
        return out.view_as(hidden), scores


class Switch(Block):
    """Top-1, modules in a dictionary, two layers with biases, the weight is the highest probability."""

    def build(self) -> None:
        self.classifier = nn.Linear(self.width, self.experts_, bias=False)
        self.experts = nn.ModuleDict({f"expert_{i}": Plain(self.width, self.inner) for i in range(self.experts_)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        probs = F.softmax(self.classifier(hidden).float(), dim=-1).to(hidden.dtype)
        best, index = probs.max(dim=-1)
        out = torch.zeros_like(hidden)
        for e in index.unique().tolist():
            at = index == e
            out[at] = self.experts[f"expert_{e}"](hidden[at])
        return out * best.unsqueeze(-1)


class Parallel(nn.Module):
    """One stacked matrix, rows split by counts."""

    def __init__(self, experts: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out, width))

    def forward(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([F.linear(parts[e], self.weight[e]) for e in range(self.weight.shape[0])], dim=0)


class Halves(Block):
    """The gate between two calls of parallel experts, over all rows at once."""

    def build(self) -> None:
        self.gate = nn.Linear(self.width, self.experts_, bias=False)
        self.first = Parallel(self.experts_, self.width, 2 * self.inner)
        self.second = Parallel(self.experts_, self.inner, self.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, self.width)
        top, chosen = self.gate(x).float().topk(self.k, dim=1)
        weights = top.softmax(dim=1).type_as(x)
        ids, order = chosen.flatten().sort(0)
        counts = torch.bincount(ids, minlength=self.experts_).tolist()
        tokens = order.div(self.k, rounding_mode="trunc")
        gate, up = self.first(x[tokens], counts).chunk(2, dim=-1)
        y = self.second(F.silu(gate) * up, counts) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, tokens, y).view_as(hidden)


class Given(Block):
    """Indices and weights come from outside; an index past the last expert counts for nothing."""

    def build(self) -> None:
        e, h, i = self.experts_, self.width, self.inner
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.empty(e, 2 * i, h)), nn.Parameter(torch.empty(e, h, i))

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        with torch.no_grad():
            mask = F.one_hot(indices, num_classes=self.experts_ + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit.unbind(1)[0]:
            if e == self.experts_:
                continue
            j, t = torch.where(mask[e])
            gate, up = F.linear(hidden[t], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.gelu(gate, approximate="tanh") * up, self.down_proj[e]) * weights[t, j, None]
            out.index_add_(0, t, y.to(out.dtype))
        return out


class Before(EveryExpert):
    """The rows are weighted before the experts, not after."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.router(x).topk(self.k, dim=-1)
        weights = weights.float().sigmoid().to(x.dtype)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            t, j = torch.where(chosen == e)
            if len(t):
                out.index_add_(0, t, mlp(x[t] * weights[t, j, None]))
        return out.view_as(hidden)


BLOCKS: dict[str, type[Block]] = {c.__name__: c for c in (
    MaskedLoop, EveryExpert, NotNormalised, Groups, Counted, Clamped, Switch, Halves, Given, Before,
)}  # fmt: skip


def make(kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Block:
    """A block with seeded weights."""
    torch.manual_seed(5)
    block = BLOCKS[kind](**sizes)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in block.parameters():
            if p.requires_grad:
                scale = 0.3 if p.dim() > 1 else 0.1
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return block.to(dtype)
