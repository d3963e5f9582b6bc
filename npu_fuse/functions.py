"""Reductions inside a `torch.autograd.Function`, as Megatron writes them: the sum forward, anything backward.

Dynamo keeps the two bodies as graphs of their own, and the product stands outside. The bodies are read by what
becomes of their first argument: each value is that argument, or its sum over ranks, or something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from npu_fuse import dialect as d
from npu_fuse import pretend
from npu_fuse.collectives import Reduction, group_argument, is_all_reduce, operation, source_of
from npu_fuse.groups import Group, group_of
from npu_fuse.products import product_of
from npu_fuse.sites import StandIn

ARGUMENT, SUM = "argument", "sum"
SAME = frozenset("view view_as reshape reshape_as alias detach contiguous".split())


@dataclass
class _Cell:
    """What a piece of memory holds."""

    holds: str
    group: Group | None = None


def is_function(node: Node) -> bool:
    return node.op == "call_function" and d.raw_name(node) == "autograd_function_apply"


def operand_of(node: Node) -> Node | None:
    """The first tensor that the function is given."""
    return next((a for a in node.args[2:] if isinstance(a, Node) and d.tensor(a) is not None), None)


def holds_product(node: Node) -> bool:
    """Whether this value comes out of a function in whose body a matmul stands."""
    source = node.args[0] if d.raw_name(node) == "getitem" and node.args else None
    body = _body(source, 0) if isinstance(source, Node) and is_function(source) else None
    return body is not None and any(product_of(n) is not None for n in body.graph.nodes)


def reduction_of(node: Node) -> Reduction | str | None:
    """The reduction that this function is; None where it reduces nothing, a reason where it does more."""
    bodies = [_body(node, i) for i in (0, 1)]
    operands = [a for a in node.args[2:] if isinstance(a, Node) and d.tensor(a) is not None]
    if bodies[0] is None or bodies[1] is None or not any(is_all_reduce(n) for n in bodies[0].graph.nodes):
        return None
    if len(operands) != 1:
        return "the autograd function takes several tensors"
    forward, backward = (_result(body) for body in bodies if body is not None)
    if isinstance(forward, str):
        return f"in the autograd function {forward}"
    if forward.holds != SUM or forward.group is None:
        return "the autograd function does not give back the sum"
    if isinstance(backward, str):
        return f"in the autograd function's backward {backward}"
    if backward.holds == SUM and (backward.group is None or not backward.group.same(forward.group)):
        return "the autograd function's backward reduces over another group"
    users = list(node.users)
    if len(users) != 1 or d.raw_name(users[0]) != "getitem":
        return "the autograd function gives back several values"
    size, gradient = forward.group.size, "all_reduce" if backward.holds == SUM else "identity"
    if size == 1:
        return "the group has one rank: nothing is communicated"
    bodies_read = tuple(a for a in node.args[:2] if isinstance(a, Node))
    run = partial(pretend.all_reduce, size=size, gradient=gradient)
    stand_ins = {body: StandIn((), _nothing, "body") for body in bodies_read}
    stand_ins[node] = StandIn((operands[0],), run, (SUM, gradient))
    stand_ins[users[0]] = StandIn((node,), _same, "item")
    nodes = (*bodies_read, node, users[0])
    return Reduction(node, operands[0], forward.group, users[0], False, nodes, gradient, False, stand_ins)


def copied_over(node: Node) -> Group | None:
    """The group of a function that gives back its argument, and whose gradient is the sum of the gradients."""
    forward_body, backward_body = _body(node, 0), _body(node, 1)
    operands = [a for a in node.args[2:] if isinstance(a, Node) and d.tensor(a) is not None]
    if forward_body is None or backward_body is None or len(operands) != 1:
        return None
    if not any(is_all_reduce(n) for n in backward_body.graph.nodes):
        return None
    forward, backward = _result(forward_body), _result(backward_body)
    if isinstance(forward, str) or isinstance(backward, str) or forward.holds != ARGUMENT or backward.holds != SUM:
        return None
    return backward.group


def _nothing() -> None:
    return None


def _same(value: Any) -> Any:
    return value


def _body(node: Node, index: int) -> GraphModule | None:
    name = node.args[index]
    owner = node.graph.owning_module
    if not isinstance(name, Node) or name.op != "get_attr" or owner is None:
        return None
    found = getattr(owner, str(name.target), None)
    return found if isinstance(found, GraphModule) else None


def _result(body: GraphModule) -> _Cell | str:
    """What the body gives back first; in words, what stands in the way of saying so."""
    cells: dict[Node, _Cell] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            cells[node] = _Cell("" if cells else ARGUMENT)
        elif node.op == "output":
            first = _first(node.args[0])
            return cells[first] if isinstance(first, Node) and first in cells else "something else is given back"
        elif node.op == "get_attr":
            return "another function is called"
        elif d.raw_name(node) == "_set_grad_enabled":
            continue
        else:
            made = _step(node, cells)
            if isinstance(made, str):
                return made
            cells[node] = made
    return "nothing is given back"


def _first(value: Any) -> Any:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value


def _step(node: Node, cells: dict[Node, _Cell]) -> _Cell | str:
    operand = source_of(node) if is_all_reduce(node) else d.unary(node)
    cell = cells.get(operand) if isinstance(operand, Node) else None
    name = d.name(node)
    if cell is None:
        return f"{name} is computed"
    if is_all_reduce(node):
        group = group_of(group_argument(node))
        if isinstance(group, str):
            return group
        if operation(node) != SUM or cell.holds != ARGUMENT:
            return f"what is reduced is not the argument, or reduced by {operation(node)!r}"
        return _Cell(SUM, group)
    if d.raw_name(node) == "wait_tensor":
        return cell
    if name == "copy" and d.mutates(node):
        source = cells.get(node.args[1]) if isinstance(node.args[1], Node) else None
        if source is None:
            return "something else is copied"
        cell.holds, cell.group = source.holds, source.group
        return cell
    if name == "clone":
        return _Cell(cell.holds, cell.group)
    before, after = d.tensor(operand), d.tensor(node)
    if name in SAME and before is not None and after is not None and _alike(before, after):
        return cell if before.is_contiguous() else _Cell(cell.holds, cell.group)
    return f"{name} is computed"


def _alike(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before.dtype == after.dtype and before.dim() == after.dim() and str(before.shape) == str(after.shape)
