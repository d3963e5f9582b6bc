"""Activations as facts, called or written out: silu, x · sigmoid(αx), x / (1 + exp(-x)), gelu by tanh or erf."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from npu_fuse import algebra
from npu_fuse import dialect as d
from npu_fuse.view import View

Scalar = float | Node
"""A Python number, or the node of one that Dynamo made symbolic."""
SILU, GELU_TANH, GELU_ERF = "silu", "gelu_tanh", "gelu_erf"


@dataclass(frozen=True)
class Activation:
    """act(x): silu means x · sigmoid(alpha · x). `nodes` are those passed on the way to x."""

    kind: str
    x: Node
    alpha: Scalar = 1.0
    nodes: tuple[Node, ...] = ()


def activation_of(view: View, node: Any) -> Activation | None:
    passed: list[Node] = []
    while isinstance(node, Node) and node.op.startswith("call") and d.name(node) == "cast":
        passed.append(node)
        node = node.args[0]
    if not isinstance(node, Node) or not node.op.startswith("call") or node in view.outputs:
        return None
    name = d.name(node)
    found: Activation | None = None
    if name == "silu":
        found = Activation(SILU, d.unary(node), 1.0, (node,))
    elif name == "gelu":
        kind = d.operand(node, 1, "approximate", "none")
        found = Activation(GELU_TANH if kind == "tanh" else GELU_ERF, d.unary(node), 1.0, (node,))
    elif name in ("mul", "div"):
        found = _written_out(view, node)
    return None if found is None else replace(found, nodes=(*passed, *found.nodes))


def _written_out(view: View, product: Node) -> Activation | None:
    """x · sigmoid(alpha · x), 0.5 · x · (1 + tanh(…)), 0.5 · x · (1 + erf(x / √2))."""
    factors, nodes = factors_of(view, product)
    coefficient = 1.0
    kept = []
    for factor in factors:
        if isinstance(factor, float):
            coefficient *= factor
        else:
            kept.append(factor)
    if len(kept) != 2:
        return None
    for one, other in ((kept[0], kept[1]), (kept[1], kept[0])):
        sigmoid = sigmoid_of(view, one)
        if sigmoid is not None and coefficient == 1.0 and view.vn(sigmoid[1]) == view.vn(other):
            return Activation(SILU, other, sigmoid[0], (*nodes, one, *sigmoid[2]))
        gelu = _gelu_factor(view, one, other)
        if gelu is not None and coefficient == 0.5:
            return Activation(gelu[0], other, 1.0, (*nodes, *gelu[1]))
    return None


def factors_of(view: View, node: Any, depth: int = 0) -> tuple[list[Any], list[Node]]:
    """The factors of a product (numbers as floats), and the nodes that multiply them."""
    if not isinstance(node, Node) or not node.op.startswith("call") or depth > 4:
        return [node], []
    name = d.name(node)
    if name == "cast":
        inner, nodes = factors_of(view, node.args[0], depth + 1)
        return (inner, [node, *nodes]) if len(inner) > 1 else ([node], [])
    constant = algebra.constant_factor(node)
    if constant is not None and name != "neg":
        inner, nodes = factors_of(view, constant[1], depth + 1)
        return [constant[0], *inner], [node, *nodes]
    if name == "div":
        first, second = d.binary(node)
        if _denominator_of(view, second) is not None and isinstance(first, Node) and d.tensor(first) is not None:
            inner, nodes = factors_of(view, first, depth + 1)
            return [*inner, second], [node, *nodes]
        return [node], []
    if name == "mul" and all(d.tensor(n) is not None for n in d.binary(node)):
        first, second = d.binary(node)
        if view.vn(first) == view.vn(second):
            return [node], []
        left, left_nodes = factors_of(view, first, depth + 1)
        right, right_nodes = factors_of(view, second, depth + 1)
        return [*left, *right], [node, *left_nodes, *right_nodes]
    return [node], []


def sigmoid_of(view: View, node: Any) -> tuple[Scalar, Node, tuple[Node, ...]] | None:
    """sigmoid(alpha · x) as (alpha, x, nodes below): called, 1/(1+exp(-x)), or a denominator 1+exp(-x)."""
    if not isinstance(node, Node):
        return None
    passed: list[Node] = []
    current: Any = node
    while isinstance(current, Node) and current.op.startswith("call") and d.name(current) == "cast":
        passed.append(current)
        current = current.args[0]
    if not isinstance(current, Node) or not current.op.startswith("call"):
        return None
    name = d.name(current)
    if name == "sigmoid":
        alpha, x, nodes = _scaled(d.unary(current))
        return alpha, x, (*passed, current, *nodes)
    if name == "reciprocal" or (name == "pow" and d.constant(d.binary(current)[1]) == -1.0):
        return _with(_denominator_of(view, d.binary(current)[0]), (*passed, current))
    if name == "div" and d.constant(d.binary(current)[0]) == 1.0:
        return _with(_denominator_of(view, d.binary(current)[1]), (*passed, current))
    return _with(_denominator_of(view, current), tuple(passed))


def _with(
    found: tuple[float, Node, tuple[Node, ...]] | None, nodes: tuple[Node, ...]
) -> tuple[Scalar, Node, tuple[Node, ...]] | None:
    return None if found is None else (found[0], found[1], (*nodes, *found[2]))


def _denominator_of(view: View, node: Any) -> tuple[float, Node, tuple[Node, ...]] | None:
    """1 + exp(-alpha · x)."""
    node = algebra.through_casts(node)
    if not isinstance(node, Node) or not node.op.startswith("call") or d.name(node) != "add":
        return None
    first, second = d.binary(node)
    for one, other in ((first, second), (second, first)):
        inner = algebra.through_casts(other)
        if d.constant(one) == 1.0 and isinstance(inner, Node) and inner.op.startswith("call"):
            if d.name(inner) == "exp":
                alpha, x, nodes = _scaled(d.unary(inner))
                if not isinstance(alpha, Node) and alpha < 0:
                    return -alpha, x, (node, inner, *nodes)
    return None


def _scaled(node: Node) -> tuple[Scalar, Node, tuple[Node, ...]]:
    """c · x as (c, x, nodes)."""
    if isinstance(node, Node) and node.op.startswith("call") and d.name(node) == "mul":
        first, second = d.binary(node)
        for one, other in ((first, second), (second, first)):
            if isinstance(one, Node) and d.symbolic_scalar(one) and d.tensor(other) is not None:
                return one, other, (node,)
    scale, nodes = 1.0, []
    while isinstance(node, Node) and node.op.startswith("call"):
        factor = algebra.constant_factor(node)
        if factor is None:
            break
        nodes.append(node)
        scale, node = scale * factor[0], factor[1]
    return scale, node, tuple(nodes)


def _gelu_factor(view: View, node: Any, x: Node) -> tuple[str, tuple[Node, ...]] | None:
    """1 + tanh(√(2/π)(x + 0.044715 x³)) or 1 + erf(x/√2); the proof checks the polynomial."""
    total = algebra.sum_of(view, node)
    if total.constant != 1.0 or total.symbol is not None or len(total.terms) != 1 or total.terms[0][0] != 1.0:
        return None
    inner = algebra.through_casts(total.terms[0][1])
    if not isinstance(inner, Node) or not inner.op.startswith("call") or d.name(inner) not in ("tanh", "erf"):
        return None
    below: set[Node] = set()
    stack = [d.unary(inner)]
    while stack:
        current = stack.pop()
        if not isinstance(current, Node) or view.vn(current) == view.vn(x) or current in below:
            continue
        if not current.op.startswith("call") or d.name(current) not in ("mul", "add", "pow", "div", "cast", "square"):
            return None
        below.add(current)
        stack += current.all_input_nodes
        if len(below) > 12:
            return None
    nodes = (*total.nodes, inner, *below)
    return (GELU_TANH if d.name(inner) == "tanh" else GELU_ERF), nodes
