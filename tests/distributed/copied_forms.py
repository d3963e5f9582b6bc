"""Column-parallel products in autograd functions: copied forward, the gradient summed over ranks; as `forms`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from .forms import copy_to_region, flat, function, total, total_

COPIED: dict[str, tuple[Callable[..., Any], int]] = {}
"""Programs, and the number of products whose gradient is fused with its sum."""


def copied(sites: int) -> Callable[..., Any]:
    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        COPIED[f.__name__] = (f, sites)
        return f

    return add


copy_functionally = function(lambda x: x.view_as(x), total)
copy_and_scale = function(lambda x: x.view_as(x), lambda g: total_(g.clone()) * 2)


@copied(1)
def column_parallel(x, w, b, r):
    return linear(copy_to_region(x), w).sin()


@copied(1)
def column_parallel_bias(x, w, b, r):
    return linear(copy_functionally(x), w, b).sin()


@copied(1)
def column_parallel_matmul(x, w, b, r):
    return torch.matmul(copy_to_region(x), w.t()).sin()


@copied(1)
def column_parallel_rows(x, w, b, r):
    return torch.addmm(b, flat(copy_to_region(x)), w.t()).sin()


@copied(2)
def columns_copied_apart(x, w, b, r):
    return linear(copy_to_region(x), w).sin() * linear(copy_to_region(x), w * 2)


@copied(0)
def columns_that_share_a_copy(x, w, b, r):
    c = copy_to_region(x)
    return linear(c, w).sin() * linear(c, w * 2)


@copied(0)
def copy_read_besides(x, w, b, r):
    c = copy_to_region(x)
    return linear(c, w).sin(), c.cos()


@copied(0)
def copy_activated(x, w, b, r):
    return linear(copy_to_region(x).relu(), w).sin()


@copied(0)
def copy_whose_gradient_is_scaled(x, w, b, r):
    return linear(copy_and_scale(x), w).sin()


@copied(0)
def copied_weight(x, w, b, r):
    return linear(x, copy_to_region(w)).sin()
