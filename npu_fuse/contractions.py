"""Products that stand in an einsum or in a matmul with tiny matrices: each element is a short sum of products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.view import static

NAMES = ("einsum", "matmul")
MOST_SUMMED = 4


@dataclass(frozen=True)
class Contraction:
    """Two operands by the letters of their last dimensions; leading ones broadcast. `summed` are in no result."""

    operands: tuple[Node, Node]
    letters: tuple[str, str]
    kept: str
    summed: str
    count: int
    """Products in each element of the result."""


def contraction_of(node: Any) -> Contraction | None:
    """The node as one, or None: it is something else, a symbolic size is summed, or more than a few products are."""
    if not isinstance(node, Node) or not node.op.startswith("call") or d.name(node) not in NAMES:
        return None
    operands, equation = _equation(node)
    if len(operands) != 2 or not all(isinstance(n, Node) and d.tensor(n) is not None for n in operands):
        return None
    parts = _letters(equation)
    if parts is None:
        return None
    first, second, kept = parts
    if (len(set(first)), len(set(second)), len(set(kept))) != (len(first), len(second), len(kept)):
        return None
    summed = "".join(c for c in first if c in second and c not in kept)
    if set(first + second) != set(kept + summed):
        return None
    sizes = {c: static(size) for n, letters in zip(operands, (first, second), strict=True) for c, size in
             zip(reversed(letters), reversed(d.tensor(n).shape), strict=False)}  # type: ignore[union-attr]  # fmt: skip
    lengths = [sizes[c] for c in summed]
    if None in lengths:
        return None
    count = math.prod(length for length in lengths if length is not None)
    return (
        Contraction((operands[0], operands[1]), (first, second), kept, summed, count) if count <= MOST_SUMMED else None
    )


def _equation(node: Node) -> tuple[Sequence[Any], str]:
    given: Sequence[Any] = node.args[1:]
    if d.name(node) == "matmul":
        operands = d.data_inputs(node)
        both = len(operands) == 2 and all(t is not None and t.dim() > 1 for t in map(d.tensor, operands))
        return (operands, "...ij,...jk->...ik") if both else ((), "")
    if given and isinstance(given[0], (tuple, list)):
        given = given[0]
    return given, str(node.args[0]).replace(" ", "")


def _letters(equation: str) -> tuple[str, str, str] | None:
    """Of two operands and the result; an ellipsis stands first, and in all or none of them."""
    taken, arrow, kept = equation.partition("->")
    first, comma, second = taken.partition(",")
    parts = (first, second, kept)
    if not arrow or not comma or "," in second:
        return None
    if "..." in kept:
        if not all(p.startswith("...") or "." not in p for p in parts):
            return None
    elif "." in equation:
        return None
    plain = tuple(p.removeprefix("...") for p in parts)
    return (plain[0], plain[1], plain[2]) if all(p.isalpha() or not p for p in plain) else None


def aligned(found: Contraction, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands with leading dimensions, those that are kept, those that are summed: ready to multiply."""
    made = []
    for letters, value in zip(found.letters, values, strict=True):
        leading = value.dim() - len(letters)
        wanted = found.kept + found.summed
        order = [leading + letters.index(c) for c in wanted if c in letters]
        moved = value.permute(*range(leading), *order)
        at = [slice(None) if c in letters else None for c in wanted]
        made.append(moved[tuple([..., *at])])
    return made[0], made[1]
