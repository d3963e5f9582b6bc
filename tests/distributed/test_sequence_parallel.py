"""Sequence parallelism by placements: norms on a rank's rows, gathered for gate and up, scattered behind down."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from . import ranks
from .judge import Outcome, compare

pytestmark = pytest.mark.distributed


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 8, bias=bias)
        self.up = nn.Linear(6, 8, bias=bias)
        self.down = nn.Linear(8, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.block = Block(bias)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.block(self.norm(x))


def plan(rows: int, shared: bool, local: bool = False) -> Any:
    """shared: one gather in front of the block; else each column-parallel layer gathers for itself."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    sharded = Shard(rows)
    found: dict[str, Any] = {
        "norm": SequenceParallel(sequence_dim=rows), "block.down": RowwiseParallel(output_layouts=sharded)
    }  # fmt: skip
    if shared:
        found["block"] = PrepareModuleInput(
            input_layouts=(sharded,), desired_input_layouts=(Replicate(),), use_local_output=local
        )
    layout = Replicate() if shared else sharded
    return {**found, **{f"block.{n}": ColwiseParallel(input_layouts=layout) for n in ("gate", "up")}}


SHAPES = {"batch of one": ((1, 2, 6), 1), "tokens": ((3, 6), 0), "sequence first": ((2, 2, 6), 0)}
"""What one rank holds, and the dimension that is sharded."""
FUSED: dict[str, tuple[Callable[[], nn.Module], bool, int]] = {
    "shared": (Layer, True, 1), "apart": (Layer, False, 2), "bias": (lambda: Layer(True), True, 1),
}  # fmt: skip
NEAR: dict[str, tuple[tuple[int, ...], int, Callable[[], Any], str]] = {
    "batch of two": ((2, 2, 6), 1, lambda: plan(1, True), "before which other rows stand"),
    "gathered, then local": ((3, 6), 0, lambda: plan(0, True, local=True), ""),
}


def run(
    world: int, make: Callable[[], nn.Module], shape: tuple[int, ...], styles: Any, train: bool,
    dtype: torch.dtype = torch.float32, dynamic: bool | None = None,
) -> Outcome:  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    torch.manual_seed(0)  # one model, of which each rank takes its part
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    model = parallelize_module(make().to(dtype), mesh, styles)
    rank = torch.distributed.get_rank()
    calls = 2 if dynamic else 1
    scale = iter((1, 2) * 2)

    def inputs() -> list[torch.Tensor]:
        times = next(scale) if dynamic else 1
        longer = (*shape[:-2], shape[-2] * times, shape[-1])
        return [torch.randn(longer, generator=torch.Generator().manual_seed(rank)).to(dtype)]

    return compare(model, inputs, train, calls=calls, model=model, dynamic=dynamic)


def every_form(rank: int, world: int) -> dict[Any, Outcome]:
    found = {}
    for name, (make, shared, _) in FUSED.items():
        for shape in SHAPES if name == "shared" else ("batch of one",):
            size, rows = SHAPES[shape]
            for train in (False, True):
                found[name, shape, train] = run(world, make, size, plan(rows, shared), train)
    found["shared", "bf16"] = run(world, Layer, (3, 6), plan(0, True), True, torch.bfloat16)
    found["shared", "dynamic"] = run(world, Layer, (4, 6), plan(0, True), False, dynamic=True)
    for name, (size, _, styles, _) in NEAR.items():
        found[name] = run(world, Layer, size, styles(), True)
    return found


def on_four(rank: int, world: int) -> dict[Any, Outcome]:
    return {train: run(world, Layer, (1, 2, 6), plan(1, True), train) for train in (False, True)}


CASES = [*(("shared", s) for s in SHAPES), ("apart", "batch of one"), ("bias", "batch of one")]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[Any, Outcome]]:
    return ranks.run(2, every_form)


def check(outcome: Outcome, gathers: int, close: float = 2e-6) -> None:
    assert not outcome.errors
    assert sorted(s[:2] for s in outcome.sites) == [
        *[("all_gather_mm", "fused")] * gathers, ("mm_reduce_scatter", "fused")
    ], outcome.sites  # fmt: skip
    assert max(outcome.differences) <= close, outcome.differences
    assert sum(outcome.before.values()) == sum(outcome.after.values()), (outcome.before, outcome.after)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_gathers_and_scatters_are_fused(outcomes: Any, name: str, shape: str, train: bool) -> None:
    for found in outcomes:
        check(found[name, shape, train], FUSED[name][2])


def test_bfloat16(outcomes: Any) -> None:
    for found in outcomes:
        check(found["shared", "bf16"], 1, 2e-2)


def test_other_lengths(outcomes: Any) -> None:
    for found in outcomes:
        check(found["shared", "dynamic"], 1)


@pytest.mark.parametrize("name", NEAR)
def test_left_alone(outcomes: Any, name: str) -> None:
    for found in outcomes:
        gathers = [s for s in found[name].sites if s[0] == "all_gather_mm"]
        assert not any(s[1] == "fused" for s in gathers) and not found[name].errors
        assert max(found[name].differences) <= 2e-6
        reason = NEAR[name][3]
        assert len(gathers) == bool(reason) and all(re.search(reason, s[2]) for s in gathers), gathers


def test_four_ranks() -> None:
    for found in ranks.run(4, on_four):
        for train in (False, True):
            check(found[train], 1)
