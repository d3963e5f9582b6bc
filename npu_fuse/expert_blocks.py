"""A whole block of experts: tokens to their experts, grouped matmuls, and back, weighted and summed.

The middle is a chain of products on rows sorted by expert (grouped matmuls with ends of groups); around it
stand index computations only: sorts, gathers, counts, inverse permutations. What they compute the proof says;
that nothing else stands there, the structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra, experts
from npu_fuse import dialect as d
from npu_fuse.expert_masks import changes_nothing
from npu_fuse.expert_rows import Chain, Product, add_in_place, continues, gathered_by, is_row_wise, step_behind
from npu_fuse.sites import StandIn
from npu_fuse.view import View, same_size, static

GROUPED = frozenset(("grouped_mm", "grouped_mm_fallback", "grouped_matmul", "grouped_linear"))
ROUTING = frozenset(
    "sort argsort getitem floordiv floor_divide index index_select gather reshape view flatten unsqueeze expand"
    " cast cast:other float int long histc bincount cumsum empty_like zeros_like arange setitem scatter scatter_"
    " index_put transpose t contiguous clone repeat_interleave".split()
)
"""Computations of indices, and gathers by them."""


@dataclass
class Block:
    """y [T, H] = Σ_j probs[t, j] · chain(tokens[t], expert indices[t, j])."""

    chain: Chain
    tokens: Node
    indices: Node
    probs: Node
    output: Node
    nodes: tuple[Node, ...] = ()
    twins: tuple[tuple[Node, Node], ...] = ()
    inputs: tuple[Node, ...] = ()
    tail: list[Node] = field(default_factory=list)
    dense: bool = False
    """All experts are computed for all tokens, most of them for nothing."""
    before: tuple[Node, list[Node]] | None = None
    """Rows are weighted before the experts, by the elementwise steps of what was scattered."""
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)


def sorted_chains(view: View) -> list[Chain]:
    """Runs of grouped matmuls with the same ends and only row-wise steps in between."""
    found: list[tuple[int, Chain]] = []
    for node in view.named(*GROUPED):
        product = _product(node)
        if product is None:
            continue
        rows, ends = product.rows, product.ids
        key = view.vn(ends)
        if found and found[-1][0] == key and continues(view, found[-1][1], product):
            found[-1][1].products.append(product)
            continue
        ids = _counted(ends)
        if ids is not None:
            found.append((key, Chain(rows, ids, [product])))
    return [chain for _, chain in found]


def _product(node: Node) -> Product | None:
    if d.name(node) == "grouped_linear":  # npu_fuse's own, of a list of matrices
        rows, weights, biases, ends, turned, zero_rest = node.args
        given = [n for n in (rows, ends) if isinstance(n, Node)]
        if len(given) != 2 or not isinstance(weights, (list, tuple)) or not isinstance(biases, (list, tuple)):
            return None
        lists = [tuple(n for n in group if isinstance(n, Node)) for group in (weights, biases)]
        return Product(given[0], lists[0], given[1], node, bool(turned), (node,), True, lists[1], bool(zero_rest))
    arguments = experts.arguments(node)
    if arguments is None or node.meta.get("npu_fuse"):
        return None
    rows, weight, ends = arguments
    own = d.name(node) == "grouped_matmul"
    return Product(rows, (weight,), ends, node, False, (node,), zero_rest=own and bool(node.args[3]))


def _counted(ends: Node) -> Node | None:
    """The indices whose counts the ends are sums of."""
    node: Any = ends
    while isinstance(node, Node) and node.op.startswith("call"):
        name = d.name(node)
        if name in ("histc", "bincount"):
            ids = d.operand(node, 0, "input")
            while isinstance(ids, Node) and d.name(ids) in ("float", "int", "long", "cast:other"):
                ids = ids.args[0]
            return ids if isinstance(ids, Node) else None
        if name not in ("cumsum", "cast:other", "int", "long"):
            return None
        node = d.operand(node, 0, "input")
    return None


def block_of(view: View, chain: Chain) -> Block | str:
    """The block around a chain, or what is missing for one."""
    tokens, indices = _tokens(chain.slots), _indices(chain.ids)
    if tokens is None or indices is None:
        return "the rows are no gather of tokens by their sorted experts"
    block = _tail(view, chain, tokens, indices)
    if isinstance(block, str):
        return block
    block.inputs = tuple(
        dict.fromkeys((tokens, indices, block.probs, *chain.weights, *chain.gathered.values(), *chain.vectors))
    )
    inner = {n for p in chain.products for n in p.nodes} | chain.steps | set(chain.gathered) | set(block.tail)
    last = view.position[block.output]
    given = {view.storage.get(n, -1) for n in block.inputs}  # what was written before it came in
    outputs = [block.output]

    def allowed(node: Node) -> bool:
        return node in inner or d.name(node) in ROUTING or changes_nothing(view, node)

    for _ in range(4):  # what is written in place is read by nobody's name
        found = algebra.between(view, outputs, block.inputs, allowed)
        if found.stopped is not None:
            return f"{found.stopped.name} stands in the experts' block"
        keys = {view.storage.get(n, -1) for n in found.nodes} - given
        writers = {view.nodes[w] for key in keys for w in view.mutations.get(key, ())}
        more = [n for w in writers if view.position[w] < last for n in (w, *w.all_input_nodes)]
        if set(more) <= {*found.nodes, *block.inputs}:
            break
        outputs = list(dict.fromkeys((*outputs, *(n for n in more if n not in block.inputs))))
    block.nodes, block.twins = found.nodes, found.twins
    return block


def _tokens(rows: Node) -> Node | None:
    """tokens [T, H] of `tokens[…]` by an integer vector."""
    node: Any = algebra.through_casts(rows)
    found = gathered_by_any(node)
    value = d.tensor(found) if found is not None else None
    return found if value is not None and value.dim() == 2 else None


def gathered_by_any(node: Any) -> Node | None:
    if not isinstance(node, Node) or not node.op.startswith("call"):
        return None
    found = gathered_by(node)
    return found[0] if found is not None else None


def _indices(ids: Node) -> Node | None:
    """[T, k] that the ids were made from by flattening and sorting."""
    node: Any = ids
    while isinstance(node, Node) and node.op.startswith("call"):
        value = d.tensor(node)
        if value is not None and value.dim() == 2:
            return node
        if d.name(node) not in ("getitem", "sort", "reshape", "view", "flatten"):
            return None
        node = node.args[0]
    value = d.tensor(node)
    return node if isinstance(node, Node) and value is not None and value.dim() == 2 else None


def _tail(view: View, chain: Chain, tokens: Node, indices: Node) -> Block | str:
    """From the last product to the sum over a token's experts, through one factor for each row."""
    rows, shape = d.tensor(chain.out), d.tensor(indices)
    assert rows is not None and shape is not None
    node, factor = chain.out, None
    tail: list[Node] = []
    for _ in range(16):
        users = [u for u in node.users if not d.mutates(u)]
        if len(users) != 1:
            return "the experts' rows are read more than once"
        user = users[0]
        name, value = d.name(user), d.tensor(user)
        if value is None:
            return f"{user.name} reads the experts' rows"
        if name == "mul" and factor is None:
            left, right = d.binary(user)
            other = right if left is node else left
            given = d.tensor(other)
            if given is None or given.shape[-1] != 1:
                return "the experts' rows are multiplied by no number for each"
            factor = other
        elif name == "sum":
            if value.dim() != 2 or d.operand(user, 1, "dim") not in (1, [1], (1,)) or d.operand(user, 2, "keepdim"):
                return "the sum does not run over a token's experts"
            if d.tensor(node).dim() != 3 or not same_size(d.tensor(node).shape[1], shape.shape[1]):  # type: ignore[union-attr]
                return "the sum does not run over a token's experts"
            probs = _probs(factor, shape) if factor is not None else None
            if probs is None:
                return "no routing weights [T, k] were found"
            add_in_place(view, chain, {n for p in chain.products for n in p.nodes}, view.position[tail[0]])
            last = _narrowed(view, user, rows)
            return Block(chain, tokens, indices, probs, last, tail=[*tail, user, last])
        elif name == "add" and node is chain.out and step_behind(view, chain, user):
            node = user
            continue
        elif (name == "add" and node is chain.out) or name in ROUTING or is_row_wise(user, chain.out):
            if name == "add":
                return "a sum stands behind the experts"
        else:
            return f"{user.name} stands behind the experts' matmuls"
        tail.append(user)
        node = user
    return "no sum over a token's experts was found"


