"""Autograd functions around rows that are scattered or gathered, and around products, as Megatron writes them.

On 2 ranks; x [4, 2, 6], w [8, 6], v [10, 6], b [8], s [4, 2, 8]: `s` has the width of the product of x and w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear

from .forms import flat, function, own, total, total_
from .row_forms import gather, gather_into, scatter, scatter_into

FUSED: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {}
"""Programs, the ops that stand in their graphs in training, and in inference, where functions are inlined."""
NEAR: dict[str, tuple[Callable[..., Any], str]] = {}
AG, RS, AR, COPIED = "all_gather_mm", "mm_reduce_scatter", "mm_all_reduce", "mm_copied"


def fused(*training: str, inference: tuple[str, ...] | None = None) -> Callable[..., Any]:
    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        FUSED[f.__name__] = (f, training, training if inference is None else inference)
        return f

    return add


def near(reason: str) -> Callable[..., Any]:
    """A program that must be left alone in training, and a piece of the reason that the report must give."""

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        NEAR[f.__name__] = (f, reason)
        return f

    return add


BUFFER = torch.empty(1024)


def gather_into_a_shared_buffer(x: Any) -> Any:
    """As Megatron's global memory buffer: all layers gather into the same memory."""
    whole = (x.shape[0] * dist.get_world_size(), *x.shape[1:])
    out = BUFFER[: x.numel() * dist.get_world_size()].view(whole)
    dist.all_gather_into_tensor(out, x)
    return out


def half(x: Any) -> Any:
    """This rank's part of the rows."""
    return x.chunk(dist.get_world_size(), 0)[dist.get_rank()]


gather_region = function(lambda x: gather_into(x.contiguous()), lambda g: scatter_into(g.contiguous()))
scatter_region = function(lambda x: scatter_into(x.contiguous()), lambda g: gather_into(g.contiguous()))
gather_functionally = function(gather, scatter)
scatter_functionally = function(scatter, gather)
gather_and_split = function(gather_into, half)
gather_without_sum = function(gather_into, lambda g: half(g).clone())
scatter_and_scale = function(lambda x: scatter_into(x) * 2, lambda g: gather_into(g) * 2)
scatter_a_scaled_gradient = function(scatter_into, lambda g: gather_into(g * 2))
gather_other_rows = function(lambda x: gather(x, 1), lambda g: scatter(g, 1))


# --- one collective in a function, the product outside ---------------------------------------------


@fused(AG)
def gathered(x, w, v, b, s):
    return linear(gather_region(x), w).sin()


@fused(AG)
def gathered_functionally(x, w, v, b, s):
    return torch.addmm(b, flat(gather_functionally(x)), w.t()).sin()


@fused(AG)
def gathered_for_two(x, w, v, b, s):
    g = gather_region(x)
    return linear(g, w).sin(), linear(g, v).cos()


@fused(AG)
def gathered_and_read(x, w, v, b, s):
    g = gather_functionally(x)
    return linear(g, w).sin(), g.cos()


@fused(RS)
def scattered(x, w, v, b, s):
    return scatter_region(linear(x, w)).sin()


@fused(RS)
def scattered_functionally(x, w, v, b, s):
    return scatter_functionally(torch.mm(flat(x), w.t())).sin() + b


@fused(AG, RS)
def sequence_parallel_layer(x, w, v, b, s):
    return scatter_region(linear(linear(gather_region(x), w, b).tanh(), w.t())).cos()


# --- a product in a function -----------------------------------------------------------------------


