"""Programs with a matmul and an all-reduce, each in one spelling; x [2, S, 6], w [8, 6], b [8], r [2, S, 8]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.nn.functional import linear

FUSED: dict[str, Callable[..., Any]] = {}
NEAR: dict[str, tuple[Callable[..., Any], str]] = {}


def fused(f: Callable[..., Any]) -> Callable[..., Any]:
    FUSED[f.__name__] = f
    return f


def near(reason: str) -> Callable[..., Any]:
    """A program that must be left alone, and a piece of the reason that the report must give."""

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        NEAR[f.__name__] = (f, reason)
        return f

    return add


def total(y: Any) -> Any:
    return funcol.all_reduce(y, "sum", dist.group.WORLD)


def total_(y: Any) -> Any:
    dist.all_reduce(y)
    return y


def flat(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


# --- linear, and where the bias is added -----------------------------------------------------------


@fused
def functional(x, w, b, r):
    return total(linear(x, w)) + r


@fused
def in_place(x, w, b, r):
    return total_(linear(x, w)) + r


@fused
def bias_inside(x, w, b, r):
    return total(linear(x, w, b)).relu()


@fused
def bias_inside_in_place(x, w, b, r):
    return total_(linear(x, w, b)).relu()


@fused
def bias_added_inside(x, w, b, r):
    return total(b + linear(x, w)).relu()


@fused
def bias_after(x, w, b, r):
    return total(linear(x, w)) + b


@fused
def bias_divided(x, w, b, r):
    return total_(linear(x, w, b / dist.get_world_size()))


@fused
def average_by_hand(x, w, b, r):
    return total(linear(x, w)) / dist.get_world_size()


@fused
def raw_ops(x, w, b, r):
    library = torch.ops._c10d_functional
    return library.wait_tensor(library.all_reduce(linear(x, w), "sum", dist.group.WORLD.group_name)) * r


@fused
def read_as_rows(x, w, b, r):
    y = linear(x, w)
    dist.all_reduce(y)
    return flat(y).sin()


@fused
def written_later(x, w, b, r):
    y = total_(linear(x, w))
    y.add_(r)
    return y.mul(2)


@fused
def two_in_a_row(x, w, b, r):
    return total_(linear(total_(linear(x, w)).tanh(), w.t())).sin()


@fused
def sum_given_back(x, w, b, r):
    y = linear(x, w)
    dist.all_reduce(y)
    return y


# --- other products --------------------------------------------------------------------------------


@fused
def matmul(x, w, b, r):
    return total(x @ w.t())


@fused
def matmul_as_it_is(x, w, b, r):
    return total(torch.matmul(r, w))


@fused
def matmul_method(x, w, b, r):
    return total_(x.matmul(w.t().contiguous()))


@fused
def mm(x, w, b, r):
    y = torch.mm(flat(x), w.t()).view(*x.shape[:-1], -1)
    dist.all_reduce(y)
    return y + b


@fused
def mm_reduced_in_rows(x, w, b, r):
    return total_(torch.mm(flat(x), w.t())).view(*x.shape[:-1], -1)


@fused
def mm_reshaped(x, w, b, r):
    return total(torch.mm(flat(x), w.t()).reshape(r.shape[0], -1, 8).contiguous()).sin()


@fused
def addmm(x, w, b, r):
    return total(torch.addmm(b, flat(x), w.t()))


@fused
def bmm(x, w, b, r):
    return total(torch.bmm(x, w.t().expand(x.shape[0], -1, -1)))


@fused
def bmm_unsqueezed(x, w, b, r):
    return total_(torch.bmm(flat(x).unsqueeze(0), w.t().unsqueeze(0))).squeeze(0)


@fused
def einsum(x, w, b, r):
    return total(torch.einsum("bsk,nk->bsn", x, w))


@fused
def einsum_of_heads(x, w, b, r):
    return total_(torch.einsum("bsnh,nhd->bsd", x.unflatten(-1, (2, 3)), w.t().contiguous().view(2, 3, 8)))


@fused
def einsum_to_heads(x, w, b, r):
    return total(torch.einsum("bsk,kgh->bsgh", x, w.t().contiguous().view(6, 2, 4)))


@fused
def tensordot(x, w, b, r):
    return total(torch.tensordot(x, w, dims=([2], [1])))


@fused
def permuted_and_back(x, w, b, r):
    return total(linear(x, w).permute(0, 1, 2).contiguous())


@fused
def from_rows_of_heads(x, w, b, r):
    heads = x.unflatten(-1, (2, 3)).transpose(1, 2).contiguous()
    return total_(linear(heads.transpose(1, 2).reshape(*x.shape[:-1], 6), w))


@fused
def under_no_grad_scope(x, w, b, r):
    with torch.no_grad():
        y = total(linear(x, w))
    return y * r


# --- autograd functions ----------------------------------------------------------------------------


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad)

    return Made.apply


def own(x: Any) -> Any:
    return x


def reduce_contiguous(x: Any) -> Any:
    dist.all_reduce(x.contiguous())
    return x


def reduce_clone(x: Any) -> Any:
    return total_(x.clone())


reduce_from_region = function(total_, own)
reduce_contiguously = function(reduce_contiguous, own)
reduce_a_clone = function(reduce_clone, own)
reduce_both_ways = function(total_, lambda g: total_(g.clone()))
reduce_functionally = function(total, own)
reduce_and_scale = function(lambda y: total_(y) * 2, own)
scale_the_gradient = function(total_, lambda g: g * 2)
copy_to_region = function(lambda x: x.view_as(x), lambda g: total_(g.clone()))


@fused
def megatron(x, w, b, r):
    return reduce_from_region(linear(x, w)) + b


@fused
def megatron_contiguous(x, w, b, r):
    return reduce_contiguously(torch.matmul(x, w.t())) + r


@fused
def megatron_clone(x, w, b, r):
    return reduce_a_clone(linear(x, w, b)).sin()


@fused
def function_both_ways(x, w, b, r):
    return reduce_both_ways(linear(x, w)) + r


@fused
def functional_in_function(x, w, b, r):
    return reduce_functionally(torch.mm(flat(x), w.t()).view(*x.shape[:-1], -1)) * r


@fused
def megatron_layer(x, w, b, r):
    return reduce_from_region(linear(linear(copy_to_region(x), w, b).relu(), w.t())).sin()


# --- near misses -----------------------------------------------------------------------------------


@near("'max'")
def maximum(x, w, b, r):
    y = linear(x, w)
    dist.all_reduce(y, op=dist.ReduceOp.MAX)
    return y


@near("'product'")
def product(x, w, b, r):
    y = linear(x, w)
    dist.all_reduce(y, op=dist.ReduceOp.PRODUCT)
    return y


@near("used besides its sum")
def product_given_back(x, w, b, r):
    y = linear(x, w)
    return total(y), y


@near("used besides its sum")
def product_used_too(x, w, b, r):
    y = linear(x, w)
    return total(y) + y


@near("before it is reduced")
def used_before(x, w, b, r):
    y = linear(x, w)
    z = y * 2
    dist.all_reduce(y)
    return y + z


@near("read before it is reduced")
def view_taken_before(x, w, b, r):
    y = linear(x, w)
    rows = y.view(-1, 8)
    dist.all_reduce(y)
    return rows * 2 + y.sum()


@near("getitem stands between")
def part_reduced(x, w, b, r):
    y = linear(x, w)
    dist.all_reduce(y[:1])
    return y


@near("changed in place")
def scaled_in_place(x, w, b, r):
    y = linear(x, w)
    y.mul_(r)
    dist.all_reduce(y)
    return y


@near("a sum of two products")
def two_products(x, w, b, r):
    return total(linear(x, w) + linear(x * 2, w * b.unsqueeze(1)))


@near("relu stands between")
def activation(x, w, b, r):
    return total(linear(x, w).relu())


@near("mul stands between")
def scaled(x, w, b, r):
    return total(linear(x, w) * 2)


@near("is cast before the sum")
def cast(x, w, b, r):
    return total(linear(x, w).double()).to(x.dtype)


@near("transpose stands between")
def rows_permuted(x, w, b, r):
    return total(linear(x, w).transpose(0, 1).contiguous())


@near("add stands between")
def residual_inside(x, w, b, r):
    return total(linear(x, w) + r)


@near("transposed in memory")
def weight_gradient(x, w, b, r):
    return total(flat(r).t() @ flat(x))


@near("a weight of its own")
def batched(x, w, b, r):
    return total(torch.bmm(x, x.transpose(1, 2)))


@near("written in place")
def operand_written(x, w, b, r):
    c = x * 1
    y = linear(c, w)
    c.zero_()
    dist.all_reduce(y)
    return y + c.sum()


@near("another collective")
def crossed(x, w, b, r):
    library, name = torch.ops._c10d_functional, dist.group.WORLD.group_name
    first = library.all_reduce(linear(x, w), "sum", name)
    second = library.all_reduce(r, "sum", name)
    return library.wait_tensor(first) + library.wait_tensor(second)


@near("works between the collective")
def overlapped(x, w, b, r):
    library = torch.ops._c10d_functional
    started = library.all_reduce(linear(x, w), "sum", dist.group.WORLD.group_name)
    other = (r * 2).sin()
    return library.wait_tensor(started) + other


@near("mul is computed")
def function_scales(x, w, b, r):
    return reduce_and_scale(linear(x, w))


@near("backward mul is computed")
def function_scales_the_gradient(x, w, b, r):
    return scale_the_gradient(linear(x, w))


@near("used besides its sum|read before")
def function_argument_used(x, w, b, r):
    y = linear(x, w)
    return reduce_a_clone(y) + y


@near("nothing reads the sum")
def not_read(x, w, b, r):
    y = total(linear(x, w))
    y * 2
    return r.sin()


@near("")
def no_product(x, w, b, r):
    return total(r) * 2


@near("")
def operand_reduced(x, w, b, r):
    return linear(total(x), w)
