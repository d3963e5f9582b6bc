# ruff: noqa: E501 - a program is a line of its table
"""Spellings of RMSNorm: tables of parts, and the programs they combine to.

x, z [3, 5, 24], w [24]; e [2, 6, 6] and k [6] for mistakes between dimensions of one size.
"""

from __future__ import annotations

import torch

from .helpers import Inputs, random
from .programs import Program, combinations, program

WIDTH = 24
INPUTS = "x w z e k"

WIDEN = (
    "x.float()", "x.to(torch.float32)", "x.to(dtype=torch.float32)", "x.type(torch.float32)",
    "torch.Tensor.float(x)", "x.to(x.device, torch.float32)", "x.float().contiguous()",
)  # fmt: skip
SQUARE = (
    "h.pow(2)", "h ** 2", "h * h", "h.square()", "torch.square(h)", "torch.pow(h, 2)", "torch.mul(h, h)",
    "h.pow(2.0)", "h.mul(h)", "h.abs().pow(2)", "torch.pow(input=h, exponent=2)", "(-h) ** 2",
)  # fmt: skip
MEAN = (
    "s.mean(-1, keepdim=True)", "s.mean(dim=-1, keepdim=True)", "torch.mean(s, -1, True)", "s.mean((-1,), True)",
    "s.mean(2, keepdim=True)", "s.sum(-1, keepdim=True) / 24", "s.sum(-1, keepdim=True) * (1.0 / 24)",
    "s.mean(-1).unsqueeze(-1)", "s.mean(-1)[..., None]", "torch.sum(s, dim=-1, keepdim=True).div(24)",
    "s.sum(dim=[-1], keepdim=True) / s.shape[-1]", "s.mean(-1).view(3, 5, 1)", "s.mean(-1, True).to(torch.float32)",
)  # fmt: skip
ROOT = (
    "r = torch.rsqrt(v + 1e-5)", "r = (v + 1e-5).rsqrt()", "r = torch.rsqrt(1e-5 + v)", "r = (v + 1e-5) ** -0.5",
    "r = torch.pow(v + 1e-5, -0.5)", "r = 1 / torch.sqrt(v + 1e-5)", "r = 1.0 / (v + 1e-5).sqrt()",
    "r = torch.reciprocal(torch.sqrt(v + 1e-5))", "r = (v + 1e-5).sqrt().reciprocal()",
    "r = torch.add(v, 1e-5).pow(0.5).reciprocal()", "r = torch.rsqrt(v.add(1e-5))", "r = (v + 1e-5).sqrt() ** -1",
    "v = v + 1e-5; r = v.rsqrt_()", "v += 1e-5; r = torch.rsqrt(v)", "r = torch.rsqrt(v.add_(1e-5))",
    "r = torch.rsqrt((24 * v + 24e-5) / 24)", "r = torch.rsqrt(v - -1e-5)",
)  # fmt: skip
PRODUCT = (
    "y = h * r", "y = r * h", "y = torch.mul(h, r)", "y = h.mul(r)", "y = h * r.expand_as(h)",
    "y = h.clone(); y *= r", "y = h.clone().mul_(r)", "y = torch.multiply(r, h)", "y = h.mul(r.expand(3, 5, 24))",
)  # fmt: skip
QUOTIENT = (
    "q = (v + 1e-5).sqrt(); y = h / q", "q = torch.sqrt(v + 1e-5); y = torch.div(h, q)",
    "q = (v + 1e-5) ** 0.5; y = h.div(q)", "q = torch.sqrt(1e-5 + v); y = torch.true_divide(h, q)",
    "q = (v + 1e-5).pow(0.5); y = h / q.expand_as(h)", "q = (v + 1e-5).sqrt(); y = h.clone(); y /= q",
)  # fmt: skip
GAMMA = (
    "w * y.to(x.dtype)", "y.to(x.dtype) * w", "y.type_as(x) * w", "(y * w.float()).to(x.dtype)",
    "(w.float() * y).type_as(x)", "(y * w).to(x.dtype)", "(y * (1.0 + w.float())).type_as(x)",
    "(y * (w.float() + 1)).to(x.dtype)", "y.to(x.dtype)", "y.type_as(x)", "torch.mul(w, y.to(dtype=x.dtype))",
    "y.to(x.dtype).mul(w)", "y.to(x.dtype) * w.view(1, 1, 24)", "y.to(x.dtype) * w.expand(3, 5, 24)",
    "(y * w.float()[None, None]).to(x.dtype)", "y.to(x.dtype).mul_(w)",
)  # fmt: skip

