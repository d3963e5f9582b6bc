"""A product summed over ranks and scattered by rows: reduce_scatter(x1 @ x2)  →  npu_mm_reduce_scatter_base.

x1 [M, …, K] (this rank's columns), x2 [K, N] (this rank's rows, a transposed view of a Linear's weight without a
copy); y [M / ranks, …, N] in x1's dtype: each rank keeps its rows of the sum, along the first dimension. The kernel
adds no bias; the reference op adds one before the sum, where the graph does. The gradient is gathered: dx1 is an
all-gather and a product in one call, dx2 takes the gathered gradient that it leaves.
Semantics: torch_npu's document of npu_mm_reduce_scatter_base and aclnnMatmulReduceScatter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import (
    bodies,
    collectives,
    communicate,
    dtensor_rows,
    dtensors,
    exchanges,
    functions,
    groups,
    layers,
    mc2,
    ops,
    products,
    reduced,
    rows,
)
from npu_fuse import dialect as d
from npu_fuse.emit import Emitter
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View

NAME = "mm_reduce_scatter"
OP = "npu_mm_reduce_scatter_base"


# --- the op: reference kernel, backward ------------------------------------------------------------


def _forward(
    x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor | None, group: str, size: int, bias_parts: int, min_rows: int
) -> torch.Tensor:
    """x1 [M, …, K], x2 [K, N], bias [N] of which each rank adds one of `bias_parts` → [M / size, …, N]."""
    if bias is None and mc2.runs_fused(x1, x1.numel() // x1.shape[-1], min_rows, group):
        flat = x1 if x1.dim() == 2 else x1.reshape(-1, x1.shape[-1])
        call = torch.ops.npu.npu_mm_reduce_scatter_base.default
        made: torch.Tensor = call(flat, x2, groups.communicator(group), size, reduce_op="sum")
        return made.view(x1.shape[0] // size, *x1.shape[1:-1], x2.shape[1])
    part = bias if bias is None or bias_parts == 1 else bias / bias_parts
    return communicate.reduce_scatter(torch.nn.functional.linear(x1, x2.t(), part), group, size)


def _fake(x1: torch.Tensor, x2: torch.Tensor, bias: Any, group: str, size: int, *rest: Any) -> torch.Tensor:
    return x1.new_empty(x1.shape[0] // size, *x1.shape[1:-1], x2.shape[1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x1, x2, bias, ctx.group, ctx.size, _, ctx.min_rows = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x1, x2)


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    """With g = all_gather(dy): dx1 = g · x2ᵀ, in one call with the gather; dx2 = x1ᵀ · g; dbias = Σ g."""
    x1, x2 = ctx.saved_tensors
    dx1 = dx2 = dbias = None
    bias = ctx.has_bias and ctx.needs_input_grad[2]
    if ctx.needs_input_grad[0]:
        gather_mm = ops.backward_op("all_gather_mm")
        weight = ctx.needs_input_grad[1] or bias
        dx1, gathered = gather_mm(dy, x2.t(), None, ctx.group, ctx.size, ctx.min_rows, weight)
    else:
        gathered = communicate.all_gather(dy, ctx.group, ctx.size)
    if ctx.needs_input_grad[1]:
        dx2 = products.weight_gradient(x1, gathered, x2)
    if bias:
        dbias = gathered.reshape(-1, dy.shape[-1]).sum(0)
    return dx1, dx2, dbias, None, None, None, None


ops.define(
    "mm_reduce_scatter(Tensor x1, Tensor x2, Tensor? bias, str group, int size, int bias_parts, int min_rows)"
    " -> Tensor", _forward, keeps=(0, 1), fake=_fake, expand=_forward,
)  # fmt: skip
ops.differentiable("mm_reduce_scatter", _backward, _setup)


def _npu_reference(
    x: torch.Tensor, x2: torch.Tensor, hcom: str, world_size: int, *, reduce_op: str = "sum",
    bias: torch.Tensor | None = None, comm_turn: int = 0, **rest: Any,
) -> torch.Tensor:  # fmt: skip
    """The floating-point form; `hcom` is torch's name of the group."""
    given = [name for name, value in {**rest, "bias": bias}.items() if value is not None]
    if given or reduce_op != "sum" or comm_turn != 0:
        raise NotImplementedError(f"{OP} with {given or reduce_op} has no reference; use reduce_op='sum'")
    return communicate.reduce_scatter(torch.matmul(x, x2), hcom, world_size)


def _npu_fake(x: torch.Tensor, x2: torch.Tensor, hcom: str, world_size: int, **rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0] // world_size, x2.shape[1])


SCHEMA = (
    'npu_mm_reduce_scatter_base(Tensor input, Tensor x2, str hcom, int world_size, *, str reduce_op="sum",'
    " Tensor? bias=None, Tensor? x1_scale=None, Tensor? x2_scale=None, int comm_turn=0,"
    " ScalarType? output_dtype=None, str? comm_mode=None) -> Tensor"
)
ops.define(SCHEMA, _npu_reference, fake=_npu_fake)


