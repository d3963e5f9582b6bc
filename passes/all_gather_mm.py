"""Gathered rows times a weight: all_gather(x1) @ x2  →  npu_all_gather_base_mm.

x1 [m, …, K] (this rank's rows), x2 [K, N] (a transposed view of a Linear's weight without a copy); y [m · ranks, …, N]
in x1's dtype, and the gathered x1, which other products (k and v beside q, up beside gate) and a weight's gradient
read. The kernel adds no bias; the reference op adds it in the product. The gradient of x1 is a product and a
reduce-scatter in one call, or, where others read the gathered value, their sum scattered once.
Semantics: torch_npu's document of npu_all_gather_base_mm and aclnnAllGatherMatmul.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    gathers,
    groups,
    layers,
    mc2,
    ops,
    products,
    rows,
)
from npu_fuse import dialect as d
from npu_fuse.emit import Emitter, item
from npu_fuse.passes.all_gather_mms import NAME as AGAIN
from npu_fuse.products import Product
from npu_fuse.report import Status
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View

NAME = "all_gather_mm"
OP = "npu_all_gather_base_mm"
KEPT = "gathered value kept"


# --- the op: reference kernel, backward ------------------------------------------------------------


def _forward(
    x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor | None, group: str, size: int, min_rows: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x1 [m, …, K], x2 [K, N], bias [N] → [m · size, …, N] and, with `keep`, the gathered x1; else an empty tensor."""
    if bias is None and mc2.runs_fused(x1, x1.numel() // x1.shape[-1] * size, min_rows, group):
        flat = x1 if x1.dim() == 2 else x1.reshape(-1, x1.shape[-1])
        call = torch.ops.npu.npu_all_gather_base_mm.default
        y, gathered = call(flat, x2, groups.communicator(group), size, gather_output=keep)
        ahead = (x1.shape[0] * size, *x1.shape[1:-1])
        return y.view(*ahead, x2.shape[1]), gathered.view(*ahead, x1.shape[-1]) if keep else x1.new_empty(0)
    gathered = communicate.all_gather(x1, group, size)
    return torch.nn.functional.linear(gathered, x2.t(), bias), gathered if keep else x1.new_empty(0)


def _fake(
    x1: torch.Tensor, x2: torch.Tensor, bias: Any, group: str, size: int, min_rows: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    ahead = (x1.shape[0] * size, *x1.shape[1:-1])
    gathered = x1.new_empty(*ahead, x1.shape[-1]) if keep else x1.new_empty(0)
    return x1.new_empty(*ahead, x2.shape[1]), gathered


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x1, x2, bias, ctx.group, ctx.size, ctx.min_rows, ctx.keep = inputs
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.keep else x1, x2)


def _backward(ctx: Any, dy: torch.Tensor | None, dgathered: torch.Tensor | None) -> Any:
    """dx1 = reduce_scatter(dy · x2ᵀ + dgathered), dx2 = gathered x1ᵀ · dy."""
    kept, x2 = ctx.saved_tensors
    dx1 = dx2 = dbias = None
    if ctx.needs_input_grad[0]:
        if dy is not None and dgathered is None:
            scatter = ops.backward_op("mm_reduce_scatter")
            dx1 = scatter(dy, x2.t(), None, ctx.group, ctx.size, 1, ctx.min_rows)
        else:
            parts = [torch.matmul(dy, x2.t())] if dy is not None else []
            parts += [dgathered] if dgathered is not None else []
            dx1 = communicate.reduce_scatter(sum(parts[1:], parts[0]), ctx.group, ctx.size) if parts else None
    if dy is not None and ctx.needs_input_grad[1]:
        gathered = kept if ctx.keep else communicate.all_gather(kept, ctx.group, ctx.size)
        dx2 = products.weight_gradient(gathered, dy, x2)
    if dy is not None and ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx1, dx2, dbias, None, None, None, None


ops.define(
    "all_gather_mm(Tensor x1, Tensor x2, Tensor? bias, str group, int size, int min_rows, bool keep)"
    " -> (Tensor, Tensor)", _forward, keeps=(0, 1), fake=_fake, expand=_forward,
)  # fmt: skip
ops.differentiable("all_gather_mm", _backward, _setup)


def _npu_reference(
    x: torch.Tensor, x2: torch.Tensor, hcom: str, world_size: int, *, bias: torch.Tensor | None = None,
    gather_index: int = 0, gather_output: bool = True, comm_turn: int = 0, **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The floating-point form; `hcom` is torch's name of the group."""
    given = [name for name, value in {**rest, "bias": bias}.items() if value is not None]
    if given or gather_index != 0 or comm_turn != 0:
        raise NotImplementedError(f"{OP} with {given or 'gather_index or comm_turn'} has no reference")
    gathered = communicate.all_gather(x, hcom, world_size)
    return torch.matmul(gathered, x2), gathered if gather_output else x.new_empty(0)


def _npu_fake(
    x: torch.Tensor, x2: torch.Tensor, hcom: str, world_size: int, *, gather_output: bool = True, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[0] * world_size
    return x.new_empty(rows, x2.shape[1]), x.new_empty(rows, x.shape[1]) if gather_output else x.new_empty(0)


SCHEMA = (
    "npu_all_gather_base_mm(Tensor input, Tensor x2, str hcom, int world_size, *, Tensor? bias=None,"
    " Tensor? x1_scale=None, Tensor? x2_scale=None, int gather_index=0, bool gather_output=True, int comm_turn=0,"
    " ScalarType? output_dtype=None, str? comm_mode=None) -> (Tensor, Tensor)"
)
ops.define(SCHEMA, _npu_reference, fake=_npu_fake)


# --- the rule --------------------------------------------------------------------------------------


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for node in view.nodes if groups.initialised() else ():
        layer = layers.find(node, bodies.GATHERED) if functions.is_function(node) else None
        if isinstance(layer, str):
            found.append(Miss(NAME, node, f"{NAME}.function", layer))
            continue
        if layer is not None:
            only = gathers.Consumer(layer.product, (), layer.product.node)
            found.append(_site(view, layers.exchange(layer), gathers.Gathered((only,), False), layer.again))
            continue
        distributed = dtensor_rows.is_gather(node)
        exchange = dtensor_rows.gather_of(node) if distributed else _exchange(view, node)
        if exchange is None:
            continue
        if isinstance(exchange, str):
            if gathers.feeds_product(view, node):
                found.append(Miss(NAME, node, f"{NAME}.collective", exchange))
            continue
        gathered = gathers.find(view, exchange, distributed)
        if gathered is None:
            continue  # no product is near: a loss, logits
        if isinstance(gathered, str):
            found.append(Miss(NAME, node, f"{NAME}.product", gathered))
        else:
            found.append(_site(view, exchange, gathered))
    return found


def _exchange(view: View, node: Node) -> exchanges.Exchange | str | None:
    if functions.is_function(node):
        return functions.exchange_of(node, bodies.GATHERED)
    return exchanges.gather_of(view, node) if exchanges.is_gather(node) else None


def _site(view: View, exchange: exchanges.Exchange, gathered: gathers.Gathered, again: bool = False) -> Site | Miss:
    used = gathered.consumers
    main, size = used[0].product, exchange.group.size
    source, values = exchange.source, [c.value for c in used]
    extra = (exchange.value,) if gathered.read else ()
    nodes = {*exchange.nodes, *(n for c in used for n in (*c.moves, *c.product.nodes, *c.behind))}
    if not any(collectives.is_read(view, v, nodes) for v in (*values, *extra)):
        why = "nothing reads the product: compilers would drop a fused call, on this rank alone"
        return Miss(NAME, exchange.anchor, f"{NAME}.used", why)
    result, local, whole = d.local(main.node), d.local(source), d.local(exchange.value)
    assert result is not None and local is not None and whole is not None
    skipped = rows.ones(local.shape[:-1])
    depth = local.dim() - 1 - skipped
    trained = any((t := d.tensor(v)) is not None and t.requires_grad for v in (*values, *extra))
    keep = trained or len(used) > 1 or bool(extra)

    def weights(e: Emitter, env: Mapping[Node, Any], product: Product, x: Any) -> tuple[Any, Any]:
        return product.operands(e, {**env, product.x: x}, result.dtype)[1:]

    def mine(e: Emitter, env: Mapping[Node, Any]) -> Any:
        return rows.without(e, e.cast(e.local(env[source]), result.dtype), skipped)

    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        x, like = mine(e, env), env[source]
        x2, bias = weights(e, env, main, like)
        bare = bias is None and mc2.bare(e.target, source, 1, trained)
        ahead = 1 if bare else depth
        if bare:
            x = rows.flat(e, x, depth)
            pair = e.fused(OP, e.dense(x), x2, e.communicator(exchange.group), size, gather_output=keep)
        else:
            pair = e.fused(NAME, e.dense(x), x2, bias, e.group(exchange.group), size, e.target.min_rows, keep)
        y, all_rows = item(e, pair, 0), item(e, pair, 1)
        made = [_shaped(e, env, used[0], y, ahead)]
        for other in used[1:]:
            w, b = weights(e, env, other.product, all_rows)
            product = e.call(torch.nn.functional.linear, all_rows, e.call(torch.t, w), b)
            made.append(_shaped(e, env, other, product, ahead))
        if extra:
            made.append(rows.shaped(e, rows.flat(e, all_rows, ahead), whole.shape[:-1], like))
        return made if len(made) > 1 else made[0]

    def emit_again(e: Emitter, env: Mapping[Node, Any]) -> Any:
        x, like = mine(e, env), env[source]
        operands = [weights(e, env, c.product, like) for c in used]
        biased = [i for i, (_, b) in enumerate(operands) if b is not None]
        w, b = [w for w, _ in operands], [operands[i][1] for i in biased]
        bits = sum(1 << i for i in biased)
        call = e.fused(AGAIN, e.dense(x), w, b, bits, e.group(exchange.group), size, e.target.min_rows)
        made = [_shaped(e, env, c, item(e, call, i), depth) for i, c in enumerate(used)]
        return made if len(made) > 1 else made[0]

    def _shaped(e: Emitter, env: Mapping[Node, Any], consumer: gathers.Consumer, y: Any, ahead: int) -> Any:
        product, found = consumer.product, d.local(consumer.product.node)
        assert found is not None
        wanted = found.shape[: found.dim() - product.free]
        if ahead > 1 or len(wanted) > 1:
            y = rows.shaped(e, rows.flat(e, y, ahead), wanted, env[source])
        y = product.shaped(e, y, env)
        layout = dtensors.layout_of(consumer.value)
        return e.wrapped(y, env[product.w], layout.placements) if layout is not None else y

    operands = [n for c in used for n in (c.product.w, c.product.bias) if n is not None]
    params = {
        "ranks": str(size), "products": str(len(used)), "gathered": "read besides" if extra else "",
        "weight": "transposed view" if main.transposed else "as it is",
        "bias": "none" if main.bias is None else "in the product",
    }  # fmt: skip
    key = (*(c.product.key for c in used), size, skipped, keep, bool(extra))
    forms = [Form(KEPT if trained else "as it is", emit, key)]
    if trained and not extra:  # else others have it and may keep it; what the graph does comes first
        forms.insert(0 if again else 1, Form(AGAIN, emit_again, key))
    return Site(
        NAME, values[0], tuple(dict.fromkeys((source, *operands))), tuple(sorted(nodes, key=view.position.__getitem__)),
        tuple(forms), exchange.anchor, params, extra_outputs=(*values[1:], *extra),
        stand_ins={
            **exchange.stand_ins, **{n: dtensors.same(n) for c in used for n in c.behind},
            **{n: s for c in used for n, s in c.stand_ins.items()},
        },
        pool=mc2.pool(size),
        facts={"kept": 0, "group": exchange.group, "x": source, "w": main.w, "sums": True, "gathered": size,
               "overlapped": exchange.overlapped, "product": main, "bias": main.bias is not None,
               "several": len(used) > 1 or bool(extra), "dtensors": dtensors.layout_of(main.node) is not None},
    )  # fmt: skip


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_all_gather_base_mm: chips, ranks, dtypes, widths (torch_npu's document), and what pays."""
    if site.facts["overlapped"]:
        return mc2.overlapped(NAME)
    if target.name == "npu":
        refused = mc2.refusal(NAME, OP, site, target)
        refused = refused or mc2.rows_refusal(NAME, OP, site, backward=not site.facts["several"])
        if refused is not None:
            return refused
    return mc2.too_few_rows(NAME, site, target) or _kept_otherwise(site, form, target)


def _kept_otherwise(site: Site, form: Form, target: Target) -> Refusal | None:
    """Whether the gathered value is kept for the weights' gradients is the graph's choice, or the option's."""
    wanted = {"keep": KEPT, "again": AGAIN}.get(target.gather, site.forms[0].name)
    if len(site.forms) == 1 or form.name == wanted:
        return None
    return Refusal(Status.REFUSED_BY_PROFIT, f"{NAME}.gather", f"option mc2_gather={target.gather!r}: {wanted}")


RULE = Rule(NAME, recognise, limits, communicates=True, order=30)
