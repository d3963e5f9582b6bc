"""npu_rotary_mul on an NPU: four dimensions, and the layouts, widths and sizes that its kernels take.

Sources: the documents of npu_rotary_mul and aclnnRotaryPositionEmbedding(Grad), and the tilings of both kernels
(ops-transformer, posembedding/rotary_position_embedding(_grad)/op_host).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import rotation as r
from npu_fuse.emit import Emitter
from npu_fuse.limits import is_old, on_npu
from npu_fuse.report import Status
from npu_fuse.rotation_tables import Table
from npu_fuse.sites import Form, Refusal, Site
from npu_fuse.targets import Target
from npu_fuse.view import is_one

SOURCE = "documents of npu_rotary_mul and aclnnRotaryPositionEmbedding"
MAX_WIDTH = 896
MAX_BATCH = 1000
OLD_WIDTH, OLD_ROWS = 128, 1024
BLOCK = 32  # bytes
SHORT_WIDTH = 80
CORES = 50  # vector cores of the largest chip: fewer make the limit wider
HALF_TABLES = ({2}, {0, 2}, {0, 1, 2}, {1}, {0, 1}, {0})
"""Which of x's first three dimensions cos may have (the others 1): 11SD, B1SD, BNSD, 1S1D, BS1D, S11D."""
INTERLEAVE_TABLES = ({2}, {1}, {0})


def emit(e: Emitter, value: Any, cos: Any, sin: Any, turn: r.Turn, x: Node, width: torch.dtype) -> Any:
    """x as it lies in memory: a [B, N, S, D] view of [B, S, N, D] goes in as the latter, without a copy.

    Where the tilings refuse [B, N, S, D], or may at some size, it goes in as [B, S, N, D] too: CANN copies it.
    """
    source = d.tensor(x)
    assert source is not None
    missing = 4 - source.dim()
    for _ in range(missing):
        value = e.call(torch.unsqueeze, value, 0)
    cos, sin = (_four(e, t, table) for t, table in ((cos, turn.cos), (sin, turn.sin)))
    table = d.tensor(turn.cos.node)
    assert table is not None
    swapped = _is_swapped(source) or not _tiling_takes(turn, source, table, width)
    if swapped:
        value, cos, sin = (e.call(torch.transpose, t, 1, 2) for t in (value, cos, sin))
    if turn.mode != "half" and _known_rows(source, _kept_dims(turn, source, table)) is None:
        y = e.fused("rotary_mul_interleaved", value, cos, sin)
    else:
        y = e.fused("npu_rotary_mul", value, cos, sin, turn.mode)
    if swapped:
        y = e.call(torch.transpose, y, 1, 2)
    for _ in range(missing):
        y = e.call(torch.squeeze, y, 0)
    return y


def _four(e: Emitter, table: Any, made_of: Table) -> Any:
    for _ in range(4 - _rank(made_of)):
        table = e.call(torch.unsqueeze, table, 0)
    return table


def _rank(table: Table) -> int:
    value = d.tensor(table.node)
    assert value is not None
    return value.dim() - max(table.flatten - 1, 0) + len(table.insert)


