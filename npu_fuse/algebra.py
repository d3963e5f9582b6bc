"""Normal forms that rules read: sums with constants, squares, means of squares, factors.

Nothing here walks past what a rule asks for: a sum is flattened through additions with constants and
constant factors only, a product only until the value a rule looks for is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.view import View, is_one, same_size, static


@dataclass
class Sum:
    """`constant + symbol + Σ coefficient · node`; `nodes` are the additions and factors passed on the way."""

    constant: float = 0.0
    symbol: Node | None = None
    terms: list[tuple[float, Node]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def sum_of(view: View, node: Any, scale: float = 1.0, into: Sum | None = None, depth: int = 0) -> Sum:
    """Flatten additions of constants and constant factors; casts between float types are passed."""
    total = into if into is not None else Sum()
    number = d.constant(node)
    if number is not None:
        total.constant += scale * number
        return total
    if not isinstance(node, Node):
        return total
    if d.symbolic_scalar(node):
        if total.symbol is not None or scale != 1.0:
            total.terms.append((scale, node))
        else:
            total.symbol = node
        return total
    name = d.name(node) if node.op.startswith("call") else ""
    if depth < 8:
        if name == "cast" and isinstance(node.args[0], Node):
            total.nodes.append(node)
            return sum_of(view, node.args[0], scale, total, depth + 1)
        if name in ("add", "sub", "rsub"):
            first, second = d.binary(node)
            alpha = d.constant(node.kwargs.get("alpha", 1))
            if alpha is not None and (d.constant(first) is not None or d.constant(second) is not None
                                      or d.symbolic_scalar(first) or d.symbolic_scalar(second)):  # fmt: skip
                total.nodes.append(node)
                sign = alpha if name == "add" else -alpha
                sum_of(view, first, scale, total, depth + 1)
                return sum_of(view, second, scale * sign, total, depth + 1)
        factor = constant_factor(node)
        if factor is not None:
            total.nodes.append(node)
            return sum_of(view, factor[1], scale * factor[0], total, depth + 1)
    total.terms.append((scale, node))
    return total


def constant_factor(node: Node) -> tuple[float, Node] | None:
    """`c · x`, `x / c`, `-x` as (c, x)."""
    name = d.name(node)
    if name == "neg":
        operand = d.unary(node)
        return (-1.0, operand) if isinstance(operand, Node) else None
    if name not in ("mul", "div"):
        return None
    first, second = d.binary(node)
    left, right = d.constant(first), d.constant(second)
    if node.kwargs.get("rounding_mode") is not None:
        return None
    if right is not None and isinstance(first, Node) and d.tensor(first) is not None and right != 0:
        return (right if name == "mul" else 1.0 / right, first)
    if left is not None and name == "mul" and isinstance(second, Node) and d.tensor(second) is not None:
        return (left, second)
    return None


def root_of(node: Node) -> tuple[float, Node] | None:
    """`S^e` with e = ±1/2 as (e, S): rsqrt, sqrt, pow."""
    name = d.name(node) if node.op.startswith("call") else ""
    if name in ("rsqrt", "sqrt"):
        operand = d.unary(node)
        return (-0.5 if name == "rsqrt" else 0.5, operand) if isinstance(operand, Node) else None
    if name == "pow":
        base, exponent = d.binary(node)
        if isinstance(base, Node) and d.constant(exponent) in (0.5, -0.5):
            return (float(exponent), base)
    return None


EVEN = frozenset(("abs", "neg", "clone", "contiguous"))
"""What a square does not see."""


def square_of(view: View, node: Any) -> Node | None:
    """x where the node is x²."""
    node = through_casts(node)
    if not isinstance(node, Node) or not node.op.startswith("call"):
        return None
    name = d.name(node)
    if name == "square":
        found = d.unary(node)
    elif name == "pow":
        found, exponent = d.binary(node)
        if d.constant(exponent) != 2.0:
            return None
    elif name == "mul":
        found, other = d.binary(node)
        if not (isinstance(found, Node) and isinstance(other, Node) and view.vn(found) == view.vn(other)):
            return None
    else:
        return None
    while isinstance(found, Node) and found.op.startswith("call") and d.name(found) in EVEN:
        found = d.unary(found)
    return found if isinstance(found, Node) and d.tensor(found) is not None else None


def through_casts(node: Any) -> Any:
    while isinstance(node, Node) and node.op.startswith("call") and d.name(node) == "cast":
        node = node.args[0]
    return node


@dataclass(frozen=True)
class MeanSquare:
    """`c · mean(x², last dims)`; `dims` counts the normalised trailing dimensions."""

    x: Node
    dims: int
    coefficient: float
    nodes: tuple[Node, ...]


class NotLast(Exception):
    """The statistic does not run over the last dimensions; the message says over which."""


def mean_square_of(view: View, node: Node) -> MeanSquare | None:
    """Recognise a mean (or sum, or squared norm) of squares over the last dimensions."""
    passed: list[Node] = []
    node = _through_layout(node, passed)
    name = d.name(node) if node.op.startswith("call") else ""
    squared = square_of(view, node)
    if squared is not None:
        return _squared_norm(view, node, squared, passed)
    if name in ("einsum", "vecdot"):
        return _with_itself(view, node, passed)
    if name not in ("mean", "sum"):
        return None
    x = square_of(view, d.unary(node))
    if x is None:
        return None
    shape = d.tensor(d.unary(node)).shape  # type: ignore[union-attr]
    dims = trailing_dims(node, shape, d.operand(node, 1, "dim"))
    coefficient = _width(shape, dims) if name == "sum" else 1.0
    if coefficient is None:
        return None
    return MeanSquare(x, dims, coefficient, (node, *_down_to(view, d.unary(node), x), *passed))


def _width(shape: torch.Size, dims: int) -> float | None:
    """Elements of the last dimensions; None where a size is symbolic."""
    known = [static(size) for size in shape[len(shape) - dims :]]
    return None if None in known else float(math.prod(size for size in known if size is not None))


def _with_itself(view: View, node: Node, passed: list[Node]) -> MeanSquare | None:
    """An inner product of x with itself over the last dimensions: `einsum("…d,…d->…", x, x)`, `vecdot(x, x)`."""
    operands = d.data_inputs(node)
    if not operands or any(view.vn(n) != view.vn(operands[0]) for n in operands):
        return None
    x, found, result = operands[0], d.tensor(operands[0]), d.tensor(node)
    if found is None or result is None or not found.is_floating_point():
        return None
    if d.name(node) == "vecdot":
        dims = trailing_dims(node, found.shape, d.operand(node, 2, "dim", -1))
    else:
        taken, arrow, given = str(node.args[0]).replace(" ", "").replace("...", ".").partition("->")
        left, _, right = taken.partition(",")
        dims = len(left) - len(given)
        if not arrow or left != right or len(set(left)) < len(left) or dims < 1:
            return None
        if given != left[:-dims]:
            raise NotLast(f"einsum {node.args[0]}")
        if "." in left[-dims:] or result.dim() != found.dim() - dims:
            return None
    width = _width(found.shape, dims)
    return None if width is None else MeanSquare(x, dims, width, (node, *passed))


def _squared_norm(view: View, node: Node, squared: Node, passed: list[Node]) -> MeanSquare | None:
    """(c · ‖x‖)²."""
    total = sum_of(view, squared)
    if len(total.terms) != 1 or total.constant != 0.0 or total.symbol is not None:
        return None
    factor, inner = total.terms[0]
    if not isinstance(inner, Node) or not inner.op.startswith("call") or d.name(inner) != "norm":
        return None
    found = norm_of(view, inner)
    if found is None:
        return None
    nodes = (*_down_to(view, node, squared), *total.nodes, *found.nodes, *passed)
    return MeanSquare(found.x, found.dims, found.coefficient * factor * factor, nodes)


def norm_of(view: View, node: Node) -> MeanSquare | None:
    """‖x‖₂ over the last dimension: the square root of D · mean(x²)."""
    order = d.operand(node, 1, "ord", node.kwargs.get("p", 2))
    if d.constant(order) != 2.0 and order not in (None, "fro"):
        return None
    x = d.unary(node)
    found = d.tensor(x)
    if found is None or not isinstance(x, Node):
        return None
    dims = trailing_dims(node, found.shape, d.operand(node, 2, "dim"))
    width = static(found.shape[-1]) if dims == 1 else None
    if width is None:
        return None
    return MeanSquare(x, 1, float(width), (node,))


def _down_to(view: View, node: Any, x: Node) -> list[Node]:
    """The square, the casts above it, and what it does not see below it."""
    found: list[Node] = []
    stack = [node]
    while stack:
        current = stack.pop()
        if not isinstance(current, Node) or not current.op.startswith("call") or view.vn(current) == view.vn(x):
            continue
        found.append(current)
        stack += d.data_inputs(current)
    return found


def _through_layout(node: Node, passed: list[Node]) -> Node:
    """A statistic is kept per row: unsqueeze, view or expand of it changes nothing that matters here."""
    while node.op.startswith("call") and d.name(node) in ("cast", "unsqueeze", "view", "reshape", "expand", "getitem"):
        operand = node.args[0]
        if not isinstance(operand, Node) or d.tensor(operand) is None:
            break
        passed.append(node)
        node = operand
    return node


def trailing_dims(node: Node, shape: torch.Size, dim: Any) -> int:
    """How many trailing dimensions a reduction runs over; `NotLast` where it is another set."""
    rank = len(shape)
    if rank == 0:
        raise NotLast(f"{d.name(node)} of a number")
    if dim is None:
        listed = list(range(rank))
    else:
        listed = [dim] if isinstance(dim, int) else list(dim)
    wanted = sorted(x % rank for x in listed)
    if wanted != list(range(rank - len(wanted), rank)):
        raise NotLast(f"{d.name(node)} over dim {dim if dim is not None else 'all'} of rank {rank}")
    return len(wanted)


def per_feature(node: Any, x: torch.Tensor, dims: int) -> bool:
    """The value broadcasts over rows: its shape is that of the last `dims` dimensions, after leading ones."""
    found = d.tensor(node)
    if found is None or not found.is_floating_point():
        return False
    shape = list(found.shape)
    while len(shape) > dims and is_one(shape[0]):
        shape = shape[1:]
    wanted = list(x.shape)[len(x.shape) - dims :]
    return len(shape) == dims and all(same_size(a, b) for a, b in zip(shape, wanted, strict=True))


@dataclass(frozen=True)
class Between:
    """The nodes between inputs and output in graph order; `twins` are read in an input's place.

    `stopped` is the first node that is not allowed there.
    """

    nodes: tuple[Node, ...] = ()
    twins: tuple[tuple[Node, Node], ...] = ()
    stopped: Node | None = None


def between(view: View, outputs: Iterable[Node], inputs: Iterable[Node], allowed: Callable[[Node], bool]) -> Between:
    """Walk up from the outputs; a node that computes the same value as an input is that input's twin."""
    stop = {view.value_number[n]: n for n in inputs}
    twins: dict[Node, Node] = {}
    seen: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in seen or node in twins:
            continue
        known = stop.get(view.value_number[node])
        if known is not None:
            twins[node] = known
            continue
        if d.symbolic_scalar(node) and not d.computed_scalar(node):
            continue
        if not (allowed(node) or d.computed_scalar(node)):
            return Between(stopped=node)
        seen.add(node)
        stack += d.data_inputs(node)
    nodes = tuple(sorted(seen, key=view.position.__getitem__))
    return Between(nodes, tuple((t, n) for t, n in twins.items() if t is not n))
