"""Gated MLPs as facts: which activation, of which value, times which other value.

`gate_of` reads one product: act(gate) · up in any spelling (silu, x·sigmoid(x), x/(1+exp(-x)), gelu
called or written out, clamped and scaled). Whether both lie in one tensor is told by `halves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from npu_fuse import algebra
from npu_fuse import dialect as d
from npu_fuse.view import View, same_shape

Scalar = float | Node
"""A Python number, or the node of one that Dynamo made symbolic."""
SILU, GELU_TANH, GELU_ERF = "silu", "gelu_tanh", "gelu_erf"
ACTIVATIONS = frozenset("silu gelu sigmoid mul div tanh erf reciprocal cast".split())


@dataclass(frozen=True)
class Activation:
    """act(x): silu means x · sigmoid(alpha · x). `nodes` are those passed on the way to x."""

    kind: str
    x: Node
    alpha: Scalar = 1.0
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Gate:
    """act(gate) · (up + bias), gate clamped above at `limit`, up at ±limit."""

    kind: str
    output: Node
    gate: Node
    up: Node
    alpha: Scalar
    limit: Scalar
    bias: float
    nodes: tuple[Node, ...]

    @property
    def scalars(self) -> tuple[Node, ...]:
        """Settings that are symbolic under dynamic shapes: inputs of the site."""
        return tuple(v for v in (self.alpha, self.limit) if isinstance(v, Node))

    @property
    def plain(self) -> bool:
        return self.alpha == 1.0 and self.limit == math.inf and self.bias == 0.0


def gates(view: View) -> list[Gate | tuple[Node, str]]:
    """Every gate of the graph, found once per view; a tuple is a near miss with its reason."""
    if "gates" not in view.memo:
        found: list[Gate | tuple[Node, str]] = []
        taken: set[Node] = set()
        for node in view.nodes:
            if not node.op.startswith("call") or node in view.claimed or node in taken:
                continue
            if d.name(node) in ("mul", "div"):
                gate = gate_of(view, node)
                if gate is not None:
                    found.append(gate)
                    taken.update(gate.nodes if isinstance(gate, Gate) else ())
        view.memo["gates"] = found
    result: list[Gate | tuple[Node, str]] = view.memo["gates"]
    return result


def gate_of(view: View, product: Node) -> Gate | tuple[Node, str] | None:
    """The gate that ends in this product."""
    first, second = d.binary(product)
    left, right = d.tensor(first), d.tensor(second)
    if left is None or right is None or not left.dtype.is_floating_point or not right.dtype.is_floating_point:
        return None
    if not same_shape(left.shape, right.shape) or left.dim() < 1:
        return None
    for gated, up in ((first, second), (second, first)) if d.name(product) == "mul" else ():
        found = activation_of(view, gated)
        if found is not None and view.vn(found.x) != view.vn(up):
            return _finished(view, product, found, up)
        clamped, _, _, passed = _clamp_of(view, gated)
        if passed and activation_of(view, clamped) is not None:
            return product, "the activation's result is clamped, the op clamps its argument"
    return _mixed(view, product)


def _mixed(view: View, product: Node) -> Gate | tuple[Node, str] | None:
    """a · (sigmoid(a) · u), (a · u) · sigmoid(a), a · u / (1 + exp(-a)): three factors, one the sigmoid of another."""
    factors, nodes = _factors(view, product)
    if len(factors) != 3 or any(isinstance(factor, float) for factor in factors):
        return None
    for node in factors:
        sigmoid = _sigmoid_of(view, node)
        if sigmoid is None:
            continue
        alpha, x, inner = sigmoid
        rest = [f for f in factors if f is not node]
        for gate, up in ((rest[0], rest[1]), (rest[1], rest[0])):
            if view.vn(gate) == view.vn(x) and view.vn(up) != view.vn(x):
                passed = tuple(n for n in nodes if n is not product)
                found = Activation(SILU, x, alpha, (*passed, node, *inner))
                return _finished(view, product, found, up)
    return None


def _finished(view: View, product: Node, act: Activation, up: Node) -> Gate | tuple[Node, str] | None:
    limits_gate = _clamp_of(view, act.x)
    gate, low, high, passed = limits_gate
    if low != -math.inf:
        return product, f"the gate is clamped below at {low}, the op clamps it above only"
    bias, inner, passed_bias = _bias_of(view, up)
    inner, up_low, up_high, passed_up = _clamp_of(view, inner)
    if not (_same(view, up_high, high) and _opposite(view, up_low, high)):
        if passed or passed_up:
            return product, (
                f"the gate is clamped at {high} and up to [{up_low}, {up_high}], the op clamps both at one limit"
            )
        passed_up = ()
    if bias != 0.0 and high == math.inf and not passed_up and act.alpha == 1.0:
        # `1 + u` may be a value of its own: without clamp or scale it is just the other factor.
        bias, inner, passed_bias = 0.0, up, ()
    nodes = (product, *act.nodes, *passed, *passed_bias, *passed_up)
    return Gate(act.kind, product, view.exact(gate, product), view.exact(inner, product), act.alpha, high, bias, nodes)


def _bias_of(view: View, node: Node) -> tuple[float, Node, tuple[Node, ...]]:
    passed = []
    current: Any = node
    while isinstance(current, Node) and current.op.startswith("call") and d.name(current) == "cast":
        passed.append(current)
        current = current.args[0]
    name = d.name(current) if isinstance(current, Node) and current.op.startswith("call") else ""
    if name in ("add", "sub"):
        first, second = d.binary(current)
        known = [(first, d.constant(second)), (second, d.constant(first))]
        for value, number in known if name == "add" else known[:1]:
            if number is not None and isinstance(value, Node) and d.constant(current.kwargs.get("alpha", 1)) == 1.0:
                return (number if name == "add" else -number), value, (*passed, current)
    return 0.0, node, ()


def _same(view: View, left: Scalar, right: Scalar) -> bool:
    if isinstance(left, Node) and isinstance(right, Node):
        return view.vn(left) == view.vn(right)
    return left == right


def _opposite(view: View, low: Scalar, high: Scalar) -> bool:
    """low is -high."""
    if isinstance(low, Node) and isinstance(high, Node):
        return d.name(low) == "neg" and view.vn(d.unary(low)) == view.vn(high)
    return not isinstance(low, Node) and not isinstance(high, Node) and low == -high


def _tighter(old: Scalar, new: Any, pick: Callable[[float, float], float]) -> Scalar | None:
    """The bound that both make; None where one is symbolic and the other does not vanish."""
    if new is None:
        return old
    number = d.constant(new)
    if number is not None and not isinstance(old, Node):
        return pick(old, number)
    unbounded = not isinstance(old, Node) and math.isinf(old)
    return new if unbounded and isinstance(new, Node) and d.symbolic_scalar(new) else None


def _clamp_of(view: View, node: Node) -> tuple[Node, Scalar, Scalar, tuple[Node, ...]]:
    """The value under clamps and their common bounds; casts in between are passed with them."""
    low: Scalar = -math.inf
    high: Scalar = math.inf
    passed: list[Node] = []
    pending: list[Node] = []
    current: Any = node
    result = node
    while isinstance(current, Node) and current.op.startswith("call"):
        name = d.name(current)
        if name == "cast":
            pending.append(current)
            current = current.args[0]
            continue
        if name not in ("clamp", "clamp_min", "clamp_max"):
            break
        lower = d.operand(current, 1, "min") if name != "clamp_max" else None
        upper = d.operand(current, 2, "max") if name == "clamp" else d.operand(current, 1, "max")
        upper = None if name == "clamp_min" else upper
        new_low, new_high = _tighter(low, lower, max), _tighter(high, upper, min)
        if new_low is None or new_high is None:
            break
        low, high = new_low, new_high
        passed += [*pending, current]
        pending = []
        current = d.unary(current)
        result = current
    return result, low, high, tuple(passed)


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
    factors, nodes = _factors(view, product)
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
        sigmoid = _sigmoid_of(view, one)
        if sigmoid is not None and coefficient == 1.0 and view.vn(sigmoid[1]) == view.vn(other):
            return Activation(SILU, other, sigmoid[0], (*nodes, one, *sigmoid[2]))
        gelu = _gelu_factor(view, one, other)
        if gelu is not None and coefficient == 0.5:
            return Activation(gelu[0], other, 1.0, (*nodes, *gelu[1]))
    return None


def _factors(view: View, node: Any, depth: int = 0) -> tuple[list[Any], list[Node]]:
    """The factors of a product (numbers as floats), and the nodes that multiply them."""
    if not isinstance(node, Node) or not node.op.startswith("call") or depth > 4:
        return [node], []
    name = d.name(node)
    if name == "cast":
        inner, nodes = _factors(view, node.args[0], depth + 1)
        return (inner, [node, *nodes]) if len(inner) > 1 else ([node], [])
    constant = algebra.constant_factor(node)
    if constant is not None and name != "neg":
        inner, nodes = _factors(view, constant[1], depth + 1)
        return [constant[0], *inner], [node, *nodes]
    if name == "div":
        first, second = d.binary(node)
        if _denominator_of(view, second) is not None and isinstance(first, Node) and d.tensor(first) is not None:
            inner, nodes = _factors(view, first, depth + 1)
            return [*inner, second], [node, *nodes]
        return [node], []
    if name == "mul" and all(d.tensor(n) is not None for n in d.binary(node)):
        first, second = d.binary(node)
        if view.vn(first) == view.vn(second):
            return [node], []
        left, left_nodes = _factors(view, first, depth + 1)
        right, right_nodes = _factors(view, second, depth + 1)
        return [*left, *right], [node, *left_nodes, *right_nodes]
    return [node], []


def _sigmoid_of(view: View, node: Any) -> tuple[Scalar, Node, tuple[Node, ...]] | None:
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
