"""Matmuls whose rows are scattered or gathered over ranks: fused on two ranks, or left alone with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import cases, ranks, row_forms

pytestmark = pytest.mark.distributed

FORMS = {**row_forms.SCATTERED, **{name: form for name, (form, _) in row_forms.GATHERED.items()}}


def inputs(rank: int, dtype: torch.dtype, length: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = [(length, 2, 6), (8, 6), (10, 6), (8,), (length, 2, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


TABLE = cases.Table(
    inputs, FORMS, row_forms.NEAR,
    ("functional", "in_place", "scatter_rows_of_mm", "gather_linear", "gather_rows", "two_products", "layer"), (4, 6),
    ("functional", "gather_linear", "two_products"),
    ("averaged", "largest", "operand_written", "given_buffer", "changed_behind", "weight_written",
     "gathered_into_a_part"),
)  # fmt: skip


def every_form(rank: int, world: int) -> cases.Found:
    return TABLE.run(rank)


@pytest.fixture(scope="module")
def outcomes() -> list[cases.Found]:
    return ranks.run(2, every_form)


@pytest.mark.parametrize(("name", "mode"), TABLE.cases)
def test_fused(outcomes: Any, name: str, mode: str) -> None:
    gathers = row_forms.GATHERED[name][1] if name in row_forms.GATHERED else 0
    expected = ["all_gather_mm"] * gathers + ["mm_reduce_scatter"] * (name in row_forms.SCATTERED or name == "layer")
    for found in outcomes:
        cases.is_fused(found[name, mode], mode, expected)
        for op in set(expected):
            assert found[name, mode].after[op] >= expected.count(op)


@pytest.mark.parametrize("name", ["functional", "gather_linear", "layer"])
def test_backwards_are_the_other_op(outcomes: Any, name: str) -> None:
    """A scattered sum's gradient is gathered in a product, a gathered value's is scattered behind one."""
    for found in outcomes:
        after = found[name, "bf16 training"].after
        wanted = {"mm_reduce_scatter": 1, "all_gather_mm": 1}
        assert dict(after) == ({op: 2 for op in wanted} if name == "layer" else wanted)


@pytest.mark.parametrize("name", row_forms.NEAR)
def test_left_alone(outcomes: Any, name: str) -> None:
    for found in outcomes:
        cases.is_left(found[name, ""], row_forms.NEAR[name][1])
