"""npu_moe_gating_top_k, npu_moe_gating_top_k_softmax and its second version: from torch_npu's documents,
aclnnMoeGatingTopK and aclnnMoeGatingTopKSoftmaxV2. Of equal scores the one of the lowest index is taken first: the
documents do not say which."""

from __future__ import annotations

import torch

from npu_host_ops.register import FLOATS, check, family, kernel, unwritten

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check_common(op: str, x: torch.Tensor, k: int, ranks: tuple[int, ...]) -> None:
    check(op, family() in ("A2", "A3", "A5"), "the operator is not on this chip")
    check(op, x.dtype in FLOATS, f"x is {x.dtype}")
    check(op, x.dim() in ranks, f"x has rank {x.dim()}")
    check(op, x.numel() > 0, "x is empty")
    check(op, 0 < k <= x.shape[-1], f"k is {k} of {x.shape[-1]} experts")


def _largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest, the largest first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def _softmax(x: torch.Tensor) -> torch.Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


@kernel
def npu_moe_gating_top_k_softmax(x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1) -> Results:
    op = "npu_moe_gating_top_k_softmax"
    check(op, family() != "A5", "this chip has the second version only")
    _check_common(op, x, k, (2, 3))
    check(op, k <= 1024 and finished is None, f"k is {k}, finished is {finished}")
    scores = _softmax(x.contiguous().float())
    chosen = _largest(scores, k)
    rows = chosen[..., 0].numel()
    slots = torch.empty(rows, k, dtype=torch.int32)
    for j in range(k):
        slots[:, j] = torch.arange(j * rows, (j + 1) * rows)
    return scores.gather(-1, chosen).to(x.dtype), chosen.int(), slots.reshape(chosen.shape)


@kernel
def npu_moe_gating_top_k_softmax_v2(
    x: torch.Tensor, *, k: int = 1, finished: torch.Tensor | None = None, renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> Results:  # fmt: skip
    op = "npu_moe_gating_top_k_softmax_v2"
    _check_common(op, x, k, (2, 3))
    check(op, k <= 1024 and finished is None and renorm in (0, 1), f"k {k}, renorm {renorm}, finished {finished}")
    wide = x.contiguous().float()
    scores = wide if renorm else _softmax(wide)
    chosen = _largest(scores, k)
    y = scores.gather(-1, chosen)
    y = _softmax(y) if renorm else y
    return y.to(x.dtype), chosen.int(), scores if output_softmax and not renorm else unwritten((0,), torch.float32)


@kernel
def npu_moe_gating_top_k(
    x: torch.Tensor, k: int, *, bias: torch.Tensor | None = None, input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None, k_group: int = 1, group_count: int = 1, group_select_mode: int = 0,
    renorm: int = 0, norm_type: int = 0, out_flag: bool = False, routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> Results:  # fmt: skip
    op = "npu_moe_gating_top_k"
    _check_common(op, x, k, (2,))
    experts = x.shape[1]
    check(op, input_ids is None and tid2eid is None, "input_ids and tid2eid are for routing by a table")
    check(op, renorm == 0 and norm_type in (0, 1), f"renorm {renorm}, norm_type {norm_type}")
    check(op, group_select_mode in (0, 1), f"group_select_mode {group_select_mode}")
    check(op, experts <= 2048, f"{experts} experts")
    check(op, 1 <= k_group <= group_count and experts % group_count == 0, f"{k_group} of {group_count} groups")
    size = experts // group_count
    check(op, size > 2, f"groups of {size}")
    check(op, (size + 31) // 32 * 32 * group_count <= 2048, f"{group_count} groups of {size}, filled up to 32")
    check(op, k <= size * k_group, f"k is {k} of {size * k_group}")
    if bias is not None:
        check(op, bias.shape == (experts,) and bias.dtype == x.dtype, f"bias is {bias.dtype} {tuple(bias.shape)}")
    wide = x.contiguous().float()
    scores = 1 / (1 + (-wide).exp()) if norm_type == 1 else _softmax(wide)
    chosen = scores + bias.float() if bias is not None else scores.clone()
    if group_count > 1:
        parts = torch.sort(chosen.view(-1, group_count, size), dim=-1, descending=True).values
        totals = parts[..., 0] + parts[..., 1] if group_select_mode == 1 else parts[..., 0]
        for row, kept in enumerate(_largest(totals, k_group).tolist()):
            for group in set(range(group_count)) - set(kept):
                chosen[row, group * size : (group + 1) * size] = -torch.inf
    found = _largest(chosen, k)
    y = scores.gather(-1, found)
    if norm_type == 1:
        y = y / (y.sum(-1, keepdim=True) + eps)
    third = scores if out_flag else unwritten(scores.shape, torch.float32)
    return (y * routed_scaling_factor).to(x.dtype), found.int(), third
