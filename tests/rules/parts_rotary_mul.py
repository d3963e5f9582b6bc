# ruff: noqa: E501 - a program is a line of its table
"""Spellings of RoPE: tables of parts, and the programs they combine to.

x [2, 3, 5, 16] (batch, heads, sequence, features); c, s [2, 5, 8] tables of half width; C, S [2, 5, 16]
tables of full width whose halves differ; a [5, 8] angles.
"""

from __future__ import annotations

import torch

from .helpers import Inputs, random
from .programs import Program, combinations, program

INPUTS = "x c s C S a"
TABLES_ONLY = ("c", "s", "C", "S", "a")

FULL = (
    "cos = torch.cat((c, c), -1).unsqueeze(1); sin = torch.cat((s, s), -1).unsqueeze(1)",
    "cos = C.unsqueeze(1); sin = S.unsqueeze(1)",
    "cos = C[:, None]; sin = S[:, None, :, :]",
    "cos = c.repeat(1, 1, 2)[:, None]; sin = s.repeat(1, 1, 2)[:, None]",
    "cos = torch.cat([c] * 2, dim=-1).view(2, 1, 5, 16); sin = torch.cat([s] * 2, dim=-1).view(2, 1, 5, 16)",
    "cos = C[0]; sin = S[0]",
    "cos = C[1][None, None]; sin = S[1].unsqueeze(0).unsqueeze(0)",
    "cos = torch.tile(c, (2,)).unsqueeze(1); sin = torch.tile(s, (2,)).unsqueeze(1)",
    "e = torch.cat((a, a), dim=-1); cos = e.cos(); sin = e.sin()",
    "cos = torch.cat((a.cos(), a.cos()), -1)[None, None]; sin = torch.cat((a.sin(), a.sin()), -1)[None, None]",
    "cos = C.unsqueeze(1).expand(2, 3, 5, 16); sin = S.unsqueeze(1).expand(2, 3, 5, 16)",
    "cos = torch.stack((c, c), -2).flatten(-2)[:, None]; sin = torch.stack((s, s), -2).flatten(-2)[:, None]",
    "cos, sin = torch.cat((C, S), -1).unsqueeze(1).chunk(2, -1)",
    "cos, sin = torch.stack((C, S), 0).unsqueeze(2)",
    "cos = C.unsqueeze(1); sin = torch.cat((s, s), -1).unsqueeze(1)",
)  # fmt: skip
ROTATED = (
    "x1, x2 = x.chunk(2, -1); rot = torch.cat((-x2, x1), -1)",
    "x1 = x[..., :8]; x2 = x[..., 8:]; rot = torch.cat((-x2, x1), dim=-1)",
    "x1 = x[..., : x.shape[-1] // 2]; x2 = x[..., x.shape[-1] // 2 :]; rot = torch.cat([-x2, x1], -1)",
    "x1, x2 = torch.split(x, 8, dim=-1); rot = torch.cat((x2.neg(), x1), -1)",
    "x1, x2 = x.view(2, 3, 5, 2, 8).unbind(-2); rot = torch.cat((-x2, x1), -1)",
    "x1, x2 = torch.tensor_split(x, 2, -1); rot = torch.concat((torch.neg(x2), x1), dim=3)",
    "t = x.reshape(2, 3, 5, 2, 8); rot = torch.stack((-t[..., 1, :], t[..., 0, :]), -2).reshape(x.shape)",
    "rot = torch.cat((torch.narrow(x, -1, 8, 8) * -1, torch.narrow(x, -1, 0, 8)), -1)",
    "rot = torch.cat((x[..., :8], -x[..., 8:]), -1).roll(8, -1)",
    "t = torch.roll(x, 8, -1); rot = torch.cat((-t[..., :8], t[..., 8:]), -1)",
    "t = x.unflatten(-1, (2, 8)).flip(-2); rot = torch.cat((-t[..., 0, :], t[..., 1, :]), -1)",
    "rot = torch.empty_like(x); rot[..., :8] = -x[..., 8:]; rot[..., 8:] = x[..., :8]",
    "x1, x2 = x.split((8, 8), -1); rot = torch.cat((-1 * x2, x1), -1)",
    "rot = torch.stack((-x[..., 8:], x[..., :8]), dim=-2).flatten(-2)",
    "t = x.transpose(-1, -2); rot = torch.cat((-t[:, :, 8:], t[:, :, :8]), 2).transpose(-1, -2)",
    "rot = torch.hstack((-x[..., 8:].movedim(-1, 1), x[..., :8].movedim(-1, 1))).movedim(1, -1)",
)  # fmt: skip
COMBINED = (
    "x * cos + rot * sin", "rot * sin + x * cos", "(cos * x) + (sin * rot)", "torch.add(x * cos, rot * sin)",
    "(x * cos).add(rot * sin)", "torch.addcmul(x * cos, rot, sin)", "y = x * cos; y += rot * sin\ny",
    "(x * cos).add_(rot * sin)", "(x * cos).addcmul_(rot, sin)", "torch.mul(x, cos) + torch.mul(rot, sin)",
    "((x * cos) + (rot * sin)).to(x.dtype)", "(x.float() * cos.float() + rot.float() * sin.float()).to(x.dtype)",
    "(x.float() * cos + rot.float() * sin).type_as(x)", "y = x.clone(); y = y.mul_(cos).add_(rot * sin)\ny",
    "x * cos - rot * sin", "x * cos - (-rot) * sin", "torch.sub(x * cos, rot * sin)", "torch.stack((x * cos, rot * sin)).sum(0)",
    "(x * cos).contiguous() + (rot * sin).contiguous()", "torch.add(x * cos, rot * sin, alpha=1)",
    "x * cos * 1 + rot * sin * 1", "1.0 * (x * cos) + (rot * sin) / 1.0",
)  # fmt: skip

