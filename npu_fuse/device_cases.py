"""One entry for every torch_npu op that npu_fuse can emit: how it is called, and what it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = tuple[list[Any], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`make(dtype)` gives positional and keyword arguments on the CPU."""

    op: str
    make: Callable[[torch.dtype], Arguments]
    label: str = ""
    backward: str = ""
    """The op that the wheel's autograd formula calls; "" where torch_npu has no gradient."""
    differentiable: tuple[int, ...] = ()
    """Which positional arguments get gradients."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    keeps_strides: bool = False
    """The meta kernel promises a permuted input's strides; the device gives contiguous results."""
    unwritten: tuple[int, ...] = ()
    """Results that the op does not write for these arguments."""
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}{'-' + self.label if self.label else ''}"


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _rms(shape: tuple[int, ...], axes: int, gamma: torch.dtype | None = None) -> Callable[[torch.dtype], Arguments]:
    def make(dtype: torch.dtype) -> Arguments:
        weight = 1 + 0.1 * _normal(*shape[len(shape) - axes :])
        return [_normal(*shape).to(dtype), weight.to(gamma or dtype), 1e-5], {}

    return make


def _add_rms(dtype: torch.dtype) -> Arguments:
    return [_normal(2, 5, 64).to(dtype), _normal(2, 5, 64).to(dtype), (1 + 0.1 * _normal(64)).to(dtype), 1e-5], {}


