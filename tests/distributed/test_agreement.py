"""Ranks fuse alike: with other lengths, other graphs, other options, alone and late; and nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from . import ranks

pytestmark = pytest.mark.distributed

TIMEOUT = 16.0
"""Of the process groups, in seconds: ranks wait half of it for each other's decisions."""


def row_parallel(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = linear(x.sin(), w, bias)
    dist.all_reduce(y)
    return y * 2


def pooled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = linear(x.sum(0, keepdim=True), w)
    dist.all_reduce(y)
    return y * 2


def expected(parts: list[torch.Tensor]) -> torch.Tensor:
    return 2 * sum(parts[1:], parts[0])


def compiled(function: Any, **options: Any) -> Any:
    import npu_fuse

    torch._dynamo.reset()
    npu_fuse.clear_reports()
    return torch.compile(
        function, backend="npu_fuse", options={"target": "reference", "handoff": "aot_eager", **options}
    )


def statuses() -> list[tuple[str, str]]:
    import npu_fuse

    return [(str(s.status), s.reason) for r in npu_fuse.reports() for s in r.sites]


def data(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank))


def lengths_differ(rank: int, world: int) -> Any:
    """Each rank has its own lengths; rank 1 sees two and compiles a second time, alone."""
    call, w = compiled(pooled), [data(10 + r, 5, 4) for r in range(world)]
    for step in range(3):
        inputs = [data(r, 3 + r * step, 4) for r in range(world)]
        parts = [x.sum(0, keepdim=True) @ v.t() for x, v in zip(inputs, w, strict=True)]
        torch.testing.assert_close(call(inputs[rank], w[rank]), expected(parts))
    return statuses()


def bias_on_rank_0(rank: int, world: int) -> Any:
    call = compiled(row_parallel)
    x, w, b = [data(r, 3, 4) for r in range(world)], [data(10 + r, 5, 4) for r in range(world)], data(20, 5)
    parts = [linear(x[r].sin(), w[r], b if r == 0 else None) for r in range(world)]
    torch.testing.assert_close(call(x[rank], w[rank], b if rank == 0 else None), expected(parts))
    return statuses()


def uneven_shards(rank: int, world: int) -> Any:
    call = compiled(row_parallel)
    x, w = [data(r, 3, 4 + r) for r in range(world)], [data(10 + r, 5, 4 + r) for r in range(world)]
    parts = [linear(x[r].sin(), w[r]) for r in range(world)]
    torch.testing.assert_close(call(x[rank], w[rank], None), expected(parts))
    return statuses()


def caches_differ(rank: int, world: int, folder: str) -> Any:
    """Rank 0 has its proofs on disk from an earlier compile, rank 1 makes them."""
    from npu_fuse.proofs import forget_verdicts

    x, w = data(rank, 6, 4), data(10 + rank, 5, 4)
    options = {"proof_cache": folder} if rank == 0 else {}
    for _ in range(2):
        forget_verdicts()
        compiled(row_parallel, **options)(x, w, None)
    return statuses()


def one_rank_cannot(rank: int, world: int) -> Any:
    """On rank 1 something stands in the way: both leave the site."""
    x, w = data(rank, 3, 4), data(10 + rank, 5, 4)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = linear(x, w)
        y = y * 3 if rank == 1 else y
        dist.all_reduce(y)
        return y.sin()

    started = time.monotonic()
    call = compiled(function)
    call(x, w)
    return statuses(), time.monotonic() - started


def one_rank_in_eager(rank: int, world: int) -> Any:
    """Rank 1 does not compile at all: rank 0 gives up in time and leaves the site."""
    x, w = data(rank, 3, 4), data(10 + rank, 5, 4)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = linear(x, w)
        dist.all_reduce(y)
        return y.sin()

    started = time.monotonic()
    (compiled(function) if rank == 0 else function)(x, w)
    return statuses() if rank == 0 else [], time.monotonic() - started


def everything(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for work in (lengths_differ, bias_on_rank_0, uneven_shards, one_rank_cannot, one_rank_in_eager):
        found[work.__name__] = work(rank, world)
        dist.barrier()
    found["caches_differ"] = caches_differ(rank, world, folder)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return ranks.run(2, everything, str(tmp_path_factory.mktemp("proofs")), timeout=TIMEOUT)


def test_other_lengths_and_a_compile_alone(outcomes: Any) -> None:
    assert [s for s, _ in outcomes[0]["lengths_differ"]] == ["fused"]
    assert [s for s, _ in outcomes[1]["lengths_differ"]] == ["fused", "fused"]


@pytest.mark.parametrize("name", ["bias_on_rank_0", "uneven_shards", "caches_differ"])
def test_graphs_and_caches_differ(outcomes: Any, name: str) -> None:
    for found in outcomes:
        assert [s for s, _ in found[name]] == ["fused"]


def test_what_one_rank_cannot_fuse_no_rank_fuses(outcomes: Any) -> None:
    (first,), seconds = outcomes[0]["one_rank_cannot"]
    assert first[0] == "missed" and first[1].startswith("another rank leaves this collective") and seconds < TIMEOUT
    assert outcomes[1]["one_rank_cannot"][0][0][0] == "missed"


def test_a_rank_that_does_not_compile_is_not_waited_for_longer_than_the_group_would(outcomes: Any) -> None:
    (only,), seconds = outcomes[0]["one_rank_in_eager"]
    assert only == ("missed", "rank 1 did not say in time whether it fuses this, too")
    assert TIMEOUT / 2 <= seconds < 1.5 * TIMEOUT


def killed(rank: int, world: int) -> Any:
    call = compiled(row_parallel)
    x, w = data(rank, 3, 4), data(10 + rank, 5, 4)
    call(x, w, None)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError) as failure:
        call(x, w, None)
    return statuses(), f"{type(failure.value).__module__} {failure.value}", time.monotonic() - started


def test_a_rank_killed_in_mid_step_is_the_groups_own_error() -> None:
    ((sites, error, seconds),) = ranks.run(2, killed, timeout=TIMEOUT, limit=120, lost=1)
    assert [s for s, _ in sites] == ["fused"]
    assert "gloo" in error and seconds < 1.5 * TIMEOUT
