"""Tensor parallelism by placements: torch's parallelize_module, on two ranks."""

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


class Mlp(nn.Module):
    def __init__(self, bias: bool, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(6, width, bias=bias)
        self.down = nn.Linear(width, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)))


class Residual(Mlp):
    """With DTensors from layer to layer, made local at the end."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.down(torch.tanh(self.up(x)))
        return (y + y.sin()).to_local()


class Whole(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.tanh(self.up(x))).full_tensor()


class Twice(Mlp):
    """The partial sum is used besides."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.down(torch.tanh(self.up(x)))
        return y.full_tensor() + y.to_local()


class Scaled(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        return (self.down(torch.tanh(self.up(x))) * 2).full_tensor()


def styles(down: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel

    return {"up": ColwiseParallel(), "down": down}


def rowwise(**how: Any) -> Any:
    from torch.distributed.tensor.parallel import RowwiseParallel

    return RowwiseParallel(**how)


def partial_result(**how: Any) -> Any:
    from torch.distributed.tensor import Partial

    return rowwise(output_layouts=Partial(), **how)


def scattered() -> Any:
    from torch.distributed.tensor import Shard

    return rowwise(output_layouts=Shard(1))


FUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "rowwise": (lambda: Mlp(False), rowwise),
    "rowwise with bias": (lambda: Mlp(True), rowwise),
    "DTensor result": (lambda: Residual(True), lambda: rowwise(use_local_output=False)),
    "full_tensor": (lambda: Whole(True), lambda: partial_result(use_local_output=False)),
}
NEAR: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "partial used": (lambda: Twice(False), lambda: partial_result(use_local_output=False), "used besides its sum"),
    "scaled": (lambda: Scaled(False), lambda: partial_result(use_local_output=False), ""),
    "scattered": (lambda: Mlp(False), scattered, ""),
}


def run(make: Callable[[], nn.Module], style: Callable[[], Any], train: bool, lengths: int) -> Outcome:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    torch.manual_seed(0)  # one model, of which each rank takes its part
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize_module(make(), mesh, styles(style()))
    each = iter((4, 6)[:lengths] * 2)

    def inputs() -> list[torch.Tensor]:
        return [torch.randn(2, next(each), 6, generator=torch.Generator().manual_seed(1))]

    return compare(model, inputs, train, calls=lengths, model=model)


def other_dimension(train: bool) -> Outcome:
    """A weight that is replicated: what is summed over is whole on every rank, the left operand is a partial sum."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))

    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        part = DTensor.from_local(x, mesh, [Partial()], run_check=False)
        weight = DTensor.from_local(w, mesh, [Replicate()], run_check=False)
        return nn.functional.linear(part, weight).redistribute(placements=[Replicate()]).to_local()

    return compare(function, lambda: [torch.ones(2, 4, 6), torch.ones(8, 6)], train)


def every_form(rank: int, world: int) -> dict[Any, Outcome]:
    found = {}
    for name, (make, style) in FUSED.items():
        for train, lengths in ((False, 1), (True, 1), *(((False, 2),) if name == "rowwise with bias" else ())):
            found[name, train, lengths] = run(make, style, train, lengths)
    for name, (make, style, _) in NEAR.items():
        found[name] = run(make, style, True, 1)
    found["other dimension"] = other_dimension(True)
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[Any, Outcome]]:
    return ranks.run(2, every_form)


@pytest.mark.parametrize(("train", "lengths"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("name", FUSED)
def test_row_parallel_layers_are_fused(outcomes: Any, name: str, train: bool, lengths: int) -> None:
    for found in outcomes:
        if (name, train, lengths) not in found:
            assert lengths == 2
            continue
        outcome = found[name, train, lengths]
        assert not outcome.errors
        assert [s[:2] for s in outcome.sites if s[0] == "mm_all_reduce"] == [("mm_all_reduce", "fused")] * lengths
        assert [s[:2] for s in outcome.sites if s[0] == "mm_copied"] == [("mm_copied", "fused")] * train
        assert max(outcome.differences) <= 1e-6, outcome.differences
        assert sum(outcome.before.values()) == sum(outcome.after.values()), (outcome.before, outcome.after)
        assert outcome.after["mm_all_reduce"] == lengths + train  # and the gradient of the column-parallel layer


@pytest.mark.parametrize("name", [*NEAR, "other dimension"])
def test_left_alone(outcomes: Any, name: str) -> None:
    reason = "not the sharded one" if name == "other dimension" else NEAR[name][2]
    for found in outcomes:
        assert not any(s[1] == "fused" for s in found[name].sites if s[0] != "mm_copied") and not found[name].errors
        assert max(found[name].differences) <= 1e-6
        assert not reason or any(re.search(reason, s[2]) for s in found[name].sites), found[name].sites
