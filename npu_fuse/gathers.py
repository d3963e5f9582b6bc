"""Who reads a gathered value: products of its rows with weights, and others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import dtensor_rows, functions, layers
from npu_fuse.collectives import KEEPS_ORDER
from npu_fuse.dtensors import value_of
from npu_fuse.exchanges import Exchange
from npu_fuse.groups import is_collective
from npu_fuse.products import Product, untransposed
from npu_fuse.sites import StandIn
from npu_fuse.view import View, same_size, static

DEPTH = 4
"""Steps from a gathered value that is no site, within which a product is worth a word in the report."""
BETWEEN = d.MOVEMENT | d.POINTWISE | {"cast", "rms_norm", "layer_norm", "dropout"}


@dataclass(frozen=True)
class Consumer:
    """A product of the gathered rows; `moves` bring them into its shape, `value` is what is read of it."""

    product: Product
    moves: tuple[Node, ...]
    value: Node
    behind: tuple[Node, ...] = ()
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)


@dataclass(frozen=True)
class Gathered:
    """The products of one gathered value, the widest first; `read`: others read the value as well."""

    consumers: tuple[Consumer, ...]
    read: bool


def find(view: View, exchange: Exchange, distributed: bool) -> Gathered | str | None:
    """The products; why they cannot be fused with the gather; None where there are none."""
    found, others = _walk(view, exchange)
    if not found:
        return _unread(exchange)
    if exchange.written and _changed(view, exchange):
        return "the gathered value is changed in place"
    taken: list[Consumer] = []
    for product, moves, stand_ins in found:
        why = "the product sums over several dimensions" if product.contracted != 1 else ""
        why = dtensor_rows.unfit(product) if distributed and not why else why
        made = value_of(product.node) if distributed and not why else (product.node, ())
        if why or isinstance(made, str):
            return why or str(made)
        taken.append(Consumer(product, moves, *made, stand_ins))
    if distributed and others:
        return "the gathered value is read besides by what is no product with a weight sharded by its outputs"
    taken.sort(key=lambda c: -(_width(c) or 0))
    if len(taken) == 1 and not others:
        chosen, read = taken, False
    else:
        chosen = [c for c in taken if _ready(view, exchange, c)]
        read = others or len(chosen) < len(taken)
        if not chosen or (distributed and read):
            return "a weight is computed behind the gather, whose result others read as well"
    if read and exchange.written:
        return "the memory that is gathered into is read besides"
    if len({_dtype(c.product.node) for c in chosen}) > 1 or (
        read and _dtype(chosen[0].product.node) != _dtype(exchange.value)
    ):
        return "the products compute in another dtype than others read the gathered value in"
    upto = view.position[exchange.value] if read else min(view.position[c.value] for c in chosen)
    if any(is_collective(n) and n not in _own(exchange, chosen) for n in _between(view, exchange, upto)):
        return "another collective stands between the gather and the product: their order must stay"
    return Gathered(tuple(chosen), read)


def _own(exchange: Exchange, chosen: list[Consumer]) -> set[Node]:
    return {*exchange.nodes, *(n for c in chosen for n in c.behind)}


def _between(view: View, exchange: Exchange, last: int) -> list[Node]:
    return view.nodes[view.position[exchange.anchor] + 1 : last]


def _unread(exchange: Exchange) -> str | None:
    """Why no product near behind the gather could be fused with it; None where there is none."""
    level: list[tuple[Node, tuple[Node, ...]]] = [(exchange.value, ())]
    for _ in range(DEPTH):
        below: list[tuple[Node, tuple[Node, ...]]] = []
        for node, passed in level:
            for user in [u for u in node.users if u not in exchange.nodes]:
                if functions.is_function(user) and layers.multiplies(user):
                    why = layers.find(user, layers.PLAIN)
                    return why if isinstance(why, str) else _stands_between(passed)
                made = layers.product_at(user)
                if made is not None and made[0].x is node:
                    return _stands_between(passed)
                if user.op.startswith("call") and d.name(user) in BETWEEN:
                    below.append((user, (*passed, user)))
        level = below
    return None


def _stands_between(passed: tuple[Node, ...]) -> str:
    joined = next((n for n in passed if d.name(n) == "cat"), None)
    if joined is not None and d.name(passed[0]) in ("chunk", "split", "tensor_split", "getitem"):
        dim = d.operand(joined, 1, "dim", 0)
        return f"the value is gathered along dimension {dim}: rows would have to be moved behind the product"
    first = next((d.name(n) for n in passed if d.name(n) not in KEEPS_ORDER), "")
    return f"{first or 'another collective'} stands between the gather and the product"


Found = tuple[Product, tuple[Node, ...], Mapping[Node, StandIn]]


def _walk(view: View, exchange: Exchange) -> tuple[list[Found], bool]:
    found: list[Found] = []
    others = False
    level: list[tuple[Node, tuple[Node, ...]]] = [(exchange.value, ())]
    while level:
        node, moves = level.pop()
        for user in sorted(node.users, key=view.position.__getitem__):
            if user in exchange.nodes:
                continue
            made = layers.product_at(user)
            if made is not None and made[0].x is node and node not in (made[0].w, made[0].bias):
                found.append((made[0], moves, made[1]))
            elif user.op.startswith("call") and d.name(user) in KEEPS_ORDER and _same_columns(node, user):
                level.append((user, (*moves, user)))
            else:
                others = True
    found.sort(key=lambda f: view.position[f[0].node])
    return [(untransposed(p), m, s) for p, m, s in found], others


def _same_columns(before: Node, after: Node) -> bool:
    left, right = d.tensor(before), d.tensor(after)
    if left is None or right is None or not left.dim() or not right.dim() or d.name(after) in d.LIKE_ANOTHER:
        return False
    return same_size(left.shape[-1], right.shape[-1]) and left.dtype == right.dtype


def _changed(view: View, exchange: Exchange) -> bool:
    last = max(view.position[n] for n in exchange.nodes)
    return view.written_after(exchange.value, last)


def _ready(view: View, exchange: Exchange, consumer: Consumer) -> bool:
    operands = [n for n in (consumer.product.w, consumer.product.bias) if n is not None]
    return all(view.position[n] < view.position[exchange.anchor] for n in operands)


def _width(consumer: Consumer) -> int | None:
    found = d.local(consumer.product.node)
    return static(found.shape[-1]) if found is not None else None


def _dtype(node: Node) -> Any:
    found = d.tensor(node)
    return found.dtype if found is not None else None


def feeds_product(view: View, node: Node) -> bool:
    """Whether a product stands near behind a gather that is no site."""
    level, seen = [node], 0
    while level and seen < DEPTH:
        seen += 1
        users = [u for n in level for u in n.users]
        if any((functions.is_function(u) and layers.multiplies(u)) or layers.product_at(u) for u in users):
            return True
        level = [u for u in users if u.op.startswith("call") and d.name(u) in d.MOVEMENT | {"wait_tensor", "copy"}]
        level += [u.args[0] for u in level if d.mutates(u) and isinstance(u.args[0], Node)]  # read from then on
    return False
