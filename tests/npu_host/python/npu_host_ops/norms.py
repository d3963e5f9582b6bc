"""npu_rms_norm, its backward, npu_add_rms_norm and _cast: from aclnnRmsNorm, aclnnRmsNormGrad, aclnnAddRmsNorm."""

from __future__ import annotations

import os

import torch

from npu_host_ops.register import FLOATS, check, family, kernel, unwritten

MIXED = {(torch.float16, torch.float32), (torch.bfloat16, torch.float32)}


def _check_dtypes(op: str, x: torch.Tensor, gamma: torch.Tensor) -> None:
    old = family() in ("310P", "910A")
    allowed = x.dtype in FLOATS and not (old and x.dtype == torch.bfloat16)
    check(op, allowed, f"x is {x.dtype}")
    same = gamma.dtype == x.dtype
    check(op, same or (not old and (x.dtype, gamma.dtype) in MIXED), f"x is {x.dtype} and gamma {gamma.dtype}")


def _check_shapes(op: str, x: torch.Tensor, gamma: torch.Tensor, lowest: int) -> int:
    """The number of normalised dimensions."""
    check(op, lowest <= x.dim() <= 8, f"x has rank {x.dim()}")
    check(op, 1 <= gamma.dim() <= x.dim(), f"gamma has rank {gamma.dim()}, x {x.dim()}")
    check(op, gamma.numel() > 0, "gamma is empty")
    tail = x.shape[x.dim() - gamma.dim() :]
    check(op, tail == gamma.shape, f"gamma {tuple(gamma.shape)} is not the last dimensions of x {tuple(x.shape)}")
    if family() in ("310P", "910A"):
        check(op, x.shape[-1] * x.element_size() >= 32, "the last dimension has less than 32 bytes")
    return gamma.dim()


def _rstd(z: torch.Tensor, axes: int, epsilon: float) -> torch.Tensor:
    dims = tuple(range(z.dim() - axes, z.dim()))
    return 1.0 / torch.sqrt((z * z).sum(dims, keepdim=True) / z[(0,) * (z.dim() - axes)].numel() + epsilon)


@kernel
def npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x / sqrt(mean(x²) + epsilon) · gamma in float32, rounded once; rstd in float32."""
    _check_dtypes("npu_rms_norm", x, gamma)
    axes = _check_shapes("npu_rms_norm", x, gamma, 1)
    wide = x.contiguous().float()
    if wide.numel() == 0:
        return wide.to(x.dtype), wide.new_empty((*x.shape[: x.dim() - axes], *[1] * axes))
    rstd = _rstd(wide, axes, epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@kernel
def npu_rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx in x's dtype, dgamma always in float32."""
    op = "npu_rms_norm_backward"
    _check_dtypes(op, x, gamma)
    axes = _check_shapes(op, x, gamma, 2)
    check(op, dy.shape == x.shape and dy.dtype == x.dtype, f"dy is {dy.dtype} {tuple(dy.shape)}, x {tuple(x.shape)}")
    wanted = (*x.shape[: x.dim() - axes], *[1] * axes)
    check(op, rstd.dtype == torch.float32 and tuple(rstd.shape) == wanted, f"rstd is {rstd.dtype} {tuple(rstd.shape)}")
    rows = x.contiguous().float().reshape(-1, gamma.numel())
    grad = dy.contiguous().float().reshape(rows.shape)
    inverse = rstd.contiguous().reshape(-1, 1)
    normal = rows * inverse
    scaled = grad * gamma.contiguous().float().reshape(1, -1)
    projection = (scaled * normal).sum(1, keepdim=True) / rows.shape[1]
    dx = inverse * (scaled - normal * projection)
    return dx.reshape(x.shape).to(x.dtype), (grad * normal).sum(0).reshape(gamma.shape)


@kernel
def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, rstd, x1 + x2): rounds before gamma in bfloat16 and float16.

    NPU_HOST_ADD_RMS_NORM chooses what a bfloat16 call normalises: "row" (the unrounded sum, the default) or
    "merge" (the rounded one). On hardware the tiling chooses.
    """
    op = "npu_add_rms_norm"
    _check_dtypes(op, x1, gamma)
    check(op, x1.dtype == x2.dtype == gamma.dtype, f"dtypes {x1.dtype}, {x2.dtype}, {gamma.dtype} differ")
    check(op, x1.shape == x2.shape, f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ; it does not broadcast")
    axes = _check_shapes(op, x1, gamma, 1)
    left, right = x1.contiguous(), x2.contiguous()
    if left.numel() == 0:
        return left.clone(), left.new_empty((*x1.shape[: x1.dim() - axes], *[1] * axes)).float(), left + right
    exact = left.float() + right.float()
    total = exact.to(x1.dtype)
    rows = x1.dtype == torch.bfloat16 and os.environ.get("NPU_HOST_ADD_RMS_NORM", "row") == "row"
    z = exact if rows else total.float()
    rstd = _rstd(z, axes, epsilon)
    y = ((z * rstd).to(x1.dtype).float() * gamma.float()).to(x1.dtype)
    return y, unwritten(rstd.shape, torch.float32) if family() == "310P" else rstd, total


@kernel
def npu_add_rms_norm_cast(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y in float32, y, rstd, x1 + x2): what npugraph_ex makes of an npu_add_rms_norm and a cast behind it."""
    op = "npu_add_rms_norm_cast"
    check(op, x1.dtype in (torch.float16, torch.bfloat16), f"x1 is {x1.dtype}")
    check(op, x1.numel() > 0, "x1 is empty")
    y, rstd, total = npu_add_rms_norm(x1, x2, gamma, epsilon)
    return y.float(), y, rstd, total