def _is_swapped(x: torch.Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """Shapes, layouts and dtypes of aclnn's rotary kernels; see the document of npu_rotary_mul."""
    if target.name != "npu":
        return None
    turn, x = site.facts["turn"], d.tensor(site.facts["x"])
    cos = d.tensor(turn.cos.node)
    assert x is not None and cos is not None
    refused = (
        None if x.dtype == torch.float64 else on_npu("rotary_mul", target, ("npu_rotary_mul",), x.dtype, form.key[0])
    )
    if refused is not None:
        return refused
    reason = _shape_limit(turn, x, cos)
    reason = reason or (_old_limit(turn, x, cos, target) if is_old(target) else None)
    if reason is None and (cos.requires_grad or d.tensor(turn.sin.node).requires_grad):  # type: ignore[union-attr]
        reason = "cos or sin needs a gradient, which the op's backward leaves unwritten in a compiled graph"
    if reason is None:
        return None
    told = reason if SOURCE in reason else f"{reason} ({SOURCE})"
    return Refusal(Status.REFUSED_BY_TARGET, "rotary_mul.npu", told)


def _shape_limit(turn: r.Turn, x: torch.Tensor, cos: torch.Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "npu_rotary_mul takes no float64"
    if x.dim() > 4:
        return f"npu_rotary_mul takes rank 4, x has {x.dim()}"
    if turn.width is None:
        return "the width is symbolic, and the kernel's limits depend on it"
    if turn.width > MAX_WIDTH:
        return f"npu_rotary_mul takes a width of at most {MAX_WIDTH}, x has {turn.width}"
    kept = _kept_dims(turn, x, cos)
    shape = [1] * (4 - x.dim()) + list(x.shape)
    allowed = HALF_TABLES if turn.mode == "half" else INTERLEAVE_TABLES
    if not any(kept <= table and all(is_one(shape[i]) for i in table - kept) for table in allowed):
        return f"cos varies over dims {sorted(kept)} of x, which mode {turn.mode!r} does not take"
    if any(isinstance(s, int) and s >= MAX_BATCH for s in _batch_and_heads(x, kept)):
        return f"batch and heads must be below {MAX_BATCH}"
    if turn.mode != "half" and (_known_rows(x, kept) or 0) >= MAX_BATCH:
        return f"batch · heads must be below {MAX_BATCH} in mode {turn.mode!r}"
    return None


def takes(x: torch.Tensor, cos: torch.Tensor) -> bool:
    """The kernels of mode interleave take these sizes: batch · heads, which cos does not have."""
    return x.numel() // x.shape[-1] // max(math.prod(cos.shape[:-1]), 1) < MAX_BATCH


def _known_rows(x: torch.Tensor, kept: set[int]) -> int | None:
    """Batch · heads; None where one of them is symbolic: the emitted op looks at each call's own."""
    rows = _batch_and_heads(x, kept)
    return math.prod(rows) if all(isinstance(s, int) for s in rows) else None


def _old_limit(turn: r.Turn, x: torch.Tensor, cos: torch.Tensor, target: Target) -> str | None:
    """310P and 910A: one mode, one width, tables shared by batch and heads (document of npu_rotary_mul)."""
    on = f"on {target.soc} ({SOURCE})"
    if turn.mode != "half":
        return f"npu_rotary_mul takes mode 'half' only {on}, here is {turn.mode!r}"
    if turn.width != OLD_WIDTH:
        return f"npu_rotary_mul takes a width of {OLD_WIDTH} only {on}, x has {turn.width}"
    kept = _kept_dims(turn, x, cos)
    if len(kept) > 1:
        return f"npu_rotary_mul takes cos over one dimension of x only {on}, here are {len(kept)}"
    rows = _batch_and_heads(x, kept)
    if not all(isinstance(s, int) for s in rows) or math.prod(rows) > OLD_ROWS:
        return f"batch · heads must be known and at most {OLD_ROWS} {on}"
    return None


def _kept_dims(turn: r.Turn, x: torch.Tensor, cos: torch.Tensor) -> set[int]:
    """The dimensions of four-dimensional x that cos has too."""
    shape = list(cos.shape)[: -max(turn.cos.flatten, 1)]
    for i in turn.cos.insert:
        shape.insert(i, 1)
    shift = 3 - len(shape)
    return {i + shift for i, size in enumerate(shape) if not is_one(size)}


def _batch_and_heads(x: torch.Tensor, kept: set[int]) -> list[Any]:
    leading = [1] * (4 - x.dim()) + list(x.shape[:-1])
    sequence = 2 if 2 in kept else 1 if 1 in kept else 0
    return [s for i, s in enumerate(leading) if i != sequence]


def _tiling_takes(turn: r.Turn, x: torch.Tensor, cos: torch.Tensor, width: torch.dtype) -> bool:
    """Whether the kernels take x as [B, N, S, D] at every size: three refusals of their tilings in mode half."""
    kept = _kept_dims(turn, x, cos)
    if turn.mode != "half" or x.dim() != 4 or 2 not in kept or turn.width is None:
        return True
    batch, heads, length = x.shape[:3]
    if kept == {2} and not (is_one(batch) or is_one(heads) or is_one(length)):
        known = all(isinstance(s, int) for s in (batch, heads, length))
        if turn.width // 2 * width.itemsize % BLOCK:
            return turn.width >= SHORT_WIDTH or (known and 2 * batch * heads <= -(-length // CORES))
        return known and batch * heads <= 8 * length
    if kept == {0, 2} and x.requires_grad:  # of the backward kernel
        return isinstance(batch, int) and isinstance(length, int) and (batch < length or length == 1)
    return True
