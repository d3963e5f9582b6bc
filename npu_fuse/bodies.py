"""What the body of an autograd function computes, as terms over its arguments: collectives, products, movement.

A term stands for elements in the order of rows: a value and a view of it with the same columns are one term. What is
written in place is followed; anything else that is computed is a term that equals nothing but itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from npu_fuse import collectives, exchanges
from npu_fuse import dialect as d
from npu_fuse.groups import Group, group_of
from npu_fuse.view import same_shape, same_size

SAME = frozenset("view view_as reshape reshape_as alias detach contiguous flatten unflatten".split())


@dataclass(frozen=True)
class Term:
    """`mark`: an argument's index, the ranks of a group, the name of what is computed."""

    kind: str
    of: tuple[Term, ...] = ()
    mark: Any = None
    group: Group | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.mark} is computed" if self.kind == "computed" else f"its {self.kind} is given back"


GRADIENT, MEMORY = Term("gradient"), Term("memory")


def argument(index: int) -> Term:
    return Term("argument", mark=index)


def over_ranks(kind: str, term: Term, group: Group) -> Term:
    """kind: "sum", "scattered sum" or "gathered value"."""
    return Term(kind, (term,), group.ranks, group)


SUM, SCATTERED, GATHERED = "sum", "scattered sum", "gathered value"


def transposed(term: Term) -> Term:
    if term.kind == "transposed":
        return term.of[0]
    if term.kind == "product":
        return product(transposed(term.of[1]), transposed(term.of[0]))
    return Term("transposed", (term,))


def product(left: Term, right: Term) -> Term:
    return Term("product", (left, right))


def plus(term: Term, vector: Term) -> Term:
    return Term("sum with a vector", (term, vector))


def column_sums(term: Term) -> Term:
    return Term("sum of columns", (term,))


@dataclass
class _Cell:
    """What a piece of memory holds, whether another view of it may have been taken, and as what it was given."""

    term: Term
    viewed: bool = False
    given: Term | None = None


@dataclass(frozen=True)
class Read:
    """What a body gives back, nodes replaced by terms, and which of the values it was given it writes into."""

    result: Any
    written: frozenset[Term]


def read(body: GraphModule, given: Sequence[Term]) -> Read | str:
    """What the body computes from the terms of its placeholders, or why that cannot be said."""
    cells: dict[Node, _Cell] = {}
    written: set[Term] = set()
    terms = iter(given)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            found = next(terms, None)
            if found is None:
                return "other values are given to the body than to the function"
            cells[node] = _Cell(found, given=found)
        elif node.op == "output":
            return Read(_replaced(node.args[0], cells), frozenset(written))
        elif node.op == "get_attr":
            return "another function is called"
        elif d.tensor(node) is not None:
            made = _step(node, cells)
            if isinstance(made, str):
                return made
            cells[node] = made
            if d.mutates(node) and made.given is not None:
                written.add(made.given)
        elif d.mutates(node) or d.raw_name(node) == "_enter_autocast":
            return f"{d.name(node).strip('_')} is computed"
    return "nothing is given back"


def _replaced(value: Any, cells: dict[Node, _Cell]) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_replaced(v, cells) for v in value)
    if isinstance(value, Node):
        return cells[value].term if value in cells else None
    return value


def _step(node: Node, cells: dict[Node, _Cell]) -> _Cell | str:
    name = d.name(node)
    collective = _collective(node)
    if collective:
        return _exchanged(node, collective, cells)
    if name == "copy" and d.mutates(node):
        return _copied(node, cells)
    if d.mutates(node):
        return f"{name} is computed"
    if name in exchanges.FRESH:
        return _Cell(MEMORY)
    cell = _of(d.unary(node), cells)
    if cell is not None and d.raw_name(node) == "wait_tensor":
        return cell
    before, after = d.tensor(d.unary(node)), d.tensor(node)
    if cell is not None and before is not None and after is not None:
        if name == "clone":
            return _Cell(cell.term)
        if name in SAME and _same_rows(before, after, cell.term):
            if before.is_contiguous():
                return cell
            cell.viewed = cell.viewed or name != "contiguous"  # a view or a copy: nobody may write into it
            return _Cell(cell.term, cell.viewed)
        if _transposes(node, before):
            cell.viewed = True
            return _Cell(transposed(cell.term))
    return _Cell(_computed(node, cells) or Term("computed", mark=name))


def _of(node: Any, cells: dict[Node, _Cell]) -> _Cell | None:
    return cells.get(node) if isinstance(node, Node) else None


def _collective(node: Node) -> str:
    if collectives.is_all_reduce(node):
        return SUM
    if exchanges.is_scatter(node):
        return SCATTERED
    return GATHERED if exchanges.is_gather(node) else ""


