"""Gated MLPs as facts: which activation, of which value, times which other value.

`gate_of` reads one product: act(gate) · up in any spelling (silu, x·sigmoid(x), x/(1+exp(-x)), gelu
called or written out, clamped and scaled). Whether both lie in one tensor is told by `halves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.activations import SILU, Activation, Scalar, activation_of, factors_of, sigmoid_of
from npu_fuse.view import View, same_shape


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
        for node in view.named("mul", "div"):
            gate = gate_of(view, node) if node not in view.claimed and node not in taken else None
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
    factors, nodes = factors_of(view, product)
    if len(factors) != 3 or any(isinstance(factor, float) for factor in factors):
        return None
    for node in factors:
        sigmoid = sigmoid_of(view, node)
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
