"""Every expert on every token by one batched product: [E, T, K] · [E, K, N], or an einsum with both letters.

    y = Σ_e r[t, e] · expert_e(x[t]),   r made of the chosen experts' indices [T, k] and weights [T, k]

As in `expert_branches` only the chosen experts have to be computed. Values between the products have an expert and a
token dimension before their features; steps on them are row-wise, biases [E, N] are broadcast over the tokens.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from npu_fuse import algebra
from npu_fuse import dialect as d
from npu_fuse.expert_before import bases, block_of_weighted
from npu_fuse.expert_blocks import Block, tokens_of
from npu_fuse.expert_branches import routing_of
from npu_fuse.expert_rows import ROW_WISE, Chain, Product
from npu_fuse.view import View, same_size, static

BEHIND = frozenset("mul sum view reshape transpose permute einsum matmul bmm squeeze unsqueeze cast contiguous".split())
"""From the last product to the sum over experts."""


def dense_blocks(view: View) -> list[Block | tuple[Node, str]]:
    """Blocks of experts in batched products over all of them, and what is none of them (its anchor, why)."""
    found: list[Block | tuple[Node, str]] = []
    for chain in _chains(view):
        if len(chain.products) < 2:
            continue
        block = _block(view, chain)
        found.append((chain.products[0].out, block) if isinstance(block, str) else block)
    return found


def _chains(view: View) -> list[Chain]:
    found: list[Chain] = []
    for node in view.named("bmm", "matmul", "einsum"):
        product = _product(node)
        if product is None:
            continue
        if not any(_joins(chain, product) for chain in found):
            found.append(Chain(product.rows, product.rows, [product]))
    return found


def _product(node: Node) -> Product | None:
    """A product of all tokens with every expert's matrix: out [E, T, N] or [T, E, N]."""
    name = d.name(node)
    result = d.tensor(node)
    if result is None or result.dim() != 3:
        return None
    if name == "einsum":
        return _einsum(node)
    rows, matrix = d.binary(node) if name == "matmul" else (node.args[0], d.operand(node, 1, "mat2"))
    inner: list[Node] = [node]
    turned = False
    while isinstance(matrix, Node) and matrix.op.startswith("call") and d.name(matrix) in ("transpose", "mT"):
        swapped = {d.operand(matrix, 1, "dim0"), d.operand(matrix, 2, "dim1")}
        if d.name(matrix) == "transpose" and swapped not in ({1, 2}, {-1, -2}):
            return None
        inner.append(matrix)
        turned, matrix = not turned, matrix.args[0]
    if not _is_stack(matrix) or not isinstance(rows, Node) or d.tensor(rows) is None or rows is matrix:
        return None
    return Product(rows, (matrix,), rows, node, turned, tuple(inner))


def _is_stack(node: Any) -> bool:
    """A parameter [E, K, N]: nothing computed."""
    value = d.tensor(node)
    return isinstance(node, Node) and not node.op.startswith("call") and value is not None and value.dim() == 3


def _einsum(node: Node) -> Product | None:
    equation: Any = node.args[0]
    operands: Any = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    letters = left.split(",")
    orders: Any = ((*operands, *letters), (*reversed(operands), *reversed(letters)))
    for rows, matrix, mine, stack in orders:
        if not _is_stack(matrix) or not isinstance(rows, Node) or len(stack) != 3 or len(out) != 3:
            continue
        expert, token = stack[0], [c for c in mine if c not in stack]
        inner = [c for c in stack[1:] if c in mine and c not in out]
        if len(token) != 1 or len(inner) != 1 or mine[-1] != inner[0] or out[-1] not in stack[1:]:
            continue
        if set(out) != {expert, token[0], out[-1]}:
            continue
        return Product(rows, (matrix,), rows, node, stack[1] == out[-1], (node,))
    return None


def _joins(chain: Chain, product: Product) -> bool:
    """The product's rows are computed row by row from the chain's, or are what the chain's first product had."""
    known = {p.out for p in chain.products}
    if product.rows is chain.slots:
        chain.products.append(product)
        return True
    steps: set[Node] = set()
    gathered, vectors = dict(chain.gathered), dict(chain.vectors)
    touched = False
    stack = [product.rows]
    while stack:
        node = stack.pop()
        if node in known or node in steps or node in gathered or node in vectors:
            touched = touched or node in known
            continue
        kind = _kind(chain, node)
        if not kind:
            return False
        if kind == "vector":
            vectors[node] = None
        elif kind == "bias":
            gathered[node] = _bias(chain, node)  # type: ignore[assignment]
        else:
            steps.add(node)
            stack += [n for n in node.all_input_nodes if not d.symbolic_scalar(n)]
    if not touched:
        return False
    chain.steps |= steps
    chain.gathered, chain.vectors = gathered, vectors
    chain.products.append(product)
    return True


def _kind(chain: Chain, node: Node) -> str:
    value = d.tensor(node)
    if value is not None and value.dim() <= 1 and value.is_floating_point():
        return "vector"
    if _bias(chain, node) is not None:
        return "bias"
    return "step" if _row_wise(node) else ""


