# ruff: noqa: E501 - a program is a line of its table
"""Near misses of RoPE: each differs from it in one thing, and none may change a result.

`OK` marks those that are a rotation after all (by other tables, or of another value): they may fuse, the
result decides.
"""

from __future__ import annotations

from .near import Near, table
from .parts_rotary_mul import INPUTS

T = "cos = C[:, None]; sin = S[:, None]; "
HALVES = "x1 = x[..., :8]; x2 = x[..., 8:]; "
P = "p = c[:, None]; q = s[:, None]; "
ROT = HALVES + "rot = torch.cat((-x2, x1), -1); "
END = "\nx * cos + rot * sin"
OK = ("rotary_mul",)
MAP = "rotary_mul.map"

NEAR_MISSES: tuple[Near, ...] = table(
    INPUTS,
    {
        "permuted by an index tensor": ("i = torch.cat((torch.arange(8, 16), torch.arange(0, 8))); sin = torch.cat((-s, s), -1)[:, None]\nx * C[:, None] + x[..., i] * sin", "rotary_mul.index"),
        # --- signs and halves
        "cat(-x1, x2)": (T + HALVES + "rot = torch.cat((-x1, x2), -1)" + END,),
        "cat(x2, x1)": (T + HALVES + "rot = torch.cat((x2, x1), -1)" + END, "", OK),
        "cat(x2, -x1)": (T + HALVES + "rot = torch.cat((x2, -x1), -1)" + END, "", OK),
        "cat(-x2, -x1)": (T + HALVES + "rot = torch.cat((-x2, -x1), -1)" + END, "", OK),
        "cat(x1, x2)": (T + HALVES + "rot = torch.cat((x1, x2), -1)" + END,),
        "cat(-x2, x2)": (T + HALVES + "rot = torch.cat((-x2, x2), -1)" + END,),
        "both halves subtract": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p - x1 * q\ntorch.cat((o1, o2), -1)", "", OK),
        "both halves add": (P + HALVES + "o1 = x1 * p + x2 * q; o2 = x2 * p + x1 * q\ntorch.cat((o1, o2), -1)", "", OK),
        "cos and sin swapped": (T + ROT + "y = x * sin + rot * cos\ny", "", OK),
        "sin for both": (T + ROT + "y = x * sin + rot * sin\ny", "", OK),
        "halves joined the wrong way round": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q\ntorch.cat((o2, o1), -1)", "", OK),
        "second half twice": (P + HALVES + "o1 = x1 * p - x2 * q\ntorch.cat((o1, o1), -1)",),
        "unequal halves": (T + "x1 = x[..., :6]; x2 = x[..., 6:]; rot = torch.cat((-x2, x1), -1)" + END,),
        "overlapping halves": (T + "x1 = x[..., :8]; x2 = x[..., 7:15]; rot = torch.cat((-x2, x1), -1)" + END,),
        "quarters": (T + "rot = torch.cat((-x[..., 4:8], x[..., :4], -x[..., 12:], x[..., 8:12]), -1)" + END, MAP),
        "rolled by a quarter": (T + "rot = torch.cat((-x[..., 4:], x[..., :4]), -1)" + END,),
        "mirrored": (T + "t = x.flip(-1); rot = torch.cat((-t[..., :8], t[..., 8:]), -1)" + END, MAP),
        "interleaved by halves": (T + "rot = torch.stack((-x[..., 8:], x[..., :8]), -1).flatten(-2)" + END,),
        "halves by neighbours": (T + "rot = torch.cat((-x[..., 1::2], x[..., ::2]), -1)" + END,),
        "neighbours, wrong order": (T + "rot = torch.stack((x[..., ::2], -x[..., 1::2]), -1).flatten(-2)" + END,),
        "halves in, neighbours out": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q\ntorch.stack((o1, o2), -1).flatten(-2)",),
        "turned twice": (T + ROT + "y = x * cos + rot * sin; r2 = torch.cat((-y[..., 8:], y[..., :8]), -1)\ny * cos + r2 * sin", "", OK),
        "sine on the rotated rotation": (T + ROT + "r2 = torch.cat((-rot[..., 8:], rot[..., :8]), -1)\nrot * cos + r2 * sin", "", OK),
        # --- matrices
        "triples by a matrix": ("t = x[..., :15].unflatten(-1, (5, 3)); m = torch.stack((c, s, C[..., :8]), -1)[:, :, :5, :, None].expand(2, 5, 5, 3, 3)\ntorch.einsum('bnspj,bspij->bnspi', t, m).flatten(-2)",),
        "pairs times themselves": ("t = x.unflatten(-1, (8, 2))\n(t.unsqueeze(-1) @ t.unsqueeze(-2)).sum(-1).flatten(-2)",),
        "matrix from the other side": ("m = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)\ntorch.einsum('bnspi,bspij->bnspj', x.unflatten(-1, (8, 2)), m).flatten(-2)", "", OK),
        "matrix of another position": ("m = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2).roll(1, 1)\ntorch.einsum('bnspj,bspij->bnspi', x.unflatten(-1, (8, 2)), m).flatten(-2)", "", OK),
        "heads for positions by einsum": ("t = x[:, :, :3]; rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\ntorch.einsum('bnsd,bnd->bnsd', t, C[:, :3]) + torch.einsum('bnsd,bsd->bnsd', rot, S[:, :3])", "", OK),
        "einsum over heads too": ("rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\ntorch.einsum('bnsd,bsd->bsd', x, C) + torch.einsum('bnsd,bsd->bsd', rot, S)",),
        "three operands": ("rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\ntorch.einsum('bnsd,bsd,bsd->bnsd', x, C, C) + torch.einsum('bnsd,bsd->bnsd', rot, S)",),
        # --- dimensions
        "heads for features": ("t = x[:, :2]; rot = torch.cat((-t[:, 1:], t[:, :1]), 1)\nt * C[:, None] + rot * S[:, None]",),
        "sequence for features": ("t = x[:, :, :4]; rot = torch.cat((-t[:, :, 2:], t[:, :, :2]), 2)\nt * C[:, None, :4] + rot * S[:, None, :4]",),
        "square, other dim": ("t = x[..., :5]; rot = torch.cat((-t[..., 3:, :], t[..., :3, :]), -2)\nt * C[:, None, :, :5] + rot * S[:, None, :, :5]",),
        "tables along heads": ("t = x[:, :, :3]; cos = C[:, :3].unsqueeze(2); sin = S[:, :3].unsqueeze(2); rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * cos + rot * sin", "", OK),
        "keys transposed": ("t = x.permute(0, 1, 3, 2); rot = torch.cat((-t[:, :, 8:], t[:, :, :8]), 2)\nt * C.transpose(1, 2)[:, None] + rot * S.transpose(1, 2)[:, None]", "", OK),
        "odd width": ("t = x[..., :15]; rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * C[:, None, :, :15] + rot * S[:, None, :, :15]",),
        "passed features too early": ("r = x[..., :8]; rot = torch.cat((-r[..., 4:], r[..., :4]), -1); o = r * c[:, None] + rot * s[:, None]\ntorch.cat((o, x[..., 4:12]), -1)", "", OK),
        "cos of another position": ("cos = C.roll(1, 1)[:, None]; sin = S[:, None]; " + ROT + "z = 0" + END, "", OK),
        "cos mirrored": ("cos = C.flip(-1)[:, None]; sin = S[:, None]; " + ROT + "z = 0" + END, "", OK),
        "cos transposed at equal sizes": ("t = x[:, :, :3, :]; cos = C[0, :3, None]; sin = S[0, :3, None]; rot = torch.cat((-t[..., 8:], t[..., :8]), -1)\nt * cos + rot * sin", "", OK),
        # --- of what
        "another tensor turned": (T + "z = x.flip(0); rot = torch.cat((-z[..., 8:], z[..., :8]), -1)" + END,),
        "shifted": (T + "z = x + 1; rot = torch.cat((-z[..., 8:], z[..., :8]), -1)" + END,),
        "another row": (T + "z = x.roll(1, 2); rot = torch.cat((-z[..., 8:], z[..., :8]), -1)" + END,),
        "another head": (T + "z = x.flip(1); rot = torch.cat((-z[..., 8:], z[..., :8]), -1)" + END,),
        "scaled in one term": (T + ROT + "y = 2 * x * cos + rot * sin\ny", "", OK),
        "squared table": (T + ROT + "y = x * cos * cos + rot * sin\ny", "", OK),
        "three terms": (T + ROT + "y = x * cos + rot * sin + x\ny", "", OK),
        "three products": (T + ROT + "y = x * cos + rot * sin + rot * cos\ny", "", OK),
        "x times x": (T + ROT + "y = x * x + rot * sin\ny",),
        "no cos": (T + ROT + "y = x + rot * sin\ny",),
        "complex, imaginary first": ("z = torch.view_as_complex(x.float().view(2, 3, 5, 8, 2).flip(-1)); t = torch.complex(a.cos().float(), a.sin().float())\ntorch.view_as_real(z * t).flatten(-2).to(x.dtype)", "", OK),
        "complex, conjugated": ("z = torch.view_as_complex(x.float().view(2, 3, 5, 8, 2)); t = torch.complex(a.cos().float(), a.sin().float())\ntorch.view_as_real(z * t.conj()).flatten(-2).to(x.dtype)", "", OK),
        "complex, x conjugated": ("z = torch.view_as_complex(x.float().view(2, 3, 5, 8, 2)); t = torch.complex(a.cos().float(), a.sin().float())\ntorch.view_as_real(z.conj() * t).flatten(-2).to(x.dtype)", "", OK),
        "complex squared": ("z = torch.view_as_complex(x.float().view(2, 3, 5, 8, 2))\ntorch.view_as_real(z * z).flatten(-2).to(x.dtype)",),
        "complex plus": ("z = torch.view_as_complex(x.float().view(2, 3, 5, 8, 2)); t = torch.complex(a.cos().float(), a.sin().float())\ntorch.view_as_real(z * t + t).flatten(-2).to(x.dtype)",),
        "complex, real part only": ("z = torch.view_as_complex(x.float().view(2, 3, 5, 8, 2)); t = torch.complex(a.cos().float(), a.sin().float())\n(z * t).real.to(x.dtype)",),
        "complex of halves": ("z = torch.complex(x[..., :8].float(), x[..., 8:].float()); t = torch.complex(a.cos().float(), a.sin().float()); y = z * t\ntorch.cat((y.real, y.imag), -1).to(x.dtype)", "", OK),
    },
)  # fmt: skip

