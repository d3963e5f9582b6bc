"""Routers as people write them: (logits [T, 16], bias [16]) → weights [T, 4], experts [T, 4], and near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

EXPERTS, K, GROUPS, KEPT = 16, 4, 4, 2
Router = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x.float()`, and float64 for the judge."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def normalised_in_place(x: torch.Tensor, bias: torch.Tensor) -> Any:
    weights, experts = torch.topk(F.softmax(wide(x), dim=-1), K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, experts


def normalised_then_cast(x: torch.Tensor, bias: torch.Tensor) -> Any:
    weights, experts = torch.topk(F.softmax(x, dtype=wide_dtype(x), dim=1), K, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(x.dtype), experts


def normalised_by_norm(x: torch.Tensor, bias: torch.Tensor) -> Any:
    found = wide(x).softmax(-1).topk(K, -1)
    return found.values / torch.norm(found.values, p=1, dim=-1, keepdim=True), found.indices


def probabilities(x: torch.Tensor, bias: torch.Tensor) -> Any:
    weights, experts = torch.topk(torch.softmax(x, -1, dtype=wide_dtype(x)), K, dim=-1)
    return weights.to(x.dtype), experts


def scaled_probabilities(x: torch.Tensor, bias: torch.Tensor) -> Any:
    scores = wide(x).softmax(-1)
    experts = torch.topk(scores, k=K, dim=-1, sorted=False).indices
    return scores.gather(1, experts) * 16.0, experts


def logits_chosen(x: torch.Tensor, bias: torch.Tensor) -> Any:
    values, experts = torch.topk(x, K, dim=-1)
    return F.softmax(values, dim=1, dtype=values.dtype), experts


def wide_logits_chosen(x: torch.Tensor, bias: torch.Tensor) -> Any:
    values, experts = wide(x).topk(K, dim=1)
    return torch.softmax(values, dim=1).type_as(x), experts


def softmax_with_bias(x: torch.Tensor, bias: torch.Tensor) -> Any:
    scores = wide(x).softmax(dim=-1)
    experts = torch.topk(scores.view(-1, EXPERTS) + bias.unsqueeze(0), k=K, dim=-1, sorted=False)[1]
    return scores.gather(1, experts) * 6.0, experts


def softmax_with_bias_bounded(x: torch.Tensor, bias: torch.Tensor) -> Any:
    scores = F.softmax(x, dim=1, dtype=wide_dtype(x))
    _, experts = torch.topk(scores + bias.view(1, -1).squeeze(), K, dim=-1)
    weights = torch.gather(scores, dim=-1, index=experts)
    return (weights / torch.clamp(weights.sum(-1, keepdim=True), min=1e-12)).to(x.dtype), experts


def sigmoid_with_bias(x: torch.Tensor, bias: torch.Tensor) -> Any:
    scores = torch.sigmoid(wide(x))
    _, experts = torch.topk(scores + bias.to(scores.dtype), K, dim=-1)
    weights = scores.gather(-1, experts)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), experts


def sigmoid_plain(x: torch.Tensor, bias: torch.Tensor) -> Any:
    weights, experts = torch.topk(wide(x).sigmoid(), K)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, experts


def grouped(fill: float = -torch.inf, best: str = "pairs", end: str = "normalised", change: str = "") -> Router:
    """Sigmoids with a bias, chosen from the best groups, as DeepSeek-V3 introduced it."""

    def run(x: torch.Tensor, bias: torch.Tensor) -> Any:
        scores = wide(x).sigmoid()
        chosen = scores + (bias if change != "no bias" else 0 * bias)
        shape = (-1, GROUPS, EXPERTS // GROUPS)
        parts = (scores if change == "groups without the bias" else chosen).view(*shape)
        sums = parts.topk(2, dim=-1)[0].sum(-1) if best == "pairs" else parts.amax(-1)
        sums = parts.sum(-1) if best == "all" else sums
        index = torch.topk(sums, k=KEPT, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(sums)
        mask.scatter_(1, index, 1)
        mask = mask.unsqueeze(-1).expand(*shape).reshape(-1, EXPERTS)
        if change == "where":
            chosen = torch.where(mask.bool(), chosen, fill)
        else:
            chosen = chosen.masked_fill(mask.bool() if change == "the groups left out" else ~mask.bool(), fill)
        experts = torch.topk(chosen, k=K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, experts)
        if end == "normalised":
            weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
        return weights * 2.5, experts

    return run


def grouped_probabilities(x: torch.Tensor, bias: torch.Tensor) -> Any:
    """Groups by their largest probability, the others masked with 0, as in DeepSeek-V2."""
    scores = x.softmax(-1, dtype=wide_dtype(x))
    best = scores.view(-1, GROUPS, EXPERTS // GROUPS).max(dim=-1).values
    mask = torch.zeros_like(best).scatter_(1, torch.topk(best, k=KEPT, dim=-1, sorted=False)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS)
    weights, experts = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=K, dim=-1, sorted=False)
    return weights * 16.0, experts


SPELLINGS: dict[str, Router] = {
    "normalised in place": normalised_in_place, "normalised, then cast": normalised_then_cast,
    "normalised by a norm": normalised_by_norm, "probabilities": probabilities,
    "scaled probabilities": scaled_probabilities, "logits chosen": logits_chosen,
    "wide logits chosen": wide_logits_chosen, "softmax with a bias": softmax_with_bias,
    "softmax with a bias, sum bounded": softmax_with_bias_bounded, "sigmoid with a bias": sigmoid_with_bias,
    "sigmoid": sigmoid_plain, "groups by pairs": grouped(), "groups by their largest": grouped(best="largest"),
    "groups, not normalised": grouped(end=""), "groups by where": grouped(change="where"),
    "groups of probabilities": grouped_probabilities,
}  # fmt: skip
GROUPED = [name for name in SPELLINGS if name.startswith("groups")]
"""In training only these pay: elsewhere the op and torch's weights are as many launches as the code."""


