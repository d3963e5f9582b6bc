"""A product summed over ranks: all_reduce(x1 @ x2 + bias)  →  npu_mm_all_reduce_base.

x1 [..., K] (this rank's columns), x2 [K, N] (this rank's rows, a transposed view of a Linear's weight without a
copy), bias [N] inside the sum; y [..., N] in x1's dtype, alike on all ranks. What is added after the sum stays
there. torch_npu's op has no backward; what the backward does with the gradient is the graph's meaning and differs
between spellings: reduced over ranks again (functional collectives, in-place calls under torch.compile) or taken
as it is (autograd functions in Megatron's style, DTensor). `mm_all_reduce` has both, and looks up HCCL's name of
the group when it runs: that name holds for one process run, and torch's for a group may come back for another.
Semantics: torch_npu's document of npu_mm_all_reduce_base and aclnnMatmulAllReduce.
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
    dtensors,
    functions,
    groups,
    layers,
    mc2,
    mc2_split,
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

NAME = "mm_all_reduce"
OP = "npu_mm_all_reduce_base"


# --- the op: reference kernel, backward ------------------------------------------------------------


def _forward(
    x1: torch.Tensor, x2: torch.Tensor, bias: torch.Tensor | None, group: str, bias_parts: int, gradient: str,
    min_rows: int, kernel: str,
) -> torch.Tensor:  # fmt: skip
    """x1 [..., K], x2 [K, N], bias [N] of which each rank adds one of `bias_parts` → the sum over ranks [..., N]."""
    part = bias if bias is None or bias_parts == 1 else bias / bias_parts
    fused = mc2.runs_fused(x1, x1.numel() // max(1, x1.shape[-1]), min_rows, group)
    if fused and kernel == mc2_split.SPLIT:
        split = mc2_split.run(x1, x2, group) if bias is None else None
        if split is not None:
            return split
    elif fused:
        flat = x1 if x1.dim() in (2, 3) else x1.reshape(-1, x1.shape[-1])
        call = torch.ops.npu.npu_mm_all_reduce_base.default
        made: torch.Tensor = call(flat, x2, groups.communicator(group), reduce_op="sum", bias=part)
        return made if x1.dim() in (2, 3) else made.view(*x1.shape[:-1], x2.shape[1])
    return communicate.all_reduce(torch.nn.functional.linear(x1, x2.t(), part), group, gradient)


def _fake(x1: torch.Tensor, x2: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x1.new_empty(*x1.shape[:-1], x2.shape[1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x1, x2, bias, ctx.group, _, ctx.gradient, *_ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x1, x2)


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    """dx1 = dy · x2ᵀ, dx2 = x1ᵀ · dy, with dy reduced over ranks first where the graph's own backward does so."""
    x1, x2 = ctx.saved_tensors
    if ctx.gradient == "all_reduce":
        dy = communicate.all_reduce(dy, ctx.group, ctx.gradient)
    dx1 = dx2 = dbias = None
    if ctx.needs_input_grad[0]:
        dx1 = torch.matmul(dy, x2.t())
    if ctx.needs_input_grad[1]:
        dx2 = products.weight_gradient(x1, dy, x2)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx1, dx2, dbias, None, None, None, None, None


ops.define(
    "mm_all_reduce(Tensor x1, Tensor x2, Tensor? bias, str group, int bias_parts, str gradient, int min_rows,"
    " str kernel) -> Tensor", _forward, keeps=(0, 1), fake=_fake, expand=_forward,
)  # fmt: skip
ops.differentiable("mm_all_reduce", _backward, _setup)


def _npu_reference(
    x1: torch.Tensor, x2: torch.Tensor, hcom: str, *, reduce_op: str = "sum", bias: torch.Tensor | None = None,
    x3: torch.Tensor | None = None, comm_turn: int = 0, **rest: Any,
) -> torch.Tensor:  # fmt: skip
    """The floating-point form; `hcom` is torch's name of the group. bias and x3 are added on every rank."""
    given = [name for name, value in rest.items() if value not in (None, 0)]
    if given or reduce_op != "sum" or comm_turn != 0:
        raise NotImplementedError(
            f"npu_mm_all_reduce_base with {given or reduce_op} has no reference; use reduce_op='sum'"
        )
    value = torch.nn.functional.linear(x1, x2.t(), bias)
    return communicate.all_reduce(value if x3 is None else value + x3, hcom, "identity")