def _rotary(x: tuple[int, ...], table: tuple[int, ...], mode: str) -> Callable[[torch.dtype], Arguments]:
    def make(dtype: torch.dtype) -> Arguments:
        angles = 3 * _normal(*table[:-1], table[-1] // 2)
        full = torch.cat((angles, angles), -1) if mode == "half" else angles.repeat_interleave(2, -1)
        return [_normal(*x).to(dtype), full.cos().to(dtype), full.sin().to(dtype), mode], {}

    return make


def _gate(*rest: Any, **named: Any) -> Callable[[torch.dtype], Arguments]:
    def make(dtype: torch.dtype) -> Arguments:
        return [(4 * _normal(3, 5, 96)).to(dtype), *rest], named

    return make


def _grouped(kind: int, ends: tuple[int, ...], transposed: bool = False) -> Callable[[torch.dtype], Arguments]:
    """Rows by the weights of their experts (kind 0), weights' gradients (2); the last end is the number of rows."""

    def make(dtype: torch.dtype) -> Arguments:
        x, experts = _normal(ends[-1], 32).to(dtype), len(ends)
        weight = _normal(experts, 16, 32).transpose(1, 2) if transposed else _normal(experts, 32, 16)
        groups = torch.tensor(ends, dtype=torch.int64)
        rest = {"group_list": groups, "split_item": 2 if kind == 0 else 3, "group_type": kind, "group_list_type": 0}
        return [[x], [weight.to(dtype)]] if kind == 0 else [[x.t()], [_normal(ends[-1], 16).to(dtype)]], rest

    return make


def _permute(k: int) -> Callable[[torch.dtype], Arguments]:
    def make(dtype: torch.dtype) -> Arguments:
        shape = (7, k) if k > 1 else (7,)
        return [_normal(7, 16).to(dtype), torch.randint(0, 4, shape)], {}

    return make


def _unpermute(k: int, probs: torch.dtype | None = None) -> Callable[[torch.dtype], Arguments]:
    def make(dtype: torch.dtype) -> Arguments:
        rows = torch.randperm(7 * k).int()
        given = [] if k == 1 else [torch.rand(7, k, dtype=torch.float64).to(probs or dtype)]
        return [_normal(7 * k, 16).to(dtype), rows, *given], {}

    return make


def _router(experts: int = 64, bias: bool = False, **named: Any) -> Callable[[torch.dtype], Arguments]:
    """Logits without ties, the same values in another order for each token."""

    def make(dtype: torch.dtype) -> Arguments:
        values = 0.125 * torch.arange(experts, dtype=torch.float64) - 4
        x = torch.stack([values[torch.randperm(experts)] for _ in range(9)]).to(dtype)
        return [x], {**named, **({"bias": (0.01 * _normal(experts)).to(dtype)} if bias else {})}

    return make


GROUPS: dict[str, Any] = {"k": 8, "group_count": 8, "k_group": 4, "norm_type": 1, "routed_scaling_factor": 2.5}
COMMUNICATING = ("npu_all_gather_base_mm", "npu_mm_all_reduce_base", "npu_mm_reduce_scatter_base")
"""Ops that need other ranks: called inside ops of npu_fuse, tested with two processes."""
MIXED = (torch.float16, torch.bfloat16)
ROTARY = "npu_rotary_mul_backward"
UNPERMUTE = next(
    (name for name in ("npu_moe_token_unpermute_grad_v2",) if hasattr(torch.ops.npu, name)),
    "npu_moe_token_unpermute_grad",
)
CASES = (
    Case("npu_rms_norm", _rms((2, 5, 64), 1), "", "npu_rms_norm_backward", (0, 1), keeps_strides=True),
    Case("npu_rms_norm", _rms((7, 48), 1, torch.float32), "f32_gamma", "npu_rms_norm_backward", (0, 1), MIXED),
    Case("npu_rms_norm", _rms((2, 3, 4, 32), 2), "two_axes", "npu_rms_norm_backward", (0, 1)),
    Case("npu_add_rms_norm", _add_rms, keeps_strides=True),
    Case("npu_rotary_mul", _rotary((2, 4, 24, 64), (1, 1, 24, 64), "half"), "BNSD_11SD", ROTARY, (0,)),
    Case("npu_rotary_mul", _rotary((2, 4, 24, 64), (2, 1, 24, 64), "half"), "BNSD_B1SD", ROTARY, (0,)),
    Case("npu_rotary_mul", _rotary((2, 24, 4, 64), (1, 24, 1, 64), "half"), "BSND_1S1D", ROTARY, (0,)),
    Case("npu_rotary_mul", _rotary((2, 24, 4, 64), (2, 24, 1, 64), "half"), "BSND_BS1D", ROTARY, (0,)),
    Case("npu_rotary_mul", _rotary((2, 24, 4, 64), (1, 24, 1, 64), "interleave"), "interleave", ROTARY, (0,)),
    Case("npu_swiglu", _gate(-1), "", "npu_swiglu_backward", (0,)),
    Case("npu_geglu", _gate(-1, 1, True), "tanh", "npu_geglu_grad", (0,)),
    Case("npu_geglu", _gate(-1, 0, True), "erf", "npu_geglu_grad", (0,)),
    Case("npu_geglu", _gate(-1, 1, False), "right", "npu_geglu_grad", (0,)),
    Case("npu_fast_gelu", _gate(), "", "npu_fast_gelu_backward", (0,), keeps_strides=True),
    Case("npu_clipped_swiglu", _gate(alpha=1.702, limit=7.0, bias=1.0, interleaved=True), "interleaved"),
    Case("npu_clipped_swiglu", _gate(dim=-1, alpha=1.0, limit=3.0, bias=0.0, interleaved=False), "chunked"),
    Case("npu_grouped_matmul", _grouped(0, (3, 3, 11, 24)), "rows"),
    Case("npu_grouped_matmul", _grouped(0, (3, 3, 11, 24), transposed=True), "view"),
    Case("npu_grouped_matmul", _grouped(2, (3, 3, 11, 24)), "weights"),
    Case("npu_moe_gating_top_k", _router(bias=True, group_select_mode=1, **GROUPS), "pairs", unwritten=(2,)),
    Case("npu_moe_gating_top_k", _router(group_select_mode=0, out_flag=True, **GROUPS), "largest"),
    Case("npu_moe_gating_top_k", _router(k=6, norm_type=0, routed_scaling_factor=16.0), "softmax", unwritten=(2,)),
    Case("npu_moe_gating_top_k_softmax", _router(k=6)),
    Case("npu_moe_gating_top_k_softmax_v2", _router(k=6, renorm=1), unwritten=(2,)),
    Case("npu_moe_token_permute", _permute(2), "", "npu_moe_token_permute_grad_v2", (0,)),
    Case("npu_moe_token_permute", _permute(1), "one", "npu_moe_token_permute_grad_v2", (0,)),
    Case("npu_moe_token_unpermute", _unpermute(3), "", UNPERMUTE, (0, 2)),
    Case("npu_moe_token_unpermute", _unpermute(2, torch.float32), "f32_probs", UNPERMUTE, (0, 2), MIXED),
    Case("npu_moe_token_unpermute", _unpermute(1), "one", UNPERMUTE, (0,)),
)
