"""Experts row by row: each slot s has its own weight, gathered by index (`bmm(W[ids], x)`), and rows stay apart.

A chain is a run of such products with the same indices and only row-wise steps in between. Rows that stay apart
may be computed in any order: sorted by expert the products are grouped matmuls. Slots S = tokens T · k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.view import View, same_size, static

ROW_WISE = d.POINTWISE | {
    "cast", "softplus", "hardswish", "mish", "relu6", "leaky_relu", "elu", "logsigmoid", "chunk", "split", "getitem",
    "clone", "contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """rows [S, K] · weight[ids] → out [S, N]; `turned`: the weight is stored [E, N, K].

    `listed`: experts have matrices of their own; `weights` are those, else the one that holds all. `biases` [N] each.
    """

    rows: Node
    weights: tuple[Node, ...]
    ids: Node
    out: Node
    turned: bool
    nodes: tuple[Node, ...]
    listed: bool = False
    biases: tuple[Node, ...] = ()
    zero_rest: bool = False
    """Rows of no expert are zeros by contract."""

    @property
    def weight(self) -> Node:
        return self.weights[0]


@dataclass
class Chain:
    """Products on the same slots. `steps` are the row-wise nodes between them, `gathered` parameters P[ids]."""

    slots: Node
    ids: Node
    products: list[Product] = field(default_factory=list)
    steps: set[Node] = field(default_factory=set)
    gathered: dict[Node, Node] = field(default_factory=dict)
    vectors: dict[Node, None] = field(default_factory=dict)
    """Per-feature values and numbers from outside, the same for every row."""
    end: Node | None = None
    """The last row-wise step behind the last product (a bias added to it), if there is one."""
    count: int = 0
    """How many experts there are, where the graph's structure says it: a branch for each."""

    @property
    def out(self) -> Node:
        return self.end if self.end is not None else self.products[-1].out

    @property
    def weights(self) -> tuple[Node, ...]:
        """Every product's matrices and biases."""
        return tuple(dict.fromkeys(n for p in self.products for n in (*p.weights, *p.biases)))

    @property
    def listed(self) -> int:
        """How many experts there are, where one has matrices of its own; else 0."""
        return next((len(p.weights) for p in self.products if p.listed), 0)

    @property
    def zero_rest(self) -> bool:
        return any(p.zero_rest for p in self.products)


def chains(view: View) -> list[Chain]:
    found: list[Chain] = []
    for node in view.named("bmm", "matmul"):
        product = product_of(view, node)
        if product is None:
            continue
        current = found[-1] if found else None
        if current is not None and view.vn(current.ids) == view.vn(product.ids) and continues(view, current, product):
            current.products.append(product)
        else:
            found.append(Chain(product.rows, product.ids, [product]))
    return found


def gathered_by(node: Any) -> tuple[Node, Node] | None:
    """(P, ids) of `P[ids]`, ids a vector of integers."""
    if not isinstance(node, Node) or not node.op.startswith("call"):
        return None
    name = d.name(node)
    source: Any
    ids: Any
    if name == "getitem":
        source, ids = node.args
        ids = ids[0] if isinstance(ids, (tuple, list)) and len(ids) == 1 else ids
    elif name == "index_select" and d.operand(node, 1, "dim") == 0:
        source, ids = node.args[0], d.operand(node, 2, "index")
    elif name == "index" and isinstance(node.args[1], (tuple, list)) and len(node.args[1]) == 1:
        source, ids = node.args[0], node.args[1][0]
    else:
        return None
    value = d.tensor(ids)
    if value is None or value.dim() != 1 or value.is_floating_point() or value.dtype.itemsize < 4:
        return None
    if not isinstance(source, Node) or not isinstance(ids, Node) or d.tensor(source) is None:
        return None
    return source, ids


