"""Reductions over ranks in a graph: what is reduced, over whom, and which value is the sum afterwards.

Dynamo writes an in-place `dist.all_reduce(y)` as `all_reduce(y)`, `wait_tensor`, `y.copy_`: from there on y is the
sum. Functional collectives give a new value. vLLM's op does so without a wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import pretend
from npu_fuse.groups import Group, group_of, is_collective
from npu_fuse.sites import StandIn, passed_on
from npu_fuse.view import View

KEEPS_ORDER = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze contiguous view_as reshape_as alias ravel".split()
)
"""Movement after which elements lie in memory as before."""


@dataclass(frozen=True)
class Reduction:
    """An all-reduce in the graph. `source` is what it reduces, `value` the node whose users see the sum."""

    anchor: Node
    source: Node
    group: Group
    value: Node
    written: bool
    """The sum is written over the source: every view of it that is read later holds the sum."""
    nodes: tuple[Node, ...]
    gradient: str
    """What its backward does with the gradient, "all_reduce" or "identity": read from the graph, never chosen."""
    overlapped: bool = False
    """Other work stands between the collective and its wait."""
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)


def namespace(node: Node) -> str:
    """The library of the op that a node calls: `_c10d_functional`, `vllm`."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).split("::")[0]
    return ""


def is_all_reduce(node: Node) -> bool:
    if node.op != "call_function" or d.raw_name(node) != "all_reduce":
        return False
    return namespace(node) in ("_c10d_functional", "vllm")


def operation(node: Node) -> str:
    """'sum', 'avg', 'max'…"""
    return "sum" if namespace(node) == "vllm" else str(d.operand(node, 1, "reduce_op", "sum")).lower()


def source_of(node: Node) -> Any:
    return d.operand(node, 0, "input", node.kwargs.get("tensor"))


def group_argument(node: Node) -> Any:
    return d.operand(node, 1 if namespace(node) == "vllm" else 2, "group_name")


def reduction_of(view: View, node: Node) -> Reduction | str:
    """The reduction that begins at an `all_reduce`, or why it is none that can be fused."""
    if operation(node) != "sum":
        return f"the reduction is {operation(node)!r}; the fused op sums"
    source, group = source_of(node), group_of(group_argument(node))
    if isinstance(group, str):
        return group
    if group.size == 1:
        return "the group has one rank: nothing is communicated"
    trained = (made := d.tensor(node)) is not None and made.requires_grad
    if trained and not has_gradient():
        return "this torch has no gradient for an all-reduce in a graph"
    gradient = "identity" if namespace(node) == "vllm" else "all_reduce"
    reduced = StandIn((source,), partial(pretend.all_reduce, size=group.size, gradient=gradient), ("sum", gradient))
    stand_ins = {node: reduced}
    if namespace(node) == "vllm":
        return Reduction(node, source, group, node, False, (node,), gradient, False, stand_ins)
    found = waited(view, node)
    if isinstance(found, str):
        return found
    copy = found.copy
    stand_ins[found.wait] = passed_on(node, "wait")
    nodes: tuple[Node, ...] = (node, found.wait)
    if copy is None:
        return Reduction(node, source, group, found.wait, False, nodes, gradient, found.overlapped, stand_ins)
    assert isinstance(source, Node)
    if not found.only_copied or copy.args[0] is not source:
        return "the sum is copied into another tensor than the one that was reduced"
    written = d.mutates(copy)  # not in aten's functional graphs
    value = source if written else copy
    return Reduction(node, source, group, value, written, (*nodes, copy), gradient, found.overlapped, stand_ins)


@dataclass(frozen=True)
class Waited:
    """The wait for a collective, and the copy of its result into memory, where there is one."""

    wait: Node
    overlapped: bool
    """Other work stands between the collective and its wait."""
    copy: Node | None = None
    only_copied: bool = False
    """Nothing but the copy reads the result."""


def waited(view: View, node: Node) -> Waited | str:
    """How the graph waits for a collective and where it keeps the result; why this cannot be said."""
    waits = [n for n in node.users if d.raw_name(n) == "wait_tensor"]
    if len(node.users) != 1 or len(waits) != 1:
        return "the collective's result is not waited for once"
    between = view.nodes[view.position[node] + 1 : view.position[waits[0]]]
    if any(is_collective(n) for n in between):
        return "another collective is started before this one is waited for: their order must stay"
    wait = waits[0]
    overlapped = any(n.op.startswith("call") and d.name(n) not in d.MOVEMENT for n in between)
    copies = [n for n in wait.users if d.name(n) == "copy" and d.operand(n, 1, "src") is wait]
    return Waited(wait, overlapped, copies[0] if copies else None, len(wait.users) == 1)


def is_read(view: View, value: Node, inside: Collection[Node]) -> bool:
    """Whether the value reaches an output, a write or another collective.

    torch keeps a collective whose result nobody reads (another rank may wait for it), but no call of ours.
    """
    if "live" not in view.memo:
        live: set[Node] = set()
        for node in reversed(view.nodes):
            if node in live or node.op == "output" or d.mutates(node) or is_collective(node):
                live.update((node, *node.all_input_nodes))
        view.memo["live"] = live
    return any(user in view.memo["live"] for user in value.users if user not in inside)


def has_gradient() -> bool:
    """torch registers autograd for functional collectives from 2.13 on."""
    name = "_c10d_functional::all_reduce"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"))
