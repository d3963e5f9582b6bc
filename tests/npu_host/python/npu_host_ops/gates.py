"""npu_swiglu, npu_geglu, their backwards, npu_clipped_swiglu: from aclnnSwiGlu, aclnnGeGluV3, aclnnClippedSwiglu."""

from __future__ import annotations

import math

import torch

from npu_host_ops.register import FLOATS, check, family, kernel, unwritten


def _check(op: str, x: torch.Tensor, dim: int, lowest: int = 1) -> int:
    """The dimension that is halved, counted from the front."""
    check(op, x.dtype in FLOATS, f"x is {x.dtype}")
    check(op, not (family() == "310P" and x.dtype == torch.bfloat16), "x is bfloat16")
    check(op, lowest <= x.dim() <= 8, f"x has rank {x.dim()}")
    check(op, -x.dim() <= dim < x.dim(), f"dim is {dim}, x has rank {x.dim()}")
    check(op, x.shape[dim] % 2 == 0, f"dimension {dim} of x has size {x.shape[dim]}, which is odd")
    return dim % x.dim()


def _halves(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = x.shape[dim] // 2
    wide = x.contiguous().float()
    return wide.narrow(dim, 0, size), wide.narrow(dim, size, size)


@kernel
def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) · second half in float32, rounded once."""
    a, b = _halves(x, _check("npu_swiglu", x, dim))
    return (a / (1.0 + torch.exp(-a)) * b).to(x.dtype)


@kernel
def npu_swiglu_backward(grad_output: torch.Tensor, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    op = "npu_swiglu_backward"
    at = _check(op, x, dim)
    a, b = _halves(x, at)
    check(op, grad_output.shape == a.shape and grad_output.dtype == x.dtype,
          f"grad_output is {grad_output.dtype} {tuple(grad_output.shape)}")  # fmt: skip
    g = grad_output.contiguous().float()
    s = 1.0 / (1.0 + torch.exp(-a))
    return torch.cat((g * b * (s + a * s * (1.0 - s)), g * a * s), at).to(x.dtype)


def _gelu(t: torch.Tensor, approximate: int) -> torch.Tensor:
    if approximate == 0:
        return 0.5 * t * (1.0 + torch.erf(t * math.sqrt(0.5)))
    return 0.5 * t * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (t + 0.044715 * t**3)))


def _gelu_slope(t: torch.Tensor, approximate: int) -> torch.Tensor:
    if approximate == 0:
        density = torch.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
        return 0.5 * (1.0 + torch.erf(t * math.sqrt(0.5))) + t * density
    root = math.sqrt(2.0 / math.pi)
    inner = torch.tanh(root * (t + 0.044715 * t**3))
    return 0.5 * (1.0 + inner) + 0.5 * t * (1.0 - inner * inner) * root * (1.0 + 0.134145 * t * t)


def _check_geglu(op: str, x: torch.Tensor, dim: int, approximate: int) -> int:
    check(op, family() != "910A", "the operator is not on this chip")
    check(op, approximate in (0, 1), f"approximate is {approximate}")
    return _check(op, x, dim)


@kernel
def npu_geglu(
    x: torch.Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gelu(one half) · other half, gelu(one half)); the right half is activated unless activate_left."""
    first, second = _halves(x, _check_geglu("npu_geglu", x, dim, approximate))
    gate, value = (first, second) if activate_left else (second, first)
    active = _gelu(gate, approximate)
    return (active * value).to(x.dtype), active.to(x.dtype)


@kernel
def npu_geglu_grad(
    grad_output: torch.Tensor, x: torch.Tensor, gelu: torch.Tensor, dim: int = -1, approximate: int = 1,
    activate_left: bool = False,
) -> torch.Tensor:  # fmt: skip
    op = "npu_geglu_grad"
    at = _check_geglu(op, x, dim, approximate)
    first, second = _halves(x, at)
    for name, t in (("grad_output", grad_output), ("gelu", gelu)):
        check(op, t.shape == first.shape and t.dtype == x.dtype, f"{name} is {t.dtype} {tuple(t.shape)}")
    gate, value = (first, second) if activate_left else (second, first)
    g = grad_output.contiguous().float()
    dgate, dvalue = g * value * _gelu_slope(gate, approximate), g * gelu.float()
    return torch.cat((dgate, dvalue) if activate_left else (dvalue, dgate), at).to(x.dtype)


@kernel
def npu_clipped_swiglu(
    x: torch.Tensor, *, group_index: torch.Tensor | None = None, dim: int = -1, alpha: float = 1.702,
    limit: float = 7.0, bias: float = 1.0, interleaved: bool = True,
) -> torch.Tensor:  # fmt: skip
    """c · sigmoid(alpha · c) · (b in ±limit + bias) for c = min(a, limit); rows past the groups stay unwritten."""
    op = "npu_clipped_swiglu"
    check(op, family() in ("A2", "A3", "A5"), "the operator is not on this chip")
    at = _check(op, x, dim, 2)
    check(op, x.is_contiguous(), f"x is not contiguous: strides {x.stride()}")
    wide = x.float().movedim(at, -1)
    size = wide.shape[-1] // 2
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :size], wide[..., size:])
    top = torch.tensor(limit)
    a, b = torch.minimum(a, top), torch.maximum(torch.minimum(b, top), -top)
    y = (a / (1.0 + torch.exp(-alpha * a)) * (b + bias)).movedim(-1, at).to(x.dtype).contiguous()
    if group_index is not None:
        check(op, group_index.dtype == torch.int64 and group_index.dim() == 1, f"group_index is {group_index.dtype}")
        rows = y.flatten(0, at - 1) if at > 1 else y
        rows[int(group_index.sum()) :] = unwritten((), x.dtype)
    return y


def _check_fast_gelu(op: str, x: torch.Tensor) -> None:
    check(op, family() in ("A2", "A3", "A5"), "the operator is not on this chip")
    check(op, x.dtype in FLOATS, f"x is {x.dtype}")
    check(op, x.dim() <= 8, f"x has rank {x.dim()}")


@kernel
def npu_fast_gelu(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(1.702 · x) in float32, rounded once."""
    _check_fast_gelu("npu_fast_gelu", x)
    wide = x.contiguous().float()
    return (wide / (1.0 + torch.exp(-1.702 * wide))).to(x.dtype)


@kernel
def npu_fast_gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    op = "npu_fast_gelu_backward"
    _check_fast_gelu(op, x)
    check(op, grad.shape == x.shape and grad.dtype == x.dtype, f"grad is {grad.dtype} {tuple(grad.shape)}")
    wide = x.contiguous().float()
    s = 1.0 / (1.0 + torch.exp(-1.702 * wide))
    return (grad.contiguous().float() * s * (1.0 + 1.702 * wide * (1.0 - s))).to(x.dtype)
