"""A rank that is killed in mid-step: the others get the process group's own error in time, in every fused op."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from . import ranks
from .forms import total
from .row_forms import gather, scatter

pytestmark = pytest.mark.distributed

TIMEOUT = 20.0
"""Of the process group, in seconds; a rank asks others for half of it."""


def summed(x: Any, w: Any) -> Any:
    return total(linear(x, w)).sin()


def sequence_parallel(x: Any, w: Any) -> Any:
    return scatter(linear(linear(gather(x), w).tanh(), w.t())).sin()


PROGRAMS: dict[str, Callable[..., Any]] = {"summed": summed, "sequence parallel": sequence_parallel}
MOMENTS = ("compiling", "forward", "backward")


def step(rank: int, world: int, program: str, moment: str) -> tuple[str, str, float, int]:
    """What the rank that is left gets: an error's type, its words, after how long, and how much was fused before."""
    import npu_fuse

    def end(*_: Any) -> None:
        if rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    compiled = torch.compile(
        PROGRAMS[program], backend="npu_fuse", options={"target": "reference", "handoff": "aot_eager"}
    )
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    if moment != "compiling":
        compiled(x, w).sum().backward()
    fused = sum(str(s.status) == "fused" for r in npu_fuse.reports() for s in r.sites)
    if moment != "backward":
        end()
    started = time.monotonic()
    try:
        y = compiled(x, w)
        if moment == "backward":
            end()
        y.sum().backward()
    except Exception as fault:
        return type(fault).__name__, str(fault), time.monotonic() - started, fused
    return "", "", time.monotonic() - started, fused


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_others_get_the_groups_error_in_time(program: str, moment: str) -> None:
    found = ranks.run(2, step, program, moment, limit=120, timeout=TIMEOUT, lost=1)
    kind, words, seconds, fused = found[0]
    assert kind in ("RuntimeError", "DistBackendError", "DistNetworkError") and "gloo" in words.lower(), (kind, words)
    assert seconds < 1.5 * TIMEOUT, seconds
    assert bool(fused) == (moment != "compiling")
