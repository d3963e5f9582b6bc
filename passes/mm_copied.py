"""A product of a value that all ranks have, with this rank's part of a weight: its gradient is one fused call.

y = x1 @ x2 with x1 [..., K] alike on all ranks and x2 [K, N] (this rank's columns): a column-parallel layer. Forward
nothing is communicated. Backward the gradient of x1 is a product summed over ranks, all_reduce(dy @ x2ᵀ)  →
npu_mm_all_reduce_base; that of x2 stays local. The all-reduce is the graph's own, in an autograd function's backward or
DTensor's; only a sum of one product is fused, never one of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import copies, dtensors, groups, mc2, mc2_split, ops, products
from npu_fuse import dialect as d
from npu_fuse.emit import Emitter
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View

NAME = "mm_copied"
OP = "npu_mm_all_reduce_base"


# --- the op ----------------------------------------------------------------------------------------


def _forward(
    x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor | None, group: str, min_rows: int, kernel: str
) -> torch.Tensor:
    """x1 [..., K], x2 [K, N], bias [N] → [..., N]."""
    return torch.nn.functional.linear(x1, x2.t(), bias)


def _fake(x1: torch.Tensor, x2: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x1.new_empty(*x1.shape[:-1], x2.shape[1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x1, x2, bias, ctx.group, ctx.min_rows, ctx.kernel = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x1, x2)


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    """dx1 = all_reduce(dy · x2ᵀ) in one call, dx2 = x1ᵀ · dy, dbias = Σ dy."""
    x1, x2 = ctx.saved_tensors
    dx1 = dx2 = dbias = None
    if ctx.needs_input_grad[0]:
        reduce = ops.backward_op("mm_all_reduce")
        dx1 = reduce(dy, x2.t(), None, ctx.group, 1, "identity", ctx.min_rows, ctx.kernel)
    if ctx.needs_input_grad[1]:
        dx2 = products.weight_gradient(x1, dy, x2)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx1, dx2, dbias, None, None, None


ops.define(
    "mm_copied(Tensor x1, Tensor x2, Tensor? bias, str group, int min_rows, str kernel) -> Tensor",
    _forward, keeps=(0, 1), fake=_fake, expand=_forward,
)  # fmt: skip
ops.differentiable("mm_copied", _backward, _setup)


# --- the rule --------------------------------------------------------------------------------------


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for node in view.nodes if groups.initialised() else ():
        copied = copies.find(view, node) if node.op == "call_function" else None
        if isinstance(copied, str):
            found.append(Miss(NAME, node, f"{NAME}.product", copied))
        elif copied is not None:
            made = d.tensor(copied.value)
            if made is not None and made.requires_grad:
                found.append(_site(view, copied))
    return found


def _site(view: View, copied: copies.Copied) -> Site:
    product, group = copied.product, copied.group
    result = d.local(product.node)
    assert result is not None
    wrapped = dtensors.layout_of(copied.value)

    width, _ = mc2.widths(product)

    def emit_split(e: Emitter, env: Mapping[Node, Any]) -> Any:
        return emit(e, env, mc2_split.SPLIT)

    def emit(e: Emitter, env: Mapping[Node, Any], kernel: str = mc2_split.WHOLE) -> Any:
        least = e.target.min_rows if kernel == OP else mc2_split.rows_for(e.target, width, group.size)
        x = e.local(env[copied.source])
        for move in copied.moves:
            x = e.moved(move, x)
        x1, x2, bias = replace(product, x=copied.source).operands(e, {**env, copied.source: x}, result.dtype)
        y = product.shaped(e, e.fused(NAME, x1, x2, bias, e.group(group), least, kernel), env)
        return e.wrapped(y, env[product.w], wrapped.placements) if wrapped is not None else y

    inputs = tuple(dict.fromkeys(n for n in (copied.source, product.w, product.bias) if n is not None))
    params = {
        "ranks": str(group.size), "weight": "transposed view" if product.transposed else "as it is",
        "gradient": "all_reduce",
    }  # fmt: skip
    key = (*product.key, group.size)
    note = mc2_split.modelled(product, group.size, backward=True)
    forms = (Form("as it is", emit, key), Form(mc2_split.FORM, emit_split, key, note))
    return Site(
        NAME, copied.value, inputs, tuple(sorted(copied.nodes, key=view.position.__getitem__)), forms, copied.anchor,
        params, stand_ins=copied.stand_ins, pool=(3, 5, 7, 4, 6, 8),
        facts={"kept": 0, "group": group, "x": copied.source, "w": product.w, "sums": True, "product": product,
               "bias": False, "dtensors": dtensors.layout_of(product.node) is not None},
    )  # fmt: skip


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_mm_all_reduce_base in the backward: chips, ranks, dtypes, and what pays."""
    if form.name == mc2_split.FORM:
        width, summed = mc2.widths(site.facts["product"])
        return mc2_split.limits(NAME, site, target, summed, width, trained=True)
    if target.name == "npu":
        refused = mc2.refusal(NAME, OP, site, target)
        if refused is not None:
            return refused
    return mc2.too_few_rows(NAME, site, target)


RULE = Rule(NAME, recognise, limits, communicates=True, order=31)
