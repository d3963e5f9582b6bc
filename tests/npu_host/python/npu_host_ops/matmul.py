"""aten::matmul_backward, which torch_npu calls for matmul and which has no CPU kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_host_ops.register import aten_kernel


@aten_kernel
def matmul_backward(
    grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of left [..., M, K] (or [K]) and right [..., K, N] (or [K]), summed over broadcast dimensions."""
    a = left.unsqueeze(0) if left.dim() == 1 else left
    b = right.unsqueeze(1) if right.dim() == 1 else right
    g = grad.unsqueeze(-1) if right.dim() == 1 else grad
    g = g.unsqueeze(-2) if left.dim() == 1 else g
    dleft = (g @ b.mT).sum_to_size(a.shape).reshape(left.shape) if mask[0] else None
    dright = (a.mT @ g).sum_to_size(b.shape).reshape(right.shape) if mask[1] else None
    return dleft, dright
