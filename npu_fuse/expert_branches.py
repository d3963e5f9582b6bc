"""Every expert on every token, weighted by numbers that are zero for most: one branch of the graph for each expert.

    y = Σ_e r[t, e] · expert_e(x[t]),   r made of the chosen experts' indices [T, k] and weights [T, k]

Modules of a list or stacked weights indexed by a number, in a loop that Dynamo unrolled. Only the chosen experts
have to be computed: the block of `expert_blocks`, from x, indices and weights. That r is what it has to be
(a scatter, a one-hot, comparisons with e) the proof says; the structure says that nothing else stands there.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from npu_fuse import algebra
from npu_fuse import dialect as d
from npu_fuse.expert_blocks import Block
from npu_fuse.expert_rows import Chain, Product, is_row_wise
from npu_fuse.view import View, same_size, static

INDEXING = frozenset(
    "eq ne cast cast:other float int long mul sum unsqueeze squeeze getitem select slice scatter scatter_ zeros_like"
    " zeros new_zeros one_hot view reshape transpose permute t where masked_fill expand contiguous clone".split()
)
"""What makes r of indices and weights."""
ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))


@dataclass
class Branch:
    """What one expert computes from `root` [T, H]."""

    root: Node
    nodes: list[Node] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)


def branch_blocks(view: View) -> list[Block | tuple[Node, str]]:
    """Blocks of experts in branches, and what looks like one and is none (its anchor, why)."""
    found: list[Block | tuple[Node, str]] = []
    for branches, factors in _clusters(view):
        anchor = branches[0].products[0].out
        block = _block(view, branches, factors)
        found.append((anchor, block) if isinstance(block, str) else block)
    return found


def _clusters(view: View) -> list[tuple[list[Branch], list[Node]]]:
    """Branches of one structure on one value, each ended by a product with one number for each row."""
    groups: dict[Hashable, list[tuple[Branch, Node]]] = {}
    for branch in _branches(view):
        weighted = _weighted(branch)
        if weighted is not None:
            groups.setdefault((branch.root, _signature(branch)), []).append((branch, weighted))
    return [([b for b, _ in group], [w for _, w in group]) for group in groups.values() if len(group) > 1]


def _branches(view: View) -> list[Branch]:
    owner: dict[Node, Branch] = {}
    products = {n: found for n in view.named("linear", "matmul", "mm") if (found := _product(n)) is not None}
    first_of_all = view.position[next(iter(products))] if products else len(view.nodes)
    for node in view.nodes[first_of_all:]:
        if not node.op.startswith("call"):
            continue
        product = products.get(node)
        if product is not None:
            branch = owner.get(product.rows) or Branch(product.rows)
            branch.nodes.append(node)
            branch.products.append(product)
            owner[node] = branch
            continue
        known = [n for n in node.all_input_nodes if n in owner]
        if not known or not is_row_wise(node, owner[known[0]].root) or d.mutates(node):
            continue
        others = [n for n in node.all_input_nodes if n not in owner and not d.symbolic_scalar(n)]
        branches = list({id(owner[n]): owner[n] for n in known}.values())
        if any((t := d.tensor(n)) is None or t.dim() > 1 for n in others) or len({b.root for b in branches}) > 1:
            continue
        first = branches[0]
        for other in branches[1:]:
            first.nodes += other.nodes
            first.products += other.products
            owner |= {n: first for n in other.nodes}
        first.nodes.append(node)
        owner[node] = first
    return list({id(b): b for b in owner.values()}.values())


def _product(node: Node) -> Product | None:
    """rows [T, K] by an expert's own matrix: a parameter, or one of a stacked parameter by number."""
    name = d.name(node)
    if len(node.args) < 2:
        return None
    rows, matrix = node.args[0], node.args[1]
    turned = name == "linear"
    bias = d.operand(node, 2, "bias") if name == "linear" else None
    inner: list[Node] = [node]
    while isinstance(matrix, Node) and matrix.op.startswith("call") and d.name(matrix) in ("t", "transpose", "mT"):
        inner.append(matrix)
        turned, matrix = not turned, matrix.args[0]
    if not isinstance(rows, Node) or not isinstance(matrix, Node):
        return None
    value, weight, result = d.tensor(rows), d.tensor(matrix), d.tensor(node)
    if value is None or weight is None or result is None or (value.dim(), weight.dim(), result.dim()) != (2, 2, 2):
        return None
    if matrix.op.startswith("call"):
        if _of_stack(matrix) is None or bias is not None:
            return None
        inner.append(matrix)
    biases = (bias,) if isinstance(bias, Node) else ()
    return Product(rows, (matrix,), rows, node, turned, tuple(inner), True, biases)


