"""The casts that `.to` becomes on an NPU."""

from __future__ import annotations

import torch

from npu_host_ops.register import kernel


@kernel
def _npu_dtype_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype, copy=True)


@kernel
def _npu_dtype_cast_backward(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return grad.to(dtype, copy=True)
