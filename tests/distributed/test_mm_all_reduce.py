"""Every spelling of a matmul and an all-reduce on two ranks: fused, or left alone with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import cases, copied_forms, forms, ranks

pytestmark = pytest.mark.distributed


def inputs(rank: int, dtype: torch.dtype, length: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = [(2, length, 6), (8, 6), (8,), (2, length, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


TABLE = cases.Table(
    inputs, forms.FUSED, forms.NEAR, ("functional", "in_place", "mm", "bmm", "einsum_of_heads"), (5, 3),
    ("in_place", "bias_inside"), ("maximum", "product", "operand_written"),
)  # fmt: skip


def every_form(rank: int, world: int) -> cases.Found:
    copied = {name: form for name, (form, _) in copied_forms.COPIED.items()}
    return TABLE.run(rank) | cases.in_all_modes(copied, lambda dtype: inputs(rank, dtype))


@pytest.fixture(scope="module")
def outcomes() -> list[cases.Found]:
    return ranks.run(2, every_form)


@pytest.mark.parametrize(("name", "mode"), TABLE.cases)
def test_fused(outcomes: Any, name: str, mode: str) -> None:
    for found in outcomes:
        outcome = found[name, mode]
        copied = name == "megatron_layer" and mode == "bf16 training"  # the column-parallel part
        sums = 2 if name == "two_in_a_row" else 1
        cases.is_fused(outcome, mode, ["mm_all_reduce"] * sums + ["mm_copied"] * copied)
        assert outcome.after["mm_all_reduce"] == len(outcome.sites)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", copied_forms.COPIED)
def test_gradients_of_copies(outcomes: Any, name: str, mode: str) -> None:
    """The gradient of one product and its sum are one call; of several products they are not."""
    dtype, train = cases.MODES[mode]
    for found in outcomes:
        outcome = found[name, mode]
        sites = copied_forms.COPIED[name][1] if train else 0
        assert not outcome.errors
        assert [s[:2] for s in outcome.sites if s[1] == "fused"] == [("mm_copied", "fused")] * sites, outcome.sites
        cases.agrees(outcome, dtype)
        assert outcome.after["mm_all_reduce"] == sites


@pytest.mark.parametrize("name", forms.NEAR)
def test_left_alone(outcomes: Any, name: str) -> None:
    for found in outcomes:
        cases.is_left(found[name, ""], forms.NEAR[name][1])
        assert forms.NEAR[name][1] or not found[name, ""].sites
