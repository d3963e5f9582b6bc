# ruff: noqa: E501 - a program is a line of its table
"""Spellings of gated MLPs: tables of parts, and the programs they combine to.

t [2, 5, 24] one tensor with both halves; g, u [2, 5, 12] two tensors; x [2, 5, 8] with weights W, V [12, 8],
WV [24, 8] (projections). Every part names the gate `p` and the other factor `q`.
"""

from __future__ import annotations

import torch

from .helpers import Inputs, random
from .programs import Program, combinations, program

INPUTS = "t g u x W V WV"

ONE_TENSOR = (
    "p, q = t.chunk(2, -1)", "p, q = t.chunk(2, dim=-1)", "p = t[..., :12]; q = t[..., 12:]",
    "p, q = torch.split(t, 12, dim=-1)", "p, q = t.split([12, 12], dim=2)", "p, q = t.view(2, 5, 2, 12).unbind(-2)",
    "p = t.narrow(-1, 0, 12); q = t.narrow(-1, 12, 12)", "p, q = torch.tensor_split(t, 2, dim=-1)",
    "d = t.shape[-1] // 2; p = t[..., :d]; q = t[..., d:]", "h = t.unflatten(-1, (2, 12)); p = h[..., 0, :]; q = h[..., 1, :]",
    "q, p = t.chunk(2, -1)", "p = t[..., 12:]; q = t[..., :12]", "p = t[..., ::2]; q = t[..., 1::2]",
    "p, q = t.view(2, 5, 12, 2).unbind(-1)", "q = t[..., 0::2]; p = t[..., 1::2]", "h = t.reshape(10, 24); p, q = h.chunk(2, 1)",
    "p, q = F.linear(x, WV).chunk(2, -1)", "h = x @ WV.t(); p = h[:, :, :12]; q = h[:, :, 12:]",
    "h = t.view(2, 5, 2, 12); p = h.select(-2, 0); q = h.select(-2, 1)",
)  # fmt: skip
TWO_TENSORS = (
    "p = g; q = u", "p = F.linear(x, W); q = F.linear(x, V)", "p = x @ W.t(); q = torch.matmul(x, V.T)",
    "p = g.flatten(0, 1); q = u.flatten(0, 1)", "p = torch.einsum('bsd,fd->bsf', x, W); q = u",
    "p = g.transpose(1, 2); q = u.transpose(1, 2)", "p = g + u; q = u",
)  # fmt: skip
SILU = (
    "F.silu(p)", "torch.nn.functional.silu(p, inplace=False)", "torch.ops.aten.silu(p)", "p * torch.sigmoid(p)",
    "torch.sigmoid(p) * p", "p * p.sigmoid()", "p * F.sigmoid(p)", "torch.mul(p, torch.sigmoid(p))",
    "p / (1 + torch.exp(-p))", "p / (1.0 + (-p).exp())", "p * (1 / (1 + torch.exp(-p)))", "p.mul(torch.special.expit(p))",
    "p * torch.reciprocal(1 + torch.exp(-p))", "p.div(torch.exp(-p) + 1)", "p * (1 + torch.exp(-p)) ** -1",
)  # fmt: skip
SILU_MIXED = (
    "p * (torch.sigmoid(p) * q)",
    "(p * q) * torch.sigmoid(p)",
    "torch.sigmoid(p) * (q * p)",
    "p * q / (1 + torch.exp(-p))",
)
GELU_TANH = (
    "F.gelu(p, approximate='tanh')", "torch.nn.functional.gelu(p, approximate='tanh')",
    "0.5 * p * (1 + torch.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * p.pow(3))))",
    "0.5 * p * (1.0 + torch.tanh(0.7978845608028654 * (p + 0.044715 * p * p * p)))",
    "p * 0.5 * (1 + torch.tanh(p * 0.7978845608028654 * (1 + 0.044715 * p * p)))",
    "p * (0.5 * (1.0 + torch.tanh((p + 0.044715 * p ** 3) * math.sqrt(2.0 / math.pi))))",
    "0.5 * (p * (1 + torch.tanh(math.sqrt(2 / math.pi) * (p + 0.044715 * torch.pow(p, 3.0)))))",
)  # fmt: skip
GELU_ERF = (
    "F.gelu(p)", "F.gelu(p, approximate='none')", "torch.ops.aten.gelu(p)", "0.5 * p * (1 + torch.erf(p / math.sqrt(2)))",
    "p * 0.5 * (1.0 + torch.erf(p * 0.7071067811865476))", "p * (0.5 * (1 + torch.special.erf(p / 2 ** 0.5)))",
    "0.5 * (p * (1.0 + torch.erf(p / 1.4142135623730951)))",
)  # fmt: skip
TIMES = (
    "ACT * q", "q * ACT", "torch.mul(ACT, q)", "(ACT).mul(q)", "y = ACT; y = y * q\ny", "torch.multiply(q, ACT)",
    "(ACT.float() * q.float()).to(q.dtype)", "(ACT * q).contiguous()", "y = q.clone(); y = ACT * y\ny",
)  # fmt: skip
IN_PLACE = ("(ACT).mul_(q)", "y = ACT; y *= q\ny")
WIDE = ("", "", "p = p.float()", "p = p.float(); q = q.float()", "p = p.to(torch.float32)")