GUARDED: tuple[Near, ...] = table(
    INPUTS,
    {
        # --- acts only at large values, or on NaN and infinity
        "x clamped": (T + "z = x.clamp(-3e4, 3e4); rot = torch.cat((-z[..., 8:], z[..., :8]), -1)" + END,),
        "rot clamped": (T + ROT + "rot = rot.clamp(-60, 60)" + END,),
        "one product clamped": (T + ROT + "y = (x * cos).clamp(-60, 60) + rot * sin\ny",),
        "rot without NaN": (T + ROT + "rot = torch.nan_to_num(rot)" + END,),
        "rot masked": (T + ROT + "rot = torch.where(rot.abs() < 90, rot, 0)" + END,),
        "float8 round trip": (T + ROT + "rot = rot.to(torch.float8_e5m2).to(x.dtype)" + END,),
        "float8 tables": (T + ROT + "cos = cos.to(torch.float8_e5m2).to(x.dtype)" + END, "", OK),
        "half precision in between": (T + ROT + "y = (x * cos * 2000).half() + (rot * sin * 2000).half()\ny.to(x.dtype)",),
        "dropout": (T + ROT + "rot = F.dropout(rot, 0.5, True)" + END,),
        "integer x": ("k = (x * 8).int(); rot = torch.cat((-k[..., 8:], k[..., :8]), -1)\nk * C[:, None] + rot * S[:, None]",),
        "integer tables": ("cos = (C[:, None] * 8).int(); sin = (S[:, None] * 8).int(); " + ROT + "z = 0" + END,),
        "empty": ("k = x[:, :0]; rot = torch.cat((-k[..., 8:], k[..., :8]), -1)\nk * C[:, None] + rot * S[:, None]", MAP),
        # --- gradients
        "rot detached": (T + "z = x.detach(); rot = torch.cat((-z[..., 8:], z[..., :8]), -1)" + END,),
        "x detached in one term": (T + ROT + "y = x.detach() * cos + rot * sin\ny",),
        "tables detached": (T + ROT + "cos = cos.detach()" + END, "", OK),
        "half without gradient": (T + HALVES + "rot = torch.cat((-x2.detach(), x1), -1)" + END,),
        # --- writes
        "x written in between": (T + ROT + "x = x.clone(); y = x * cos; x.mul_(2); rot = torch.cat((-x[..., 8:], x[..., :8]), -1)\ny + rot * sin", "", (), "training"),
        "input written in between": (T + ROT + "y = x * cos; x.add_(1)\ny + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin", "", (), "training"),
        "x written through an alias": (T + HALVES + "y = x * cos; x1.mul_(2); rot = torch.cat((-x2, x1), -1)\ny + rot * sin", "", (), "training"),
        "first half turned in place": (P + "x = x.clone(); x1, x2 = x[..., :8], x[..., 8:]; x1.mul_(p).sub_(x2 * q); x2.mul_(p).add_(x1 * q)\nx", "", (), "training"),
        "first half assigned in place": (P + "x = x.clone(); x[..., :8] = x[..., :8] * p - x[..., 8:] * q; x[..., 8:] = x[..., 8:] * p + x[..., :8] * q\nx", "", (), "training"),
        "table written in between": (T + ROT + "y = x * cos; sin.mul_(2)\ny + rot * sin", "", OK),
        "table written after": (T + ROT + "y = x * cos.clone() + rot * sin.clone(); C.mul_(2)\ny", "", OK),
        "rot written": (T + ROT + "y = x * cos; rot.add_(1)\ny + rot * sin", "", ()),
        "rot written through its half": (T + ROT + "rot[..., :8] += 1" + END, "", ()),
        "product kept": (T + ROT + "y = x * cos; k = y; y = y + rot * sin\ny, k", "", OK),
        "product kept, then added to": (T + ROT + "y = x * cos; k = y; y += rot * sin\ny, k", "", OK),
        "product seen through a view": (T + ROT + "y = x * cos; k = y.view(2, 3, 80); y += rot * sin\ny, k", "", OK),
        "x written after": (T + ROT + "y = x * cos + rot * sin; x.zero_()\ny", "", OK, "training"),
        "buffer half written": (P + HALVES + "o1 = x1 * p - x2 * q; y = torch.zeros_like(x); y[..., :8] = o1\ny",),
        "buffer of ones half written": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q; y = torch.ones_like(x); y[..., :8] = o1; y[..., 8:15] = o2[..., :7]\ny",),
        "buffer written over": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q; y = torch.empty_like(x); y[..., :8] = o1; y[..., 8:] = o2; y[..., 4:12] = 0\ny", "", OK),
        "buffer written in the other order": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q; y = torch.empty_like(x); y[..., 8:] = o1; y[..., :8] = o2\ny", "", OK),
        "buffer read in between": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q; y = torch.zeros_like(x); y[..., :8] = o1; k = y.clone(); y[..., 8:] = o2\ny, k", "", OK),
        "buffer seen by an alias": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q; y = torch.zeros_like(x); k = y.view(2, 3, 80); y[..., :8] = o1; y[..., 8:] = o2; k.add_(1)\ny", "", OK, "training"),
        "one head written": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q; y = torch.zeros_like(x); y[:, :1, :, :8] = o1[:, :1]; y[:, :1, :, 8:] = o2[:, :1]\ny",),
        "x itself is the buffer": (P + HALVES + "o1 = x1 * p - x2 * q; o2 = x2 * p + x1 * q; y = x.clone(); y[..., :8] = o1; y[..., 8:] = o2\ny", "", OK),
        "vmap": ("f = lambda t, m, n: t * m + torch.cat((-t[..., 8:], t[..., :8]), -1) * n\ntorch.vmap(f)(x, C[:, None], S[:, None])",),
    },
)  # fmt: skip
