"""Chips without matmul + all-reduce in one call: matmul + reduce-scatter in one, and an all-gather of the rows.

An all-reduce is a reduce-scatter and an all-gather; the first half then hides behind the product. When that pays is
modelled, from published numbers: nothing of it was measured on an NPU. A matmul takes its operations over PEAK, a ring
collective its bytes over LINK and a latency a step; a fused kernel cuts its rows into TILES parts and communicates one
while the next is computed, so that exposed are one part, and what communication takes longer than the product.
"""

from __future__ import annotations

import functools
import math

import torch

from npu_fuse import communicate, groups, mc2
from npu_fuse.products import Product
from npu_fuse.report import Status
from npu_fuse.sites import Refusal, Site
from npu_fuse.targets import Target

WHOLE, SPLIT = "npu_mm_all_reduce_base", "npu_mm_reduce_scatter_base"
"""The kernels for a product that is summed over ranks; the second is followed by an all-gather."""
FORM = "reduce-scatter behind the product, and an all-gather"

PEAK = 280e12
"""bfloat16 operations a second of an Ascend 910B: Gitee AI's page on it (ai.gitee.com/docs, Ascend 910B)."""
LINK = 784e9 / 2 / 2
"""Bytes a second that a processor sends: 784 GB/s are published of a 910C (besthub.dev, "How Huawei's Ascend AI Chips
Evolve"), of two processors and both directions. That the mesh of an A2 server gives as much is an assumption."""
LATENCY = 5e-6
"""Seconds a step of a collective, and a launch: an assumption."""
TILES = 4
"""Parts into which a fused kernel cuts its rows: an assumption."""
BYTES = 2


def exposed(work: float, talk: float) -> float:
    """Seconds of communication that a fused kernel does not hide behind its product."""
    return max(talk / TILES, talk - work * (1 - 1 / TILES)) if work and talk else talk


def seconds(rows: int, inner: int, width: int, ranks: int) -> tuple[float, float]:
    """Exposed communication of [rows, inner] · [inner, width] and its sum: as an all-reduce apart, and split."""
    half = rows * width * BYTES * (ranks - 1) / ranks / LINK + (ranks - 1) * LATENCY
    work = 2.0 * rows * inner * width / PEAK
    return 2 * half, exposed(work, half) + half + LATENCY  # one launch more


@functools.cache
def least_rows(width: int, ranks: int) -> int:
    """Rows from which on splitting pays, with the narrowest product that the kernel takes: alike on ranks whose
    shards are not."""
    low, high = 1, 1 << 24
    while low < high:
        middle = (low + high) // 2
        apart, split = seconds(middle, mc2.INNER[0], width, ranks)
        low, high = (low, middle) if split < apart else (middle + 1, high)
    return math.ceil(low / ranks) * ranks


def run(x1: torch.Tensor, x2: torch.Tensor, group: str) -> torch.Tensor | None:
    """The sum over ranks of x1 [..., K] · x2 [K, N]; None where its rows cannot be scattered."""
    size = torch.distributed.get_world_size(groups.resolve(group))
    flat = x1 if x1.dim() == 2 else x1.reshape(-1, x1.shape[-1])
    if flat.shape[0] % size:
        return None
    call = torch.ops.npu.npu_mm_reduce_scatter_base.default
    part = call(flat, x2, groups.communicator(group), size, reduce_op="sum")
    return communicate.all_gather(part, group, size).view(*x1.shape[:-1], x2.shape[1])


def limits(
    name: str, site: Site, target: Target, inner: int | None, width: int | None, trained: bool
) -> Refusal | None:
    """Why the split form of this site is not for the target. It is for chips that lack the one call only."""
    one_call = mc2.refusal(name, WHOLE, site, target) if target.name == "npu" else None
    if one_call is None:
        why = "the chip has the product and its sum in one call"
        return mc2.too_few_rows(name, site, target) or Refusal(Status.REFUSED_BY_TARGET, f"{name}.one_call", why)
    if not one_call.code.endswith(".soc"):
        return one_call
    refused = mc2.refusal(name, SPLIT, site, target) or mc2.width_refusal(name, SPLIT, inner, "the product")
    if refused is None and site.facts["bias"]:
        refused = mc2.no_bias(name, SPLIT)
    if refused is not None:
        return Refusal(refused.status, refused.code, f"{one_call.reason}; instead of it {refused.reason}")
    if target.names_in_graph and not trained:
        why = f"{one_call.reason}; a hand-off that translates ops one by one is given no other form"
        return Refusal(Status.REFUSED_BY_TARGET, f"{name}.handoff", why)
    return _rows(name, site, target, one_call.reason, inner, width)


def _rows(name: str, site: Site, target: Target, without: str, inner: int | None, width: int | None) -> Refusal | None:
    """A length that is not known before the call is looked at in it."""
    rows, size = mc2.rows_of(site), site.facts["group"].size
    if rows is None:
        return None
    if rows % size:
        why = f"{without}; {rows} rows cannot be scattered over {size} ranks"
        return Refusal(Status.REFUSED_BY_TARGET, f"{name}.rows", why)
    least = rows_for(target, width, size)
    if rows >= least:
        return None
    apart, split = (1e6 * s for s in seconds(rows, inner or mc2.INNER[0], width or 1, size))
    why = (
        f"{without}; {rows} rows are fewer than {least}, from which on a reduce-scatter behind the product and an"
        f" all-gather pay (modelled: {split:.0f} µs exposed, an all-reduce apart {apart:.0f} µs; option mc2_min_rows)"
    )
    return Refusal(Status.REFUSED_BY_PROFIT, f"{name}.rows", why)


def rows_for(target: Target, width: int | None, size: int) -> int:
    """The fewest rows for the split form: the option's, or else what the model says."""
    if not target.models_rows:
        return target.min_rows
    return max(target.min_rows, least_rows(width, size)) if width is not None else target.min_rows


def modelled(product: Product, size: int, backward: bool = False) -> str:
    """What the model says of a product of known sizes, for the report; `backward`: of its left operand's gradient."""
    rows = mc2.known_rows(product.x, product.contracted)
    inner, width = mc2.widths(product)[:: -1 if backward else 1]
    if rows is None or inner is None or width is None:
        return ""
    apart, split = (1e6 * s for s in seconds(rows, inner, width, size))
    return f"as a {FORM}: modelled {split:.0f} µs of communication exposed, an all-reduce apart {apart:.0f} µs"
