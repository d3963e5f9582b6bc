"""Experts of weighted rows: y = Σ_e expert_e(r[t, e] · x[t]), r made of the chosen experts' numbers, 0 elsewhere.

An expert that is not chosen gets rows of zeros. Where that makes its result zero (no biases, activations that are 0
at 0: the proof says so) only the chosen ones have to be computed, of rows that are weighted first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra
from npu_fuse import dialect as d
from npu_fuse.expert_blocks import Block, tokens_of
from npu_fuse.expert_rows import Chain, Product
from npu_fuse.sites import StandIn
from npu_fuse.view import View, same_size

ELEMENTWISE = frozenset(("cast", "sigmoid", "exp", "mul", "div", "relu", "tanh"))
FILLED = {"full_like": 1, "zeros_like": None, "full": 1, "zeros": None, "new_full": 2, "new_zeros": None}
"""Tensors of one value, and the position of that value."""


def block_of_weighted(view: View, chain: Chain, output: Node, steps: list[Node], inner: set[Node]) -> Block | str:
    """The block of a dense chain whose results are added as they are."""
    first = chain.slots
    way, product = _down(first)
    rows, result = d.tensor(output), d.tensor(product)
    if rows is None or result is None or d.name(product) != "mul" or d.mutates(product):
        return "the experts are added without weights"
    count = tokens_of(rows)
    for tokens, factor in (d.binary(product), d.binary(product)[::-1]):
        if not isinstance(tokens, Node) or not isinstance(factor, Node):
            continue
        more, root = _down(tokens, count)
        path, last = _down(factor)
        value = d.tensor(root)
        if value is None or value.dim() != 2 or not same_size(value.shape[0], count):
            continue
        read = _scattered(last, count)
        if read is None:
            continue
        elementwise, scatter, base, indices, values = read
        allowed = {*inner, *way, product, *more, *path, *elementwise, scatter, *steps}
        inputs = tuple(dict.fromkeys((root, indices, values, *chain.weights, *chain.vectors)))
        found = algebra.between(view, [output], (*inputs, base), lambda n, a=allowed: n in a)  # type: ignore[misc]
        if found.stopped is not None or chain.gathered:
            return f"{found.stopped.name if found.stopped else 'a bias'} stands in the block of weighted rows"
        chain.products = [
            Product(root if p.rows is first else p.rows, p.weights, indices, p.out, p.turned, p.nodes)
            for p in chain.products
        ]
        chain.slots, chain.ids = root, indices
        nodes = tuple(sorted({*found.nodes, base}, key=view.position.__getitem__))
        return Block(
            chain, root, indices, values, output, nodes, found.twins, inputs, dense=True, before=(scatter, elementwise),
            stand_ins={base: _filled(base, values, chain.weights[0])},
        )  # fmt: skip
    return "the experts are added without weights"


def _down(node: Node, rows: Any = None) -> tuple[list[Node], Node]:
    """The moves from a value to the node, and that value: [rows, …] if a number of rows is given."""
    way: list[Node] = []
    while node.op.startswith("call") and d.moves(node) and isinstance(node.args[0], Node):
        value = d.tensor(node)
        if rows is not None and value is not None and value.dim() == 2 and same_size(value.shape[0], rows):
            break
        way.append(node)
        node = node.args[0]
    return way, node


def _scattered(node: Any, rows: Any) -> tuple[list[Node], Node, Node, Node, Node] | None:
    """Elementwise steps, first to last, behind a scatter of values [T, k] by indices [T, k]; and what it fills."""
    steps: list[Node] = []
    while isinstance(node, Node) and node.op.startswith("call") and d.name(node) in ELEMENTWISE:
        tensors = [n for n in d.data_inputs(node) if d.tensor(n) is not None]
        if len(tensors) != 1 or d.mutates(node):
            return None
        steps.append(node)
        node = tensors[0]
    if not isinstance(node, Node) or d.name(node) != "scatter":
        return None
    base, indices, values = node.args[0], d.operand(node, 2, "index"), d.operand(node, 3, "src")
    found, given = d.tensor(indices), d.tensor(values)
    if not isinstance(base, Node) or d.name(base) not in FILLED or found is None or given is None:
        return None
    flat = found.dim() == given.dim() == 2 and same_size(found.shape[0], rows)
    if not flat or d.operand(node, 1, "dim") not in (1, -1) or _fill(base) is None:
        return None
    return steps[::-1], node, base, indices, values


def _fill(base: Node) -> float | None:
    at = FILLED[d.name(base)]
    return 0.0 if at is None else d.constant(d.operand(base, at, "fill_value"))


def _filled(base: Node, values: Node, weight: Node) -> StandIn:
    fill = _fill(base)
    assert fill is not None
    run: Callable[..., torch.Tensor] = lambda v, w: v.new_full((v.shape[0], w.shape[0]), fill)  # noqa: E731
    return StandIn((values, weight), run, ("filled", fill))


def bases(nodes: Iterable[Node], values: Node, weight: Node) -> dict[Node, StandIn]:
    """Tensors [T, E] of one value that another gave its shape: of that nothing else is read."""
    shaped = [n for n in nodes if d.name(n) in FILLED and n.op.startswith("call") and d.data_inputs(n)]
    sizes, rows = d.tensor(weight), d.tensor(values)
    found = {}
    for base in shaped:
        value = d.tensor(base)
        if value is None or sizes is None or rows is None or value.dtype != rows.dtype or _fill(base) is None:
            continue
        if value.dim() == 2 and same_size(value.shape[1], sizes.shape[0]) and same_size(value.shape[0], rows.shape[0]):
            found[base] = _filled(base, values, weight)
    return found