def product_of(view: View, node: Node) -> Product | None:
    """A batched product of one row with one gathered matrix."""
    left, right = d.binary(node) if d.name(node) == "matmul" else (node.args[0], d.operand(node, 1, "mat2"))
    for operand, row, matrix_first in ((left, right, True), (right, left, False)):
        inner: list[Node] = [node]
        matrix: Any = operand
        turned = matrix_first
        while isinstance(matrix, Node) and matrix.op.startswith("call") and _swaps_last(matrix):
            inner.append(matrix)
            turned = not turned
            matrix = matrix.args[0]
        gathered = gathered_by(matrix)
        if gathered is None or not isinstance(row, Node) or not isinstance(matrix, Node):
            continue
        weight = d.tensor(gathered[0])
        rows, result, flat = _as_rows(row), d.tensor(node), _sole_flattening(node)
        if weight is None or weight.dim() != 3 or rows is None or result is None or result.dim() != 3 or flat is None:
            continue
        one = result.shape[2] if matrix_first else result.shape[1]
        if static(one) != 1:
            continue
        return Product(rows, (gathered[0],), gathered[1], flat, turned, (*inner, matrix, row, flat))
    return None


def _swaps_last(node: Node) -> bool:
    name = d.name(node)
    if name == "mT":
        return True
    if name != "transpose":
        return False
    found = d.tensor(node)
    if found is None or found.dim() != 3:
        return False
    return {d.operand(node, 1, "dim0") % 3, d.operand(node, 2, "dim1") % 3} == {1, 2}


def _as_rows(node: Node) -> Node | None:
    """x [S, K] of `x.unsqueeze(…)` [S, K, 1] or [S, 1, K]."""
    if not node.op.startswith("call") or not d.moves(node) or not isinstance(node.args[0], Node):
        return None
    source, found = d.tensor(node.args[0]), d.tensor(node)
    if source is None or found is None or source.dim() != 2 or found.dim() != 3:
        return None
    return node.args[0] if same_size(source.shape[0], found.shape[0]) else None


def _sole_flattening(node: Node) -> Node | None:
    """[S, N] made from [S, N, 1] or [S, 1, N] by its only user."""
    users = list(node.users)
    if len(users) != 1 or not d.moves(users[0]):
        return None
    found, result = d.tensor(users[0]), d.tensor(node)
    if found is None or result is None or found.dim() != 2 or not same_size(found.shape[0], result.shape[0]):
        return None
    return users[0]


def continues(view: View, chain: Chain, product: Product) -> bool:
    """The product's rows are computed row by row from what the chain has; then its steps become the chain's."""
    steps: set[Node] = set()
    gathered, vectors = dict(chain.gathered), dict(chain.vectors)
    known = {p.out for p in chain.products} | {chain.slots}
    touched = product.rows in known
    stack = [product.rows]
    while stack:
        node = stack.pop()
        if node in known or node in steps or node in gathered or node in vectors:
            touched = touched or node in known
            continue
        kind = _kind(view, chain, node, product.rows)
        if kind == "":
            return False
        if kind == "vector":
            vectors[node] = None
        elif kind == "gathered":
            found = gathered_by(node)
            assert found is not None
            gathered[node] = found[0]
        else:
            steps.add(node)
            vectors |= {n: None for n in node.all_input_nodes if d.symbolic_scalar(n)}
            stack += [n for n in node.all_input_nodes if not d.symbolic_scalar(n)]
    if not touched:
        return False
    chain.steps |= steps
    chain.gathered, chain.vectors = gathered, vectors
    _add_writers(view, chain, product)
    return True


def _add_writers(view: View, chain: Chain, product: Product) -> None:
    """In-place steps on the chain's own values (`out.add_(bias)`), whose results nobody reads by name."""
    limit = view.position[product.out]
    inside = {n for p in chain.products for n in p.nodes} | chain.steps
    add_in_place(view, chain, inside, limit)