def linear_function(
    before: Any, after: Any, grad_before: Any, grad_after: Any, keep: bool = False, by_rows: bool = True,
    grad_weight: Any = own, right: Any = own,
) -> Callable[..., Any]:  # fmt: skip
    """x, w, bias → after(before(x) · w + bias), with its gradient by hand, as Megatron's linear layers have it."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, bias):
            whole = before(x)
            ctx.save_for_backward(whole if keep else x, w)
            ctx.has_bias = bias is not None
            y = torch.matmul(whole, w.t() if by_rows else w)
            return after(y if bias is None else y + bias)

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            whole = x if keep else before(x)
            grad = grad_before(grad)
            dx = grad_after(grad.matmul(right(w if by_rows else w.t())))
            rows, values = grad.reshape(-1, grad.shape[-1]), whole.reshape(-1, whole.shape[-1])
            dw = rows.t().matmul(values) if by_rows else values.t().matmul(rows)
            return dx, grad_weight(dw), rows.sum(dim=0) if ctx.has_bias else None

    return Made.apply


plain_linear = linear_function(own, own, own, own)
plain_matmul = linear_function(own, own, own, own, by_rows=False)
gathering_linear = linear_function(gather_into, own, own, scatter_into)
gathering_and_keeping = linear_function(gather_into, own, own, scatter_into, keep=True)
copying_linear = linear_function(own, own, own, total_)
copying_matmul = linear_function(own, own, own, total, by_rows=False)
reducing_linear = linear_function(own, total_, own, own)
reducing_both_ways = linear_function(own, total, total, own)
scattering_linear = linear_function(own, scatter_into, gather_into, own)
halving_linear = linear_function(own, own, own, lambda g: total_(g) / 2)
reducing_the_weights_too = linear_function(own, own, total, own)
doubling_the_weights = linear_function(gather_into, own, own, scatter_into, grad_weight=lambda g: g * 2)
losing_the_weights = linear_function(own, scatter_into, gather_into, own, grad_weight=lambda g: None)
turning_the_weight = linear_function(own, own, own, total_, right=lambda w: w.t())
gathering_in_shared_memory = linear_function(gather_into_a_shared_buffer, own, own, scatter_into)
forgetting_the_sum = linear_function(gather_into, own, own, half)


@fused(AG)
def gathered_inside(x, w, v, b, s):
    return gathering_linear(x, w, None).sin()


@fused(AG)
def gathered_inside_bias(x, w, v, b, s):
    return gathering_linear(x, w, b).sin()


@fused(AG)
def gathered_inside_and_kept(x, w, v, b, s):
    return gathering_and_keeping(x, w, b).sin()


@fused(COPIED, inference=())
def copied_inside(x, w, v, b, s):
    return copying_linear(x, w, b).sin()


@fused(COPIED, inference=())
def copied_inside_as_it_is(x, w, v, b, s):
    return copying_matmul(s, w, None).sin()


@fused(AR)
def reduced_inside(x, w, v, b, s):
    return reducing_linear(x, w, b).relu()


@fused(AR)
def reduced_inside_both_ways(x, w, v, b, s):
    return reducing_both_ways(x, w, None).sin()


@fused(RS)
def scattered_inside(x, w, v, b, s):
    return scattering_linear(x, w, None).sin()


@fused(RS)
def scattered_inside_bias(x, w, v, b, s):
    return scattering_linear(x, w, b).relu()


@fused(AR)
def product_function_reduced(x, w, v, b, s):
    return total(plain_linear(x, w, b)).relu()


@fused(AG)
def product_function_of_gathered(x, w, v, b, s):
    return plain_linear(gather_region(x), w, None).sin()


@fused(AG, RS)
def megatron_sequence_parallel(x, w, v, b, s):
    """Column- and row-parallel layers of Megatron-core with sequence parallelism, collectives not asynchronous."""
    h = gathering_linear(x, w, b).tanh()
    return x + scatter_region(plain_matmul(h, w, None))


@fused(COPIED, AR, inference=(AR,))
def megatron_tensor_parallel(x, w, v, b, s):
    return x + total(plain_matmul(copying_linear(x, w, b).tanh(), w, None))


# --- near misses -----------------------------------------------------------------------------------


@near("backward getitem is computed")
def gradient_split(x, w, v, b, s):
    return linear(gather_without_sum(x), w).sin()


@near("chunk|getitem|backward")
def gradient_split_in_view(x, w, v, b, s):
    return linear(gather_and_split(x), w).sin()


@near("in the autograd function mul is computed")
def scattered_and_scaled(x, w, v, b, s):
    return scatter_and_scale(linear(x, w)).sin()


@near("gives back no gathered value")
def gradient_scaled(x, w, v, b, s):
    return scatter_a_scaled_gradient(linear(x, w)).sin()


@near("in the autograd function")
def gathered_along_another(x, w, v, b, s):
    return linear(gather_other_rows(x), w).sin()


@near("not beside its product")
def half_the_gradient(x, w, v, b, s):
    return halving_linear(x, w, b).sin()


@near("")
def gradient_of_another_sum(x, w, v, b, s):
    return reducing_the_weights_too(x, w, b).sin()


@near("not the gradient of the product")
def unsummed_gradient(x, w, v, b, s):
    return forgetting_the_sum(x, w, b).sin()


@near("not the gradient of the product")
def doubled_weight_gradient(x, w, v, b, s):
    return doubling_the_weights(x, w, b).sin()


@near("not the gradient of the product")
def lost_weight_gradient(x, w, v, b, s):
    return losing_the_weights(x, w, b).sin()


@near("not the gradient of the product")
def turned_weight(x, w, v, b, s):
    """A square weight, whose transpose fits as well."""
    return turning_the_weight(x, w.t() @ w, None).sin()


@near("add is computed|autograd function")
def given_rows_written(x, w, v, b, s):
    return adding_first(x * 1, w).sin()


@near("a part of a value is written")
def gathered_in_shared_memory(x, w, v, b, s):
    return gathering_in_shared_memory(x, w, b).sin()


@near("several values")
def two_results(x, w, v, b, s):
    first, second = twice(linear(x, w))
    return first.sin() + second.cos()


class _AddingFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        x.add_(1)
        ctx.save_for_backward(x, w)
        return scatter_into(x.matmul(w.t()))

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        whole = gather_into(grad)
        return whole.matmul(w), flat(whole).t().matmul(flat(x))


adding_first = _AddingFirst.apply


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return scatter_into(y), scatter_into(y * 2)

    @staticmethod
    def backward(ctx, first, second):
        return gather_into(first) + gather_into(second) * 2


twice = _Twice.apply