def _of_stack(matrix: Node) -> tuple[Node, int] | None:
    """(W, e) of `W[e]`."""
    source = matrix.args[0]
    index = matrix.args[1] if d.name(matrix) == "getitem" else d.operand(matrix, 2, "index")
    if d.name(matrix) == "select" and d.operand(matrix, 1, "dim") != 0:
        return None
    value = d.tensor(source)
    if d.name(matrix) not in ("getitem", "select") or not isinstance(index, int) or value is None or value.dim() != 3:
        return None
    return (source, index) if isinstance(source, Node) else None


def _weighted(branch: Branch) -> Node | None:
    """The product of the branch's only result with numbers [T, 1]."""
    inside = set(branch.nodes)
    outside = [(n, u) for n in branch.nodes for u in n.users if u not in inside]
    if len(outside) != 1:
        return None
    last, user = outside[0]
    value, result = d.tensor(last), d.tensor(user)
    if d.name(user) != "mul" or d.mutates(user) or result is None or value is None:
        return None
    left, right = d.binary(user)
    factor = d.tensor(right if left is last else left)
    return user if factor is not None and factor.dim() == 2 and static(factor.shape[1]) == 1 else None


def _signature(branch: Branch) -> Hashable:
    """Equal for branches that compute the same with matrices of their own."""
    names: dict[Node, Hashable] = {branch.root: "root"}
    own = {n: ("own", i, j) for i, p in enumerate(branch.products) for j, n in enumerate((*p.weights, *p.biases))}
    names |= own
    parts: list[Hashable] = []
    for node in branch.nodes:
        product = next((p for p in branch.products if p.out is node), None)
        if product is not None:
            shapes = tuple(str(d.tensor(w).shape) for w in (*product.weights, *product.biases))  # type: ignore[union-attr]
            parts.append((d.name(node), names.get(product.rows), product.turned, shapes))
        else:
            text = str(_encoded((node.args, tuple(sorted(node.kwargs.items()))), names))
            parts.append((str(node.target), text))
        names[node] = len(parts)
    return tuple(parts)


def _encoded(value: Any, names: Mapping[Node, Hashable]) -> Any:
    if isinstance(value, Node):
        return names.get(value, value.name)
    if isinstance(value, (tuple, list)):
        return tuple(_encoded(v, names) for v in value)
    return repr(value)


def _block(view: View, branches: list[Branch], weighted: list[Node]) -> Block | str:
    total = _total(view, weighted)
    if isinstance(total, str):
        return total
    output, adds = total
    lasts = [next(n for n in w.all_input_nodes if n in set(b.nodes)) for b, w in zip(branches, weighted, strict=True)]
    factors = [next(n for n in w.all_input_nodes if n is not last) for w, last in zip(weighted, lasts, strict=True)]
    routing = routing_of(branches[0].root, factors)
    if isinstance(routing, str):
        return routing
    indices, probs, between = routing
    chain = _chain(branches, indices, lasts[0])
    if isinstance(chain, str):
        return chain
    inner = {n for b in branches for n in b.nodes} | {n for b in branches for p in b.products for n in p.nodes}
    allowed = inner | set(weighted) | adds | between
    inputs = tuple(dict.fromkeys((branches[0].root, indices, probs, *chain.weights, *chain.vectors)))
    found = algebra.between(view, [output], inputs, lambda n: n in allowed)
    if found.stopped is not None:
        return f"{found.stopped.name} stands in the experts' block"
    return Block(chain, branches[0].root, indices, probs, output, found.nodes, found.twins, inputs, dense=True)


