"""Notice a rotation when its last sum is computed, whatever its spelling."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import checks

Product = tuple[Tensor, Tensor]


@dataclass
class Half:
    """One half of a rotation, out₁ = x·c ∓ z·s, waiting for the other, out₂ = z·c ± x·s."""

    x: Tensor
    c: Tensor
    z: Tensor
    s: Tensor
    done: bool = field(default=False)


class Rotations:
    """Sums of two products seen so far that are half of a rotation."""

    def __init__(self) -> None:
        self._halves: list[Half] = []

    def complete(self, out: Tensor, p: Product, q: Product) -> bool:
        """True if out = p ± q is a whole rotation, or the second half of one."""
        for (x, c), (z, s) in itertools.product((p, p[::-1]), (q, q[::-1])):
            if checks.is_unit_pair(c, s, out.shape):
                whole = checks.is_paired(x, z) or checks.is_spread(x, out.shape, c)
                return whole or self._completes(Half(x, c, z, s))
        return False

    def _completes(self, new: Half) -> bool:
        for old in self._halves:
            ways = (((old.x, old.c), (old.z, old.s)), ((old.z, old.s), (old.x, old.c)))
            for (x, c), (z, s) in ways:  # {(x, c), (z, s)} and {(z, c), (x, s)} make a rotation
                if old.done or not (checks.same(new.x, z) and checks.same(new.z, x)):
                    continue
                if checks.same(new.c, c) and checks.same(new.s, s):
                    old.done = True
                    return True
        self._halves.append(new)
        return False


def is_matrix(product: Product, dims: Sequence[int]) -> bool:
    """(R · x).sum(dim) over a dim of size 2 whose rows (c, ∓s) have one length."""
    if len(dims) != 1:
        return False
    for matrix, x in (product, product[::-1]):
        shape = torch.broadcast_shapes(matrix.shape, x.shape)
        whole = matrix.broadcast_to(shape)
        if shape[dims[0]] != 2 or not matrix.is_floating_point():
            continue
        c, s = whole.select(dims[0], 0), whole.select(dims[0], 1)
        if checks.is_unit_pair(c, s, c.shape) and checks.is_spread(x, shape, matrix):
            return True
    return False


def is_complex(a: Tensor, b: Tensor) -> bool:
    """a · b of complex numbers, one of them on a circle."""
    return any(f.is_complex() and checks.is_unit_pair(f.real, f.imag, f.shape) for f in (a, b))
