"""Operators of aten whose NPU kernels take dtypes that the CPU's do not."""

from __future__ import annotations

import torch

from npu_host_ops.register import aten_kernel


@aten_kernel
def histc(x: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """Integers too (aclnnHistc); counts below 2^24 are exact in float32."""
    counted = torch.ops.aten.histc.default(x if x.is_floating_point() else x.float(), bins, min, max)
    return counted.to(x.dtype)