PAIRS = (
    "x1, x2 = x.chunk(2, -1)", "x1 = x[..., :8]; x2 = x[..., 8:]", "x1, x2 = x.view(2, 3, 5, 2, 8).unbind(3)",
    "x1, x2 = x.float().chunk(2, -1)", "x1, x2 = torch.split(x, [8, 8], dim=-1)",
)  # fmt: skip
HALF_TABLES = (
    "p = c.unsqueeze(1); q = s.unsqueeze(1)", "p = c[:, None]; q = s[:, None]", "p = a.cos(); q = a.sin()",
    "p = c[0]; q = s[0]", "p = C[..., :8].unsqueeze(1); q = S[..., :8].unsqueeze(1)",
    "p, q = torch.stack((c, s)).unsqueeze(2)", "p = c.float().unsqueeze(1); q = s.float().unsqueeze(1)",
)  # fmt: skip
TURNED = (
    "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q", "o1 = p * x1 - q * x2; o2 = q * x1 + p * x2",
    "o1 = x1 * p + -x2 * q; o2 = x1 * q + x2 * p", "o1 = torch.addcmul(x1 * p, x2, q, value=-1); o2 = torch.addcmul(x2 * p, x1, q)",
    "o1 = x1 * p + x2 * q; o2 = x2 * p - x1 * q", "o1 = torch.sub(x1 * p, x2 * q); o2 = torch.add(x2 * p, x1 * q)",
    "o1 = x1 * p + x2 * q; o2 = x1 * (-q) + x2 * p", "o1 = x1 * p + x2 * -q; o2 = x1 * q + x2 * p",
)  # fmt: skip
JOINED = (
    "torch.cat((o1, o2), -1).to(x.dtype)", "torch.stack((o1, o2), -2).flatten(-2).to(x.dtype)",
    "torch.stack((o1, o2), dim=3).reshape(2, 3, 5, 16).to(x.dtype)",
    "y = torch.empty_like(x); y[..., :8] = o1; y[..., 8:] = o2\ny",
    "torch.cat((o1.to(x.dtype), o2.to(x.dtype)), -1)", "y = torch.zeros_like(x); y[..., 8:] = o2; y[..., :8] = o1\ny",
)  # fmt: skip
NEIGHBOURS = (
    "x1 = x[..., ::2]; x2 = x[..., 1::2]", "x1 = x[..., 0::2].float(); x2 = x[..., 1::2].float()",
    "x1, x2 = x.view(2, 3, 5, 8, 2).unbind(-1)", "t = x.unflatten(-1, (8, 2)); x1 = t[..., 0]; x2 = t[..., 1]",
    "t = x.reshape(2, 3, 5, -1, 2); x1, x2 = t.select(-1, 0), t.select(-1, 1)",
)  # fmt: skip
WOVEN = (
    "torch.stack((o1, o2), -1).flatten(-2).to(x.dtype)", "torch.stack([o1, o2], dim=4).reshape(x.shape).to(x.dtype)",
    "torch.stack((o1, o2), -1).view(2, 3, 5, 16).type_as(x)", "y = torch.empty_like(x); y[..., ::2] = o1; y[..., 1::2] = o2\ny",
    "torch.cat((o1.unsqueeze(-1), o2.unsqueeze(-1)), -1).flatten(3).to(x.dtype)",
    "torch.cat((o1, o2), -1).to(x.dtype)",
)  # fmt: skip

