"""Products inside autograd functions, as Megatron's linear layers: read whole, with the gradients of all operands.

Such a function is taken only where its backward is the gradient of its forward: of a plain product, of one whose
input was gathered or whose gradient is reduced, of one whose sum over ranks, whole or scattered, is given back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import functions, pretend
from npu_fuse.bodies import (
    GATHERED,
    GRADIENT,
    SCATTERED,
    SUM,
    Term,
    argument,
    column_sums,
    over_ranks,
    product,
    transposed,
)
from npu_fuse.collectives import Reduction
from npu_fuse.exchanges import Exchange
from npu_fuse.functions import Function
from npu_fuse.groups import Group
from npu_fuse.products import NAMES, Product, product_of
from npu_fuse.sites import StandIn

PLAIN, COPIED = "plain", "copied"
BESIDE = {COPIED: (SUM, True), SUM: (SUM, False), SCATTERED: (SCATTERED, False), GATHERED: (GATHERED, False)}
"""Which collective stands where in a function of each kind: its name, and whether that is the backward."""


@dataclass(frozen=True)
class Layer:
    """A product in a function. `product.node` is what is read of the function; no other node of it has a place."""

    function: Function
    kind: str
    product: Product
    group: Group | None
    gradient: str = "identity"
    """Of a sum over ranks: what its backward does with the gradient."""
    again: bool = False
    """The gathered value is not kept for the weight's gradient, but gathered again."""
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)


def multiplies(node: Node) -> bool:
    """Whether a product stands in the function's forward body."""
    body = functions.body_of(node)
    return body is not None and any(n.op.startswith("call") and d.name(n) in NAMES for n in body.graph.nodes)


def function_at(node: Node) -> Node | None:
    """The function that gives this value."""
    source = node.args[0] if d.raw_name(node) == "getitem" and node.args else None
    return source if isinstance(source, Node) and functions.is_function(source) else None


def find(node: Node, kind: str) -> Layer | str | None:
    """The product of that kind in this function; why it is none; None where the function is of another kind."""
    if not multiplies(node):
        return None
    wanted = BESIDE.get(kind)
    found = {k for k, (what, backward) in BESIDE.items() if functions.holds(node, what, backward)}
    forward = found - {COPIED}
    if (wanted is None and found) or (wanted is not None and kind not in found) or (kind == COPIED and forward):
        return None
    function = functions.read(node)
    return function if isinstance(function, str) else _layer(function, kind)


def product_at(node: Node) -> tuple[Product, Mapping[Node, StandIn]] | None:
    """The product that this node computes, if need be in an autograd function, whose stand-ins are beside it."""
    if functions.is_function(node):
        layer = find(node, PLAIN)
        return (layer.product, layer.stand_ins) if isinstance(layer, Layer) else None
    found = product_of(node)
    return (found, {}) if isinstance(found, Product) else None


def reduction(layer: Layer) -> Reduction:
    """The sum over ranks in the function."""
    assert layer.group is not None
    value, nodes, node = layer.product.node, layer.function.nodes, layer.function.node
    return Reduction(node, value, layer.group, value, False, nodes, layer.gradient, False, layer.stand_ins)


def exchange(layer: Layer) -> Exchange:
    """The reduce-scatter or all-gather in the function."""
    assert layer.group is not None
    function, product = layer.function, layer.product
    return Exchange(
        function.node, product.x, layer.group, product.node, function.nodes, stand_ins=layer.stand_ins
    )  # fmt: skip


