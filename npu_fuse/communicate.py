"""The collectives of fused ops, over torch's process groups by name, or over pretended ones in a proof.

They are functional: the input stays, the result is waited for.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fuse import pretend


def all_reduce(value: torch.Tensor, group: str, gradient: str) -> torch.Tensor:
    """The sum over ranks. gradient: "all_reduce" or "identity", for a second derivative through a body."""
    size = pretend.size_of(group)
    if size is not None:
        return pretend.all_reduce(value, size, gradient)
    if gradient == "identity":
        result: torch.Tensor = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
        return result
    return _sum(value, group)


def all_gather(value: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """[n, ...] of each rank → [size · n, ...]."""
    if pretend.size_of(group) is not None:
        return pretend.all_gather(value, size)
    library = torch.ops._c10d_functional
    started = library.all_gather_into_tensor.default(value.contiguous(), size, group)
    result: torch.Tensor = library.wait_tensor.default(started)
    return result


def reduce_scatter(value: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """[size · n, ...] → this rank's [n, ...] of the sum over ranks."""
    if pretend.size_of(group) is not None:
        return pretend.reduce_scatter(value, size)
    library = torch.ops._c10d_functional
    started = library.reduce_scatter_tensor.default(value.contiguous(), "sum", size, group)
    result: torch.Tensor = library.wait_tensor.default(started)
    return result


def _sum(value: torch.Tensor, group: str) -> torch.Tensor:
    library = torch.ops._c10d_functional
    result: torch.Tensor = library.wait_tensor.default(library.all_reduce.default(value, "sum", group))
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: str) -> torch.Tensor:
        return _sum(value, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override, unused-ignore]
        return grad, None
