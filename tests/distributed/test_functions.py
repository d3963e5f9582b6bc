"""Megatron's autograd functions with rows that are scattered and gathered, and with products inside."""

from __future__ import annotations

from typing import Any

import pytest

from . import cases, function_forms, ranks
from .test_rows import inputs

pytestmark = pytest.mark.distributed

TABLE = cases.Table(
    inputs, {name: form for name, (form, _, _) in function_forms.FUSED.items()}, function_forms.NEAR,
    ("gathered", "scattered", "gathered_inside_bias", "scattered_inside", "megatron_sequence_parallel"),
)  # fmt: skip


def every_form(rank: int, world: int) -> tuple[cases.Found, list[str]]:
    """Outcomes, and the lines of code that the report gives for the last program, a near miss."""
    import npu_fuse

    return TABLE.run(rank), [s.source or "" for r in npu_fuse.reports() for s in r.sites]


@pytest.fixture(scope="module")
def told() -> list[tuple[cases.Found, list[str]]]:
    return ranks.run(2, every_form)


@pytest.fixture
def outcomes(told: Any) -> list[cases.Found]:
    return [found for found, _ in told]


@pytest.mark.parametrize(("name", "mode"), TABLE.cases)
def test_fused(outcomes: Any, name: str, mode: str) -> None:
    _, training, inference = function_forms.FUSED[name]
    for found in outcomes:
        cases.is_fused(found[name, mode], mode, inference if mode == "inference" else training)


@pytest.mark.parametrize("name", function_forms.NEAR)
def test_left_alone(outcomes: Any, name: str) -> None:
    for found in outcomes:
        cases.is_left(found[name, ""], function_forms.NEAR[name][1])


def test_a_miss_names_the_line(told: Any) -> None:
    assert list(function_forms.NEAR)[-1] == "two_results"
    for _, lines in told:
        assert lines == ["first, second = twice(linear(x, w))"]


def on_four(rank: int, world: int) -> cases.Found:
    names = ("megatron_sequence_parallel", "megatron_tensor_parallel")
    return cases.in_all_modes({n: function_forms.FUSED[n][0] for n in names}, lambda dtype: inputs(rank, dtype))


def test_four_ranks() -> None:
    for found in ranks.run(4, on_four):
        for (name, mode), outcome in found.items():
            _, training, inference = function_forms.FUSED[name]
            cases.is_fused(outcome, mode, inference if mode == "inference" else training)
