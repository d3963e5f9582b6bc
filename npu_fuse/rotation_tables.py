"""The tables of a rotation: which value's last dimension holds the wanted elements, and in which arrangement."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from npu_fuse.trace import Complex, Tracer


@dataclass(frozen=True)
class Table:
    """How r1 or r2 is made from a node: `part` of a complex value, trailing dims flattened, then arranged.

    `arrange` is "" (full width as it is), "tile" (half width twice), "repeat" (each angle twice), or a
    tuple of indices along the last dimension. `sign` is +1 or -1, or a tuple of them. `insert` are x's dimensions
    that it lacks, where they are not the leading ones (an einsum names its dimensions).
    """

    node: Node
    part: str = ""
    flatten: int = 0
    arrange: Any = ""
    sign: Any = 1
    insert: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.part, self.flatten, self.arrange, self.sign, self.insert)


def tables(
    tracer: Tracer, wanted: list[list[tuple[int, float]]], leading: torch.Size, width: int, values: dict[Node, Any],
    mode: str,
) -> list[tuple[int, Table]]:  # fmt: skip
    """The nodes from whose last dimension the wanted elements can be arranged, with what that costs.

    The cheapest come first, of equal ones the latest.
    """
    flat = [w for row in wanted for w in row]
    found: list[tuple[int, Table]] = []
    for node, value in reversed(list(values.items())):
        for part, flatten, ids in _variants(value):
            for insert, placed in _placed(ids, leading):
                arranged = _arranged(tracer, placed, flat, leading, width, mode)
                if arranged is None:
                    continue
                arrange, sign = arranged
                cost = (0 if arrange == "" else 2 if isinstance(arrange, str) else 4) + (sign != 1) + flatten
                found.append((cost, Table(node, part, flatten, arrange, sign, insert)))
                break
    return sorted(found, key=lambda entry: entry[0])


def _variants(value: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    if isinstance(value, Complex):
        yield "real", 0, value.real
        yield "imag", 0, value.imag
    elif isinstance(value, torch.Tensor) and value.dim() > 0:
        yield "", 0, value
        for count in (2, 3):
            if value.dim() > count:
                yield "", count, value.flatten(-count)


def _placed(ids: torch.Tensor, leading: torch.Size) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """The ways to lay a value's dimensions over x's, in order: as broadcasting does, then with ones in between."""
    missing = len(leading) + 1 - ids.dim()
    if missing < 0:
        return
    for insert in itertools.combinations(range(len(leading)), missing):
        placed = ids
        for i in insert:
            placed = placed.unsqueeze(i)
        if _broadcasts(placed.shape[:-1], leading):
            yield (insert if insert != tuple(range(missing)) else ()), placed


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
