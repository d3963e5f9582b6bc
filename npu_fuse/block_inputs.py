"""Inputs to try a block of experts on: hidden states, and indices and weights where it takes them.

A block says nowhere what it takes. Either a call of the whole model was watched, or it is tried: hidden states
alone, or hidden states with indices and weights in any order.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

KINDS = ("states", "indices", "weights")


@dataclass(frozen=True)
class Signature:
    """What a block takes: kinds of its tensors by argument name, the rank of its states, their width, the rest."""

    kinds: Mapping[str, str]
    rank: int
    width: int
    experts: int
    weights: torch.dtype | None = None
    flat: bool = False
    """Indices and weights have one for each token, without a dimension for k."""


@dataclass(frozen=True)
class Example:
    """One call: tensors by argument name, in the order of `names`; the states first."""

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def make(
    signature: Signature, block: nn.Module, size: tuple[int, int], seed: int, k: int = 2, how: str = "",
    scale: float = 1.0,
) -> Example:  # fmt: skip
    """Seeded inputs of (batch, sequence). how: "one" expert for all, "same" rows, "zero" rows, "rest" (no
    expert), "each" expert."""
    generator = torch.Generator().manual_seed(seed)
    like = next(p for p in block.parameters() if p.is_floating_point())
    tokens, k = size[0] * size[1], min(k, signature.experts)
    shape = (*size, signature.width) if signature.rank == 3 else (tokens, signature.width)
    states = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    if how == "same":
        states = states.reshape(-1, signature.width)[:1].expand(tokens, -1).reshape(shape).clone()
    if how == "zero":
        states.view(-1, signature.width)[::2] = 0.0
    chosen = torch.rand((tokens, signature.experts), generator=generator).topk(k, -1).indices
    if how == "one":
        chosen = chosen[:1].expand(tokens, -1).clone()
    if how == "each":
        chosen = (torch.arange(tokens * k) % signature.experts).view(tokens, k)
    if how == "rest":
        chosen.view(-1)[::3] = signature.experts
    factors = torch.rand((tokens, k), generator=generator, dtype=torch.float64) + 0.1
    factors = factors.to(signature.weights or like.dtype)
    values = {"states": states.to(like.dtype), "indices": chosen, "weights": factors}
    names = sorted(signature.kinds, key=lambda n: KINDS.index(signature.kinds[n]))
    made = {n: values[signature.kinds[n]].to(like.device) for n in names}
    return Example(tuple(names), tuple(made.values()), (), made)


def signatures(block: nn.Module, widths: Sequence[int], experts: int) -> Iterator[Signature]:
    """What the block may take, the likeliest first; each has to be tried."""
    like = next(p for p in block.parameters() if p.is_floating_point())
    try:
        parameters = inspect.signature(block.forward).parameters
    except (TypeError, ValueError):
        return
    usual = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in usual if p.default is p.empty]
    others = [p.name for p in usual if p.default is not p.empty]
    for width, rank in itertools.product(widths, (3, 2)):
        if len(needed) == 1:
            yield Signature({needed[0]: "states"}, rank, width, experts)
        names = needed if len(needed) == 3 else [*needed, *others][:3]
        if len(names) == 3 and len(needed) in (1, 3):
            for order in (KINDS, ("states", "weights", "indices")):
                yield Signature(dict(zip(names, order, strict=True)), rank, width, experts, like.dtype)


def working(block: nn.Module, widths: Sequence[int], experts: int) -> Iterator[Signature]:
    """Those with which the block's forward runs and gives a tensor."""
    for signature in signatures(block, widths, experts):
        example = make(signature, block, (2, 3), 0)
        try:
            with torch.no_grad():
                block.forward(*example.args, **example.kwargs)
        except Exception:
            continue
        yield signature


def with_weights(signature: Signature, dtype: torch.dtype) -> Signature:
    return replace(signature, weights=dtype)
