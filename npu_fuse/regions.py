"""Where a rotation may stand: the nodes between a value and the leaves below it.

A region is movement and casts, at most one addition, movement, at most one product, movement. Every node in it
is accounted for by that shape; what the movement does is read off element ids (`rotation`), never off names.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra, contractions
from npu_fuse import dialect as d
from npu_fuse.trace import BUFFERS
from npu_fuse.view import View, same_shape

MAX_STEPS, MAX_NODES = 8, 96


@dataclass
class Region:
    """Nodes between `output` and `leaves`; `products` are the multiplications, with their operands."""

    output: Node
    nodes: list[Node]
    leaves: list[Node]
    products: list[Node]
    sums: int = 0


ANCHORS = ("add", "sub", "rsub", "sum", "addcmul", "mul", *contractions.NAMES)


def is_anchor(node: Node) -> bool:
    """A sum of two products below movement, or a complex product, of floating-point tensors."""
    name = d.name(node)
    found = d.tensor(node)
    if found is None or found.dim() < 1:
        return False
    if name == "mul":
        return found.dtype.is_complex and all(d.tensor(n) is not None for n in node.all_input_nodes)
    if name == "sum":
        return found.dtype.is_floating_point and _is_product(_below(d.unary(node)))
    if name == "addcmul":
        return found.dtype.is_floating_point and _is_product(_below(node.args[0]))
    if not found.dtype.is_floating_point:
        return False
    if name in contractions.NAMES:
        contraction = contractions.contraction_of(node)
        return contraction is not None and contraction.count > 1
    first, second = d.binary(node)
    return _is_product(_below(first)) and _is_product(_below(second))


def _below(node: Any) -> Any:
    """Through movement, casts and constant factors (the first piece of a cat)."""
    for _ in range(MAX_STEPS):
        if not isinstance(node, Node) or not node.op.startswith("call"):
            return node
        if not _passes(node):
            return node
        below = d.tensors_in(node)
        if not below:
            return node
        node = below[0]
    return node


def _passes(node: Node) -> bool:
    """Movement, a cast or a constant factor: each element of the result is one of the operand's, scaled."""
    return d.moves(node) or d.name(node) == "cast" or algebra.constant_factor(node) is not None


def _is_product(node: Any) -> bool:
    if not isinstance(node, Node) or not node.op.startswith("call"):
        return False
    if d.name(node) != "mul":
        contraction = contractions.contraction_of(node)
        return contraction is not None and not contraction.summed
    return sum(d.tensor(n) is not None for n in d.tensors_in(node)) == 2


def ways_forward(view: View, anchor: Node) -> Iterator[Node]:
    """The anchor, then what its users make of it by movement alone, nearest first."""
    queue, seen = [(anchor, 0)], {anchor}
    while queue:
        node, depth = queue.pop(0)
        yield node
        if depth == MAX_STEPS:
            continue
        for user in node.users:
            target: Any = user
            if user.target is operator.setitem and len(user.args) > 2 and user.args[2] is node:
                target = user.args[0]
            elif not user.op.startswith("call") or not (d.moves(user) or d.name(user) == "cast"):
                continue
            if isinstance(target, Node) and target not in seen and d.tensor(target) is not None:
                seen.add(target)
                queue.append((target, depth + 1))


