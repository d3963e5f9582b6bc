"""The stand-in's kernels: every aten operator on host memory, and the `npu::` operators of this folder.

`counts()` gives what torch_npu would have launched since `reset_counts()`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

refused: tuple[str, ...] = ()
"""Operators that torch_npu has a kernel for and the stand-in has not: they raise."""


@dataclass(frozen=True)
class Count:
    """Launches of one operator; bytes of its distinct tensor inputs, and of what it wrote."""

    launches: int
    read: int
    written: int


def install() -> None:
    """Register the kernels. torch_npu has been imported."""
    global refused
    if refused:
        return
    torch.ops.load_library(os.path.join(os.environ["NPU_HOST"], "kernels.so"))
    from npu_host_ops import (  # noqa: F401  (they register themselves)
        attention,
        casts,
        communication,
        experts,
        gates,
        gating,
        matmul,
        norms,
        rotary,
        routing,
        wider,
    )

    refused = tuple(torch.ops.npu_host._install())


def counts() -> dict[str, Count]:
    """By operator: what ran on the device since `reset_counts()`."""
    names, numbers = torch.ops.npu_host._counts()
    return {name: Count(*numbers[3 * i : 3 * i + 3]) for i, name in enumerate(names)}


def reset_counts() -> None:
    torch.ops.npu_host._reset_counts()
