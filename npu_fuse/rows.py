"""Leading dimensions around a fused call whose rows are scattered or gathered along the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from npu_fuse.emit import Emitter
from npu_fuse.view import is_one


def ones(leading: Sequence[Any]) -> int:
    """How many of these dimensions, of size 1, stand before the rows."""
    count = 0
    for size in leading[:-1]:
        if not is_one(size):
            break
        count += 1
    return count


def without(e: Emitter, value: Any, count: int) -> Any:
    """[1, …, rows…, K] → [rows…, K]"""
    for _ in range(count):
        value = e.call(torch.squeeze, value, 0)
    return value


def with_ones(e: Emitter, value: Any, count: int) -> Any:
    """[rows…, N] → [1, …, rows…, N]"""
    for _ in range(count):
        value = e.call(torch.unsqueeze, value, 0)
    return value


def flat(e: Emitter, value: Any, ahead: int) -> Any:
    """[rows…, N] with `ahead` leading dimensions → [rows, N]"""
    return e.call(torch.flatten, value, 0, ahead - 1) if ahead > 1 else value


def shaped(e: Emitter, value: Any, wanted: Sequence[Any], like: Any) -> Any:
    """[rows, N] → [*wanted, N], in the same order. Sizes that are not known are taken from `like`."""
    if len(wanted) == 1:
        return value
    first = next((i for i, size in enumerate(wanted) if not is_one(size)), 0)
    sizes = [-1 if i == first else e.size(size, like) for i, size in enumerate(wanted)]
    return e.call(torch.unflatten, value, 0, tuple(sizes))
