"""What Ascend's fused matmul and communication kernels cannot run, and where they do not pay.

Limits rest on what all ranks of a group have alike: the chip, the group, dtypes, numbers of rows. Sources: the
documents of npu_mm_all_reduce_base, npu_mm_reduce_scatter_base and npu_all_gather_base_mm in Ascend/pytorch, and
of aclnnMatmulAllReduce(V2), aclnnMatmulReduceScatter, aclnnAllGatherMatmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from npu_fuse import dialect as d
from npu_fuse import groups, pretend
from npu_fuse.report import Status
from npu_fuse.sites import Refusal, Site
from npu_fuse.targets import Target
from npu_fuse.view import static

DTYPES = (torch.float16, torch.bfloat16)


def _on_npu(value: torch.Tensor) -> bool:
    return value.device.type == "npu"


def runs_fused(x1: torch.Tensor, min_rows: int, group: str) -> bool:
    """Asked in the call, where a length is known: enough rows on an NPU, and no capture in which the communicator
    would have to be made first (making it copies to the host, which a capture forbids)."""
    if not _on_npu(x1) or pretend.size_of(group) is not None:
        return False
    rows = x1.numel() // max(1, x1.shape[-1])
    npu: Any = torch.npu  # type: ignore[attr-defined]
    return rows >= min_rows and (groups.has_communicator(group) or not npu.is_current_stream_capturing())


def refusal(
    name: str, op: str, site: Site, target: Target, chips: Sequence[str], sizes: Sequence[int]
) -> Refusal | None:
    """A limit of the op that the site breaks on this chip."""
    group: groups.Group = site.facts["group"]
    result = d.tensor(site.output)
    if target.soc is not None and target.generation not in chips:
        chip = f"{target.soc} ({target.generation})" if target.generation else target.soc
        return _refused(name, "soc", f"{op} runs on {' and '.join(chips)} only, the chip is {chip}")
    if group.size not in sizes:
        counts = ", ".join(map(str, sizes))
        return _refused(name, "ranks", f"{op} takes groups of {counts} ranks, this one has {group.size}")
    if result is None or result.dtype not in DTYPES:
        dtype = "no tensor" if result is None else str(result.dtype)
        return _refused(name, "dtype", f"{op} takes float16 and bfloat16, the product is {dtype}")
    if not groups.speaks_hccl(group.name):
        return _refused(name, "backend", f"{op} communicates through HCCL, and the group has another backend")
    claimed = groups.claimed()
    if claimed is not None and not claimed.same(group):
        why = f"the fused kernels of a process share one communicator, and {claimed} have it; this group is {group}"
        return _refused(name, "communicator", why)
    return None


def too_few_rows(name: str, site: Site, target: Target) -> Refusal | None:
    """A length that is not known before the call is compared inside the op."""
    rows = rows_of(site)
    if rows is None or rows >= target.min_rows:
        return None
    reason = f"{rows} rows are fewer than {target.min_rows}, from which on fusing pays (option mc2_min_rows)"
    return Refusal(Status.REFUSED_BY_PROFIT, f"{name}.rows", reason)


def rows_of(site: Site) -> int | None:
    """The rows of the left operand: the product of its leading sizes; None where one is not known."""
    value = d.local(site.facts["x"])
    contracted = site.facts["product"].contracted
    if value is None:
        return None
    rows = 1
    for size in value.shape[:-contracted]:
        known = static(size)
        if known is None:
            return None
        rows *= known
    return rows


def _refused(name: str, code: str, reason: str) -> Refusal:
    return Refusal(Status.REFUSED_BY_TARGET, f"{name}.{code}", reason)