def _total(view: View, weighted: list[Node]) -> tuple[Node, set[Node]] | str:
    """The sum of all branches, and the additions on the way."""
    parts: dict[Node, frozenset[Node]] = {w: frozenset((w,)) for w in weighted}
    wanted = frozenset(weighted)
    used: set[Node] = set()
    for node in view.nodes[view.position[weighted[0]] + 1 :]:
        if not node.op.startswith("call") or not any(n in parts for n in node.all_input_nodes):
            continue
        name = d.name(node)
        given: list[Any] = list(node.args[:2]) if name == "add" and not node.kwargs else []
        if name in ("stack", "cast", "contiguous", "clone"):
            given = list(node.args[0]) if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
        elif name == "sum" and d.operand(node, 1, "dim") in (0, [0], (0,)) and not d.operand(node, 2, "keepdim"):
            given = [node.args[0]] if d.name(node.args[0]) == "stack" else []  # type: ignore[arg-type]
        if not given or not all(g in parts or _is_zero(g) for g in given):
            continue
        parts[node] = frozenset().union(*(parts[g] for g in given if g in parts))
        used |= {node, *(g for g in given if isinstance(g, Node))}
        if parts[node] == wanted and name != "stack":
            return node, used
    return "the experts are not added up"


def _is_zero(value: Any) -> bool:
    if isinstance(value, Node):
        return value.op.startswith("call") and d.name(value) in ZEROS
    return isinstance(value, (int, float)) and value == 0


def routing_of(root: Node, factors: list[Node]) -> tuple[Node, Node, set[Node]] | str:
    """Indices [T, k], weights [T, k] and what makes the branches' factors of them."""
    rows = d.tensor(root)
    assert rows is not None
    seen = _above(factors, lambda n: False)
    indices = [n for n in seen if _chosen(n, rows.shape[0])]
    if len(indices) != 1:
        return "no indices of chosen experts were found: every token goes to every expert"
    shape = d.tensor(indices[0]).shape  # type: ignore[union-attr]

    def is_weight(node: Node) -> bool:
        value = d.tensor(node)
        if value is None or not value.is_floating_point() or value.dim() != 2:
            return False
        if not all(same_size(a, b) for a, b in zip(value.shape, shape, strict=True)):
            return False
        return indices[0] not in _above([node], lambda n: n is indices[0])

    between = _above(factors, lambda n: n is indices[0] or is_weight(n))
    weights = [n for n in between if is_weight(n)]
    if len(weights) != 1:
        return "no routing weights [T, k] were found"
    return indices[0], weights[0], set(between) - {indices[0], weights[0]}


def _above(nodes: list[Node], stop: Any) -> list[Node]:
    """What the nodes were made of by index computations, the ends included."""
    found: dict[Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found[node] = None
        if node.op.startswith("call") and d.name(node) in INDEXING and not stop(node):
            stack += node.all_input_nodes
    return list(found)


def _chosen(node: Node, rows: Any) -> bool:
    """Integers [T, k]: the indices of a top-k, or given from outside."""
    value = d.tensor(node)
    if value is None or value.dim() != 2 or value.is_floating_point() or value.dtype.itemsize < 4:
        return False
    if not same_size(value.shape[0], rows):
        return False
    if node.op == "placeholder":
        return True
    source = node.args[0] if node.args else None
    is_second = d.name(node) == "getitem" and node.args[1] == 1
    return bool(is_second and isinstance(source, Node) and d.name(source) == "topk")


def _chain(branches: list[Branch], indices: Node, last: Node) -> Chain | str:
    """The first branch, with every branch's matrices in the place of its own."""
    first = branches[0]
    chain = Chain(first.root, indices)
    for position, product in enumerate(first.products):
        alike = [b.products[position] for b in branches]
        weights = tuple(p.weights[0] for p in alike)
        stacked = [_of_stack(w) for w in weights if w.op.startswith("call")]
        listed = not stacked
        if stacked:
            order = [s[1] if s is not None else -1 for s in stacked]
            sources = {s[0] for s in stacked if s is not None}
            size = d.tensor(next(iter(sources))).shape[0]  # type: ignore[union-attr]
            if len(sources) != 1 or order != list(range(len(branches))) or static(size) != len(branches):
                return "the experts' matrices are not all of one stacked parameter, in its order"
            weights = (next(iter(sources)),)
        elif len(set(weights)) != len(weights):
            return "two experts have one matrix"
        biases = tuple(n for p in alike for n in p.biases)
        chain.products.append(
            Product(product.rows, weights, indices, product.out, product.turned, product.nodes, listed, biases)
        )
    chain.steps = set(first.nodes) - {p.out for p in chain.products}
    chain.vectors = {
        n: None for s in chain.steps for n in s.all_input_nodes if n not in set(first.nodes) and n is not first.root
    }
    chain.end = last if last is not chain.products[-1].out else None
    chain.count = len(branches)
    return chain