def add_in_place(view: View, chain: Chain, inside: set[Node], limit: int) -> None:
    for node in list(inside):
        for at in view.mutations.get(view.storage.get(node, -1), ()):
            writer = view.nodes[at]
            if at > limit or writer in chain.steps or not d.mutates(writer):
                continue
            if writer.args and writer.args[0] in inside and d.name(writer) in d.POINTWISE:
                others = [a for a in writer.args[1:] if isinstance(a, Node)]
                for other in others:
                    found = gathered_by(other)
                    if found is not None and view.vn(found[1]) == view.vn(chain.ids):
                        chain.gathered[other] = found[0]
                    elif _is_vector(other):
                        chain.vectors[other] = None
                    elif other not in inside:
                        return
                chain.steps.add(writer)


def step_behind(view: View, chain: Chain, node: Node) -> bool:
    """A row-wise step on the last product's rows and on what each expert or all of them have: it joins the chain."""
    if not is_row_wise(node, chain.out) or d.mutates(node):
        return False
    others = [n for n in node.all_input_nodes if n is not chain.out]
    kinds = [_kind(view, chain, n, chain.out) for n in others]
    if not all(k in ("gathered", "vector") for k in kinds):
        return False
    for other, kind in zip(others, kinds, strict=True):
        found = gathered_by(other)
        if kind == "gathered" and found is not None:
            chain.gathered[other] = found[0]
        else:
            chain.vectors[other] = None
    chain.steps.add(node)
    chain.end = node
    return True


def _kind(view: View, chain: Chain, node: Node, rows: Node) -> str:
    """step, gathered, vector, or "" for what ties rows together or comes from elsewhere."""
    found = gathered_by(node)
    if found is not None and view.vn(found[1]) == view.vn(chain.ids):
        value = d.tensor(found[0])
        return "gathered" if value is not None and value.dim() == 2 else ""
    if _is_vector(node):
        return "vector"
    return "step" if is_row_wise(node, rows) else ""


def _is_vector(node: Node) -> bool:
    value = d.tensor(node)
    return value is not None and value.dim() <= 1 and value.is_floating_point()


def is_row_wise(node: Node, rows: Node) -> bool:
    """Row s of the result depends on row s of the operands only. Written for [S, N], and for pairs of such."""
    if not node.op.startswith("call") or node.kwargs.get("out") is not None:
        return False
    if d.name(node) not in ROW_WISE and not _drops_nothing(node):
        return False
    like = d.tensor(rows)
    assert like is not None
    value = d.value(node)
    results = list(value) if isinstance(value, (tuple, list)) else [value]
    for result in results:
        if not hasattr(result, "dim") or result.dim() != 2 or not same_size(result.shape[0], like.shape[0]):
            return False
    name = d.name(node)
    if name in ("chunk", "split"):
        last = d.operand(node, 2, "dim", 0) in (-1, 1)
        return last and len({str(r.shape[1]) for r in results}) == 1
    if name == "getitem":
        return isinstance(node.args[1], int) == isinstance(d.value(node.args[0]), (tuple, list)) and (
            isinstance(node.args[1], int) or _slices_features(node.args[1])
        )
    return True


def _drops_nothing(node: Node) -> bool:
    """Dropout of nothing: p is 0, or it is not training."""
    if d.name(node) != "dropout" or d.mutates(node):
        return False
    return d.operand(node, 1, "p", 0.5) == 0 or d.operand(node, 2, "training", True) is False


def _slices_features(index: Any) -> bool:
    """`[..., a::step]` and `[:, a::step]`: no literal size, all rows."""
    if not isinstance(index, tuple) or len(index) != 2 or not isinstance(index[1], slice):
        return False
    if index[0] is not Ellipsis and index[0] != slice(None):
        return False
    last = index[1]
    return last.stop is None and isinstance(last.start or 0, int) and isinstance(last.step or 1, int) and (
        last.start in (None, 0) or (last.step or 1) > (last.start or 0)
    )  # fmt: skip
