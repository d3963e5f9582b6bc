"""A row-parallel product, its sum, the residual add and the norm behind it: two fused calls in inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear, rms_norm

from . import cases, ranks
from .forms import total, total_
from .judge import Outcome, compare
from .row_forms import scatter
from .test_mm_all_reduce import inputs

pytestmark = pytest.mark.distributed


def llama(x: Any) -> Any:
    """As models write it: statistics in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def in_place(x: Any, w: Any, b: Any, r: Any) -> Any:
    y = linear(x, w)
    dist.all_reduce(y)
    r = r + y
    return r, b * llama(r)


def functional(x: Any, w: Any, b: Any, r: Any) -> Any:
    r = total(linear(x, w)) + r
    return r, rms_norm(r, (8,), b, 1e-6)


def two_layers(x: Any, w: Any, b: Any, r: Any) -> Any:
    for _ in range(2):
        r = r + total_(linear(x, w))
        x = linear(b * llama(r), w.t()).tanh()
    return r, x


def rows_scattered(x: Any, w: Any, b: Any, r: Any) -> Any:
    r = scatter(linear(x, w)) + r[: r.shape[0] // dist.get_world_size()]
    return r, b * llama(r)


ONE_ROUNDING = ("functional", "DTensor")
"""torch's own norm rounds bfloat16 once, the fused add and norm before its weight, too: the norm is fused alone."""
PROGRAMS = {
    "in_place": (in_place, "mm_all_reduce", 1), "functional": (functional, "mm_all_reduce", 1),
    "two_layers": (two_layers, "mm_all_reduce", 2), "rows_scattered": (rows_scattered, "mm_reduce_scatter", 1),
}  # fmt: skip


class Model(nn.Module):
    """One decoder MLP under DTensor's plan."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False), nn.RMSNorm(6)

    def forward(self, x: torch.Tensor) -> Any:
        r = x + self.down(self.up(x).tanh())
        return r, self.norm(r)


def every_program(rank: int, world: int) -> dict[tuple[str, torch.dtype], Outcome]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (function, _, _) in PROGRAMS.items():
            found[name, dtype] = compare(function, lambda d=dtype: inputs(rank, d), False)
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        model = parallelize_module(Model().to(dtype), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        found["DTensor", dtype] = compare(model, lambda d=dtype: [torch.ones(2, 3, 6, dtype=d)], False)
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[tuple[str, torch.dtype], Outcome]]:
    return ranks.run(2, every_program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*PROGRAMS, "DTensor"])
def test_the_sum_the_add_and_the_norm_are_two_calls(outcomes: Any, name: str, dtype: torch.dtype) -> None:
    _, op, layers = PROGRAMS.get(name, (None, "mm_all_reduce", 1))
    for found in outcomes:
        outcome = found[name, dtype]
        assert not outcome.errors
        norm = "rms_norm" if name in ONE_ROUNDING and dtype is torch.bfloat16 else "add_rms_norm"
        wanted = [(op, "fused")] * layers + [(norm, "fused")] * layers
        assert sorted(s[:2] for s in outcome.sites) == sorted(wanted), outcome.sites
        cases.agrees(outcome, dtype)