def _npu_fake(x1: torch.Tensor, x2: torch.Tensor, hcom: str, **rest: Any) -> torch.Tensor:
    return _fake(x1, x2)


SCHEMA = (
    'npu_mm_all_reduce_base(Tensor x1, Tensor x2, str hcom, *, str reduce_op="sum", Tensor? bias=None,'
    " Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? x3=None, Tensor? dequant_scale=None,"
    " Tensor? pertoken_scale=None, Tensor? comm_quant_scale_1=None, Tensor? comm_quant_scale_2=None,"
    " int antiquant_group_size=0, int comm_turn=0, int[]? group_sizes=None, int? y_dtype=None, int? x1_dtype=None,"
    " int? x2_dtype=None, int? dequant_scale_dtype=None, int? pertoken_scale_dtype=None, int comm_quant_mode=0,"
    " str? comm_mode=None) -> Tensor"
)
ops.define(SCHEMA, _npu_reference, fake=_npu_fake)


# --- the rule --------------------------------------------------------------------------------------


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for node in view.nodes if groups.initialised() else ():
        if dtensors.is_reduction(node):
            distributed = dtensors.reduction_of(view, node)
            if isinstance(distributed, str):
                found.append(Miss(NAME, node, f"{NAME}.placements", distributed))
            elif distributed is not None:
                found.append(_site(view, *distributed))
            continue
        layer = layers.find(node, bodies.SUM) if functions.is_function(node) else None
        if isinstance(layer, str):
            found.append(Miss(NAME, node, f"{NAME}.function", layer))
            continue
        if layer is not None:
            found.append(_site(view, layers.reduction(layer), reduced.inside(layer)))
            continue
        function = functions.reduction_of(node) if functions.is_function(node) else None
        if function is None and not collectives.is_all_reduce(node):
            continue
        source = functions.operand_of(node) if function is not None else collectives.source_of(node)
        below = reduced.find(view, source, node)
        if below is None:
            continue  # nothing near that is a product: an embedding, a loss
        reduction = function if function is not None else collectives.reduction_of(view, node)
        if isinstance(reduction, str):
            found.append(Miss(NAME, node, f"{NAME}.collective", reduction))
        elif isinstance(below, str):
            found.append(Miss(NAME, node, f"{NAME}.product", below))
        else:
            found.append(_site(view, reduction, below))
    return found


