"""npu_rotary_mul and its backward: from aclnnRotaryPositionEmbedding(Grad) and its tilings.

The operator has no layout argument: which dimensions of cos are 1 tells the kernel what x's are. A layout
names the dimension of x that is the sequence, the batch and the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from npu_host_ops.register import FLOATS, check, family, kernel, refuse, unwritten, vector_cores

BLOCK = 32  # bytes


@dataclass(frozen=True)
class Layout:
    name: str
    batch: int
    heads: int
    sequence: int
    tables: tuple[str, ...]
    """The shapes of cos: S sequence, B batch, N heads, 1 broadcast; in the order of x's dimensions."""


HALF = (
    Layout("BNSD", 0, 1, 2, ("11S", "B1S", "BNS")),
    Layout("BSND", 0, 2, 1, ("1S1", "BS1", "BSN")),
    Layout("SBND", 1, 2, 0, ("S11", "SB1", "SBN")),
)
INTERLEAVE = (
    Layout("BNSD", 0, 1, 2, ("11S",)),
    Layout("BSND", 0, 2, 1, ("1S1",)),
    Layout("SBND", 1, 2, 0, ("S11",)),
)


def _readings(x: torch.Tensor, cos: torch.Tensor, layouts: tuple[Layout, ...]) -> list[tuple[Layout, str]]:
    """Every layout and table that the sizes fit."""
    found = []
    for layout in layouts:
        for table in layout.tables:
            wanted = [1 if mark == "1" else x.shape[i] for i, mark in enumerate(table)]
            if list(cos.shape[:3]) == wanted:
                found.append((layout, table))
    return found


def _turn(t: torch.Tensor, mode: str) -> torch.Tensor:
    """The quarter turn of each pair: (a, b) to (-b, a)."""
    if mode == "half":
        h = t.shape[-1] // 2
        return torch.cat((-t[..., h:], t[..., :h]), dim=-1)
    out = torch.empty_like(t)
    out[..., 0::2] = -t[..., 1::2]
    out[..., 1::2] = t[..., 0::2]
    return out


def _unturn(t: torch.Tensor, mode: str) -> torch.Tensor:
    return -_turn(t, mode)


def _check(op: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> list[tuple[Layout, str]]:
    check(op, x.dtype in FLOATS, f"x is {x.dtype}")
    check(op, cos.dtype in FLOATS and sin.dtype in FLOATS, f"cos is {cos.dtype}, sin {sin.dtype}")
    known = ("half", "interleave", "quarter", "interleave-half") if family() == "A5" else ("half", "interleave")
    check(op, mode in known, f"rotary_mode {mode!r}")
    if mode not in ("half", "interleave"):
        refuse(op, f"the stand-in has no rotary_mode {mode!r}")
    check(op, x.dim() == 4, f"x has rank {x.dim()}: the tilings take four dimensions only")
    check(op, cos.dim() == 4 and cos.shape == sin.shape, f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}")
    width = x.shape[-1]
    check(op, width % 2 == 0 and 0 < width <= 896, f"D is {width}")
    check(op, cos.shape[-1] == width, f"cos has width {cos.shape[-1]}, x {width}")
    if family() in ("310P", "910A"):
        check(op, mode == "half" and width == 128, f"mode {mode!r} with D = {width}")
    readings = _readings(x, cos, HALF if mode == "half" else INTERLEAVE)
    check(op, bool(readings), f"cos {tuple(cos.shape)} beside x {tuple(x.shape)} in mode {mode!r}")
    in_range = [(layout, table) for layout, table in readings if _small(x, layout, mode)]
    check(op, bool(in_range), f"batch and heads of x {tuple(x.shape)} are too many in mode {mode!r}")
    return in_range


def _small(x: torch.Tensor, layout: Layout, mode: str) -> bool:
    batch, heads = x.shape[layout.batch], x.shape[layout.heads]
    return batch * heads < 1000 if mode == "interleave" else batch < 1000 and heads < 1000


def _is_aligned(x: torch.Tensor) -> bool:
    return x.shape[-1] // 2 * x.element_size() % BLOCK == 0


def _tiling_takes(x: torch.Tensor, layout: Layout, table: str) -> bool:
    """The forward tiling of mode half with cos of [1, 1, S, D] beside many heads."""
    if layout.name != "BNSD" or table != "11S" or 1 in x.shape[:3]:
        return True
    rows, sequence = x.shape[0] * x.shape[1], x.shape[2]
    if _is_aligned(x):
        return rows <= 8 * sequence
    return x.shape[-1] >= 80 or 2 * rows <= -(-sequence // vector_cores())


@kernel
def npu_rotary_mul(
    x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: torch.Tensor | None = None
) -> torch.Tensor:
    """x · cos + turn(x) · sin in float32, rounded once; cos and sin are cast to x's dtype first."""
    op = "npu_rotary_mul"
    if rotate is not None:
        refuse(op, "the stand-in does not know the argument rotate")
    readings = _check(op, x, r1, r2, rotary_mode)
    takes = rotary_mode != "half" or all(_tiling_takes(x, *reading) for reading in readings)
    check(op, takes, f"error 561002: no tiling for x {tuple(x.shape)} with cos {tuple(r1.shape)}")
    wide = x.contiguous().float()
    cos, sin = r1.to(x.dtype).float(), r2.to(x.dtype).float()
    return (wide * cos + _turn(wide, rotary_mode) * sin).to(x.dtype)


@kernel
def npu_rotary_mul_backward(
    grad: torch.Tensor, x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dcos, dsin); dcos and dsin stay unwritten where neither cos nor sin requires a gradient now."""
    op = "npu_rotary_mul_backward"
    readings = _check(op, x, r1, r2, rotary_mode)
    check(op, grad.shape == x.shape and grad.dtype == x.dtype, f"grad is {grad.dtype} {tuple(grad.shape)}")
    if rotary_mode == "half":
        covered = x.shape[0] < x.shape[2] or x.shape[2] == 1
        takes = any(covered or (layout.name, table) != ("BNSD", "B1S") for layout, table in readings)
        check(op, takes, f"no tiling for x {tuple(x.shape)} with cos {tuple(r1.shape)}")
    cos, sin = r1.to(x.dtype).float(), r2.to(x.dtype).float()
    dy = grad.contiguous().float()
    dx = (dy * cos + _unturn(dy * sin, rotary_mode)).to(x.dtype)
    if not (r1.requires_grad or r2.requires_grad):
        return dx, unwritten(r1.shape, x.dtype), unwritten(r2.shape, x.dtype)
    fits = any(x.shape[layout.batch] * x.shape[layout.heads] <= 1024 for layout, _ in readings)
    check(op, fits, "gradients of cos and sin need batch · heads of at most 1024")
    broadcast = [i for i in range(3) if r1.shape[i] == 1 and x.shape[i] != 1]
    wide = x.contiguous().float()
    dcos, dsin = dy * wide, dy * _turn(wide, rotary_mode)
    if broadcast:
        dcos, dsin = dcos.sum(broadcast, keepdim=True), dsin.sum(broadcast, keepdim=True)
    return dx, dcos.to(x.dtype), dsin.to(x.dtype)