def _exchanged(node: Node, kind: str, cells: dict[Node, _Cell]) -> _Cell | str:
    cell = _of(collectives.source_of(node), cells)
    of_rows = kind != SUM
    group = group_of(exchanges.group_argument(node) if of_rows else collectives.group_argument(node))
    if isinstance(group, str):
        return group
    if kind != GATHERED and (operation := collectives.operation(node)) != SUM:
        return f"the reduction is {operation!r}; the fused op sums"
    if cell is None or (of_rows and collectives.namespace(node) == "vllm"):
        return f"{d.raw_name(node)} is computed"
    return _Cell(over_ranks(kind, cell.term, group))


def _copied(node: Node, cells: dict[Node, _Cell]) -> _Cell | str:
    into, source = _of(node.args[0], cells), _of(node.args[1], cells)
    left, right = d.tensor(node.args[0]), d.tensor(node.args[1])
    if into is None or source is None or left is None or right is None or left.dtype != right.dtype:
        return "something else is copied"
    if into.viewed or into.term.kind in ("computed", "transposed") or not same_shape(left.shape, right.shape):
        return "a part of a value is written"
    into.term = source.term
    return into


def _same_rows(before: torch.Tensor, after: torch.Tensor, term: Term) -> bool:
    if before.dtype != after.dtype or not before.dim() or not after.dim():
        return False
    if term.kind == "transposed" and not same_shape(before.shape, after.shape):
        return False
    return same_size(before.shape[-1], after.shape[-1])


def _transposes(node: Node, before: torch.Tensor) -> bool:
    if before.dim() != 2:
        return False
    return d.name(node) in ("t", "mT") or (
        d.name(node) == "transpose" and sorted(int(a) % 2 for a in node.args[1:] if isinstance(a, int)) == [0, 1]
    )


def _computed(node: Node, cells: dict[Node, _Cell]) -> Term | None:
    """A product with a matrix, a vector added to all rows, sums of columns."""
    name = d.name(node)
    if name in ("matmul", "mm", "linear"):
        left, right = d.operand(node, 0, "input", node.kwargs.get("self")), d.operand(node, 1, "other")
        right = right if right is not None else node.kwargs.get("weight", node.kwargs.get("mat2"))
        bias = d.operand(node, 2, "bias") if name == "linear" else None
        return _product(left, right, bias, name == "linear", cells)
    if name == "addmm" and not {"alpha", "beta"} & set(node.kwargs) and len(node.args) == 3:
        return _product(node.args[1], node.args[2], node.args[0], False, cells)
    if name == "add" and node.kwargs.get("alpha", 1) == 1:
        return _vector_added(node, *d.binary(node), cells)
    return _columns(node, cells) if name == "sum" else None


def _product(left: Any, right: Any, bias: Any, by_rows: bool, cells: dict[Node, _Cell]) -> Term | None:
    """left [..., K] times right [K, N], or [N, K] with `by_rows`; bias [N] or None."""
    x, w, values = _of(left, cells), _of(right, cells), [d.tensor(left), d.tensor(right)]
    if x is None or w is None or values[0] is None or values[1] is None:
        return None
    if values[1].dim() != 2 or values[0].dim() < 2 or values[0].dtype != values[1].dtype:
        return None
    made = product(x.term, transposed(w.term) if by_rows else w.term)
    if bias is None:
        return made
    added, vector = _of(bias, cells), d.tensor(bias)
    return plus(made, added.term) if added is not None and vector is not None and vector.dim() == 1 else None


def _vector_added(node: Node, first: Any, second: Any, cells: dict[Node, _Cell]) -> Term | None:
    result = d.tensor(node)
    for value, vector in ((first, second), (second, first)):
        left, right, found = _of(value, cells), _of(vector, cells), d.tensor(vector)
        whole = d.tensor(value)
        if left is None or right is None or found is None or whole is None or result is None:
            continue
        if found.dim() == 1 and whole.dim() > 1 and found.dtype == whole.dtype == result.dtype:
            if same_shape(whole.shape, result.shape) and same_size(found.shape[0], whole.shape[-1]):
                return plus(left.term, right.term)
    return None


def _columns(node: Node, cells: dict[Node, _Cell]) -> Term | None:
    cell, value, result = _of(d.unary(node), cells), d.tensor(d.unary(node)), d.tensor(node)
    if cell is None or value is None or result is None or result.dim() != 1 or result.dtype != value.dtype:
        return None
    dims = d.operand(node, 1, "dim")
    given = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, (tuple, list)) else []
    if cell.term.kind == "transposed" or sorted(int(i) % value.dim() for i in given) != list(range(value.dim() - 1)):
        return None
    return column_sums(cell.term)
