# ruff: noqa: E501 - a program is a line of its table
"""Near misses of RMSNorm: each differs from it in one thing, and none may change a result.

`Near.code` is the reason that the report must give; `fused` are ops that may rightly be fused all the same
(a norm inside a longer expression, a coefficient that the rule takes into gamma).
"""

from __future__ import annotations

from .near import Near, table
from .parts_rms_norm import INPUTS

STAT = "h = x.float(); v = h.pow(2).mean(-1, keepdim=True); "
R = "r = torch.rsqrt(v + 1e-5); "
DIMS, PRODUCT = "rms_norm.dims", "rms_norm.product"
OK = ("rms_norm",)

NEAR_MISSES: tuple[Near, ...] = table(
    INPUTS,
    {
        # --- which elements the statistic is taken over
        "mean over another dim": ("h = e.float(); r = torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-5)\n(h * r).to(e.dtype) * k", DIMS),
        "mean over dim -2": ("h = x.float(); r = torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w", DIMS),
        "einsum over the rows": ("h = e.float(); r = torch.rsqrt(torch.einsum('bsd,bsd->bd', h, h)[:, None] / 6 + 1e-5)\n(h * r).to(e.dtype) * k", DIMS),
        "einsum over the first": ("h = e.float(); r = torch.rsqrt(torch.einsum('b...,b...->...', h, h) / 6 + 1e-5)\n(h * r).to(e.dtype) * k", DIMS),
        "einsum with the result turned": ("h = e.float(); r = torch.rsqrt(torch.einsum('bsd,bsd->sb', h, h)[..., None] / 6 + 1e-5).transpose(0, 1)\n(h * r).to(e.dtype) * k",),
        "einsum of two": ("h = e.float(); r = torch.rsqrt(torch.einsum('bsd,bsd->bs', h, h.flip(-1))[..., None].abs() / 6 + 1e-5)\n(h * r).to(e.dtype) * k", "", OK),
        "einsum with a trace": ("h = e.float(); r = torch.rsqrt(torch.einsum('bsd,btd->bs', h, h)[..., None].abs() / 6 + 1e-5)\n(h * r).to(e.dtype) * k", "", OK),
        "mean over all": ("h = x.float(); r = torch.rsqrt(h.pow(2).mean() + 1e-5)\n(h * r).to(x.dtype) * w", "", OK),
        "mean over first and last": ("h = e.float(); r = torch.rsqrt(h.pow(2).mean((0, 2), keepdim=True) + 1e-5)\n(h * r).to(e.dtype)", DIMS),
        "lost dimension meets the columns": ("h = e[0].float(); r = torch.rsqrt(h.pow(2).mean(-1) + 1e-5)\n(h * r).to(e.dtype)",),
        "unsqueezed at the wrong place": ("h = e.float(); r = torch.rsqrt(h.pow(2).mean(-1) + 1e-5).unsqueeze(1)\n(h * r).to(e.dtype)",),
        "statistic viewed as columns": ("h = e.float(); v = h.pow(2).mean(-1, keepdim=True).view(2, 1, 6); r = torch.rsqrt(v + 1e-5)\n(h * r).to(e.dtype) * k",),
        "statistic transposed": ("h = e.float(); v = h.pow(2).mean(-1, keepdim=True).transpose(1, 2); r = torch.rsqrt(v + 1e-5)\n(h * r).to(e.dtype) * k",),
        "statistic reshaped between batch and rows": ("h = e.float(); v = h.pow(2).mean(-1).reshape(6, 2).reshape(2, 6, 1).flip(1); r = torch.rsqrt(v + 1e-5)\n(h * r).to(e.dtype)",),
        "statistic of the first row for all": ("h = x.float(); v = h.pow(2).mean(-1, keepdim=True)[:, :1]; r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "half of the features": ("h = x.float(); r = torch.rsqrt(h[..., :12].pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "every other feature": ("h = x.float(); r = torch.rsqrt(h[..., ::2].pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "statistic per group, product per row": ("h = x.float(); v = h.view(3, 5, 2, 12).pow(2).mean(-1, keepdim=True)[..., :1, 0]; r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "amax for mean": ("h = x.float(); r = torch.rsqrt(h.pow(2).amax(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "median for mean": ("h = x.float(); r = torch.rsqrt(h.pow(2).median(-1, keepdim=True)[0] + 1e-5)\n(h * r).to(x.dtype) * w",),
        # --- of what
        "mean of abs": ("h = x.float(); r = torch.rsqrt(h.abs().mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "cubes": ("h = x.float(); r = torch.rsqrt(h.abs().pow(3).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "fourth powers": ("h = x.float(); r = torch.rsqrt(h.pow(4).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "another tensor": ("h = x.float(); r = torch.rsqrt(z.float().pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w", PRODUCT),
        "product of two tensors": ("h = x.float(); r = torch.rsqrt((h * z.float()).pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "covariance": ("h = x.float(); r = torch.rsqrt((h * z.float()).mean(-1, keepdim=True).abs() + 1e-5)\n(h * r).to(x.dtype) * w",),
        "shifted": ("h = x.float(); r = torch.rsqrt((h + 1).pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w", PRODUCT),
        "centred statistic": ("h = x.float(); r = torch.rsqrt((h - h.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "variance": ("h = x.float(); r = torch.rsqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "layer norm": ("F.layer_norm(x, (24,), w)",),
        "rows shifted": ("h = x.float(); r = torch.rsqrt(h.roll(1, 1).pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "scaled twice": (STAT + "g = h * 3; r = torch.rsqrt(v + 1e-5)\n(g * r * h).to(x.dtype)", "", OK),
        # --- epsilon and the root
        "epsilon outside the root": (STAT + "y = h / (v.sqrt() + 1e-5)\ny.to(x.dtype) * w", PRODUCT),
        "epsilon added to the reciprocal root": (STAT + "y = h * (v.rsqrt() + 1e-5)\ny.to(x.dtype) * w", PRODUCT),
        "epsilon by clamp": (STAT + "y = h * torch.rsqrt(v.clamp_min(1e-5))\ny.to(x.dtype) * w",),
        "epsilon by clamp of the root": (STAT + "y = h / v.sqrt().clamp(min=1e-5)\ny.to(x.dtype) * w", PRODUCT),
        "epsilon by maximum": (STAT + "y = h * torch.rsqrt(torch.maximum(v, torch.full_like(v, 1e-5)))\ny.to(x.dtype) * w",),
        "normalize": ("F.normalize(x.float(), dim=-1).to(x.dtype) * w", PRODUCT),
        "normalize, scaled": ("(F.normalize(x.float(), dim=-1) * 24 ** 0.5).to(x.dtype) * w", PRODUCT),
        "epsilon is data": (STAT + "r = torch.rsqrt(v + z.float().abs().mean())\n(h * r).to(x.dtype) * w",),
        "epsilon per row": (STAT + "r = torch.rsqrt(v + z.float().abs().mean(-1, keepdim=True))\n(h * r).to(x.dtype) * w",),
        "epsilon per feature": (STAT + "r = torch.rsqrt(v + w.float().abs())\n(h * r).to(x.dtype)",),
        "power -1": (STAT + "(h * (v + 1e-5) ** -1).to(x.dtype) * w",),
        "power -0.25": (STAT + "(h * (v + 1e-5) ** -0.25).to(x.dtype) * w",),
        "root upside down": (STAT + "(h * torch.sqrt(v + 1e-5)).to(x.dtype) * w",),
        "divided by the reciprocal root": (STAT + "(h / torch.rsqrt(v + 1e-5)).to(x.dtype) * w",),
        "root of a root": (STAT + "(h * torch.rsqrt(torch.sqrt(v + 1e-5))).to(x.dtype) * w",),
        "minus the statistic": (STAT + "(h * torch.rsqrt(30 - v)).to(x.dtype) * w",),
        "negative epsilon": (STAT + "(h * torch.rsqrt(v - 1e-9)).to(x.dtype) * w", "rms_norm.epsilon"),
        "floor division": (STAT + "torch.div(h, torch.sqrt(v + 1e-5), rounding_mode='floor').to(x.dtype) * w",),
        # --- the product
        "root used twice": (STAT + R + "y = h * r * r\ny.to(x.dtype) * w", "", OK),
        "x used twice": (STAT + R + "y = h * r * h\ny.to(x.dtype)", "", OK),
        "another tensor is scaled": (STAT + R + "y = z.float() * r\ny.to(x.dtype) * w", PRODUCT),
        "x shifted in the product": (STAT + R + "y = (h + 1) * r\ny.to(x.dtype) * w", PRODUCT),
        "x negative part only": (STAT + R + "y = h.abs() * r\ny.to(x.dtype) * w", PRODUCT),
        "features rolled": (STAT + R + "y = h.roll(1, -1) * r\ny.to(x.dtype) * w", PRODUCT),
        "gamma along the rows": ("h = e.float(); r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(e.dtype) * k[:, None]", "", OK),
        "gamma along the rows, inside": ("h = e.float(); r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\n((h * r) * k.float().unsqueeze(-1)).to(e.dtype)", "", OK),
        "gamma per row and feature": ("h = x.float(); r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * z[0]", "", OK),
        "gamma squared": (STAT + R + "y = h * r * w * w\ny.to(x.dtype)", "", OK),
        "gamma added": (STAT + R + "y = h * r + w.float()\ny.to(x.dtype)", "", OK),
        "divided by gamma": (STAT + R + "y = h * r / w.float()\ny.to(x.dtype)", "", OK),
        "scaled behind": (STAT + R + "y = (h * r).to(x.dtype) * w\ny * 2", "", OK),
        "gamma of one element": (STAT + R + "y = (h * r).to(x.dtype) * w[:1]\ny", "", OK),
    },
)  # fmt: skip

GUARDED: tuple[Near, ...] = table(
    INPUTS,
    {
        # --- acts only at large values, or on NaN and infinity
        "x clamped": ("h = x.float(); c = h.clamp(-5e4, 5e4); r = torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "statistic clamped": (STAT + "v = v.clamp(max=1e9); r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "root clamped": (STAT + "r = torch.rsqrt(v + 1e-5).clamp(max=50.0)\n(h * r).to(x.dtype) * w", PRODUCT),
        "product clamped before gamma": (STAT + R + "y = (h * r).clamp(-4, 4)\ny.to(x.dtype) * w", "", OK),
        "x masked": (STAT + R + "y = torch.where(h.abs() < 3e3, h, torch.zeros_like(h)) * r\ny.to(x.dtype) * w",),
        "statistic without NaN": ("h = x.float(); r = torch.rsqrt(torch.nan_to_num(h).pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "x without NaN in the product": (STAT + R + "y = torch.nan_to_num(h) * r\ny.to(x.dtype) * w", PRODUCT),
        "nanmean": ("h = x.float(); r = torch.rsqrt(h.pow(2).nanmean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "float8 round trip of x": ("h = x.float(); c = x.to(torch.float8_e5m2).float(); r = torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "float8 round trip of the product": (STAT + R + "y = (h * r).to(torch.float8_e5m2).to(x.dtype)\ny * w", "", OK),
        "float8 round trip of gamma": (STAT + R + "y = (h * r).to(x.dtype) * w.to(torch.float8_e5m2).to(x.dtype)\ny", "", OK),
        "statistic in half precision": (STAT + "v = v.half().float(); r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "squares in half precision": ("h = x.float(); v = h.half().pow(2).mean(-1, keepdim=True).float(); r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "integers in between": (STAT + "v = v.int().float(); r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "dropout in between": (STAT + R + "y = F.dropout(h, 0.5, True) * r\ny.to(x.dtype) * w",),
        # --- gradients
        "statistic detached": (STAT + "r = torch.rsqrt(v.detach() + 1e-5)\n(h * r).to(x.dtype) * w",),
        "x of the statistic detached": ("h = x.float(); r = torch.rsqrt(h.detach().pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w",),
        "x of the product detached": (STAT + R + "y = h.detach() * r\ny.to(x.dtype) * w",),
        "gamma detached": (STAT + R + "y = h * r\ny.to(x.dtype) * w.detach()", "", OK),
        "root detached": (STAT + R + "y = h * r.detach()\ny.to(x.dtype) * w",),
        "statistic without gradient mode": ("h = x.float()\nwith torch.no_grad():\n    r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w", "", OK),
        # --- writes
        "x written in between": ("x = x.clone(); v = x.float().pow(2).mean(-1, keepdim=True); x.mul_(2); r = torch.rsqrt(v + 1e-5)\n(x.float() * r).to(x.dtype) * w", "", (), "float32 training"),
        "input written in between": ("v = x.float().pow(2).mean(-1, keepdim=True); x.add_(1); r = torch.rsqrt(v + 1e-5)\n(x.float() * r).to(x.dtype) * w", "", (), "float32 training"),
        "x written through an alias": ("a = x.view(-1, 24); v = x.float().pow(2).mean(-1, keepdim=True); a.mul_(2); r = torch.rsqrt(v + 1e-5)\n(x.float() * r).to(x.dtype) * w", "", (), "float32 training"),
        "one row written": ("v = x.float().pow(2).mean(-1, keepdim=True); x[0, 0] = 1; r = torch.rsqrt(v + 1e-5)\n(x.float() * r).to(x.dtype) * w", "", (), "float32 training"),
        "statistic written": (STAT + "u = v; u.mul_(2); r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "root written": (STAT + R + "y = h * r.clone(); r.mul_(3)\n(y + h * r).to(x.dtype)", "", OK, "training"),
        "gamma written before": (STAT + R + "y = (h * r).to(x.dtype); w.mul_(2)\ny * w", "", OK),
        "gamma written after": (STAT + R + "y = (h * r).to(x.dtype) * w.clone(); w.mul_(2)\ny", "", OK),
        "x written after": (STAT + R + "y = (h * r).to(x.dtype) * w; x.add_(y.detach())\ny", "", OK, "float32 training"),
        "x written after, residual": ("x = x.clone(); h = x.float(); y = (h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5)).to(x.dtype) * w; x += y\nx", "", OK, "float32 training"),
        "result aliases escape": (STAT + R + "y = (h * r).to(x.dtype); a = y.view(-1); y.mul_(w)\ny, a", "", OK),
        "product kept, then written": (STAT + R + "y = h * r; k2 = y.clone(); y = (y * w.float()).to(x.dtype); k2.add_(1)\ny, k2", "", OK),
        # --- what comes in
        "empty": ("h = x[:0].float(); r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)\n(h * r).to(x.dtype) * w", "tensor.empty"),
        "integer": ("h = (x * 4).int(); v = h.pow(2).float().mean(-1, keepdim=True); r = torch.rsqrt(v + 1e-5)\n(h * r).to(x.dtype) * w",),
        "complex": ("h = torch.complex(x.float(), z.float()); r = torch.rsqrt(h.abs().pow(2).mean(-1, keepdim=True) + 1e-5)\ntorch.view_as_real(h * r)",),
        "vmap": ("f = lambda a: a.float() * torch.rsqrt(a.float().pow(2).mean(-1, keepdim=True) + 1e-5)\ntorch.vmap(f)(x).to(x.dtype) * w",),
    },
)  # fmt: skip