def _bias(chain: Chain, node: Node) -> Node | None:
    """[E, N] that was given a dimension for the tokens."""
    value = d.tensor(node)
    source: Any = node
    while isinstance(source, Node) and source.op.startswith("call") and d.name(source) in ("getitem", "unsqueeze"):
        source = source.args[0]
    found = d.tensor(source)
    weight = d.tensor(chain.products[0].weight)
    if value is None or found is None or weight is None or not isinstance(source, Node) or found.dim() != 2:
        return None
    if source.op.startswith("call") or source is node or not same_size(found.shape[0], weight.shape[0]):
        return None
    return source if value.dim() == 3 and value.numel() == found.numel() else None


def _row_wise(node: Node) -> bool:
    """Features of [·, ·, N] only are split or combined, elements of one row with one another's."""
    if not node.op.startswith("call") or d.name(node) not in ROW_WISE or d.mutates(node):
        return False
    value = d.value(node)
    results = list(value) if isinstance(value, (tuple, list)) else [value]
    if not all(hasattr(r, "dim") and r.dim() == 3 for r in results):
        return False
    if d.name(node) in ("chunk", "split"):
        return d.operand(node, 2, "dim", 0) == -1 and len({str(r.shape[2]) for r in results}) == 1
    if d.name(node) == "getitem" and not isinstance(node.args[1], int):
        index: Any = node.args[1]
        simple = isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(index[1], slice)
        return bool(simple and index[1].stop is None)
    return True


def _block(view: View, chain: Chain) -> Block | str:
    tail = _tail(chain)
    if isinstance(tail, str):
        return tail
    output, steps, factors = tail
    if not factors:
        computed = {n for p in chain.products for n in p.nodes} | chain.steps
        return block_of_weighted(view, chain, output, steps, computed)
    root = _root(chain.slots, output)
    if root is None:
        return "the tokens that go to every expert were not found"
    routing = routing_of(root, factors)
    if isinstance(routing, str):
        return routing
    indices, probs, between = routing
    inner = {n for p in chain.products for n in p.nodes} | chain.steps | set(steps) | between
    inner |= _way(chain.slots, root) | {n for g in chain.gathered for n in _way(g, chain.gathered[g])}
    inputs = tuple(dict.fromkeys((root, indices, probs, *chain.weights, *chain.gathered.values(), *chain.vectors)))
    filled = bases(between, probs, chain.weights[0])
    found = algebra.between(view, [output], (*inputs, *filled), lambda n: n in inner)
    if found.stopped is not None:
        return f"{found.stopped.name} stands in the experts' block"
    slots, chain.slots = chain.slots, root
    chain.products = [
        Product(root if p.rows is slots else p.rows, p.weights, indices, p.out, p.turned, p.nodes)
        for p in chain.products
    ]
    chain.ids = indices
    nodes = tuple(sorted({*found.nodes, *filled}, key=view.position.__getitem__))
    return Block(chain, root, indices, probs, output, nodes, found.twins, inputs, dense=True, stand_ins=filled)


def _way(node: Node, end: Node) -> set[Node]:
    found: set[Node] = set()
    while node is not end and node.op.startswith("call"):
        found.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _tail(chain: Chain) -> tuple[Node, list[Node], list[Node]] | str:
    """From the last product to the first value without a dimension for experts; what it is weighted by on the way."""
    node, steps, factors = chain.out, [], []
    for _ in range(12):
        users = list(node.users)
        if len(users) != 1:
            return "the experts' rows are read more than once"
        user = users[0]
        value, before = d.tensor(user), d.tensor(node)
        if node is chain.out and d.name(user) == "add" and value is not None and _adds_bias(chain, user):
            chain.steps.add(user)
            chain.end = node = user
            continue
        if value is None or before is None or d.name(user) not in BEHIND or d.mutates(user):
            return f"{user.name} stands behind the experts' products"
        steps.append(user)
        factors += [n for n in user.all_input_nodes if n is not node and d.tensor(n) is not None]
        node = user
        if not same_size(value.numel(), before.numel()):
            shape = d.tensor(chain.out).shape  # type: ignore[union-attr]
            if value.dim() not in (2, 3) or not same_size(value.shape[-1], shape[2]):
                return "what the experts add up to is no [tokens, width]"
            if value.dim() == 3 and all(static(s) is None for s in value.shape[:2]):
                return "the experts add up to [batch, sequence, width] of two unknown sizes"
            return node, steps, factors
    return "no sum over the experts was found"


def _adds_bias(chain: Chain, user: Node) -> bool:
    others = [n for n in user.all_input_nodes if n is not chain.out]
    source = _bias(chain, others[0]) if len(others) == 1 else None
    if source is None:
        return False
    chain.gathered[others[0]] = source
    return True


def _root(slots: Node, output: Node) -> Node | None:
    """x [T, K] that was repeated for every expert."""
    rows = d.tensor(output)
    node: Any = slots
    while isinstance(node, Node) and rows is not None:
        value = d.tensor(node)
        if value is not None and value.dim() == 2 and same_size(value.shape[0], tokens_of(rows)):
            return node
        if not node.op.startswith("call") or not d.moves(node) or not node.args:
            return None
        node = node.args[0]
    return None
