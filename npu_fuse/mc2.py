"""What Ascend's fused matmul and communication kernels cannot run, and where they do not pay.

Limits rest on what all ranks of a group have alike: the chip, the group, dtypes, numbers of rows. Sources: the
documents of npu_mm_all_reduce_base, npu_mm_reduce_scatter_base and npu_all_gather_base_mm in Ascend/pytorch, and
of aclnnMatmulAllReduce(V2), aclnnMatmulReduceScatter, aclnnAllGatherMatmul.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import groups, pretend
from npu_fuse.products import Product
from npu_fuse.report import Status
from npu_fuse.sites import Refusal, Site
from npu_fuse.targets import Target
from npu_fuse.view import static

DTYPES = (torch.float16, torch.bfloat16)


def _on_npu(value: torch.Tensor) -> bool:
    return value.device.type == "npu"


def runs_fused(x1: torch.Tensor, rows: Any, min_rows: int, group: str) -> bool:
    """Asked in the call, where a length is known: enough rows on an NPU, and a communicator that is there.

    All of it is alike on all ranks: rows of a collective are, and communicators are made where graphs are compiled,
    when all ranks have agreed. Where one is missing (the group was made anew since), it is missing everywhere.
    """
    if not _on_npu(x1) or pretend.size_of(group) is not None:
        return False
    return bool(rows >= min_rows) and groups.has_communicator(group)


CHIPS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "npu_mm_all_reduce_base": {"A2": (2, 4, 8)},
    "npu_mm_reduce_scatter_base": {"A2": (2, 4, 8), "A3": (2, 4, 8, 16, 32)},
    "npu_all_gather_base_mm": {"A2": (2, 4, 8), "A3": (2, 4, 8, 16, 32)},
}
"""The families that run an op, and the numbers of ranks that it takes there."""
INNER = (256, 65535)
"""The width that is summed over is at least the first and below the second, with scattered or gathered rows."""


def refusal(name: str, op: str, site: Site, target: Target) -> Refusal | None:
    """A limit of the op that the site breaks on this chip."""
    group: groups.Group = site.facts["group"]
    result = d.tensor(site.output)
    chips = CHIPS[op]
    if target.soc is not None and target.generation not in chips:
        chip = f"{target.soc} ({target.generation})" if target.generation else target.soc
        return _refused(name, "soc", f"{op} runs on {' and '.join(chips)} only, the chip is {chip}")
    sizes = chips.get(target.generation, next(iter(chips.values())))
    if group.size not in sizes:
        counts = ", ".join(map(str, sizes))
        return _refused(name, "ranks", f"{op} takes groups of {counts} ranks, this one has {group.size}")
    if result is None or result.dtype not in DTYPES:
        dtype = "no tensor" if result is None else str(result.dtype)
        return _refused(name, "dtype", f"{op} takes float16 and bfloat16, the product is {dtype}")
    if target.present and not target.has(op):
        return _refused(name, "release", f"this torch_npu has no op {op}; a newer release has")
    if not groups.speaks_hccl(group.name):
        return _refused(name, "backend", f"{op} communicates through HCCL, and the group has another backend")
    claimed = groups.claimed()
    if claimed is not None and not claimed.same(group):
        why = f"the fused kernels of a process share one communicator, and {claimed} have it; this group is {group}"
        return _refused(name, "communicator", why)
    return None


def rows_refusal(name: str, op: str, site: Site, backward: bool) -> Refusal | None:
    """Limits of the ops that scatter or gather rows; `backward`: its gradient takes one of them, too."""
    product: Product = site.facts["product"]
    if site.facts["bias"]:
        return no_bias(name, op)
    inner, outer = widths(product)
    result = d.tensor(site.output)
    trained = backward and result is not None and result.requires_grad
    refused = width_refusal(name, op, inner, "the product")
    return refused or (width_refusal(name, op, outer, "the product of its backward") if trained else None)


def no_bias(name: str, op: str) -> Refusal:
    return _refused(name, "bias", f"{op} adds no bias, and added apart it would be rounded once more")


def width_refusal(name: str, op: str, width: int | None, what: str) -> Refusal | None:
    """`width`: how many columns are summed over."""
    if width is not None and INNER[0] <= width < INNER[1]:
        return None
    limits = f"{INNER[0]} to {INNER[1] - 1}"
    return _refused(name, "width", f"{op} sums over {limits} columns, {what} over {width or 'a symbol'}")


def widths(product: Product) -> tuple[int | None, int | None]:
    """K and N of this rank's weight; None where one is a symbol."""
    weight = d.local(product.w)
    assert weight is not None
    sizes = [static(size) for size in weight.shape[-product.contracted - product.free :]]
    first, last = sizes[: product.free], sizes[product.free :]
    if not product.transposed:
        first, last = sizes[product.contracted :], sizes[: product.contracted]
    inner, outer = (None if None in part else math.prod(part) for part in (last, first))  # type: ignore[arg-type]
    return inner, outer


def overlapped(name: str) -> Refusal:
    reason = "the code works between the collective and its wait: fused, that work would wait"
    return Refusal(Status.REFUSED_BY_PROFIT, f"{name}.overlapped", reason)


def pool(size: int) -> tuple[int, ...]:
    """Sizes for proofs, all of which can be scattered over that many ranks."""
    return tuple(size * factor for factor in (2, 3, 5, 1, 4, 7))


def too_few_rows(name: str, site: Site, target: Target) -> Refusal | None:
    """A length that is not known before the call is compared inside the op."""
    rows = rows_of(site)
    if rows is not None:
        rows *= int(site.facts.get("gathered", 1))
    if rows is None or rows >= target.min_rows:
        return None
    reason = f"{rows} rows are fewer than {target.min_rows}, from which on fusing pays (option mc2_min_rows)"
    return Refusal(Status.REFUSED_BY_PROFIT, f"{name}.rows", reason)


def bare(target: Target, x: Node, contracted: int, trained: bool) -> bool:
    """The NPU's own op stands in the graph: where the hand-off asks for it, and nothing has to be decided later.

    In training the graph needs our backward, and a length that is not known a branch.
    """
    return target.names_in_graph and not trained and known_rows(x, contracted) is not None


def rows_of(site: Site) -> int | None:
    """The rows of the left operand: the product of its leading sizes; None where one is not known."""
    return known_rows(site.facts["x"], site.facts["product"].contracted)


def known_rows(x: Node, contracted: int) -> int | None:
    value = d.local(x)
    if value is None:
        return None
    sizes = [static(size) for size in value.shape[:-contracted]]
    return None if None in sizes else math.prod(sizes)  # type: ignore[arg-type]


def _refused(name: str, code: str, reason: str) -> Refusal:
    return Refusal(Status.REFUSED_BY_TARGET, f"{name}.{code}", reason)
