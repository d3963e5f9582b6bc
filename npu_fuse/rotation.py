"""Read a rotation off traced elements: which value is turned, by which tables, in which pairing."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.proofs import structure_key
from npu_fuse.regions import Region
from npu_fuse.replay import ATTEMPTS, CannotShrink, choose_sizes
from npu_fuse.rotation_tables import Table, tables
from npu_fuse.sites import Form, Site
from npu_fuse.trace import Tracer, Untraceable, sums_many, trace
from npu_fuse.view import View, static

MAX_ELEMENTS, MAX_WIDTH = 1 << 16, 2048


@dataclass(frozen=True)
class Turn:
    """A rotation: its pairing, its width D (None: symbolic), its tables.

    `deinterleave` where x[0::2], x[1::2] come first.
    """

    mode: str
    width: int | None
    cos: Table
    sin: Table
    deinterleave: bool = False


def turn_of(view: View, region: Region, x: Node) -> Turn | str:
    """The rotation of x that the region computes; "" where it is none, a fact where it nearly is one."""
    number = view.vn(x)
    same = {n for n in (*region.nodes, *region.leaves) if view.vn(n) == number}
    cut = _above(region, same)
    reached = {n for node in cut for n in node.all_input_nodes}
    others = [n for n in region.leaves if n not in same and n in reached]
    inputs = (*sorted(same & _operands(cut), key=view.position.__getitem__), *others)
    if not inputs or len(inputs) == len(others):
        return ""
    pseudo = Site("rotary_trace", region.output, inputs, tuple(cut), (), region.output)
    scope = view.scope[region.output]
    key = (
        "turn", structure_key(pseudo, Form("trace", lambda e, env: None), ""), tuple(n in same for n in inputs),
        tuple(view.scope[n] == scope for n in cut),
    )  # fmt: skip
    order = (*inputs, *cut)
    if key not in view.memo:

        def enough(cos: Node, sin: Node) -> bool:
            return _enough(view, region, same, cos, sin)

        view.memo[key] = _indexed(_read(region, cut, inputs, same, enough), order)
    return _materialised(view.memo[key], order)


def turned_by_itself(x: Node, turn: Turn) -> bool:
    """x and a table are parts of one value, as in a row of a matrix times its other rows: no positions turn it."""
    return _whole(x) in (_whole(turn.cos.node), _whole(turn.sin.node))


def pairs_of_made_tables(region: Region, turn: Turn) -> bool:
    """Width 2, by matrices that the graph makes of cos and sin: the row of pairs may follow, and has those tables."""
    return turn.width == 2 and any(table.node in region.nodes for table in (turn.cos, turn.sin))


def _whole(node: Node) -> Node:
    while (d.moves(node) or d.name(node) in ("cast", "neg")) and len(operands := d.data_inputs(node)) == 1:
        node = operands[0]
    return node


Enough = Callable[[Node, Node], bool]
"""Whether x and these two tables are all that the rotation reads, in one autocast region."""


def _enough(view: View, region: Region, same: set[Node], cos: Node, sin: Node) -> bool:
    numbers = {view.value_number[cos], view.value_number[sin]}
    given = same | {n for n in (*region.nodes, *region.leaves) if view.value_number[n] in numbers}
    needed = _above(region, given)
    known, scope = given.union(needed), view.scope[region.output]
    reads_no_other = all(n in known for n in _operands(needed) if d.tensor(n) is not None)
    return reads_no_other and all(view.scope[n] == scope for n in needed)


def _operands(nodes: list[Node]) -> set[Node]:
    return {n for node in nodes for n in d.data_inputs(node)}


def _above(region: Region, same: set[Node]) -> list[Node]:
    """The region's nodes that are needed when the values in `same` are given."""
    inside = set(region.nodes)
    needed: set[Node] = set()
    writes = [n for n in region.nodes if n.target is operator.setitem]
    stack = [region.output]
    while stack:
        node = stack.pop()
        if node in needed or node in same or node not in inside:
            continue
        needed.add(node)
        stack += d.data_inputs(node)
        stack += [w for w in writes if w.args[0] is node]
    return [n for n in region.nodes if n in needed]


