"""npu_grouped_matmul in its floating-point forms: from aclnnGroupedMatmul and torch_npu's document."""

from __future__ import annotations

from typing import Any

import torch

from npu_host_ops.register import FLOATS, check, family, kernel, unwritten

OP = "npu_grouped_matmul"


@kernel
def npu_grouped_matmul(
    x: list[torch.Tensor], weight: list[torch.Tensor], *, bias: Any = None, group_list: torch.Tensor | None = None,
    split_item: int | None = 0, group_type: int | None = None, group_list_type: int | None = 0, **rest: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """One x [S, K] and one weight [E, K, N] by rows (group_type 0), or x [K, S] by dy [S, N] (group_type 2)."""
    given = [name for name, value in rest.items() if value not in (None, 0)]
    check(OP, not given and bias is None, f"{given or 'bias'} are for quantised calls")
    check(OP, split_item in (2, 3) and group_type in (0, 2), f"split_item {split_item}, group_type {group_type}")
    check(OP, len(x) == len(weight) == 1, f"{len(x)} x and {len(weight)} weights")
    check(OP, group_list is not None and group_list.dtype == torch.int64 and group_list.dim() == 1,
          "group_list is no int64 vector")  # fmt: skip
    check(OP, x[0].dtype in FLOATS and x[0].dtype == weight[0].dtype, f"{x[0].dtype} by {weight[0].dtype}")
    if family() == "310P":
        check(OP, x[0].dtype == torch.float16 and group_type == 0, f"x is {x[0].dtype}, group_type {group_type}")
        check(OP, weight[0].shape[-1] % 16 == 0, f"n is {weight[0].shape[-1]}")
    check(OP, max(x[0].shape[1], weight[0].shape[-1]) < 65536, "an inner axis is too long")
    assert group_list is not None
    ends = group_list.cumsum(0).tolist() if group_list_type == 1 else group_list.tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    wide, other = x[0].float(), weight[0].float()
    if group_type == 2:
        check(OP, x[0].dim() == 2 and x[0].t().is_contiguous(), "x is not transposed, splitting K needs it")
        return [torch.stack([wide[:, a:b] @ other[a:b] for a, b in bounds]).to(x[0].dtype)]
    check(OP, x[0].dim() == 2 and x[0].stride(1) == 1, "x is transposed, splitting M forbids it")
    check(OP, other.dim() == 3 and other.shape[0] == len(ends) <= 1024, f"{len(ends)} groups of {other.shape}")
    y = unwritten((wide.shape[0], other.shape[2]), x[0].dtype)
    for (a, b), w in zip(bounds, other.unbind(), strict=True):
        y[a:b] = (wide[a:b] @ w).to(y.dtype)
    return [y]