def _layer(function: Function, kind: str) -> Layer | str:
    term = function.forward
    group: Group | None = None
    if kind in (SUM, SCATTERED) and term.kind == kind:
        group, term = term.group, term.of[0]
    bias = term.of[1].mark if term.kind == "sum with a vector" and term.of[1].kind == "argument" else None
    term = term.of[0] if bias is not None else term
    if term.kind != "product":
        return "more than a product and its collective is computed inside an autograd function"
    left, right = term.of
    if kind == GATHERED and left.kind == GATHERED:
        group, left = left.group, left.of[0]
    weight = right.of[0] if right.kind == "transposed" else right
    if left.kind != "argument" or weight.kind != "argument":
        return "other than its operands are multiplied inside an autograd function"
    x, w = function.operands[left.mark], function.operands[weight.mark]
    b = function.operands[bias] if bias is not None else None
    if kind == COPIED:
        group = next((t.group for t in (function.gradients[left.mark],) if t is not None), None)
    if kind != PLAIN and (group is None or group.size == 1):
        return "the collective inside an autograd function is not beside its product"
    meaning = _gradients_fit(function, kind, group, (left.mark, weight.mark, bias), right.kind == "transposed")
    if not meaning:
        return "the backward of the autograd function is not the gradient of the product inside"
    if not _alike(x, w, b, function.value):
        return "the operands of the product inside an autograd function differ in dtype, or are no tensors"
    made = Product(function.value, x, w, right.kind == "transposed", bias=b, nodes=function.nodes)
    operands = tuple(n for n in (x, w, b) if n is not None)
    again = kind == GATHERED and not any(isinstance(s, Term) and s.kind == GATHERED for s in function.saved)
    size = group.size if group is not None else 1
    run = partial(_run, kind=kind, transposed=made.transposed, size=size, gradient=meaning)
    stand_ins = function.stand_ins(operands, run, ("layer", kind, *made.key, size, meaning))
    return Layer(function, kind, made, group, meaning, again, stand_ins)


def _gradients_fit(
    function: Function, kind: str, group: Group | None, places: tuple[int, int, int | None], by_rows: bool
) -> str:
    """What becomes of the gradient where all operands' gradients are those of the product; empty where they are not."""
    x, w, bias = places
    right = transposed(argument(w)) if by_rows else argument(w)
    whole = argument(x)
    if kind == GATHERED and group is not None:
        whole = over_ranks(GATHERED, whole, group)
    grads: dict[str, Term] = {"identity": GRADIENT}
    if kind == SCATTERED and group is not None:
        grads = {"identity": over_ranks(GATHERED, GRADIENT, group)}
    if kind == SUM and group is not None:
        grads["all_reduce"] = over_ranks(SUM, GRADIENT, group)
    for meaning, grad in grads.items():
        dx = product(grad, transposed(right))
        if kind in (COPIED, GATHERED) and group is not None:
            dx = over_ranks(SUM if kind == COPIED else SCATTERED, dx, group)
        dw = product(transposed(grad), whole) if by_rows else product(transposed(whole), grad)
        wanted = {x: dx, w: dw} | ({bias: column_sums(grad)} if bias is not None else {})
        if len(wanted) == 2 + (bias is not None) and all(
            _given(function, index, term) for index, term in wanted.items()
        ):
            return meaning
    return ""


def _given(function: Function, index: int, term: Term) -> bool:
    """The operand gets this gradient, or none where it wants none."""
    made, found = function.gradients[index], d.tensor(function.operands[index])
    return made == term or (made is None and found is not None and not found.requires_grad)


def _alike(x: Any, w: Any, bias: Any, value: Node) -> bool:
    found = [d.tensor(n) for n in (x, w, value, *([bias] if bias is not None else []))]
    if any(f is None for f in found) or len({f.dtype for f in found if f is not None}) != 1:
        return False
    weight, rows, made = found[1], found[0], found[2]
    assert weight is not None and rows is not None and made is not None
    return weight.dim() == 2 and rows.dim() > 1 and rows.dim() == made.dim() and rows.is_contiguous()


def _run(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, kind: str, transposed: bool, size: int,
    gradient: str,
) -> torch.Tensor:  # fmt: skip
    """The product in a proof, and its collective among pretended ranks."""
    x = pretend.all_gather(x, size) if kind == GATHERED else pretend.copied(x, size) if kind == COPIED else x
    y = torch.nn.functional.linear(x, w if transposed else w.t(), bias)
    if kind == SUM:
        return pretend.all_reduce(y, size, gradient)
    return pretend.reduce_scatter(y, size) if kind == SCATTERED else y
