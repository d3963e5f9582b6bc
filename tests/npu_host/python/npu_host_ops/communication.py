"""Matmuls with communication: from aclnnMatmulAllReduce, aclnnMatmulReduceScatter, aclnnAllGatherMatmul.

`hcom` is looked up among the process groups that have a communicator; what HCCL would move, gloo moves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from npu_host_ops.register import check, family, kernel

RANKS = {"A2": (2, 4, 8), "A3": (2, 4, 8, 16, 32)}
INNER = (256, 65535)


def _group(op: str, hcom: str) -> Any:
    """The process group of a communicator's name."""
    for group in dist.distributed_c10d._world.pg_map if dist.is_initialized() else ():
        backend = group._get_backend(torch.device("npu"))
        if backend.get_hccl_comm_name(dist.get_rank(), init_comm=False) == hcom:
            return group
    check(op, False, f"no communicator is named {hcom!r}")
    return None


def _check(op: str, x: torch.Tensor, x2: torch.Tensor, given: dict[str, Any], families: tuple[str, ...]) -> None:
    told = [name for name, value in given.items() if value not in (None, 0)]
    check(op, not told, f"{told} belong to forms that the stand-in has not")
    check(op, family() in families, f"runs on {' and '.join(families)}")
    check(op, x.dtype == x2.dtype and x.dtype in (torch.float16, torch.bfloat16), f"x {x.dtype}, x2 {x2.dtype}")
    check(op, x2.dim() == 2 and x.shape[-1] == x2.shape[0], f"x {tuple(x.shape)}, x2 {tuple(x2.shape)}")
    check(op, x.numel() > 0 and x2.numel() > 0, "an empty tensor")
    check(op, x.stride(-1) == 1 or x.shape[-1] == 1, "x is transposed")


def _check_rows(op: str, x: torch.Tensor, x2: torch.Tensor, group: Any, world_size: int, given: dict[str, Any]) -> None:
    _check(op, x, x2, given, ("A2", "A3"))
    check(op, x.dim() == 2, f"x has rank {x.dim()}")
    check(op, INNER[0] <= x.shape[1] < INNER[1], f"{x.shape[1]} columns are summed over")
    check(op, world_size == group.size() and world_size in RANKS[family()], f"world_size {world_size}")


@kernel
def npu_mm_all_reduce_base(
    x1: torch.Tensor, x2: torch.Tensor, hcom: str, *, reduce_op: str = "sum", bias: Any = None, x3: Any = None,
    **given: Any,
) -> torch.Tensor:  # fmt: skip
    op, group = "npu_mm_all_reduce_base", _group("npu_mm_all_reduce_base", hcom)
    _check(op, x1, x2, given, ("A2",))
    check(op, x1.dim() in (2, 3), f"x1 has rank {x1.dim()}")
    check(op, reduce_op == "sum", f"reduce_op is {reduce_op!r}")
    check(op, group.size() in (1, *RANKS["A2"]), f"{group.size()} ranks")
    check(op, bias is None or (bias.shape == x2.shape[1:] and bias.dtype == x1.dtype), "bias is not [N] in x1's dtype")
    part = torch.nn.functional.linear(x1, x2.t(), bias)
    part = part if x3 is None else part + x3
    dist.all_reduce(part, group=group)
    return part


@kernel
def npu_mm_reduce_scatter_base(
    x: torch.Tensor, x2: torch.Tensor, hcom: str, world_size: int, *, reduce_op: str = "sum", bias: Any = None,
    **given: Any,
) -> torch.Tensor:  # fmt: skip
    op, group = "npu_mm_reduce_scatter_base", _group("npu_mm_reduce_scatter_base", hcom)
    _check_rows(op, x, x2, group, world_size, given)
    check(op, bias is None, "a bias is not supported")
    check(op, reduce_op == "sum", f"reduce_op is {reduce_op!r}")
    check(op, x.shape[0] % world_size == 0, f"{x.shape[0]} rows over {world_size} ranks")
    part = x @ x2
    result = part.new_empty(x.shape[0] // world_size, x2.shape[1])
    dist.reduce_scatter_tensor(result, part, group=group)
    return result


@kernel
def npu_all_gather_base_mm(
    x: torch.Tensor, x2: torch.Tensor, hcom: str, world_size: int, *, bias: Any = None, gather_index: int = 0,
    gather_output: bool = True, **given: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    op, group = "npu_all_gather_base_mm", _group("npu_all_gather_base_mm", hcom)
    _check_rows(op, x, x2, group, world_size, given)
    check(op, bias is None, "a bias is not supported")
    check(op, gather_index == 0, f"gather_index is {gather_index}")
    gathered = x.new_empty(x.shape[0] * world_size, x.shape[1])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered @ x2, gathered if gather_output else x.new_empty(0)
