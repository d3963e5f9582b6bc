"""Operators of aten whose NPU kernels take dtypes that the CPU's do not, or that torch_npu has under its own name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_host_ops.register import aten_kernel, kernel


@aten_kernel
def histc(x: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """Integers too (aclnnHistc); counts below 2^24 are exact in float32."""
    counted = torch.ops.aten.histc.default(x if x.is_floating_point() else x.float(), bins, min, max)
    return counted.to(x.dtype)


@kernel
def npu_gather_backward(
    grad: torch.Tensor, self_size: Sequence[int], dim: int, index: torch.Tensor, sparse_grad: bool
) -> torch.Tensor:
    """Zeros of the source's size, the gradient added where it was taken from."""
    return torch.zeros(list(self_size), dtype=grad.dtype).scatter_add(dim, index, grad)