def softmaxed(x: torch.Tensor, bias: torch.Tensor, change: str) -> Any:
    noise = bias if change == "noise on the logits that are chosen from" else 0
    scores = F.softmax(wide(x), dim=0 if change == "softmax over the tokens" else -1)
    if change == "scores in 16 bits":
        scores = scores.bfloat16()
    shown = F.softmax(wide(x) + noise, -1) if change.startswith("noise") else scores
    if change == "smallest":
        weights, experts = torch.topk(shown, K, dim=-1, largest=False)
    elif change == "scores clamped":
        weights, experts = torch.topk(shown.clamp(max=0.1), K, dim=-1)
    else:
        weights, experts = torch.topk(shown, K, dim=-1)
    if change.startswith("noise"):
        weights = scores.gather(-1, experts)
    if change == "normalised over all experts":
        weights = weights / scores.sum(-1, keepdim=True)
    elif change == "normalised over the tokens":
        weights = weights / weights.sum(0, keepdim=True)
    elif change == "normalised by the largest":
        weights = weights / weights.amax(-1, keepdim=True)
    elif change == "epsilon under a root":
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-3).sqrt()
    return weights, experts


def biased(x: torch.Tensor, bias: torch.Tensor, change: str) -> Any:
    if change == "bias on the logits":
        scores = wide(x)
        experts = torch.topk(scores + bias, K, dim=-1)[1]
        return scores.gather(1, experts).sigmoid(), experts
    scores = wide(x).sigmoid()
    weights, experts = torch.topk(scores + bias * (2 if change == "bias twice" else 1), K, dim=-1)
    if change == "weights of other logits":
        weights = (wide(x) * 1.5).sigmoid().gather(-1, experts)
    elif change == "weights of the next experts":
        weights = scores.gather(-1, (experts + 1) % EXPERTS)
    elif change == "bias twice":
        weights = scores.gather(-1, experts)
    return weights / weights.sum(-1, keepdim=True), experts


def sigmoid_of_chosen(x: torch.Tensor, bias: torch.Tensor) -> Any:
    values, experts = torch.topk(x, K, -1)
    return values.sigmoid(), experts


NEAR: dict[str, Router] = {
    **{c: (lambda x, b, c=c: softmaxed(x, b, c)) for c in (
        "softmax over the tokens", "scores in 16 bits", "noise on the logits that are chosen from", "smallest",
        "scores clamped")},
    **{c: (lambda x, b, c=c: biased(x, b, c)) for c in (
        "bias on the logits", "weights with the bias", "weights of other logits", "weights of the next experts")},
    "sigmoid of the chosen": sigmoid_of_chosen,
    "groups masked with 0": grouped(fill=0.0), "groups by all scores": grouped(best="all"),
    "groups without the bias": grouped(change="groups without the bias"),
    "groups that were left out": grouped(change="the groups left out"),
}  # fmt: skip
PARTS: dict[str, Router] = {
    c: (lambda x, b, c=c: softmaxed(x, b, c)) for c in (
        "normalised over all experts", "normalised over the tokens", "normalised by the largest",
        "epsilon under a root")
}  # fmt: skip
"""The choice is fused, what becomes of the weights is left as it is."""
