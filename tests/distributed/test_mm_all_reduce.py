"""Every spelling of a matmul and an all-reduce on two ranks: fused, or left alone with the reason."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from . import copied_forms, forms, ranks
from .judge import Outcome, compare

pytestmark = pytest.mark.distributed

MODES = {"inference": (torch.float32, False), "bf16 training": (torch.bfloat16, True)}
DYNAMIC = ("functional", "in_place", "mm", "bmm", "einsum_of_heads")
AUTOCAST = ("in_place", "bias_inside")
NO_GRADIENT = ("maximum", "product", "operand_written")
"""torch has no gradient for these: of such reductions, of a product whose operand is overwritten."""
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""A bias that was added to a rounded product is added before the rounding; all else is equal to the last bit."""


def inputs(rank: int, dtype: torch.dtype, length: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [make(2, length, 6), make(8, 6), make(8), make(2, length, 8)]


def every_form(rank: int, world: int) -> dict[tuple[str, str], Outcome]:
    found = {}
    for name, function in forms.FUSED.items():
        for mode, (dtype, train) in MODES.items():
            found[name, mode] = compare(function, lambda d=dtype: inputs(rank, d), train)
    for name in DYNAMIC:
        lengths = iter((5, 3, 5, 3))
        make = lambda lengths=lengths: inputs(rank, torch.float32, next(lengths))  # noqa: E731
        found[name, "dynamic"] = compare(forms.FUSED[name], make, True, dynamic=True, calls=2)
    for name in AUTOCAST:
        found[name, "autocast"] = compare(forms.FUSED[name], lambda: inputs(rank, torch.float32), True, autocast=True)
    for name, (function, _) in forms.NEAR.items():
        found[name, ""] = compare(function, lambda: inputs(rank, torch.float32), name not in NO_GRADIENT)
    for name, (function, _) in copied_forms.COPIED.items():
        for mode, (dtype, train) in MODES.items():
            found[name, mode] = compare(function, lambda d=dtype: inputs(rank, d), train)
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[tuple[str, str], Outcome]]:
    return ranks.run(2, every_form)


CASES = [
    *itertools.product(forms.FUSED, MODES), *((n, "dynamic") for n in DYNAMIC), *((n, "autocast") for n in AUTOCAST)
]  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_fused(outcomes: Any, name: str, mode: str) -> None:
    for rank, found in enumerate(outcomes):
        outcome = found[name, mode]
        assert not outcome.errors
        copied = name == "megatron_layer" and MODES.get(mode, ("", True))[1]  # the column-parallel part
        assert {s[:2] for s in outcome.sites} == {
            ("mm_all_reduce", "fused"), *([("mm_copied", "fused")] if copied else [])
        }, (rank, outcome.sites)  # fmt: skip
        close = CLOSE[torch.bfloat16 if mode in ("bf16 training", "autocast") else torch.float32]
        assert max(outcome.differences) <= close, (rank, outcome.differences)
        assert sum(outcome.before.values()) == sum(outcome.after.values()), (outcome.before, outcome.after)
        assert outcome.after["mm_all_reduce"] == len(outcome.sites)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", copied_forms.COPIED)
def test_gradients_of_copies(outcomes: Any, name: str, mode: str) -> None:
    """The gradient of one product and its sum are one call; of several products they are not."""
    for rank, found in enumerate(outcomes):
        outcome = found[name, mode]
        sites = copied_forms.COPIED[name][1] if MODES[mode][1] else 0
        assert not outcome.errors
        assert [s[:2] for s in outcome.sites if s[1] == "fused"] == [("mm_copied", "fused")] * sites, outcome.sites
        assert max(outcome.differences) <= CLOSE[MODES[mode][0]], (rank, outcome.differences)
        assert outcome.after["mm_all_reduce"] == sites
        assert sum(outcome.before.values()) == sum(outcome.after.values()), (outcome.before, outcome.after)


@pytest.mark.parametrize("name", forms.NEAR)
def test_left_alone(outcomes: Any, name: str) -> None:
    for found in outcomes:
        outcome = found[name, ""]
        assert outcome.fused == 0 and not outcome.errors
        assert max(outcome.differences) == 0.0
        reason = forms.NEAR[name][1]
        if reason:
            assert any(re.search(reason, s[2]) for s in outcome.sites), outcome.sites
        else:
            assert not outcome.sites