def _indexed(turn: Turn | str, order: tuple[Node, ...]) -> Any:
    if isinstance(turn, str):
        return turn
    position = {n: i for i, n in enumerate(order)}
    return turn, position[turn.cos.node], position[turn.sin.node]


def _materialised(kept: Any, order: tuple[Node, ...]) -> Turn | str:
    if isinstance(kept, str):
        return kept
    turn: Turn = kept[0]
    _, cos, sin = kept
    return replace(turn, cos=replace(turn.cos, node=order[cos]), sin=replace(turn.sin, node=order[sin]))


@dataclass(frozen=True)
class _Term:
    """One product of an output element: position in x's row, table element, coefficient."""

    index: int
    element: int
    coefficient: float


POOL, OTHER_POOL = (2, 3, 2, 2), (4, 2, 5, 2)


def _read(region: Region, cut: list[Node], inputs: tuple[Node, ...], same: set[Node], enough: Enough) -> Turn | str:
    """A symbolic width is read at two sizes: what is found has to be the same, and to name no index.

    Whether it holds at an odd width too is left to the proof.
    """
    wanted = d.tensor(region.output)
    assert wanted is not None
    found = _read_at(region, cut, inputs, same, POOL, enough)
    if static(wanted.shape[-1]) is not None or isinstance(found, str):
        return found
    other = _read_at(region, cut, inputs, same, OTHER_POOL, enough)
    if isinstance(other, str) or replace(other, width=found.width) != found:
        return "the rotation is another one at another width, and the width is symbolic"
    if any(isinstance(t.arrange, tuple) or isinstance(t.sign, tuple) for t in (found.cos, found.sin)):
        return "cos or sin is arranged by indices, and the width is symbolic"
    return replace(found, width=None)


def _read_at(
    region: Region, cut: list[Node], inputs: tuple[Node, ...], same: set[Node], pool: tuple[int, ...], enough: Enough
) -> Turn | str:
    tracer = Tracer()
    wanted = d.tensor(region.output)
    assert wanted is not None
    for shrink, alike in ATTEMPTS:
        try:
            sizes = choose_sizes(inputs, 1, pool, shrink, alike)
            width = sizes.of(wanted.shape[-1], feature=True)
            if width < 2 or width % 2 or width > MAX_WIDTH:
                return ""
            shapes = {n: sizes.shape(t.shape) for n in inputs if (t := d.tensor(n)) is not None}
            if sum(torch.Size(s).numel() for s in shapes.values()) > MAX_ELEMENTS or sums_many(cut, sizes):
                return ""
            x_ids = tracer.leaf(next(shapes[n] for n in inputs if n in same))
            env: dict[Node, Any] = {}
            for node, shape in shapes.items():
                complex_value = d.tensor(node).dtype.is_complex  # type: ignore[union-attr]
                if node in same:
                    env[node] = x_ids
                else:
                    env[node] = tracer.complex_leaf(shape) if complex_value else tracer.leaf(shape)
            env = trace(cut, env, sizes, tracer)
            break
        except Untraceable:
            return ""
        except (CannotShrink, RuntimeError, IndexError, ValueError, TypeError):
            tracer = Tracer()  # sizes that were shrunk apart do not fit together
    else:
        return ""
    ids = env[region.output]
    if not isinstance(ids, torch.Tensor) or ids.shape != x_ids.shape or bool((ids < 0).any()):
        return ""
    return _interpret(tracer, ids, width, {n: v for n, v in env.items() if n not in same and v is not None}, enough)