NAMED: tuple[Program, ...] = tuple(
    program(name, INPUTS, text)
    for name, text in {
        "two by two matrix": "p = c.unsqueeze(1); q = s.unsqueeze(1); m = torch.stack((torch.stack((p, -q), -1), torch.stack((q, p), -1)), -2)\n(m * x.view(2, 3, 5, 8, 1, 2)).sum(-1).flatten(-2)",
        "einsum for products": "rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\ntorch.einsum('bnsd,bsd->bnsd', x, C) + torch.einsum('bnsd,bsd->bnsd', rot, S)",
        "einsum for products, broadcast": "rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\ntorch.einsum('...d,...d->...d', x, C[:, None]) + torch.einsum('...d,...d->...d', rot, S[:, None])",
        "einsum for products, BSND": "t = x.transpose(1, 2); rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\ntorch.einsum('bsnd,bsd->bsnd', t, C) + torch.einsum('bsd,bsnd->bsnd', S, rot)",
        "two by two matrix, x unsqueezed": "m = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)\n(m[:, None] * x.unflatten(-1, (8, 2)).unsqueeze(-2)).sum(-1).flatten(-2)",
        "two by two matrix by einsum": "m = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)\ntorch.einsum('bnspj,bspij->bnspi', x.unflatten(-1, (8, 2)), m).flatten(-2)",
        "two by two matrix by matmul": "m = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)\n(m[:, None] @ x.unflatten(-1, (8, 2)).unsqueeze(-1)).squeeze(-1).flatten(-2)",
        "two by two matrix, rows by matmul": "m = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)\n(x.unflatten(-1, (8, 2)).unsqueeze(-2) @ m[:, None].mT).squeeze(-2).flatten(-2)",
        "halves by einsum": "m = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)\ntorch.einsum('bnsjp,bspij->bnsip', x.unflatten(-1, (2, 8)), m).flatten(-2)",
        "complex": "z = torch.view_as_complex(x.float().view(2, 3, 5, 8, 2)); t = torch.complex(a.cos().float(), a.sin().float())\ntorch.view_as_real(z * t).flatten(-2).to(x.dtype)",
        "complex by polar": "z = torch.view_as_complex(x.float().reshape(2, 3, 5, 8, 2)); t = torch.polar(torch.ones_like(a).float(), a.float())\ntorch.view_as_real(z * t[None, None]).flatten(3).type_as(x)",
        "interleaved by rot": "x1 = x[..., ::2]; x2 = x[..., 1::2]; rot = torch.stack((-x2, x1), -1).flatten(-2); cos = c.repeat_interleave(2, -1)[:, None]; sin = s.repeat_interleave(2, -1)[:, None]\nx * cos + rot * sin",
        "interleaved, full tables": "x1, x2 = x.view(2, 3, 5, 8, 2).unbind(-1); rot = torch.stack((-x2, x1), dim=-1).view(2, 3, 5, 16)\nx * C[:, None] + rot * S[:, None]",
        "de-interleaved, then half": "t = x.view(2, 3, 5, 8, 2).transpose(4, 3).reshape(2, 3, 5, 16); x1, x2 = t.chunk(2, -1); rot = torch.cat((-x2, x1), -1)\nt * C[:, None] + rot * S[:, None]",
        "de-interleaved by cat": "t = torch.cat((x[..., ::2], x[..., 1::2]), -1); rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C[:, None] + rot * S[:, None]",
        "partial, first": "r = x[..., :8]; p = x[..., 8:]; rot = torch.cat((-r[..., 4:], r[..., :4]), -1); o = r * c[:, None] + rot * s[:, None]\ntorch.cat((o, p), -1)",
        "partial, last": "p, r = x.split((8, 8), -1); rot = torch.cat((-r[..., 4:], r[..., :4]), -1); o = r * c[:, None] + rot * s[:, None]\ntorch.cat((p, o), -1)",
        "BSND": "t = x.transpose(1, 2); rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C.unsqueeze(2) + rot * S.unsqueeze(2)",
        "SBND": "t = x.permute(2, 0, 1, 3).contiguous(); rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C[0][:, None, None] + rot * S[0][:, None, None]",
        "TND": "t = x.transpose(1, 2).flatten(0, 1); rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C.flatten(0, 1)[:, None] + rot * S.flatten(0, 1)[:, None]",
        "no heads": "t = x[:, 0]; rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C + rot * S",
        "rank 2": "t = x[0, 0]; rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C[0] + rot * S[0]",
        "projected": "t = (x.transpose(1, 2).reshape(2, 5, 48) @ x.new_ones(48, 48)).view(2, 5, 3, 16).transpose(1, 2); rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C[:, None] + rot * S[:, None]",
        "x kept for later": "rot = torch.cat((-x[..., 8:], x[..., :8]), -1); y = x * C[:, None] + rot * S[:, None]\ny, x + 1",
        "scaled before": "t = x * 0.25; rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C[:, None] + rot * S[:, None]",
        "tables scaled": "cos = C[:, None] * 1.5; sin = S[:, None] * 1.5; rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\nx * cos + rot * sin",
        "tables cast late": "cos = torch.cat((a, a), -1).cos().to(x.dtype); sin = torch.cat((a, a), -1).sin().to(x.dtype); rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\nx * cos + rot * sin",
        "gathered tables": "i = torch.arange(5, device=x.device); cos = C[0][i]; sin = S[0][i]; rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\nx * cos + rot * sin",
        "written over afterwards": "rot = torch.cat((-x[..., 8:], x[..., :8]), -1); y = x * C[:, None] + rot * S[:, None]; y *= 2\ny",
        "table written before": "S.mul_(0.5); rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\nx * C[:, None] + rot * S[:, None]",
        "view of a table written before": "p = c.sign()[:, None]; p.mul_(2); q = s[:, None]; x1 = x[..., :8]; x2 = x[..., 8:]\ntorch.cat((x1 * p - x2 * q, x2 * p + x1 * q), -1)",
        "signed tables": "sin = torch.cat((-s, s), -1)[:, None]; cos = torch.cat((c, c), -1)[:, None]\nx * cos + torch.roll(x, 8, -1) * sin",
        "swapped halves, signed tables": "sin = torch.cat((-s, s), -1)[:, None]; cos = torch.cat((c, c), -1)[:, None]; t = torch.cat((x[..., 8:], x[..., :8]), -1)\nx * cos + t * sin",
    }.items()
)  # fmt: skip