def _narrowed(view: View, total: Node, rows: torch.Tensor) -> Node:
    """The sum rounded back to the rows' dtype, where nothing reads the wider one: the op rounds so itself."""
    user = next(iter(total.users)) if len(total.users) == 1 else total
    result = d.tensor(user)
    back = result is not None and d.name(user) == "cast" and result.dtype == rows.dtype
    return user if back and view.same_version(total, user) and view.scope[user] == view.scope[total] else total


def _probs(factor: Any, indices: torch.Tensor) -> Node | None:
    """[T, k] of numbers that were flattened, sorted and broadcast."""
    node = factor
    while isinstance(node, Node):
        value = d.tensor(node)
        if value is None:
            return None
        if value.dim() == 2 and value.is_floating_point():
            if all(same_size(a, b) for a, b in zip(value.shape, indices.shape, strict=True)) and not _sliced(node):
                return node
        if not node.op.startswith("call") or d.name(node) not in ROUTING or not node.args:
            return None
        node = node.args[0]
    return None


def _sliced(node: Node) -> bool:
    """[S, 1] where k is 1: still on the way to the weights."""
    found = d.tensor(node)
    return (
        found is not None and static(found.shape[1]) == 1 and node.op.startswith("call") and d.name(node) == "unsqueeze"
    )


def tokens_of(result: torch.Tensor) -> Any:
    """How many rows [T, N] or [B, S, N] has."""
    return result.shape[0] if result.dim() == 2 else result.shape[0] * result.shape[1]


def ranges(block: Block) -> Mapping[int, tuple[Any, Any]]:
    """The literal number of slots, as tokens times experts of each."""
    shape = d.tensor(block.indices)
    assert shape is not None
    tokens, k = shape.shape
    slots = tokens * k
    return {slots: (tokens, k)} if isinstance(slots, int) else {}