CLAMP = (
    "p = p.clamp(max=7.0); q = q.clamp(-7.0, 7.0)", "p = torch.clamp(p, max=7.0); q = torch.clamp(q, min=-7.0, max=7.0)",
    "p = p.clamp(min=None, max=7.0); q = q.clamp(min=-7.0, max=7.0)", "p = p.clip(max=7); q = q.clip(-7, 7)",
    "p = torch.clamp_max(p, 7.0); q = q.clamp_min(-7.0).clamp_max(7.0)", "q = q.clamp(max=7.0).clamp(min=-7.0); p = p.clamp(max=7.0)",
)  # fmt: skip
SCALED = (
    "p * torch.sigmoid(p * 1.702)", "p * torch.sigmoid(1.702 * p)", "torch.sigmoid(1.702 * p) * p",
    "p / (1 + torch.exp(-1.702 * p))", "p * torch.sigmoid(p)", "F.silu(p)", "torch.mul(p, (p * 1.702).sigmoid())",
)  # fmt: skip
BIASED = ("(q + 1)", "(1 + q)", "q.add(1.0)", "torch.add(q, 1)", "(q - -1)", "q")
CLIPPED = (
    "BIAS * (ACT)",
    "(ACT) * BIAS",
    "torch.mul(ACT, BIAS)",
    "glu = ACT; y = BIAS * glu\ny",
    "((ACT).float() * BIAS.float()).to(q.dtype)",
)


def _gated(acts: tuple[str, ...], count: int, seed: int) -> list[Program]:
    made = []
    splits = (*ONE_TENSOR, *TWO_TENSORS)
    for split, wide, act, times in combinations((splits, WIDE, acts, (*TIMES, *IN_PLACE)), count, seed):
        made.append(gated(split, wide, act, times))
    return list({p.text: p for p in made}.values())


def gated(split: str, wide: str, act: str, times: str) -> Program:
    body = times.replace("ACT", f"({act})")
    result = body if not wide else _narrowed(body)
    return program(f"{split} | {wide} | {act} | {times}", INPUTS, f"{split}\n{wide}\n{result}")


def _narrowed(body: str) -> str:
    """The last line, cast to the inputs' dtype."""
    *before, last = body.split("\n")
    return "\n".join((*before, f"({last}).to(t.dtype)"))


def swiglu(count: int) -> list[Program]:
    mixed = [gated(s, "", a, "ACT") for s in (ONE_TENSOR[0], TWO_TENSORS[0]) for a in SILU_MIXED]
    return [*_gated(SILU, count, 0), *mixed]


def geglu(count: int) -> list[Program]:
    return [*_gated(GELU_TANH, count // 2, 1), *_gated(GELU_ERF, count // 2, 2)]


def clipped_swiglu(count: int) -> list[Program]:
    made = []
    for split, clamp, act, bias, form in combinations(
        ((*ONE_TENSOR, *TWO_TENSORS), CLAMP, SCALED, BIASED, CLIPPED), count, 3
    ):
        text = form.replace("ACT", act).replace("BIAS", bias)
        made.append(program(f"{split} | {clamp} | {act} | {bias} | {form}", INPUTS, f"{split}\n{clamp}\n{text}"))
    for split, act, bias in combinations(((ONE_TENSOR[0], ONE_TENSOR[12], TWO_TENSORS[0]), SCALED[:3], BIASED), 12, 4):
        made.append(program(f"{split} | {act} | {bias} without clamp", INPUTS, f"{split}\n({act}) * {bias}"))
    return made


def inputs(dtype: torch.dtype, seed: int = 0, scale: float = 3.0, rows: int = 5) -> Inputs:
    return {
        "t": random((2, rows, 24), dtype, seed, scale),
        "g": random((2, rows, 12), dtype, seed + 1, scale),
        "u": random((2, rows, 12), dtype, seed + 2, scale),
        "x": random((2, rows, 8), dtype, seed + 3, scale),
        "W": random((12, 8), dtype, seed + 4),
        "V": random((12, 8), dtype, seed + 5),
        "WV": random((24, 8), dtype, seed + 6),
    }