def collect(view: View, output: Node) -> Region | None:
    """The region above the leaves, or None where it has another shape than a rotation's."""
    region = Region(output, [], [], [])
    seen: dict[Node, int] = {}

    def visit(node: Node, level: int) -> bool:
        """level 0: above the sum, 1: below it, 2: below the product."""
        if seen.get(node, -1) >= level:
            return True
        if len(seen) > MAX_NODES:
            return False
        if level < 2 and node in view.outputs and node is not output:
            return False
        name = d.name(node) if node.op.startswith("call") else ""
        found = d.tensor(node)
        below: list[Node] | None = None
        next_level = level
        if node in view.outputs and node is not output:
            below = None
        elif name in BUFFERS and view.mutations.get(view.storage.get(node, -1)):
            below = _written(region, node)
        elif _passes(node):
            below = [n for n in d.data_inputs(node) if d.value(n) is not None and not _scalar(n)]
        elif name in ("add", "sub", "rsub") and level == 0 and _plain(node):
            region.sums += 1
            below, next_level = [n for n in d.binary(node) if isinstance(n, Node)], 1
        elif name == "sum" and level == 0:
            below, next_level = [d.unary(node)], 1
        elif name == "addcmul" and level == 0:
            seen[node] = level
            region.nodes.append(node)
            region.products.append(node)
            first, *factors = d.data_inputs(node)
            return visit(first, 1) and all(visit(n, 2) for n in factors)
        elif name == "mul" and level < 2:
            region.products.append(node)
            below, next_level = [n for n in d.binary(node) if isinstance(n, Node)], 2
        elif level < 2 and (contraction := contractions.contraction_of(node)) is not None:
            if contraction.summed and level:
                return False
            region.products.append(node)
            below, next_level = list(contraction.operands), 2
        if below is None:
            if level < 2 or found is None or not (found.dtype.is_floating_point or found.dtype.is_complex):
                return False
            if node not in region.leaves:
                region.leaves.append(node)
            return True
        first_time = node not in seen
        seen[node] = level
        if first_time:
            region.nodes.append(node)
        return bool(below) and all(visit(n, next_level) for n in below)

    if not visit(output, 0) or not region.products:
        return None
    if any(n in region.leaves for n in region.nodes):
        return None
    region.nodes.sort(key=view.position.__getitem__)
    return region


def _scalar(node: Node) -> bool:
    """A size or another number: no value is moved out of it."""
    return d.symbolic_scalar(node) or isinstance(d.value(node), torch.Size)


def _plain(node: Node) -> bool:
    first, second = d.binary(node)
    return d.tensor(first) is not None and d.tensor(second) is not None


def _written(region: Region, buffer: Node) -> list[Node]:
    """The values that a fresh buffer gets by `buffer[...] = value`."""
    values = []
    for user in buffer.users:
        if user.target is operator.setitem and user.args[0] is buffer and isinstance(user.args[2], Node):
            region.nodes.append(user)
            values.append(user.args[2])
    return values


def rotated_values(view: View, region: Region) -> Iterator[Node]:
    """Values of the output's shape that stand below every product: the nearest to the output first."""
    wanted = d.tensor(region.output)
    assert wanted is not None
    inside = set(region.nodes)
    common: set[int] | None = None
    by_number: dict[int, Node] = {}
    for product in region.products:
        numbers: set[int] = set()
        for operand in _factors(product):
            for node in _cone(operand, inside):
                number = view.vn(node)
                by_number.setdefault(number, node)
                numbers.add(number)
        common = numbers if common is None else common & numbers
    candidates = [by_number[n] for n in common or ()]
    for node in sorted(candidates, key=view.position.__getitem__, reverse=True):
        found = d.tensor(node)
        if found is not None and found.dtype.is_floating_point and found.dim() == wanted.dim():
            if same_shape(found.shape, wanted.shape) and node is not region.output:
                yield node


def indexed_value(view: View, region: Region) -> Node | None:
    """A leaf that is another leaf, permuted by an index tensor."""
    for leaf in region.leaves:
        if not leaf.op.startswith("call") or d.name(leaf) not in ("getitem", "index", "index_select", "gather"):
            continue
        source, value = leaf.args[0], d.tensor(leaf)
        others = [n for n in region.leaves if n is not leaf]
        if isinstance(source, Node) and value is not None and any(view.vn(n) == view.vn(source) for n in others):
            found = d.tensor(source)
            if found is not None and same_shape(found.shape, value.shape):
                return leaf
    return None


def _factors(product: Node) -> list[Node]:
    contraction = contractions.contraction_of(product)
    if contraction is not None:
        return list(contraction.operands)
    operands = product.args[1:3] if d.name(product) == "addcmul" else d.binary(product)
    return [n for n in operands if isinstance(n, Node)]


def _cone(node: Node, inside: set[Node]) -> list[Node]:
    """The node and everything below it inside the region, its leaves included."""
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found:
            continue
        found[current] = None
        if current in inside:
            stack += d.data_inputs(current)
    return [n for n in found if d.tensor(n) is not None]
