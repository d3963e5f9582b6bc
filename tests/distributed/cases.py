"""What every table of programs is run through on two ranks: modes, lengths, autocast, and near misses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .judge import Outcome, compare

Program = Callable[..., Any]
Found = dict[tuple[str, str], Outcome]

MODES = {"inference": (torch.float32, False), "bf16 training": (torch.bfloat16, True)}
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""A sum that is rounded once where it was twice, or added in another order; all else is equal to the last bit."""


@dataclass(frozen=True)
class Table:
    """Programs that are fused and near misses with the reason; which of them run with two lengths or autocast.

    `inputs(rank, dtype, length)` makes what they take.
    """

    inputs: Callable[..., list[torch.Tensor]]
    fused: Mapping[str, Program]
    near: Mapping[str, tuple[Program, str]]
    dynamic: tuple[str, ...] = ()
    lengths: tuple[int, int] = (4, 6)
    autocast: tuple[str, ...] = ()
    no_gradient: tuple[str, ...] = ()
    """Near misses for which torch has no gradient, or refuses what they write into."""

    @property
    def cases(self) -> list[tuple[str, str]]:
        return [
            *itertools.product(self.fused, MODES), *((n, "dynamic") for n in self.dynamic),
            *((n, "autocast") for n in self.autocast),
        ]  # fmt: skip

    def run(self, rank: int) -> Found:
        found = in_all_modes(self.fused, lambda dtype: self.inputs(rank, dtype))
        for name in self.dynamic:
            lengths = iter(self.lengths * 2)
            make = lambda lengths=lengths: self.inputs(rank, torch.float32, next(lengths))  # noqa: E731
            found[name, "dynamic"] = compare(self.fused[name], make, True, dynamic=True, calls=2)
        for name in self.autocast:
            make = lambda: self.inputs(rank, torch.float32)  # noqa: E731
            found[name, "autocast"] = compare(self.fused[name], make, True, autocast=True)
        for name, (function, _) in self.near.items():
            train = name not in self.no_gradient
            found[name, ""] = compare(function, lambda: self.inputs(rank, torch.float32), train)
        return found


def in_all_modes(programs: Mapping[str, Program], inputs: Callable[[torch.dtype], list[torch.Tensor]]) -> Found:
    return {
        (name, mode): compare(function, lambda d=dtype: inputs(d), train)
        for name, function in programs.items() for mode, (dtype, train) in MODES.items()
    }  # fmt: skip


def is_fused(outcome: Outcome, mode: str, expected: Iterable[str]) -> None:
    """These ops stand for the program's collectives, whose values and number stay."""
    assert not outcome.errors
    assert sorted(s[:2] for s in outcome.sites) == sorted((op, "fused") for op in expected), outcome.sites
    agrees(outcome, torch.bfloat16 if mode in ("bf16 training", "autocast") else torch.float32)


def agrees(outcome: Outcome, dtype: torch.dtype) -> None:
    assert max(outcome.differences) <= CLOSE[dtype], outcome.differences
    assert sum(outcome.before.values()) == sum(outcome.after.values()), (outcome.before, outcome.after)


def is_left(outcome: Outcome, reason: str) -> None:
    """Nothing is changed, and the report gives the reason."""
    assert outcome.fused == 0 and not outcome.errors
    assert max(outcome.differences) == 0.0
    if reason:
        assert any(re.search(reason, s[2]) for s in outcome.sites), outcome.sites
