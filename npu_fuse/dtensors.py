"""Reductions of DTensors: Dynamo's graph holds no collective, the placements tell that there will be one.

A product whose operands are sharded along the dimension that is summed over is `Partial`; `redistribute` to
`Replicate` (or `full_tensor`) reduces it. The gradient of such a reduction is taken as it is, and a replicated
bias is divided among the ranks before the sum while its own gradient is not: as DTensor does it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import pretend
from npu_fuse.collectives import Reduction
from npu_fuse.groups import Group, described
from npu_fuse.products import Product, product_of
from npu_fuse.reduced import Reduced
from npu_fuse.sites import StandIn, passed_on
from npu_fuse.view import View


@dataclass(frozen=True)
class Layout:
    """A DTensor's placements on a mesh of one axis, and that axis' group."""

    placements: tuple[Any, ...]
    mesh: Any

    @property
    def group(self) -> Group:
        return described(self.mesh.get_group())

    def sharded(self, dim: int, rank: int) -> bool:
        """Sharded evenly or not along `dim` of a tensor of that rank, and in no other way."""
        placement = self.placements[0]
        return type(placement).__name__ == "Shard" and placement.dim % rank == dim % rank

    def same(self, other: Layout) -> bool:
        return self.placements == other.placements and self.group.same(other.group)

    @property
    def replicated(self) -> bool:
        return all(p.is_replicate() for p in self.placements)


def layout_of(node: Any) -> Layout | None:
    found = d.tensor(node)
    placements = getattr(found, "placements", None)
    if found is None or placements is None:
        return None
    mesh: Any = found.device_mesh  # type: ignore[attr-defined]
    return Layout(tuple(placements), getattr(mesh, "real_obj", mesh))


def is_reduction(node: Node) -> bool:
    """A Partial value becomes a replicated one."""
    if node.op != "call_method" or d.raw_name(node) not in ("redistribute", "full_tensor"):
        return False
    before, after = layout_of(node.args[0]), layout_of(node)
    if before is None or not any(p.is_partial() for p in before.placements):
        return False
    return after is None or after.replicated


def reduction_of(view: View, node: Node) -> tuple[Reduction, Reduced] | str | None:
    """The reduction at this node and the product below it; the reason why it is none; None without a product."""
    found = summed(node)
    if not isinstance(found, Summed):
        return found
    gradient = "identity"
    run = partial(pretend.all_reduce, size=found.group.size, gradient=gradient)
    stand_ins = {**found.stand_ins, node: StandIn((found.source,), run, ("sum", gradient))}
    reduction = Reduction(
        node, found.source, found.group, found.value, False, found.nodes, gradient, False, stand_ins
    )  # fmt: skip
    return reduction, found.below


@dataclass(frozen=True)
class Summed:
    """A Partial product that a redistribution sums over the ranks of a group, and what is read then."""

    source: Node
    group: Group
    value: Node
    nodes: tuple[Node, ...]
    below: Reduced
    stand_ins: dict[Node, StandIn]
    """Of all nodes but the redistribution itself."""


def summed(node: Node) -> Summed | str | None:
    source = node.args[0]
    assert isinstance(source, Node)
    product = product_of(source)
    if product is None or isinstance(product, str):
        return product
    result = layout_of(source)
    assert result is not None
    why = _unfit(product, result)
    if why:
        return why
    if len(source.users) != 1:
        return "the product is used besides its sum"
    group = result.group
    if group.size == 1:
        return "the group has one rank: nothing is communicated"
    found = value_of(node)
    if isinstance(found, str):
        return found
    value, behind = found
    stand_ins = {source: _product(product, group.size)}
    x, before = local_of(product.x)
    stand_ins |= {n: same(n) for n in (*behind, *before)}
    local = replace(product, x=x)
    parts = group.size if product.bias is not None else 1
    below = Reduced(local, (source,), (), product.bias, parts, (*before, *product.nodes))
    return Summed(source, group, value, (node, *behind), below, stand_ins)


def same(node: Node) -> StandIn:
    """What a node computes that only changes how a value is described."""
    assert isinstance(node.args[0], Node)
    return passed_on(node.args[0])


def _unfit(product: Product, result: Layout) -> str:
    """Empty where each rank holds its share of the dimension that is summed over."""
    if len(result.placements) != 1:
        return "the mesh has several axes"
    placement = result.placements[0]
    if not placement.is_partial() or getattr(placement, "reduce_op", "sum") != "sum":
        return f"the product is {placement}; the fused op sums"
    x, w = layout_of(product.x), layout_of(product.w)
    weight, value = d.tensor(product.w), d.tensor(product.x)
    if x is None or w is None or weight is None or value is None:
        return "an operand is no DTensor"
    if product.contracted != 1 or product.free != 1 or weight.dim() != 2:
        return "the product sums over several dimensions"
    inner = 1 if product.transposed else 0
    if not x.sharded(-1, value.dim()) or not w.sharded(inner, 2):
        return "the dimension that is summed over is not the sharded one"
    bias = layout_of(product.bias) if product.bias is not None else None
    if product.bias is not None and (bias is None or not bias.replicated):
        return "the bias is not replicated"
    return ""


def value_of(node: Node) -> tuple[Node, tuple[Node, ...]] | str:
    """The node whose users see what `node` makes, and the nodes between it and `node`."""
    if layout_of(node) is None:
        return (node, ()) if not node.kwargs else "full_tensor is told another gradient"
    value, behind = node, list[Node]()
    while len(value.users) == 1:
        user = next(iter(value.users))
        before, after = layout_of(value), layout_of(user)
        if d.raw_name(user) == "to_local":
            if user.kwargs.get("grad_placements") or len(user.args) > 1:
                return "to_local is told another gradient"
            return user, (*behind, user)
        if d.raw_name(user) != "redistribute" or before is None or after is None or not before.same(after):
            break
        behind.append(user)
        value = user
    return value, tuple(behind)


def local_of(x: Node) -> tuple[Node, tuple[Node, ...]]:
    """The local tensor that x was made of, where nothing was moved since; else x itself."""
    node, passed = x, []
    while node.op.startswith("call") and d.raw_name(node) in ("redistribute", "from_local"):
        below = node.args[0]
        if not isinstance(below, Node) or len(node.users) != 1:
            return x, ()
        passed.append(node)
        if d.raw_name(node) == "from_local":
            return below, tuple(reversed(passed))
        before, after = layout_of(below), layout_of(node)
        if before is None or after is None or not before.same(after):
            return x, ()
        node = below
    return x, ()


def _product(product: Product, size: int) -> StandIn:
    operands = tuple(n for n in (product.x, product.w, product.bias) if n is not None)
    return StandIn(operands, partial(_share, transposed=product.transposed, size=size), ("product", *product.key))


class _Divided(torch.autograd.Function):
    """A rank's share of a replicated bias, whose gradient is the whole."""

    @staticmethod
    def forward(ctx: Any, bias: torch.Tensor, size: int) -> torch.Tensor:
        return bias / size

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override, unused-ignore]
        return grad, None


def _share(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, transposed: bool, size: int
) -> torch.Tensor:
    share = None if bias is None else _Divided.apply(bias, size)  # type: ignore[no-untyped-call]
    return torch.nn.functional.linear(x, w if transposed else w.t(), share)


def wrap_like(local: torch.Tensor, like: Any, placements: tuple[Any, ...]) -> Any:
    """A DTensor on the mesh of `like`, of which this rank holds `local`; alike in size on all ranks."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, placements, run_check=False)