def combined(count: int) -> list[Program]:
    made = [program(" | ".join(p), INPUTS, "\n".join(p)) for p in combinations((FULL, ROTATED, COMBINED), count)]
    for pairs, tables, turned, joined in combinations((PAIRS, HALF_TABLES, TURNED, JOINED), count // 3):
        made.append(_halves(pairs, tables, turned, joined))
    for pairs, tables, turned, joined in combinations((NEIGHBOURS, HALF_TABLES, TURNED, WOVEN), count // 3):
        made.append(_halves(pairs, tables, turned, joined))
    return made


def _halves(pairs: str, tables: str, turned: str, joined: str) -> Program:
    return program(f"{pairs} | {tables} | {turned} | {joined}", INPUTS, f"{pairs}\n{tables}\n{turned}\n{joined}")


def inputs(dtype: torch.dtype, seed: int = 0, scale: float = 1.0, rows: int = 5) -> Inputs:
    return {
        "x": random((2, 3, rows, 16), dtype, seed, scale),
        "c": random((2, rows, 8), dtype, seed + 1),
        "s": random((2, rows, 8), dtype, seed + 2),
        "C": random((2, rows, 16), dtype, seed + 3),
        "S": random((2, rows, 16), dtype, seed + 4),
        "a": random((rows, 8), dtype, seed + 5, 3.0),
    }