# --- the rule --------------------------------------------------------------------------------------


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for node in view.nodes if groups.initialised() else ():
        if dtensor_rows.is_scatter(node):
            distributed = dtensor_rows.scatter_of(node)
            if isinstance(distributed, str):
                found.append(Miss(NAME, node, f"{NAME}.placements", distributed))
            elif distributed is not None:
                found.append(_site(view, *distributed))
            continue
        layer = layers.find(node, bodies.SCATTERED) if functions.is_function(node) else None
        if isinstance(layer, str):
            found.append(Miss(NAME, node, f"{NAME}.function", layer))
            continue
        if layer is not None:
            found.append(_site(view, layers.exchange(layer), reduced.inside(layer)))
            continue
        exchange = _exchange(view, node)
        if exchange is None:
            continue
        source = _given(node) if isinstance(exchange, str) else exchange.source
        below = reduced.find(view, source, node)
        if below is None:
            continue  # nothing near that is a product
        if isinstance(exchange, str):
            found.append(Miss(NAME, node, f"{NAME}.collective", exchange))
        elif isinstance(below, str):
            found.append(Miss(NAME, node, f"{NAME}.product", below))
        else:
            found.append(_site(view, exchange, below))
    return found


def _exchange(view: View, node: Node) -> exchanges.Exchange | str | None:
    if functions.is_function(node):
        return functions.exchange_of(node, bodies.SCATTERED)
    return exchanges.scatter_of(view, node) if exchanges.is_scatter(node) else None


def _given(node: Node) -> Any:
    return functions.operand_of(node) if functions.is_function(node) else node.args[0]


def _site(view: View, exchange: exchanges.Exchange, below: reduced.Reduced) -> Site | Miss:
    product, value = below.product, exchange.value
    nodes = {*below.nodes, *exchange.nodes}
    if any(user not in nodes for node in below.order for user in node.users):
        return Miss(NAME, exchange.anchor, f"{NAME}.used", "the product is used besides its sum")
    if not collectives.is_read(view, value, nodes):
        why = "nothing reads the sum: compilers would drop a fused call, on this rank alone"
        return Miss(NAME, exchange.anchor, f"{NAME}.used", why)
    result, out, source = d.local(product.node), d.local(value), d.local(exchange.source)
    if result is None or out is None or source is None or not reduced.keeps_rows(below, product):
        return Miss(NAME, exchange.anchor, f"{NAME}.product", "the product's columns are taken apart before its sum")
    taken = d.local(product.x)
    assert taken is not None
    leading = taken.shape[: -product.contracted]
    skipped = rows.ones(leading) if source.dim() == result.dim() else 0
    ahead, wanted = leading[skipped:], out.shape[: out.dim() - product.free]
    same = len(ahead) == len(wanted) - skipped and len(below.moves) == 0
    size, wrapped = exchange.group.size, dtensors.layout_of(value)

    trained = bool(out.requires_grad)

    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        x1, x2, bias = replace(product, bias=below.bias).operands(e, env, result.dtype)
        x1 = rows.without(e, x1, skipped)
        bare = bias is None and mc2.bare(e.target, product.x, product.contracted, trained)
        x1 = x1 if same and not bare else rows.flat(e, x1, len(ahead))
        if bare:
            y = e.fused(OP, e.dense(x1), x2, e.communicator(exchange.group), size, reduce_op="sum")
        else:
            name = e.group(exchange.group)
            y = e.fused(NAME, e.dense(x1), x2, bias, name, size, below.bias_parts, e.target.min_rows)
        y = rows.with_ones(e, y, skipped) if same and not bare else rows.shaped(e, y, wanted, env[product.x])
        y = product.shaped(e, y, env)
        return e.wrapped(y, env[product.w], wrapped.placements) if wrapped is not None else y

    inputs = tuple(dict.fromkeys(n for n in (product.x, product.w, below.bias) if n is not None))
    params = {
        "ranks": str(size), "weight": "transposed view" if product.transposed else "as it is",
        "bias": "none" if below.bias is None else "inside the sum",
    }  # fmt: skip
    return Site(
        NAME, value, inputs, tuple(sorted(nodes, key=view.position.__getitem__)),
        (Form("as it is", emit, (*product.key, below.bias is not None, below.bias_parts, size, skipped, same)),),
        exchange.anchor, params, stand_ins={**below.stand_ins, **exchange.stand_ins},
        pool=mc2.pool(size),
        facts={"kept": 0, "group": exchange.group, "x": product.x, "w": product.w, "sums": True,
               "overlapped": exchange.overlapped, "product": product, "bias": below.bias is not None,
               "dtensors": dtensors.layout_of(product.node) is not None},
    )  # fmt: skip


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_mm_reduce_scatter_base: chips, ranks, dtypes, widths (torch_npu's document), and what pays."""
    if site.facts["overlapped"]:
        return mc2.overlapped(NAME)
    if target.name == "npu":
        refused = mc2.refusal(NAME, OP, site, target) or mc2.rows_refusal(NAME, OP, site, backward=True)
        if refused is not None:
            return refused
    return mc2.too_few_rows(NAME, site, target)


RULE = Rule(NAME, recognise, limits, communicates=True, order=30)
