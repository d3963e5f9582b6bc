"""Read a rotation off traced elements: which value is turned, by which tables, in which pairing."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.proofs import structure_key
from npu_fuse.regions import Region
from npu_fuse.replay import ATTEMPTS, CannotShrink, choose_sizes
from npu_fuse.sites import Form, Site
from npu_fuse.trace import Complex, Tracer, Untraceable, trace
from npu_fuse.view import View, static

MAX_ELEMENTS, MAX_WIDTH = 1 << 16, 2048


@dataclass(frozen=True)
class Table:
    """How r1 or r2 is made from a node: `part` of a complex value, trailing dims flattened, then arranged.

    `arrange` is "" (full width as it is), "tile" (half width twice), "repeat" (each angle twice), or a
    tuple of indices along the last dimension. `sign` is +1 or -1, or a tuple of them.
    """

    node: Node
    part: str = ""
    flatten: int = 0
    arrange: Any = ""
    sign: Any = 1

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.part, self.flatten, self.arrange, self.sign)


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
    key = ("turn", structure_key(pseudo, Form("trace", lambda e, env: None), ""), tuple(n in same for n in inputs))
    order = (*inputs, *cut)
    if key not in view.memo:
        view.memo[key] = _indexed(_read(region, cut, inputs, same), order)
    return _materialised(view.memo[key], order)


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


def _read(region: Region, cut: list[Node], inputs: tuple[Node, ...], same: set[Node]) -> Turn | str:
    """A symbolic width is read at two sizes: what is found has to be the same, and to name no index.

    Whether it holds at an odd width too is left to the proof.
    """
    wanted = d.tensor(region.output)
    assert wanted is not None
    found = _read_at(region, cut, inputs, same, POOL)
    if static(wanted.shape[-1]) is not None or isinstance(found, str):
        return found
    other = _read_at(region, cut, inputs, same, OTHER_POOL)
    if isinstance(other, str) or replace(other, width=found.width) != found:
        return "the rotation is another one at another width, and the width is symbolic"
    tables = (found.cos, found.sin)
    if any(isinstance(t.arrange, tuple) or isinstance(t.sign, tuple) for t in tables):
        return "cos or sin is arranged by indices, and the width is symbolic"
    return replace(found, width=None)


def _read_at(
    region: Region, cut: list[Node], inputs: tuple[Node, ...], same: set[Node], pool: tuple[int, ...]
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
            if sum(torch.Size(s).numel() for s in shapes.values()) > MAX_ELEMENTS:
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
    return _interpret(tracer, ids, width, {n: v for n, v in env.items() if n not in same and v is not None})


def _interpret(tracer: Tracer, ids: torch.Tensor, width: int, values: dict[Node, Any]) -> Turn | str:
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
    cos = _table(tracer, table_main, leading, width, values, mode)
    sin = _table(tracer, table_rot, leading, width, values, mode)
    if cos is None or sin is None:
        return "cos or sin is no arrangement of one value's last dimension"
    return Turn(mode, width, cos, sin, deinterleave)


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


def _table(
    tracer: Tracer, wanted: list[list[tuple[int, float]]], leading: torch.Size, width: int, values: dict[Node, Any],
    mode: str,
) -> Table | None:  # fmt: skip
    """The latest node from whose last dimension the wanted elements can be arranged."""
    flat = [w for row in wanted for w in row]
    best: tuple[int, Table] | None = None
    for node, value in reversed(list(values.items())):
        for part, flatten, ids in _variants(value):
            if len(ids.shape) > len(leading) + 1 or not _broadcasts(ids.shape[:-1], leading):
                continue
            arranged = _arranged(tracer, ids, flat, leading, width, mode)
            if arranged is None:
                continue
            arrange, sign = arranged
            cost = (0 if arrange == "" else 2 if isinstance(arrange, str) else 4) + (sign != 1) + flatten
            if best is None or cost < best[0]:
                best = (cost, Table(node, part, flatten, arrange, sign))
    return best[1] if best is not None else None


def _variants(value: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    if isinstance(value, Complex):
        yield "real", 0, value.real
        yield "imag", 0, value.imag
    elif isinstance(value, torch.Tensor) and value.dim() > 0:
        yield "", 0, value
        for count in (2, 3):
            if value.dim() > count:
                yield "", count, value.flatten(-count)


def _broadcasts(shape: torch.Size, leading: torch.Size) -> bool:
    padded = (1,) * (len(leading) - len(shape)) + tuple(shape)
    return all(a in (1, b) for a, b in zip(padded, leading, strict=True))


def _arranged(
    tracer: Tracer, ids: torch.Tensor, flat: list[tuple[int, float]], leading: torch.Size, width: int, mode: str
) -> tuple[Any, Any] | None:
    """Indices and signs along the last dimension that give the wanted elements in every row."""
    last = ids.shape[-1]
    if last > 4 * width or bool((ids < 0).any()):
        return None
    spread = ids.expand(*leading, last).reshape(-1, last).tolist()
    elements = []
    for i in spread[0]:
        polynomial = tracer.polynomials[i]
        single = len(polynomial) == 1 and len(polynomial[0][0]) == 1
        elements.append((polynomial[0][0][0], polynomial[0][1]) if single else (-1, 0.0))
    where = {element: (j, c) for j, (element, c) in reversed(list(enumerate(elements)))}
    order, signs = [], []
    for element, coefficient in flat[:width]:
        if element not in where or not where[element][1]:
            return None
        j, own = where[element]
        order.append(j)
        signs.append(coefficient / own)
    if any(s not in (1.0, -1.0) for s in signs):
        return None
    own_places = _in_place(tracer, spread, flat, width) if last == width else None
    if own_places is not None:
        return "", own_places
    for number, row in enumerate(spread):
        for position, (j, sign) in enumerate(zip(order, signs, strict=True)):
            element, coefficient = flat[number * width + position]
            if tracer.polynomials[row[j]] != (((element,), coefficient * sign),):
                return None
    uniform = _uniform(signs)
    half = list(range(width // 2))
    if last == width // 2 and order == half + half:
        return "tile", uniform
    if last == width // 2 and order == [i for i in half for _ in range(2)]:
        return "repeat", uniform
    return tuple(order), uniform


def _in_place(tracer: Tracer, spread: list[list[int]], flat: list[tuple[int, float]], width: int) -> Any:
    """The signs by which every element stands at its own place already, though equal ones may stand elsewhere."""
    signs = []
    for position in range(width):
        element, coefficient = flat[position]
        polynomial = tracer.polynomials[spread[0][position]]
        if len(polynomial) != 1 or polynomial[0][0] != (element,) or not polynomial[0][1]:
            return None
        signs.append(coefficient / polynomial[0][1])
    for number, row in enumerate(spread):
        for position, sign in enumerate(signs):
            element, coefficient = flat[number * width + position]
            if tracer.polynomials[row[position]] != (((element,), coefficient * sign),):
                return None
    return _uniform(signs) if all(s in (1.0, -1.0) for s in signs) else None


def _uniform(signs: list[float]) -> Any:
    return int(signs[0]) if len(set(signs)) == 1 else tuple(int(s) for s in signs)
