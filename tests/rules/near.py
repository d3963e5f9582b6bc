"""Near misses as data, and the one way to judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from npu_fuse.report import Status

from .helpers import Inputs, Mode, assert_no_fault, call, compare, described, fresh, planned, sites
from .programs import Program, program


@dataclass(frozen=True)
class Near:
    """A program that is almost a site. `fused`: ops that may be fused in it all the same.

    `fails` names the mode in which eager itself raises.
    """

    program: Program
    code: str = ""
    fused: tuple[str, ...] = ()
    fails: str = "never"

    def __str__(self) -> str:
        return self.program.name


def table(inputs: str, rows: Mapping[str, tuple[Any, ...]]) -> tuple[Near, ...]:
    return tuple(Near(program(name, inputs, row[0]), *row[1:]) for name, row in rows.items())


Draw = Callable[[torch.dtype, int, float], Inputs]

ANYWHERE = {"fast_gelu"}
"""x · sigmoid(1.702 · x) is an op by itself, whatever stands around it."""
DRAWS = ((0, 1.0), (31, 40.0), (62, 1e-3))
"""Seeds and scales of the inputs on which a rewritten near miss has to give eager's results."""


def check(near: Near, mode: Mode, draw: Draw) -> None:
    """Results equal eager's at several magnitudes, with NaN and infinity too; nothing wrong is fused."""
    if near.fails in str(mode):
        with pytest.raises(RuntimeError):  # eager too
            call(near.program.function(), draw(mode.dtype, *DRAWS[0]), mode.train)
        return
    with fresh():
        function, reports = planned(near.program, mode)
        for seed, scale in DRAWS:
            compare(near.program, draw(mode.dtype, seed, scale), mode.train, function)
        if not mode.train:
            compare(near.program, spoiled(draw(mode.dtype, *DRAWS[0])), False, function)
        assert_no_fault(reports)
        fused = {s.op for s in sites(reports) if s.status is Status.FUSED}
        assert fused <= {*near.fused, *ANYWHERE}, described(reports)
        if near.code:
            assert near.code in {s.code for s in sites(reports)}, described(reports)


def spoiled(inputs: Inputs) -> Inputs:
    """NaN and infinities in some rows of the largest tensors, huge values in others."""
    made = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            rows = value.clone().reshape(-1, value.shape[-1])
            rows[0, 0], rows[-1, -1], rows[1, 1] = float("inf"), float("nan"), float("-inf")
            rows[2] = rows[2] * 1e4
            made[name] = rows.reshape(value.shape)
        else:
            made[name] = value
    return made