def _site(view: View, reduction: collectives.Reduction, below: reduced.Reduced) -> Site | Miss:
    product = below.product
    value = _value(view, reduction, below)
    if not isinstance(value, str) and not collectives.is_read(view, value, {*below.nodes, *reduction.nodes}):
        value = "nothing reads the sum: compilers would drop a fused call, on this rank alone"
    if isinstance(value, str):
        return Miss(NAME, reduction.anchor, f"{NAME}.used", value)
    nodes = {*below.nodes, *reduction.nodes}
    result = d.tensor(product.node)
    assert result is not None
    upto = below.order.index(value) + 1 if value in below.order else len(below.order)
    moves = [n for n in below.moves if n in below.order[:upto]]
    trained = (out := d.tensor(value)) is not None and out.requires_grad
    gradient = reduction.gradient if trained else "identity"
    spread = dtensors.layout_of(product.node) is not None
    wrapped = dtensors.layout_of(value) is not None

    _, width = mc2.widths(product)

    def emit_split(e: Emitter, env: Mapping[Node, Any]) -> Any:
        return emit(e, env, mc2_split.SPLIT)

    def emit(e: Emitter, env: Mapping[Node, Any], kernel: str = mc2_split.WHOLE) -> Any:
        from torch.distributed.tensor import Replicate

        x1, x2, bias = replace(product, bias=below.bias).operands(e, env, result.dtype)
        if kernel == OP and mc2.bare(e.target, product.x, product.contracted, trained):
            y = _bare(e, e.dense(x1), x2, bias)
        else:
            name, least = e.group(reduction.group), e.target.min_rows
            least = least if kernel == OP else mc2_split.rows_for(e.target, width, reduction.group.size)
            y = e.fused(NAME, e.dense(x1), x2, bias, name, below.bias_parts, gradient, least, kernel)
        y = product.shaped(e, y, env)
        for move in moves:
            y = e.moved(move, y)
        return e.wrapped(y, env[product.w], (Replicate(),)) if wrapped else y

    def _bare(e: Emitter, x1: Any, x2: Any, bias: Any) -> Any:
        part = bias if bias is None or below.bias_parts == 1 else e.call(torch.div, bias, below.bias_parts)
        value, named = d.local(product.x), e.communicator(reduction.group)
        ahead = value.dim() - product.contracted if value is not None else 1
        if ahead <= 2:
            return e.fused(OP, x1, x2, named, reduce_op="sum", bias=part)
        y = e.fused(OP, e.call(torch.flatten, x1, 0, ahead - 1), x2, named, reduce_op="sum", bias=part)
        return rows.shaped(e, y, value.shape[:ahead], x1)  # type: ignore[union-attr]

    inputs = tuple(dict.fromkeys(n for n in (product.x, product.w, below.bias) if n is not None))
    size = reduction.group.size
    params = {
        "ranks": str(size), "gradient": gradient if trained else "none",
        "weight": "transposed view" if product.transposed else "as it is",
        "bias": "none" if below.bias is None else "inside the sum",
    }  # fmt: skip
    key = (*product.key, below.bias is not None, below.bias_parts, gradient, size)
    note = mc2_split.modelled(product, reduction.group.size)
    forms = (Form("as it is", emit, key), Form(mc2_split.FORM, emit_split, key, note))
    return Site(
        NAME, value, inputs, tuple(sorted(nodes, key=view.position.__getitem__)), forms, reduction.anchor,
        params, stand_ins={**below.stand_ins, **reduction.stand_ins}, pool=(3, 5, 7, 4, 6, 8),
        facts={"kept": 0, "group": reduction.group, "x": product.x, "w": product.w, "sums": True,
               "overlapped": reduction.overlapped, "product": product, "dtensors": spread,
               "bias": below.bias is not None},
    )  # fmt: skip


def _value(view: View, reduction: collectives.Reduction, below: reduced.Reduced) -> Node | str:
    """The node whose users see the sum; nobody else may have seen the product."""
    inside = {*below.nodes, *reduction.nodes}
    used = {n: [u for u in n.users if u not in inside] for n in below.order}
    if not reduction.written:
        if any(used.values()):
            return "the product is used besides its sum"
        return reduction.value
    last = max(view.position[n] for n in reduction.nodes)
    storage = view.storage.get(reduction.source)
    if any(users and view.storage.get(n) != storage for n, users in used.items()):
        return "the product is used besides its sum"
    readers = [n for n, users in used.items() if users]
    if any(view.position[u] < last for users in used.values() for u in users):
        return "the product is read before it is reduced"
    if len(readers) > 1:
        return "the sum is read through several views of one tensor"
    copies = [n for n in reduction.nodes if d.name(n) == "copy" and n.users]
    if copies and readers:
        return "the sum is read through several views of one tensor"
    return (copies or readers or [reduction.value])[0]


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_mm_all_reduce_base: chips, ranks, dtypes (torch_npu's document, aclnnMatmulAllReduceV2), and what pays."""
    if site.facts["overlapped"]:
        return mc2.overlapped(NAME)
    if form.name == mc2_split.FORM:
        out = d.tensor(site.output)
        trained = out is not None and out.requires_grad
        return mc2_split.limits(NAME, site, target, *mc2.widths(site.facts["product"]), trained)
    if target.name == "npu":
        refused = mc2.refusal(NAME, OP, site, target)
        if refused is not None:
            return refused
    return mc2.too_few_rows(NAME, site, target)


RULE = Rule(NAME, recognise, limits, communicates=True, order=30)
