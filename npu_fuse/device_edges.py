"""The edge of every limit of torch_npu's ops: a call just beyond it, and one that only just keeps it.

Written from the ops' documents, apart from the limits in the passes: each checks the other. `verify_device` tells
which of them a device really has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def t(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.ones(*shape, device="npu", dtype=dtype)


def rms(x: torch.Tensor, gamma: torch.Tensor) -> Any:
    return torch.ops.npu.npu_rms_norm(x, gamma, 1e-6)


def rms_back(x: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor) -> Any:
    return torch.ops.npu.npu_rms_norm_backward(x, x, gamma, rstd)


def add(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor) -> Any:
    return torch.ops.npu.npu_add_rms_norm(x1, x2, gamma, 1e-6)


def rope(x: torch.Tensor, cos: torch.Tensor, mode: str = "half") -> Any:
    return torch.ops.npu.npu_rotary_mul(x, cos, cos, mode)


def rope_back(x: torch.Tensor, cos: torch.Tensor, mode: str = "half") -> Any:
    return torch.ops.npu.npu_rotary_mul_backward(x, x, cos, cos, mode)


def swiglu(x: torch.Tensor, dim: int = -1) -> Any:
    return torch.ops.npu.npu_swiglu(x, dim)


def clipped(x: torch.Tensor, **named: Any) -> Any:
    return torch.ops.npu.npu_clipped_swiglu(x, **named)


def gate(x: torch.Tensor, k: int = 2, **named: Any) -> Any:
    return torch.ops.npu.npu_moe_gating_top_k(x, k, **named)


Call = Callable[[], Any]
EDGES: dict[str, tuple[Call, Call]] = {
    "rms gamma of another length": (lambda: rms(t(2, 8), t(4)), lambda: rms(t(2, 8), t(8))),
    "rms rank 9": (lambda: rms(t(*[1] * 8, 8), t(8)), lambda: rms(t(*[1] * 7, 8), t(8))),
    "rms float64": (lambda: rms(t(2, 8, dtype=torch.float64), t(8, dtype=torch.float64)), lambda: rms(t(2, 8), t(8))),
    "rms f32 with bf16 gamma": (lambda: rms(t(2, 8), t(8, dtype=BF16)), lambda: rms(t(2, 8, dtype=BF16), t(8))),
    "rms backward of rank 1": (lambda: rms_back(t(8), t(8), t(1)), lambda: rms_back(t(1, 8), t(8), t(1, 1))),
    "rms backward rstd": (lambda: rms_back(t(2, 8), t(8), t(2)), lambda: rms_back(t(2, 8), t(8), t(2, 1))),
    "add broadcast": (lambda: add(t(2, 8), t(1, 8), t(8)), lambda: add(t(2, 8), t(2, 8), t(8))),
    "add mixed": (
        lambda: add(t(2, 8, dtype=F16), t(2, 8, dtype=F16), t(8)),
        lambda: add(t(2, 8, dtype=F16), t(2, 8, dtype=F16), t(8, dtype=F16)),
    ),
    "rope rank 3": (lambda: rope(t(4, 2, 64), t(4, 1, 64)), lambda: rope(t(1, 4, 2, 64), t(1, 4, 1, 64))),
    "rope width": (lambda: rope(t(1, 2, 4, 898), t(1, 1, 4, 898)), lambda: rope(t(1, 2, 4, 896), t(1, 1, 4, 896))),
    "rope table of half width": (
        lambda: rope(t(1, 2, 4, 64), t(1, 1, 4, 32)),
        lambda: rope(t(1, 2, 4, 64), t(1, 1, 4, 64)),
    ),
    "rope table over heads and length": (
        lambda: rope(t(2, 3, 4, 64), t(1, 3, 4, 64)),
        lambda: rope(t(2, 3, 4, 64), t(2, 3, 4, 64)),
    ),
    "rope mode": (
        lambda: rope(t(1, 2, 4, 64), t(1, 1, 4, 64), "quarter"),
        lambda: rope(t(1, 2, 4, 64), t(1, 1, 4, 64)),
    ),
    "rope batch": (
        lambda: rope(t(1000, 2, 4, 64), t(1000, 1, 4, 64)),
        lambda: rope(t(999, 2, 4, 64), t(999, 1, 4, 64)),
    ),
    "rope many heads": (lambda: rope(t(3, 6, 2, 64), t(1, 1, 2, 64)), lambda: rope(t(2, 8, 2, 64), t(1, 1, 2, 64))),
    "rope unaligned tiling": (
        lambda: rope(t(2, 2, 40, 24), t(1, 1, 40, 24)),
        lambda: rope(t(2, 2, 320, 24), t(1, 1, 320, 24)),
    ),
    "rope interleave per batch": (
        lambda: rope(t(2, 4, 2, 64), t(2, 4, 1, 64), "interleave"),
        lambda: rope(t(2, 4, 2, 64), t(1, 4, 1, 64), "interleave"),
    ),
    "rope interleave batch": (
        lambda: rope(t(10, 2, 100, 64), t(1, 2, 1, 64), "interleave"),
        lambda: rope(t(9, 2, 111, 64), t(1, 2, 1, 64), "interleave"),
    ),
    "rope backward batch": (
        lambda: rope_back(t(4, 2, 4, 64), t(4, 1, 4, 64)),
        lambda: rope_back(t(3, 2, 4, 64), t(3, 1, 4, 64)),
    ),
    "swiglu odd": (lambda: swiglu(t(2, 7)), lambda: swiglu(t(2, 8))),
    "swiglu rank 9": (lambda: swiglu(t(*[1] * 8, 8)), lambda: swiglu(t(*[1] * 7, 8))),
    "swiglu float64": (lambda: swiglu(t(2, 8, dtype=torch.float64)), lambda: swiglu(t(2, 8))),
    "geglu approximate": (
        lambda: torch.ops.npu.npu_geglu(t(2, 8), -1, 2),
        lambda: torch.ops.npu.npu_geglu(t(2, 8), -1, 0),
    ),
    "clipped rank 1": (lambda: clipped(t(8)), lambda: clipped(t(1, 8))),
    "clipped strided": (lambda: clipped(t(2, 16)[:, :8]), lambda: clipped(t(2, 16)[:, :8].contiguous())),
    "gating rank 3": (lambda: gate(t(2, 3, 8)), lambda: gate(t(6, 8))),
    "gating experts": (lambda: gate(t(2, 2049)), lambda: gate(t(2, 2048))),
    "gating groups of two": (
        lambda: gate(t(2, 8), group_count=4, k_group=2),
        lambda: gate(t(2, 12), group_count=4, k_group=2),
    ),
    "gating groups filled up": (
        lambda: gate(t(2, 260), group_count=65, k_group=1),
        lambda: gate(t(2, 256), group_count=64, k_group=1),
    ),
    "gating k of the groups": (
        lambda: gate(t(2, 16), 9, group_count=4, k_group=2),
        lambda: gate(t(2, 16), 8, group_count=4, k_group=2),
    ),
    "gating bias": (lambda: gate(t(2, 8, dtype=BF16), bias=t(8)), lambda: gate(t(2, 8), bias=t(8))),
    "gating softmax k": (
        lambda: torch.ops.npu.npu_moe_gating_top_k_softmax(t(2, 1025), k=1025),
        lambda: torch.ops.npu.npu_moe_gating_top_k_softmax(t(2, 1025), k=1024),
    ),
    "fast gelu float64": (
        lambda: torch.ops.npu.npu_fast_gelu(t(2, dtype=torch.float64)),
        lambda: torch.ops.npu.npu_fast_gelu(t(2)),
    ),
}
