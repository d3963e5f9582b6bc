"""Matmuls whose rows are scattered or gathered over ranks: fused on two ranks, or left alone with the reason."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from . import ranks, row_forms
from .judge import Outcome, compare

pytestmark = pytest.mark.distributed

MODES = {"inference": (torch.float32, False), "bf16 training": (torch.bfloat16, True)}
DYNAMIC = ("functional", "in_place", "scatter_rows_of_mm", "gather_linear", "gather_rows", "two_products", "layer")
AUTOCAST = ("functional", "gather_linear", "two_products")
NO_GRADIENT = ("averaged", "largest", "operand_written", "given_buffer", "changed_behind", "weight_written")
"""torch has no gradient for these, or refuses what they write into."""
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Gradients of a value that several products read are added in another order; all else is equal to the last bit."""
FORMS = {**row_forms.SCATTERED, **{name: form for name, (form, _) in row_forms.GATHERED.items()}}


def inputs(rank: int, dtype: torch.dtype, length: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = [(length, 2, 6), (8, 6), (10, 6), (8,), (length, 2, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def every_form(rank: int, world: int) -> dict[tuple[str, str], Outcome]:
    found = {}
    for name, function in FORMS.items():
        for mode, (dtype, train) in MODES.items():
            found[name, mode] = compare(function, lambda d=dtype: inputs(rank, d), train)
    for name in DYNAMIC:
        lengths = iter((4, 6, 4, 6))
        make = lambda lengths=lengths: inputs(rank, torch.float32, next(lengths))  # noqa: E731
        found[name, "dynamic"] = compare(FORMS[name], make, True, dynamic=True, calls=2)
    for name in AUTOCAST:
        found[name, "autocast"] = compare(FORMS[name], lambda: inputs(rank, torch.float32), True, autocast=True)
    for name, (function, _) in row_forms.NEAR.items():
        found[name, ""] = compare(function, lambda: inputs(rank, torch.float32), name not in NO_GRADIENT)
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[tuple[str, str], Outcome]]:
    return ranks.run(2, every_form)


CASES = [
    *itertools.product(FORMS, MODES), *((n, "dynamic") for n in DYNAMIC), *((n, "autocast") for n in AUTOCAST)
]  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_fused(outcomes: Any, name: str, mode: str) -> None:
    gathers = row_forms.GATHERED[name][1] if name in row_forms.GATHERED else 0
    expected = ["all_gather_mm"] * gathers + ["mm_reduce_scatter"] * (name in row_forms.SCATTERED or name == "layer")
    for rank, found in enumerate(outcomes):
        outcome = found[name, mode]
        assert not outcome.errors
        assert sorted(s[:2] for s in outcome.sites) == [(op, "fused") for op in expected], (rank, outcome.sites)
        close = CLOSE[torch.bfloat16 if mode in ("bf16 training", "autocast") else torch.float32]
        assert max(outcome.differences) <= close, (rank, outcome.differences)
        assert sum(outcome.before.values()) == sum(outcome.after.values()), (outcome.before, outcome.after)
        for op in set(expected):
            assert outcome.after[op] >= expected.count(op)


@pytest.mark.parametrize("name", ["functional", "gather_linear", "layer"])
def test_backwards_are_the_other_op(outcomes: Any, name: str) -> None:
    """A scattered sum's gradient is gathered in a product, a gathered value's is scattered behind one."""
    for found in outcomes:
        after = found[name, "bf16 training"].after
        wanted = {"mm_reduce_scatter": 1, "all_gather_mm": 1}
        assert dict(after) == ({op: 2 for op in wanted} if name == "layer" else wanted)


@pytest.mark.parametrize("name", row_forms.NEAR)
def test_left_alone(outcomes: Any, name: str) -> None:
    reason = row_forms.NEAR[name][1]
    for found in outcomes:
        outcome = found[name, ""]
        assert outcome.fused == 0 and not outcome.errors
        assert max(outcome.differences) == 0.0
        if reason:
            assert any(re.search(reason, s[2]) for s in outcome.sites), outcome.sites
