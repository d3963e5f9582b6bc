"""Gathered rows times several weights, the gathered value not kept: all_gather(x1) @ x2, once more for gradients.

x1 [m, …, K] (this rank's rows), x2 a list of [K, N]; y [m · ranks, …, N] of each. The weights' gradients
gather x1 again, once for all of them, so that a rank keeps its own rows only: what Megatron's layers do, and the option
mc2_gather="again" asks for. The gradient of x1 is a product and a reduce-scatter in one call, or the sum of several
products, scattered once. `all_gather_mm` has the rule.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_fuse import communicate, groups, mc2, ops, products

NAME = "all_gather_mms"


def _forward(
    x1: torch.Tensor, x2: list[torch.Tensor], biases: list[torch.Tensor], biased: int, group: str, size: int,
    min_rows: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Products whose bit is set in `biased` have a bias. The kernel adds none to the first, which is a product then."""
    vectors = dict(zip(_set_bits(biased, len(x2)), biases, strict=True))
    ahead = (x1.shape[0] * size, *x1.shape[1:-1])
    made: list[torch.Tensor] = []
    if 0 not in vectors and mc2.runs_fused(x1, x1.numel() // x1.shape[-1] * size, min_rows, group):
        flat = x1 if x1.dim() == 2 else x1.reshape(-1, x1.shape[-1])
        call = torch.ops.npu.npu_all_gather_base_mm.default
        whole = len(x2) > 1
        first, gathered = call(flat, x2[0], groups.communicator(group), size, gather_output=whole)
        made.append(first.view(*ahead, x2[0].shape[1]))
        gathered = gathered.view(*ahead, x1.shape[-1]) if whole else gathered
    else:
        gathered = communicate.all_gather(x1, group, size)
    for i in range(len(made), len(x2)):
        made.append(torch.nn.functional.linear(gathered, x2[i].t(), vectors.get(i)))
    return made


def _fake(
    x1: torch.Tensor, x2: list[torch.Tensor], biases: Any, biased: Any, group: str, size: int, min_rows: int
) -> list[torch.Tensor]:
    return [x1.new_empty(x1.shape[0] * size, *x1.shape[1:-1], w.shape[1]) for w in x2]


def _set_bits(number: int, count: int) -> list[int]:
    return [i for i in range(count) if number >> i & 1]


def _gather_again(x1: torch.Tensor, dy: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """x1 of all ranks, when a gradient is there."""
    return communicate.all_gather(x1, group, size)


def _gather_again_fake(x1: torch.Tensor, dy: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return x1.new_empty(x1.shape[0] * size, *x1.shape[1:])


def _stays(*_: Any) -> Any:
    """A gather that needs no gradient is taken into the forward by compilers, as one with the other, and kept."""
    return NotImplemented


ops.define(
    "all_gather_again(Tensor x1, Tensor dy, str group, int size) -> Tensor", _gather_again, fake=_gather_again_fake,
    expand=_stays,
)  # fmt: skip


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x1, x2, _, ctx.biased, ctx.group, ctx.size, ctx.min_rows = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x1, *x2)


def _backward(ctx: Any, grads: list[Any]) -> Any:
    """dx1 = reduce_scatter(Σ dy · x2ᵀ), dx2 = gathered x1ᵀ · dy, dbias = Σ dy."""
    x1, *x2 = ctx.saved_tensors
    used = [(dy, w) for dy, w in zip(grads, x2, strict=True) if dy is not None]
    dx1 = None
    if ctx.needs_input_grad[0] and len(used) == 1:
        scatter = ops.backward_op("mm_reduce_scatter")
        dx1 = scatter(used[0][0], used[0][1].t(), None, ctx.group, ctx.size, 1, ctx.min_rows)
    elif ctx.needs_input_grad[0] and used:
        total = torch.matmul(used[0][0], used[0][1].t())
        for dy, w in used[1:]:
            total = total + torch.matmul(dy, w.t())
        dx1 = communicate.reduce_scatter(total, ctx.group, ctx.size)
    wanted = [dy is not None and bool(need) for dy, need in zip(grads, ctx.needs_input_grad[1], strict=True)]
    gathered = x1
    if any(wanted):
        gathered = ops.backward_op("all_gather_again")(x1, used[0][0], ctx.group, ctx.size)
    dx2 = [
        products.weight_gradient(gathered, dy, w) if need else None
        for dy, w, need in zip(grads, x2, wanted, strict=True)
    ]  # fmt: skip
    biased = [grads[i] for i in _set_bits(ctx.biased, len(x2))]
    sums = [None if dy is None else dy.reshape(-1, dy.shape[-1]).sum(0) for dy in biased]
    return dx1, dx2, sums, None, None, None, None


ops.define(
    "all_gather_mms(Tensor x1, Tensor[] x2, Tensor[] biases, int biased, str group, int size, int min_rows)"
    " -> Tensor[]", _forward, keeps=(0,), fake=_fake, expand=_forward,
)  # fmt: skip
ops.differentiable(NAME, _backward, _setup)
