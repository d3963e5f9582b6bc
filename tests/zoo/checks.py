"""Numerical facts about tensors of one eager run: is this a normalised row, a rotation, an activation?

Every function looks at values only; none knows how a model spelled the computation. The run is in float32, so
an equality that holds in the model holds here to about 1e-5, and one that does not is off by far more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-3
EXACT = 1e-6
LARGEST_EPSILON = 0.1  # a constant added to a mean of squares and larger than this is not an epsilon


def norm_kind(x: Tensor, statistic: Tensor) -> str | None:
    """What `x / sqrt(statistic)` normalises: "rms", "l2", "layer" (the rows have no mean left) or None.

    x (..., d) and a statistic that broadcasts against it over the normalised dims.
    """
    dims = broadcast_dims(x, statistic)
    if not dims or not statistic.is_floating_point() or not x.is_floating_point():
        return None
    x, v = x.double(), _aligned(statistic.double(), x.dim())
    mean_square = x.square().mean(dims, keepdim=True)
    count = math.prod(x.shape[d] for d in dims)
    if _differs_by_epsilon(v, mean_square):
        mean = x.mean(dims, keepdim=True).square()
        return "layer" if bool((mean <= EXACT * mean_square).all()) else "rms"
    return "l2" if _differs_by_epsilon(v, mean_square * count) else None


def _differs_by_epsilon(v: Tensor, expected: Tensor) -> bool:
    """v == expected + one constant that is small and not negative (or v == max(expected, constant))."""
    if v.shape != expected.shape or not bool(torch.isfinite(v).all()) or not bool((v > 0).all()):
        return False
    difference = v - expected
    epsilon = difference.median()
    close = bool(((difference - epsilon).abs() <= TOLERANCE * v).all())
    return close and bool(epsilon >= -TOLERANCE * v.min()) and bool(epsilon <= LARGEST_EPSILON)


def broadcast_dims(x: Tensor, small: Tensor) -> list[int]:
    """Dims of x over which `small` is one value; empty if it does not broadcast or nothing is shared."""
    if small.dim() > x.dim() or x.numel() == 0:
        return []
    small = narrowed(_aligned(small, x.dim()))
    if any(s not in (1, n) for s, n in zip(small.shape, x.shape, strict=True)):
        return []
    return [d for d, n in enumerate(x.shape) if n > 1 and small.shape[d] == 1]


def narrowed(t: Tensor) -> Tensor:
    """t with expanded dims narrowed to the one value that they hold."""
    for d in range(t.dim()):
        if t.stride(d) == 0 and t.shape[d] > 1:
            t = t.narrow(d, 0, 1)
    return t


def _aligned(t: Tensor, rank: int) -> Tensor:
    return t[(None,) * (rank - t.dim())]


def is_unit_pair(c: Tensor, s: Tensor, shape: torch.Size) -> bool:
    """c² + s² is one positive constant over `shape` and c and s are not: scaled cosines and sines."""
    try:
        c, s = c.double().broadcast_to(shape), s.double().broadcast_to(shape)
    except RuntimeError:
        return False
    if c.numel() == 0:
        return False
    norm = c.square() + s.square()
    largest = norm.max()
    turns = s.abs().max() > TOLERANCE * largest.sqrt() and c.max() - c.min() > EXACT
    return bool(largest > 0) and bool(turns) and bool(largest - norm.min() <= TOLERANCE * largest)


def is_paired(x: Tensor, z: Tensor) -> bool:
    """z is x with the members of each pair exchanged, up to sign: pairs (d, d ± D/2) or (d, d ^ 1)."""
    if x.shape != z.shape or x.dim() == 0:
        return False
    x, z = x.double().abs(), z.double().abs()
    for dim in range(x.dim() - 1, -1, -1):
        size = x.shape[dim]
        if size % 2 or torch.equal(x, z):
            continue
        halves = x.roll(size // 2, dim)
        neighbours = x.unflatten(dim, (size // 2, 2)).flip(dim + 1).flatten(dim, dim + 1)
        if same(halves, z) or same(neighbours, z):
            return True
    return False


def same(a: Tensor, b: Tensor) -> bool:
    """Equal shapes and equal values to float32 rounding."""
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=EXACT))


def is_spread(data: Tensor, shape: torch.Size, coefficient: Tensor) -> bool:
    """`data` is one value along a dim of size 2 of `shape` where the coefficient has two: a 2 × 2 product."""
    if data.dim() > len(shape) or coefficient.dim() == 0:
        return False
    whole = torch.empty(shape, device="meta")
    shared = broadcast_dims(whole, data)
    return any(shape[d] == 2 and d not in broadcast_dims(whole, coefficient) for d in shared)


def sigmoid_scale(a: Tensor, sigmoid_input: Tensor) -> float | None:
    """alpha such that sigmoid_input == alpha · a, else None."""
    if a.shape != sigmoid_input.shape or a.numel() == 0:
        return None
    a, z = a.double(), sigmoid_input.double()
    alpha = float((a * z).sum() / a.square().sum())
    return alpha if same(alpha * a, z) and abs(alpha) > EXACT else None


def is_gelu_factor(a: Tensor, factor: Tensor) -> bool:
    """factor is a constant times the gate of gelu (erf or tanh form) at a, 2a or a / 2."""
    if a.shape != factor.shape or a.numel() == 0:
        return False
    f = factor.double()
    for scale in (1.0, 2.0):
        x = scale * a.double()
        for gate in (
            1 + torch.erf(x / math.sqrt(2)),
            1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
        ):
            ratio = float((f * gate).sum() / gate.square().sum())
            if abs(ratio) > TOLERANCE and bool(torch.allclose(f, ratio * gate, rtol=TOLERANCE, atol=1e-4)):
                return True
    return False
