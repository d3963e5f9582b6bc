"""Routers in a graph: which experts a token is given to, and with which weights, read as what is computed.

Everything is read from a top-k: upwards what it chooses from, downwards what becomes of the chosen scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.algebra import constant_factor
from npu_fuse.router_choice import LOGITS, Choice, choice_of, is_last, unchanged
from npu_fuse.view import View

Nodes = tuple[Node, ...]


@dataclass
class Router:
    """ids [T, k] and weights [T, k] = `output`; `values` are the chosen scores, `tail` what is done to them."""

    choice: Choice
    topk: Node
    k: int
    ids: Node
    values: Node
    output: Node
    tail: list[Node] = field(default_factory=list)
    normalised: bool = False
    epsilon: float | None = 0.0
    """What is added to the sum; None where the sum is bounded from below instead."""
    soft: bool = False
    """A softmax over the chosen logits."""
    scale: float = 1.0
    unordered: bool = False
    """The code leaves the order of a token's experts open."""


def routers(view: View) -> list[tuple[Node, Router | str]]:
    """Every top-k that routes, with what was read or why it is none that a fused op computes."""
    found: list[tuple[Node, Router | str]] = []
    for node in view.named("topk"):
        read = _router(view, node) if node not in view.claimed else None
        if read is not None:
            found.append((node, read))
    return found


def _router(view: View, top: Node) -> Router | str | None:
    chosen, k = d.operand(top, 0, "input"), d.operand(top, 1, "k")
    value = d.tensor(chosen)
    if value is None or not isinstance(k, int) or value.dim() < 2 or not value.is_floating_point():
        return None
    choice = choice_of(view, chosen)
    if choice is None or isinstance(choice, str):
        return choice
    if not is_last(d.operand(top, 2, "dim", -1), value.dim()):
        return f"the experts are chosen along dimension {d.operand(top, 2, 'dim', -1)}, not the last"
    if d.operand(top, 3, "largest", True) is not True:
        return "the smallest scores are chosen"
    parts = {u.args[1]: u for u in top.users if d.name(u) == "getitem" and isinstance(u.args[1], int)}
    if len(parts) != len(top.users) or 1 not in parts:
        return None
    ids = parts[1]
    values = _values(view, choice, ids, parts.get(0))
    if values is None or isinstance(values, str):
        return values
    router = Router(choice, top, k, ids, values, values, unordered=d.operand(top, 4, "sorted", True) is False)
    _read_tail(view, router)
    if choice.kind == LOGITS and not router.soft:
        return None  # a sampler, or sigmoids of what was chosen among finer values than they are
    if choice.kind != LOGITS and _rounded(choice, chosen):
        return "the scores are rounded to 16 bits before the choice: other experts may tie"
    if router.unordered and (reader := _reads_order(router)) is not None:
        return f"{reader.name} reads the order of a token's experts, which sorted=False leaves open"
    return router


def _rounded(choice: Choice, chosen: Any) -> bool:
    dtypes = [t.dtype for n in (choice.scores, chosen) if (t := d.tensor(n)) is not None]
    return any(t.itemsize < 4 for t in dtypes)


def _reads_order(router: Router) -> Node | None:
    """Who takes single experts of a token, or parts of the list."""
    for node in (router.ids, router.values, *router.tail):
        for user in node.users:
            if user not in router.tail and d.name(user) in ("select", "narrow", "slice", "chunk", "split", "unbind"):
                return user
            if d.name(user) == "getitem" and user is not router.values and user.args[0] is node:
                return user
    return None


def _values(view: View, choice: Choice, ids: Node, first: Node | None) -> Node | str | None:
    """The chosen scores: the top-k's own values, or gathered by its indices."""
    if first is not None and first.users:
        return "the weights are taken with the bias" if choice.bias is not None else first
    wanted = choice.scores if choice.kind != LOGITS else choice.x
    for user in ids.users:
        if d.name(user) not in ("gather", "take_along_dim"):
            continue
        at, index = (1, 2) if d.name(user) == "gather" else (2, 1)
        source, value = d.operand(user, 0, "input"), d.tensor(user)
        if d.operand(user, index, "index" if index == 2 else "indices") is not ids or value is None:
            continue
        if not is_last(d.operand(user, at, "dim"), value.dim()) or not isinstance(source, Node):
            continue
        if view.vn(unchanged(view, source)) == view.vn(wanted):
            return user
        return "the weights are no scores of those that were chosen from"
    return None


