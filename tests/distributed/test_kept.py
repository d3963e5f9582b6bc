"""Gathered rows in training: kept for the weights' gradients or gathered again, as the graph has it or as asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import cases, function_forms, ranks, row_forms
from .judge import Outcome, compare
from .test_rows import inputs

pytestmark = pytest.mark.distributed

PROGRAMS = {
    **{n: row_forms.GATHERED[n][0] for n in ("gather_linear", "two_products", "three_products")},
    **{n: function_forms.FUSED[n][0] for n in ("gathered_inside_bias", "gathered_inside_and_kept")},
}
AGAIN = ("gathered_inside_bias",)
"""The graph itself gathers again."""
READ = ("three_products",)
"""Others read the gathered value and keep it."""
CHOICES = ("graph", "keep", "again")


def every_choice(rank: int, world: int) -> dict[tuple[str, str], Outcome]:
    found = {}
    for name, function in PROGRAMS.items():
        for choice in CHOICES:
            make = lambda: inputs(rank, torch.float32, 8)  # noqa: E731
            found[name, choice] = compare(function, make, True, mc2_gather=choice)
    make = lambda: inputs(rank, torch.bfloat16)  # noqa: E731
    found["two_products", "bfloat16"] = compare(PROGRAMS["two_products"], make, True, mc2_gather="again")
    lengths = iter((4, 6) * 2)
    make = lambda: inputs(rank, torch.float32, next(lengths))  # noqa: E731
    found["two_products", "dynamic"] = compare(
        PROGRAMS["two_products"], make, True, dynamic=True, calls=2, mc2_gather="again"
    )
    for choice in CHOICES:
        make = lambda: inputs(rank, torch.float32, 8)  # noqa: E731
        found["inductor", choice] = compare(
            PROGRAMS["gather_linear"], make, True, mc2_gather=choice, handoff="inductor"
        )
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[tuple[str, str], Outcome]]:
    return ranks.run(2, every_choice)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_what_is_kept(outcomes: Any, name: str, choice: str) -> None:
    shard = 8 * 2 * 6 * 4  # a rank's rows, in bytes; gathered twice as many
    for found in outcomes:
        outcome = found[name, choice]
        assert not outcome.errors and {s[1] for s in outcome.sites} == {"fused"}
        assert max(outcome.differences) <= cases.CLOSE[torch.float32]
        before, after = outcome.kept
        again = (choice == "again" and name not in READ) or (choice == "graph" and name in AGAIN)
        gathers = sum(
            outcome.after[n] for n in ("all_gather_into_tensor", "all_gather_mm", "all_gather_mms", "all_gather_again")
        )
        assert gathers == (2 if again else 1)
        if choice == "graph":
            assert after <= before
        elif again:
            assert after <= before - (0 if name in AGAIN else shard)
        elif name not in AGAIN:
            assert after <= before


@pytest.mark.parametrize("what", ["bfloat16", "dynamic"])
def test_other_dtypes_and_lengths(outcomes: Any, what: str) -> None:
    for found in outcomes:
        outcome = found["two_products", what]
        assert not outcome.errors and {s[1] for s in outcome.sites} == {"fused"}
        assert max(outcome.differences) <= cases.CLOSE[torch.bfloat16 if what != "dynamic" else torch.float32]


@pytest.mark.parametrize("choice", CHOICES)
def test_inductor_keeps_the_choice(outcomes: Any, choice: str) -> None:
    """It takes a collective that needs no gradient into the forward: one of ours stays behind."""
    for found in outcomes:
        outcome = found["inductor", choice]
        assert not outcome.errors and max(outcome.differences) <= cases.CLOSE[torch.float32]
        before, after = outcome.kept
        assert after <= before - (8 * 2 * 6 * 4 if choice == "again" else 0)
