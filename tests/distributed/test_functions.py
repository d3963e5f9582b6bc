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


def every_form(rank: int, world: int) -> cases.Found:
    return TABLE.run(rank)


@pytest.fixture(scope="module")
def outcomes() -> list[cases.Found]:
    return ranks.run(2, every_form)


@pytest.mark.parametrize(("name", "mode"), TABLE.cases)
def test_fused(outcomes: Any, name: str, mode: str) -> None:
    _, training, inference = function_forms.FUSED[name]
    for found in outcomes:
        cases.is_fused(found[name, mode], mode, inference if mode == "inference" else training)


@pytest.mark.parametrize("name", function_forms.NEAR)
def test_left_alone(outcomes: Any, name: str) -> None:
    for found in outcomes:
        cases.is_left(found[name, ""], function_forms.NEAR[name][1])
