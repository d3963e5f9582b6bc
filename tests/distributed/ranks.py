"""Run a function on several ranks, each a process of its own over gloo, and never wait for ever."""

from __future__ import annotations

import datetime
import multiprocessing
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

PRELOADED = ["torch", "torch.distributed.tensor", "torch._dynamo", "torch._inductor.compile_fx", "npu_fuse.backend"]
ALONE = Path(tempfile.gettempdir()) / "npu_fuse_ranks.lock"
"""Workers of pytest-xdist take turns: ranks that compete for cores run into their groups' timeouts."""
LIMIT = 500.0
"""Seconds for one run; the machine may be busy."""


class RankFailed(AssertionError):
    """A rank raised, ended without a word, or did not end in time."""


def run(
    world: int, work: Callable[..., Any], *args: Any, limit: float = LIMIT, timeout: float = 60.0, lost: int = 0
) -> list[Any]:  # fmt: skip
    """`work(rank, world, *args)` on every rank; its results by rank. The last `lost` ranks are not waited for.

    `timeout` is the process group's own, in seconds. Raises `RankFailed` with the traceback of the first rank
    that failed; ranks that are left are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results: Any = context.Queue()
    with FileLock(ALONE), tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_rank, args=(rank, world, f"{folder}/store", timeout, results, work, args))
            for rank in range(world)
        ]
        for process in started:
            process.start()
        try:
            return _collect(world - lost, started, results, time.monotonic() + limit)
        finally:
            for process in started:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(world: int, started: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < world:
        try:
            rank, failure, value = results.get(timeout=0.5)
        except queue.Empty:
            ended = [r for r, p in enumerate(started[:world]) if r not in found and p.exitcode not in (None, 0)]
            if ended:
                raise RankFailed(f"rank {ended[0]} ended with {started[ended[0]].exitcode}") from None
            if time.monotonic() > deadline:
                missing = sorted(set(range(world)) - set(found))
                raise RankFailed(f"ranks {missing} did not end in time") from None
            continue
        if failure:
            raise RankFailed(f"rank {rank}:\n{failure}")
        found[rank] = value
    return [found[rank] for rank in range(world)]


def _rank(rank: int, world: int, store: str, timeout: float, results: Any, work: Any, args: Any) -> None:
    import torch
    import torch._dynamo.guards
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0  # 0.15 s a compile, and nobody reads it here
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )  # fmt: skip
        value = work(rank, world, *args)
        results.put((rank, "", value))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise
