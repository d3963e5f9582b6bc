"""Reduce-scatters and all-gathers of rows in a graph: what goes in, over whom, and which value comes out.

Ascend's fused kernels scatter and gather along the first dimension. A collective along another one is written by
torch as a movement of parts around one along the first; where all dimensions before it are of size 1 the parts lie in
memory as they should, and nothing has to be moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import pretend
from npu_fuse.collectives import namespace, waited
from npu_fuse.groups import Group, group_of
from npu_fuse.sites import StandIn, passed_on
from npu_fuse.view import View, is_one

LIBRARIES = ("_c10d_functional", "_c10d_functional_autograd")
FRESH = frozenset("empty new_empty empty_like zeros new_zeros zeros_like".split())
"""What gives memory of its own to write a collective's result into."""


@dataclass(frozen=True)
class Exchange:
    """A collective of rows: `source` goes in, `value` is the node whose users see what comes out."""

    anchor: Node
    source: Node
    group: Group
    value: Node
    nodes: tuple[Node, ...]
    overlapped: bool = False
    written: bool = False
    """The result is copied into memory that was made for it: `value` is that memory."""
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)


def is_scatter(node: Node) -> bool:
    if node.op != "call_function":
        return False
    raw = d.raw_name(node)
    return (raw == "reduce_scatter_tensor" and namespace(node) in LIBRARIES) or _of_vllm(node, "reduce_scatter")


def is_gather(node: Node) -> bool:
    if node.op != "call_function":
        return False
    raw = d.raw_name(node)
    return (raw == "all_gather_into_tensor" and namespace(node) in LIBRARIES) or _of_vllm(node, "all_gather")


def _of_vllm(node: Node, name: str) -> bool:
    return d.raw_name(node) == name and namespace(node) == "vllm"


def group_argument(node: Node) -> Any:
    index = 3 if is_scatter(node) or namespace(node) == "vllm" else 2
    return d.operand(node, index, "group_name")


def scatter_of(view: View, node: Node) -> Exchange | str:
    """The reduce-scatter that begins here, or why it is none that can be fused."""
    vllm = namespace(node) == "vllm"
    operation = "sum" if vllm else str(d.operand(node, 1, "reduce_op", "sum")).lower()
    if operation != "sum":
        return f"the reduction is {operation!r}; the fused op sums"
    dim = d.operand(node, 1, "dim") if vllm else 0
    source = d.operand(node, 0, "input", node.kwargs.get("tensor"))
    parts: tuple[Node, ...] = ()
    found = _parts(source) if not vllm else None
    if isinstance(found, str):
        return found
    if found is not None:
        source, dim, parts = found
    value = d.tensor(source)
    if not isinstance(dim, int) or value is None or not all(is_one(s) for s in value.shape[: dim % value.dim()]):
        return f"the sum is scattered along dimension {dim}: rows would have to be moved before the product"
    return _exchange(view, node, source, pretend.reduce_scatter, parts)


def gather_of(view: View, node: Node) -> Exchange | str:
    """The all-gather that begins here, or why it is none that can be fused."""
    source = d.operand(node, 0, "input", node.kwargs.get("tensor"))
    value = d.tensor(source)
    dim = d.operand(node, 1, "dim") if namespace(node) == "vllm" else 0
    if not isinstance(dim, int) or value is None or not all(is_one(s) for s in value.shape[: dim % value.dim()]):
        return f"the value is gathered along dimension {dim}: rows would have to be moved behind the product"
    return _exchange(view, node, source, pretend.all_gather, ())


def _exchange(view: View, node: Node, source: Any, run: Any, parts: tuple[Node, ...]) -> Exchange | str:
    group = group_of(group_argument(node))
    if isinstance(group, str):
        return group
    if group.size == 1:
        return "the group has one rank: nothing is communicated"
    trained = (found := d.tensor(node)) is not None and found.requires_grad
    if trained and not _has_gradient(node):
        return "this torch has no gradient for this collective in a graph"
    reads = node.args[0] if node.args else source
    assert isinstance(reads, Node)
    stand_ins = {node: StandIn((reads,), partial(run, size=group.size), (d.raw_name(node), group.size))}
    if namespace(node) == "vllm":
        return Exchange(node, source, group, node, (*parts, node), stand_ins=stand_ins)
    ended = waited(view, node)
    if isinstance(ended, str):
        return ended
    stand_ins[ended.wait] = passed_on(node, "wait")
    nodes = (*parts, node, ended.wait)
    made = Exchange(node, source, group, ended.wait, nodes, ended.overlapped, stand_ins=stand_ins)
    return made if ended.copy is None else _into(view, made, ended.copy, ended.only_copied)


def _into(view: View, found: Exchange, copy: Node, only_copied: bool) -> Exchange | str:
    """The result is copied into a buffer, which code reads from then on."""
    out, wait = copy.args[0], found.value
    if not only_copied or not isinstance(out, Node) or d.name(out) not in FRESH or d.mutates(out):
        return "the result is written into a tensor that was not made for it"
    if any(u is not copy and view.position[u] < view.position[copy] for u in out.users):
        return "the tensor that the result is written into is read before"
    stand_ins = {**found.stand_ins, out: StandIn((), _memory, "memory"), copy: StandIn((out, wait), _filled, "filled")}
    nodes = (*found.nodes, out, copy)
    value = out if d.mutates(copy) else copy
    return Exchange(
        found.anchor, found.source, found.group, value, nodes, found.overlapped, value is out, stand_ins
    )  # fmt: skip


def _memory() -> torch.Tensor:
    return torch.empty(0)


def _filled(memory: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Written into, whatever its dtype and shape in this proof."""
    memory.data = torch.empty_like(value)
    return memory.copy_(value)


def _has_gradient(node: Node) -> bool:
    name = f"{namespace(node)}::{d.raw_name(node)}"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"))


def _parts(node: Any) -> tuple[Node, int, tuple[Node, ...]] | str | None:
    """`cat(chunk(y, n, dim), 0)`: y, the dimension, and the nodes that move it; None where it is no such thing."""
    if not isinstance(node, Node) or d.name(node) != "cat" or d.operand(node, 1, "dim", 0) != 0:
        return None
    items = d.operand(node, 0, "tensors")
    if isinstance(items, Node):
        split, between = items, ()
    else:
        if not all(isinstance(n, Node) and d.name(n) == "getitem" for n in items):
            return None
        split, between = items[0].args[0], tuple(items)
        if [n.args for n in items] != [(split, i) for i in range(len(items))]:
            return "parts of the sum are put together in another order"
    if not isinstance(split, Node) or d.name(split) not in ("chunk", "split", "tensor_split"):
        return None
    source, made = d.unary(split), d.value(split)
    if not isinstance(source, Node) or not isinstance(made, (tuple, list)) or (between and len(made) != len(between)):
        return "only a part of the product is reduced"
    nodes = (split, *between, node)
    if any(u not in nodes for n in nodes[:-1] for u in n.users) or len(node.users) != 1:
        return "parts of the product are used besides their sum"
    dim = d.operand(split, 2, "dim", 0)
    return (source, dim, nodes) if isinstance(dim, int) else None
