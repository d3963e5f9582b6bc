"""Target npu: a rank that compiles alone takes the form that the others run, or says why it cannot; nothing hangs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from . import npu_stub, ranks

pytestmark = pytest.mark.distributed

WAIT = 15.0
"""Seconds for which a rank waits for others."""


def first(x: Any, w: Any) -> Any:
    y = linear(x, w)
    dist.all_reduce(y)
    return y * 1


def second(x: Any, w: Any) -> Any:
    y = linear(x, w.t())
    dist.all_reduce(y)
    return y * 2


def both(x: Any, w: Any) -> Any:
    return second(first(x, w), w)


def reduced_here(x: Any, w: Any, besides: bool = False) -> Any:
    y = linear(x, w)
    z = y * 2 if besides else None
    dist.all_reduce(y)
    return y * 1 if z is None else y + z


def one_rank_alone(rank: int, world: int) -> dict[str, Any]:
    import npu_fuse
    from npu_fuse import ballots, groups, mc2

    calls = npu_stub.install("Ascend910B3")
    mc2._on_npu = lambda x: True  # type: ignore[assignment]
    groups.speaks_hccl = lambda name: True  # type: ignore[assignment]
    ballots.LONGEST_WAIT = WAIT
    generator = torch.Generator().manual_seed(rank)
    x, w = (torch.randn(*s, generator=generator).bfloat16() for s in ((2, 3, 8), (16, 8)))

    def compiled(function: Any) -> Any:
        options = {"target": "npu", "handoff": "aot_eager", "mc2_min_rows": 4, "soc": "Ascend910B3"}
        return torch.compile(function, backend="npu_fuse", options=options)

    def statuses() -> list[str]:
        return [str(s.status) for r in npu_fuse.reports() for s in r.sites]

    one, two, other = compiled(first), compiled(second), compiled(reduced_here)
    expected = both(x, w)
    apart = two(one(x, w), w)
    other(x, w)
    found: dict[str, Any] = {"together": statuses(), "apart": float((apart - expected).abs().max())}
    npu_fuse.clear_reports()
    started = time.monotonic()
    whole = compiled(both)(x, w) if rank == 0 else two(one(x, w), w)
    found |= {"alone": statuses(), "whole": float((whole - expected).abs().max()), "ops": len(calls.ops)}
    found["seconds"] = time.monotonic() - started
    if rank == 0:
        with pytest.raises(Exception, match="their kernels would wait for each other") as raised:
            other(x, w, True)
        found["error"] = str(raised.value)
    dist.all_reduce(torch.zeros(1))
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return ranks.run(2, one_rank_alone, timeout=180.0)


def test_a_rank_alone_takes_what_the_others_run(outcomes: Any) -> None:
    for found in outcomes:
        assert found["together"] == ["fused"] * 3
        assert found["apart"] == found["whole"] == 0.0
        assert found["ops"] == 5  # two and one by all ranks, then two by each in graphs of its own
    assert outcomes[0]["alone"] == ["fused", "fused"] and outcomes[1]["alone"] == []
    assert outcomes[0]["seconds"] >= WAIT


def test_a_rank_alone_that_cannot_says_so(outcomes: Any) -> None:
    """Left plain, its all-reduce would wait for the others' fused kernel."""
    assert "test_alone.py" in outcomes[0]["error"] and "What to do" in outcomes[0]["error"]
