"""Spelled-out code compiled for the device and trained there: the calls that npu_fuse emits, its own backwards too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROOM = 1.5
"""Times eager's own error, on the same device."""


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2) * sin


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def geglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return functional.gelu(gate, approximate="tanh") * up


def clipped(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., 0::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def experts(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return functional.grouped_mm(x, w, offs=ends)


def _table(width: int, turn: Any) -> list[torch.Tensor]:
    angles = 3 * torch.randn(1, 1, 24, width // 2, dtype=torch.float64)
    full = torch.cat((angles, angles), -1) if turn is half else angles.repeat_interleave(2, -1)
    return [full.cos(), full.sin()]


def _programs() -> Mapping[str, tuple[Callable[..., torch.Tensor], Callable[[], list[torch.Tensor]], int]]:
    """Code, its arguments in float64, and how many of them are trained."""
    f64 = torch.float64
    ends = torch.tensor((3, 3, 11, 24), dtype=torch.int32)
    return {
        "norm": (norm, lambda: [torch.randn(6, 64, dtype=f64), 1 + torch.rand(64, dtype=f64)], 2),
        "rotation of halves": (half, lambda: [torch.randn(2, 4, 24, 64, dtype=f64), *_table(64, half)], 1),
        "rotation of pairs": (interleaved, lambda: [torch.randn(2, 4, 24, 64, dtype=f64), *_table(64, interleaved)], 1),
        "silu gate": (swiglu, lambda: [torch.randn(6, 96, dtype=f64)], 1),
        "gelu gate": (geglu, lambda: [torch.randn(6, 96, dtype=f64)], 1),
        "clamped gate": (clipped, lambda: [4 * torch.randn(6, 96, dtype=f64)], 1),
        "experts": (experts, lambda: [torch.randn(24, 32, dtype=f64), torch.randn(4, 32, 16, dtype=f64), ends], 2),
        "experts with transposed views": (
            lambda x, w, ends: experts(x, w.transpose(1, 2), ends),
            lambda: [torch.randn(24, 32, dtype=f64), torch.randn(4, 16, 32, dtype=f64), ends],
            2,
        ),
    }


def blocks() -> dict[str, Callable[[], str]]:
    """One check a program and dtype, values and gradients."""
    return {
        f"{name} {str(dtype)[6:]}": lambda name=name, dtype=dtype: trained(name, dtype)  # type: ignore[misc]
        for name in _programs()
        for dtype in DTYPES
        if dtype is torch.bfloat16 or "experts" not in name  # all that torch's grouped matmul takes
    }


def trained(name: str, dtype: torch.dtype) -> str:
    """Compiled for target npu: no further from float64 than the same code in eager mode on the device."""
    import npu_fuse

    torch.manual_seed(0)
    code, make, trained_ones = _programs()[name]
    values = make()
    exact = _run(code, values, trained_ones, "cpu", torch.float64)
    npu_fuse.clear_reports()
    torch._dynamo.reset()
    fast = torch.compile(code, backend="npu_fuse", options={"target": "npu", "handoff": "aot_eager"}, dynamic=False)
    given = _run(fast, values, trained_ones, "npu", dtype)
    ops = [site.op for graph in npu_fuse.reports() for site in graph.sites if site.status is npu_fuse.Status.FUSED]
    if not ops:
        reasons = [site.reason for graph in npu_fuse.reports() for site in graph.sites]
        return f"left as it is: {'; '.join(reasons) or 'no site'}"
    try:
        eager = _run(code, values, trained_ones, "npu", dtype)
    except (RuntimeError, NotImplementedError):
        eager = None  # torch's grouped matmul has no kernel on an NPU
    worst = 0.0
    for i, (one, true) in enumerate(zip(given, exact, strict=True)):
        error, room = _error(one, true), 8 * torch.finfo(dtype).eps
        allowed = max(room, ROOM * _error(eager[i], true) if eager else 0.0)
        what = "the value" if i == 0 else f"gradient {i}"
        assert error <= allowed, f"{what} is off by {error:.3g} of the largest, {allowed:.3g} is allowed"
        worst = max(worst, error)
    return f"{'+'.join(ops)}: off by {worst:.3g} of the largest value"


def _run(code: Any, values: list[torch.Tensor], trained_ones: int, device: str, dtype: torch.dtype) -> list[Any]:
    given = [v.to(device, dtype) if v.is_floating_point() else v.to(device) for v in values]
    leaves = [v.detach().requires_grad_() for v in given[:trained_ones]]
    if device == "cpu" and dtype == torch.float64 and any(not v.is_floating_point() for v in values):
        code = _loop  # grouped_mm takes no float64
    y = code(*leaves, *given[trained_ones:])
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights.to(device, y.dtype))]


def _loop(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    stops = ends.tolist()
    w = w if w.shape[1] == x.shape[1] else w.transpose(1, 2)
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip([0, *stops[:-1]], stops, strict=True))])


def _error(given: torch.Tensor, true: torch.Tensor) -> float:
    got = given.detach().cpu().double()
    assert not got.isnan().any(), "NaN, or memory that was not written"
    return float((got - true).abs().max()) / (float(true.abs().max()) or 1.0)