def _interpret(tracer: Tracer, ids: torch.Tensor, width: int, values: dict[Node, Any], enough: Enough) -> Turn | str:
    rows = ids.reshape(-1, width).tolist()
    if not rows:
        return "the tensor is empty"
    partners: list[int] = []
    table_main, table_rot = [], []
    mode, deinterleave = "", False
    mains: list[int] = []
    for number, row in enumerate(rows):
        terms = [_terms(tracer, tracer.polynomials[i], number, width) for i in row]
        if any(t is None for t in terms):
            return ""
        pairs = [t for t in terms if t is not None]
        if not mains:
            decided = _pairing(pairs, width)
            if isinstance(decided, str):
                return decided
            mode, deinterleave, mains = decided
            partners = [next(t.index for t in pair if t.index != m) for pair, m in zip(pairs, mains, strict=True)]
        ordered = [_ordered(p, m) for p, m in zip(pairs, mains, strict=True)]
        if any(a is None for a in ordered):
            return "rows are rotated in different pairings"
        pairs_in_order = [p for p in ordered if p is not None]
        table_main.append([(main.element, main.coefficient) for main, _ in pairs_in_order])
        table_rot.append(
            [(rot.element, _turned(rot.coefficient, i, mode, width)) for i, (_, rot) in enumerate(pairs_in_order)]
        )
        if [rot.index for _, rot in pairs_in_order] != partners:
            return "rows are rotated in different pairings"
    leading = ids.shape[:-1]
    cosines = tables(tracer, table_main, leading, width, values, mode)
    sines = tables(tracer, table_rot, leading, width, values, mode)
    pairs_of_tables = sorted(itertools.product(cosines, sines), key=lambda p: p[0][0] + p[1][0])
    if not pairs_of_tables:
        return "cos or sin is no arrangement of one value's last dimension"
    best = next((p for p in pairs_of_tables if enough(p[0][1].node, p[1][1].node)), pairs_of_tables[0])
    return Turn(mode, width, best[0][1], best[1][1], deinterleave)


def _terms(tracer: Tracer, polynomial: Any, row: int, width: int) -> tuple[_Term, _Term] | None:
    """Exactly two products of one element of x's same row and one table element."""
    if len(polynomial) != 2:
        return None
    made = []
    for factors, coefficient in polynomial:
        of_x = [f for f in factors if tracer.leaf_of_element[f] == 0]
        if len(factors) != 2 or len(of_x) != 1:
            return None
        position = tracer.position_in_leaf[of_x[0]]
        if position // width != row:
            return None
        table = factors[0] if factors[1] == of_x[0] else factors[1]
        made.append(_Term(position % width, table, coefficient))
    return (made[0], made[1]) if made[0].index != made[1].index else None


def _pairing(pairs: list[tuple[_Term, _Term]], width: int) -> tuple[str, bool, list[int]] | str:
    """The mode, whether x is de-interleaved first, and for each d the index of x that cos multiplies."""
    half = width // 2
    even_odd = [*range(0, width, 2), *range(1, width, 2)]
    for mains, deinterleave in ((list(range(width)), False), (even_odd, True)):
        if not all(any(t.index == m for t in pair) for pair, m in zip(pairs, mains, strict=True)):
            continue
        place = {m: i for i, m in enumerate(mains)}
        partners = [place[next(t.index for t in pair if t.index != m)] for pair, m in zip(pairs, mains, strict=True)]
        if partners == [(i + half) % width for i in range(width)]:
            return "half", deinterleave, mains
        if partners == [i ^ 1 for i in range(width)] and not deinterleave:
            return "interleave", False, mains
    indices = sorted({abs(a.index - b.index) for a, b in pairs})
    return f"elements are paired at distances {indices[:4]}, the op pairs d with d±{half} or with its neighbour"


def _ordered(pair: tuple[_Term, _Term], main: int) -> tuple[_Term, _Term] | None:
    if pair[0].index == main:
        return pair
    return (pair[1], pair[0]) if pair[1].index == main else None


def _turned(coefficient: float, position: int, mode: str, width: int) -> float:
    """rot(x) has a minus in the first of each pair: the rest of the sign belongs to the table."""
    first = position < width // 2 if mode == "half" else position % 2 == 0
    return -coefficient if first else coefficient
