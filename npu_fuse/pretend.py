"""Collectives in a proof: one process stands for all ranks, and nothing is communicated.

A proof must not wait for other ranks (one may have its proof in a cache), nor depend on what they hold. So the
group is pretended: rank r's part of a sum or of a gathered value is this rank's, its elements rolled by r in the
order of memory, which views do not change; this rank is rank 0, and keeps the first part of a scattered sum. A sum
over ranks, its gradient, a bias added once per rank or once at all, an activation before or behind the sum: each
gives other numbers, as it would on a real group. What a pretended group cannot show, that the ranks do what this file
says, is shown by tests on real process groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

PREFIX = "npu_fuse:pretend:"


def name(size: int) -> str:
    """What stands for a group of that many ranks where a proof runs a fused op."""
    return f"{PREFIX}{size}"


def size_of(group: str) -> int | None:
    """The number of pretended ranks; None for a real group."""
    return int(group.removeprefix(PREFIX)) if group.startswith(PREFIX) else None


def summed(value: torch.Tensor, size: int) -> torch.Tensor:
    """The sum over ranks, in the value's dtype, one after the other."""
    flat = value.reshape(-1)
    total = flat
    for rank in range(1, size):
        total = total + flat.roll(rank)
    return total.view(value.shape)


def gathered(value: torch.Tensor, size: int) -> torch.Tensor:
    """All ranks' values along dimension 0: [n, ...] → [size · n, ...]."""
    flat = value.reshape(-1)
    return torch.cat([flat.roll(rank).view(value.shape) for rank in range(size)])


def scattered(value: torch.Tensor, size: int) -> torch.Tensor:
    """This rank's part of the sum along dimension 0: [size · n, ...] → [n, ...]."""
    if value.shape[0] % size:
        raise ValueError(f"{value.shape[0]} rows cannot be scattered over {size} ranks")
    return summed(value, size)[: value.shape[0] // size]


Step = Callable[[torch.Tensor], torch.Tensor]


class _ThereAndBack(torch.autograd.Function):
    """One collective forward, another for the gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, there: Step, back: Step) -> torch.Tensor:
        ctx.back = back
        return there(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override, unused-ignore]
        return ctx.back(grad), None, None


def _run(value: torch.Tensor, there: Step, back: Step) -> torch.Tensor:
    result: torch.Tensor = _ThereAndBack.apply(value, there, back)  # type: ignore[no-untyped-call]
    return result


def _as_it_is(value: torch.Tensor) -> torch.Tensor:
    return value.view_as(value)


def all_reduce(value: torch.Tensor, size: int, gradient: str) -> torch.Tensor:
    """gradient: "all_reduce" where the graph's backward reduces again, "identity" where it does not."""
    total = partial(summed, size=size)
    return _run(value, total, total if gradient == "all_reduce" else _as_it_is)


def copied(value: torch.Tensor, size: int) -> torch.Tensor:
    """The value; its gradient is summed over ranks."""
    return _run(value, _as_it_is, partial(summed, size=size))


def all_gather(value: torch.Tensor, size: int, dim: int = 0) -> torch.Tensor:
    """[1, …, n, …] → [1, …, size · n, …] along `dim`, before which all is 1; the gradient is summed and scattered."""
    return _of_rows(value, dim, partial(gathered, size=size), partial(scattered, size=size))


def reduce_scatter(value: torch.Tensor, size: int, dim: int = 0) -> torch.Tensor:
    """[1, …, size · n, …] → [1, …, n, …] along `dim`, before which all is 1; the gradient is gathered."""
    return _of_rows(value, dim, partial(scattered, size=size), partial(gathered, size=size))


def _of_rows(value: torch.Tensor, dim: int, there: Step, back: Step) -> torch.Tensor:
    result = _run(value.reshape(value.shape[dim:]), there, back)
    return result.reshape(value.shape[:dim] + result.shape)