def _read_tail(view: View, router: Router) -> None:
    """Follow the weights while one step after the other is read; a cast to something narrower is the last."""
    for _ in range(8):
        node = router.output
        users = list(node.users)
        if not all(view.same_version(node, u) for u in users):
            return
        if not users:
            return
        user, sums, epsilon = _divided(router, node, users) or (users[0], (), 0.0)
        if set(users) != {user, *(s for s in sums if node in s.all_input_nodes)}:
            return
        if sums:
            router.normalised, router.epsilon = True, epsilon
        elif not _step(router, user):
            return
        router.output = user
        router.tail += [*sums, user]
        before, after = d.tensor(node), d.tensor(user)
        if before is not None and after is not None and after.dtype.itemsize < before.dtype.itemsize:
            return


def _step(router: Router, user: Node) -> bool:
    """A cast, a constant factor, or the softmax of chosen logits."""
    name, value = d.name(user), d.tensor(user)
    if name == "cast":
        return True
    if name in ("mul", "div") and value is not None:
        factor = constant_factor(user)
        if factor is not None and math.isfinite(factor[0]) and factor[0] != 0:
            router.scale *= factor[0]
            return True
    if name in ("softmax", "_softmax") and value is not None and router.choice.kind == LOGITS and not router.soft:
        if is_last(d.operand(user, 1, "dim"), value.dim()) and router.scale == 1.0:
            router.soft = True
            return True
    return False


def _divided(router: Router, node: Node, users: list[Node]) -> tuple[Node, Nodes, float | None] | None:
    """`w / (Σw + ε)`, the steps from w to the denominator, and ε."""
    if router.normalised or router.scale != 1.0 or router.choice.kind == LOGITS:
        return None
    for user in users:
        if d.name(user) != "div" or user.kwargs.get("rounding_mode") is not None:
            continue
        first, second = d.binary(user)
        found = _sum_of(node, second) if first is node and isinstance(second, Node) else None
        if found is not None:
            return user, found[1], found[0]
    return None


def _sum_of(node: Node, total: Node) -> tuple[float | None, Nodes] | None:
    """Epsilon (None: a lower bound) and the nodes of Σw + ε over the last dimension."""
    epsilon: float | None = 0.0
    above: list[Node] = []
    while total.op.startswith("call"):
        name, value = d.name(total), d.tensor(node)
        if name == "add" and not above and d.constant(d.binary(total)[1]) is not None:
            epsilon = d.constant(d.binary(total)[1])
        elif name in ("clamp", "clamp_min") and not above:
            epsilon = None
        elif name == "expand":
            pass
        elif name in ("sum", "norm") and d.unary(total) is node and value is not None:
            dims = d.operand(total, 1 if name == "sum" else 2, "dim")
            dims = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
            kept = bool(d.operand(total, 2 if name == "sum" else 3, "keepdim"))
            one = name == "sum" or d.constant(d.operand(total, 1, "p", total.kwargs.get("ord"))) == 1.0
            return (epsilon, (total, *reversed(above))) if is_last(dims, value.dim()) and kept and one else None
        else:
            return None
        above.append(total)
        source = d.unary(total) if name != "add" else d.binary(total)[0]
        if not isinstance(source, Node):
            return None
        total = source
    return None


def nodes_of(view: View, router: Router) -> tuple[Node, ...]:
    """Everything between the logits and the bias on one side, and ids and weights on the other."""
    ends = {router.choice.x, router.choice.bias}
    found: set[Node] = set()
    stack = [router.output, router.ids]
    while stack:
        node = stack.pop()
        if node in found or node in ends or not node.op.startswith("call"):
            continue
        found.add(node)
        stack += d.data_inputs(node)
        stack += [u for u in node.users if d.mutates(u) and d.name(u) == "scatter" and u.args[0] is node]
    return tuple(sorted(found, key=view.position.__getitem__))