NAMED: tuple[Program, ...] = tuple(
    program(name, INPUTS, text)
    for name, text in {
        "F.rms_norm": "F.rms_norm(x, (24,), w, 1e-5)",
        "torch.rms_norm": "torch.rms_norm(x, [24], w, eps=1e-5)",
        "F.rms_norm without weight": "F.rms_norm(x, (24,), eps=1e-5)",
        "F.rms_norm without epsilon": "F.rms_norm(x, (24,), w)",
        "F.rms_norm in float32": "F.rms_norm(x.float(), (24,), w.float(), 1e-5).to(x.dtype)",
        "weight joins the root": "h = x.float(); g = w.float() * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5)\n(h * g).to(x.dtype)",
        "weight joins x": "h = x.float(); g = h * w.float()\n(g * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5)).to(x.dtype)",
        "no name in between": "w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)",
        "widened twice": "v = x.to(torch.float32).pow(2).mean(-1, keepdim=True); h = x.float()\n(h * torch.rsqrt(v + 1e-5)).to(x.dtype) * w",
        "squared in the input's dtype": "v = x.pow(2).mean(-1, keepdim=True); y = x * torch.rsqrt(v + 1e-5)\ny * w",
        "vector_norm": "h = x.float(); n = torch.linalg.vector_norm(h, dim=-1, keepdim=True)\n(h * torch.rsqrt(n.pow(2) / 24 + 1e-5)).to(x.dtype) * w",
        "norm method": "h = x.float(); n = h.norm(2, dim=-1, keepdim=True)\n(h / torch.sqrt(n ** 2 / 24 + 1e-5)).to(x.dtype) * w",
        "norm of width": "h = x.float(); n = h.norm(dim=-1, keepdim=True) * 24 ** -0.5\n(h / torch.sqrt(n * n + 1e-5)).to(x.dtype) * w",
        "epsilon times width": "h = x.float(); q = torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 24e-5)\n(h * q * 24 ** 0.5).to(x.dtype) * w",
        "no epsilon": "h = x.float(); q = torch.rsqrt(h.pow(2).mean(-1, keepdim=True))\n(h * q).to(x.dtype) * w",
        "two dims": "h = x.float().view(3, 5, 4, 6); r = torch.rsqrt(h.pow(2).mean((-2, -1), keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w.view(4, 6)",
        "two dims by F": "F.rms_norm(x.view(3, 5, 4, 6), (4, 6), w.view(4, 6), 1e-5)",
        "einsum over features": "h = x.float(); v = torch.einsum('bsd,bsd->bs', h, h)[..., None] / 24\n(h * torch.rsqrt(v + 1e-5)).to(x.dtype) * w",
        "einsum with an ellipsis": "h = x.float(); v = torch.einsum('...d,...d->...', h, h).unsqueeze(-1) / 24\n(h * torch.rsqrt(v + 1e-5)).to(x.dtype) * w",
        "vecdot": "h = x.float(); v = torch.linalg.vecdot(h, h).unsqueeze(-1) / 24\n(h * torch.rsqrt(v + 1e-5)).to(x.dtype) * w",
        "per head": "h = x.view(3, 5, 4, 6).float(); r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w[:6]",
        "per head, moved": "h = x.view(3, 5, 4, 6).transpose(1, 2); f = h.float(); r = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)\n(f * r).to(x.dtype) * w[:6]",
        "grouped": "h = x.view(3, 5, 4, 6).float(); y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\n(y.view(3, 5, 24) * w).to(x.dtype)",
        "rank 2": "t = x.view(15, 24); h = t.float(); y = h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-5)\nw * y.to(x.dtype)",
        "rank 1": "t = x[0, 0]; h = t.float(); y = h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + 1e-5)\nw * y.to(x.dtype)",
        "of a sum": "t = x + 2 * x; h = t.float(); y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\nw * y.to(x.dtype)",
        "of a scaled value": "t = x * 4.9; h = t.float(); y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\nw * y.to(x.dtype)",
        "of a gated value": "t = x * torch.tanh(x); h = t.float(); y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\nw * y.to(x.dtype)",
        "statistic used again": "h = x.float(); v = h.pow(2).mean(-1, keepdim=True); y = h * torch.rsqrt(v + 1e-5)\nw * y.to(x.dtype), v",
        "root used again": "h = x.float(); r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\nw * (h * r).to(x.dtype), r * 2",
        "weight used twice": "h = x.float(); y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\nw * y.to(x.dtype) + w",
        "tail reads it twice": "h = x.float(); y = (h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5)).to(x.dtype) * w\ny + y.tanh()",
        "written over afterwards": "h = x.float(); y = (h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5)).to(x.dtype) * w; y += 1\ny",
        "gamma in float32": "g = w.float(); h = x.float(); y = h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5)\n(g * y).to(x.dtype)",
        "gamma negated": "h = x.float(); y = h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5)\n(y * (1 - w.float())).to(x.dtype)",
        "result stays wide": "h = x.float()\nh * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5) * w.float()",
    }.items()
)  # fmt: skip


def combined(count: int) -> list[Program]:
    """True respellings from the parts: with a root, and with a division."""
    made = []
    for parts in combinations((WIDEN, SQUARE, MEAN, ROOT, PRODUCT, GAMMA), count):
        made.append(composed(*parts))
    for widen, square, mean, quotient, gamma in combinations((WIDEN, SQUARE, MEAN, QUOTIENT, GAMMA), count // 4):
        made.append(composed(widen, square, mean, "", quotient, gamma))
    return made


def composed(widen: str, square: str, mean: str, root: str, product: str, gamma: str) -> Program:
    text = f"h = {widen}; s = {square}; v = {mean}\n{root}\n{product}\n{gamma}"
    label = " | ".join(p for p in (widen, square, mean, root, product, gamma) if p)
    return program(label, INPUTS, text)


def inputs(dtype: torch.dtype, seed: int = 0, scale: float = 1.0, rows: int = 5) -> Inputs:
    """x with rows of unlike magnitude, w about one."""
    x = random((3, rows, WIDTH), torch.float64, seed, scale) * random((3, rows, 1), torch.float64, seed + 1).exp()
    return {
        "x": x.to(dtype),
        "w": random((WIDTH,), dtype, seed + 2, 0.3, 1.0),
        "z": random((3, rows, WIDTH), dtype, seed + 3, scale),
        "e": random((2, 6, 6), dtype, seed + 4, scale),
        "k": random((6,), dtype, seed + 5, 0.3, 1.0),
    }
