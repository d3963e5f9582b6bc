"""Programs that scatter or gather rows around a matmul, on 2 ranks.

x [4, 2, 6], w [8, 6], v [10, 6], b [8], s [4, 2, 8]: `s` has the width of the product of x and w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.nn.functional import linear

SCATTERED: dict[str, Callable[..., Any]] = {}
GATHERED: dict[str, tuple[Callable[..., Any], int]] = {}
NEAR: dict[str, tuple[Callable[..., Any], str]] = {}


def scattered(f: Callable[..., Any]) -> Callable[..., Any]:
    SCATTERED[f.__name__] = f
    return f


def gathered(sites: int = 1) -> Callable[..., Any]:
    """A program in which that many gathers are fused with products."""

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        GATHERED[f.__name__] = (f, sites)
        return f

    return add


def near(reason: str) -> Callable[..., Any]:
    """A program that must be left alone, and a piece of the reason that the report must give."""

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        NEAR[f.__name__] = (f, reason)
        return f

    return add


def scatter(y: Any, dim: int = 0) -> Any:
    return funcol.reduce_scatter_tensor(y, "sum", dim, dist.group.WORLD)


def gather(x: Any, dim: int = 0) -> Any:
    return funcol.all_gather_tensor(x, dim, dist.group.WORLD)


def scatter_into(y: Any) -> Any:
    out = torch.empty(y.shape[0] // dist.get_world_size(), *y.shape[1:], dtype=y.dtype)
    dist.reduce_scatter_tensor(out, y)
    return out


def gather_into(x: Any) -> Any:
    out = torch.empty(x.shape[0] * dist.get_world_size(), *x.shape[1:], dtype=x.dtype)
    dist.all_gather_into_tensor(out, x)
    return out


def flat(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def batch_of_one(x: Any) -> Any:
    return x.reshape(1, -1, x.shape[-1])


# --- matmul + reduce-scatter -----------------------------------------------------------------------


@scattered
def functional(x, w, v, b, s):
    return scatter(linear(x, w)).sin()


@scattered
def in_place(x, w, v, b, s):
    return scatter_into(linear(x, w)).sin()


@scattered
def in_place_new_empty(x, w, v, b, s):
    y = linear(x, w)
    out = y.new_empty(y.shape[0] // 2, *y.shape[1:])
    dist.reduce_scatter_tensor(out, y)
    return out * 2


@scattered
def scatter_rows_of_mm(x, w, v, b, s):
    return scatter(torch.mm(flat(x), w.t())).sin()


@scattered
def scatter_mm_viewed(x, w, v, b, s):
    return scatter(torch.mm(flat(x), w.t()).view(x.shape[0], x.shape[1], -1)).sin()


@scattered
def scatter_matmul_as_it_is(x, w, v, b, s):
    return scatter(torch.matmul(s, w)).sin()


@scattered
def scatter_bias_inside(x, w, v, b, s):
    return scatter(linear(x, w, b)).sin()


@scattered
def scatter_bias_behind(x, w, v, b, s):
    return scatter(linear(x, w)) + b


@scattered
def scatter_batch_of_one(x, w, v, b, s):
    return scatter(linear(batch_of_one(x), w), 1).sin()


@scattered
def scatter_einsum(x, w, v, b, s):
    return scatter(torch.einsum("sbk,nk->sbn", x, w)).sin()


@scattered
def scatter_heads(x, w, v, b, s):
    return scatter(torch.einsum("sbhk,hkn->sbn", x.unflatten(-1, (2, 3)), w.t().contiguous().view(2, 3, 8))).sin()


@scattered
def scatter_raw_ops(x, w, v, b, s):
    library = torch.ops._c10d_functional
    started = library.reduce_scatter_tensor(linear(x, w), "sum", 2, dist.group.WORLD.group_name)
    return library.wait_tensor(started) + 1


@scattered
def scatter_written_later(x, w, v, b, s):
    y = scatter(linear(x, w))
    y.add_(1)
    return y.sin()


# --- all-gather + matmul ---------------------------------------------------------------------------


@gathered()
def gather_linear(x, w, v, b, s):
    return linear(gather(x), w).sin()


@gathered()
def gather_in_place(x, w, v, b, s):
    return linear(gather_into(x), w).sin()


@gathered()
def gather_bias(x, w, v, b, s):
    return linear(gather(x), w, b).sin()


@gathered()
def gather_matmul(x, w, v, b, s):
    return torch.matmul(gather(x), w.t()).sin()


@gathered()
def gather_rows(x, w, v, b, s):
    return torch.mm(flat(gather(x)), w.t()).sin()


@gathered()
def gather_addmm(x, w, v, b, s):
    return torch.addmm(b, flat(gather(x)), w.t()).sin()


@gathered()
def gather_batch_of_one(x, w, v, b, s):
    return linear(gather(batch_of_one(x), 1), w).sin()


@gathered()
def gather_to_heads(x, w, v, b, s):
    return torch.einsum("sbk,kgh->sbgh", gather(x), w.t().contiguous().view(6, 2, 4)).sin()


@gathered()
def two_products(x, w, v, b, s):
    g = gather(x)
    return linear(g, w).sin(), linear(g, v).cos()


@gathered()
def two_products_in_place(x, w, v, b, s):
    g = gather_into(x)
    return linear(g, w).sin(), linear(g, v).cos()


@gathered()
def three_products(x, w, v, b, s):
    g = gather(x)
    q = linear(g, w, b)
    return (q * q.sin()).sum(-1), torch.matmul(g, v.t()).tanh(), linear(g, w * 2)


@gathered()
def read_besides(x, w, v, b, s):
    g = gather(x)
    return linear(g, w).sin(), g.cos()


@gathered()
def viewed_besides(x, w, v, b, s):
    g = gather(x)
    return linear(g, w).sin(), torch.mm(flat(g), v.t()), flat(g)[0] * 2


@gathered(2)
def two_gathers(x, w, v, b, s):
    return linear(gather(x), w).sin() + linear(gather(x * 2), w)


# --- both ------------------------------------------------------------------------------------------


@gathered()
def layer(x, w, v, b, s):
    return scatter(linear(linear(gather(x), w).sin(), w.t())).cos()


# --- near misses -----------------------------------------------------------------------------------


@near("'avg'")
def averaged(x, w, v, b, s):
    return funcol.reduce_scatter_tensor(linear(x, w), "avg", 0, dist.group.WORLD)


@near("'max'")
def largest(x, w, v, b, s):
    return funcol.reduce_scatter_tensor(linear(x, w), "max", 0, dist.group.WORLD)


@near("scattered along dimension 1")
def scattered_inside(x, w, v, b, s):
    return scatter(linear(x, w), 1).sin()


@near("scattered along dimension 2")
def scattered_columns(x, w, v, b, s):
    return scatter(linear(x, w), 2).sin()


@near("scattered along dimension 1")
def scattered_inside_a_layer(x, w, v, b, s):
    return scatter(linear(gather(x, 1), w).sin() @ w, 1).cos()


@near("used besides its sum")
def product_used(x, w, v, b, s):
    y = linear(x, w)
    return scatter(y), y.sin()


@near("relu stands between")
def activation(x, w, v, b, s):
    return scatter(linear(x, w).relu())


@near("a sum of two products")
def sum_of_two(x, w, v, b, s):
    return scatter(linear(x, w) + linear(x.sin(), w))


@near("is cast before the sum")
def cast(x, w, v, b, s):
    return scatter(linear(x, w).double()).to(x.dtype)


@near("transposed in memory")
def weight_gradient(x, w, v, b, s):
    return scatter(flat(s).t() @ flat(x))


@near("changed in place")
def scaled_in_place(x, w, v, b, s):
    y = linear(x, w)
    y.mul_(2)
    return scatter(y)


@near("nothing reads the sum")
def sum_not_read(x, w, v, b, s):
    scatter(linear(x, w)) * 2
    return x.sin()


@near("was not made for it")
def given_buffer(x, w, v, b, s):
    out = s[: s.shape[0] // 2]
    dist.reduce_scatter_tensor(out, linear(x, w))
    return out.sin()


@near("gathered along dimension 1: rows would have to be moved behind")
def gathered_inside(x, w, v, b, s):
    return linear(gather(x, 1), w).sin()


@near("gathered along dimension 2")
def gathered_columns(x, w, v, b, s):
    return linear(gather(s[..., :3], 2), w).sin()


@near("")
def gathered_weight(x, w, v, b, s):
    return linear(x, gather(w)).sin()


@near("was not made for it")
def gathered_into_a_part(x, w, v, b, s):
    memory = x.new_empty(64 + x.numel() * 2)
    out = memory[: x.numel() * 2].view(x.shape[0] * 2, *x.shape[1:])
    dist.all_gather_into_tensor(out, x)
    return linear(out, w).sin()


@near("relu stands between the gather and the product")
def activated_behind(x, w, v, b, s):
    return linear(gather(x).relu(), w)


@near("changed in place")
def changed_behind(x, w, v, b, s):
    g = gather_into(x)
    y = linear(g, w)
    g.add_(1)
    return y.sin()


@near("another collective stands between")
def crossed(x, w, v, b, s):
    g = gather(x)
    t = funcol.all_reduce(s, "sum", dist.group.WORLD)
    return linear(g, w).sin(), t


@near("works between the collective")
def overlapped(x, w, v, b, s):
    library = torch.ops._c10d_functional
    started = library.all_gather_into_tensor(x, 2, dist.group.WORLD.group_name)
    other = (s * 2).sin()
    return linear(library.wait_tensor(started), w), other


@near("read besides")
def buffer_read(x, w, v, b, s):
    g = gather_into(x)
    return linear(g, w).sin(), g.cos()


@near("written in place")
def operand_written(x, w, v, b, s):
    c = x * 1
    g = gather(c)
    c.zero_()
    return linear(g, w).sin() + c.sum()


@near("written in place")
def weight_written(x, w, v, b, s):
    c = w * 1
    g = gather(x)
    y = linear(g, c)
    c.zero_()
    return y.sin() + linear(g, v).sum()


@near("")
def no_product(x, w, v, b, s):
    return scatter(s).sin(), gather(x).cos()
