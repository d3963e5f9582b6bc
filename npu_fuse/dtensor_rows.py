"""Sequence parallelism by placements: a redistribution that scatters a sum over rows, or gathers rows.

`Partial` to `Shard(d)` behind a product is a reduce-scatter, whose gradient is gathered; `Shard(d)` to `Replicate`
before products with weights sharded by their outputs is an all-gather, whose gradient, a partial sum of all these
products, is scattered once. As DTensor does it; its collectives are not in Dynamo's graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from npu_fuse import dialect as d
from npu_fuse import pretend
from npu_fuse.dtensors import Layout, Summed, layout_of, local_of, same, summed
from npu_fuse.exchanges import Exchange
from npu_fuse.products import Product
from npu_fuse.reduced import Reduced
from npu_fuse.sites import StandIn
from npu_fuse.view import is_one


def _layouts(node: Node) -> tuple[Layout, Layout] | None:
    if node.op != "call_method" or d.raw_name(node) != "redistribute":
        return None
    before, after = layout_of(node.args[0]), layout_of(node)
    return (before, after) if before is not None and after is not None else None


def ranks_of(node: Node) -> int:
    """How many ranks a redistribution is over."""
    layout = layout_of(node)
    return layout.group.size if layout is not None and len(layout.placements) == 1 else 1


def is_scatter(node: Node) -> bool:
    """A Partial value becomes a sharded one."""
    found = _layouts(node)
    if found is None:
        return False
    return any(p.is_partial() for p in found[0].placements) and any(p.is_shard() for p in found[1].placements)


def is_gather(node: Node) -> bool:
    """A sharded value becomes a replicated one."""
    found = _layouts(node)
    return found is not None and any(p.is_shard() for p in found[0].placements) and found[1].replicated


def scatter_of(node: Node) -> tuple[Exchange, Reduced] | str | None:
    """The reduce-scatter at this node and the product below it; why it is none; None without a product."""
    layouts = _layouts(node)
    found = summed(node)
    if not isinstance(found, Summed) or layouts is None:
        return found if not isinstance(found, Summed) else None
    dim = _rows(node, layouts[1], found.group.size)
    if isinstance(dim, str):
        return dim
    run = partial(pretend.reduce_scatter, size=found.group.size, dim=dim)
    stand_ins = {**found.stand_ins, node: StandIn((found.source,), run, ("scatter", found.group.size, dim))}
    exchange = Exchange(node, found.source, found.group, found.value, found.nodes, stand_ins=stand_ins)
    return exchange, found.below


def gather_of(node: Node) -> Exchange | str:
    """The all-gather at this node, or why it is none that can be fused."""
    layouts, source = _layouts(node), node.args[0]
    assert layouts is not None and isinstance(source, Node)
    before = layouts[0]
    if len(before.placements) != 1:
        return "the mesh has several axes"
    group = before.group
    if group.size == 1:
        return "the group has one rank: nothing is communicated"
    dim = _rows(node, before, group.size)
    if isinstance(dim, str):
        return dim
    if node.kwargs.get("forward_dtype") or node.kwargs.get("backward_dtype"):
        return "the redistribution changes the dtype"
    x, passed = local_of(source)
    stand_ins: dict[Node, StandIn] = {n: same(n) for n in passed}
    run = partial(pretend.all_gather, size=group.size, dim=dim)
    stand_ins[node] = StandIn((source,), run, ("gather", group.size, dim))
    return Exchange(node, x, group, node, (*passed, node), stand_ins=stand_ins)


def _rows(node: Node, sharded: Layout, size: int) -> int | str:
    """The dimension of the rows, which every rank has as many of and before which all is of size 1."""
    whole: Any = d.tensor(node)
    placement = sharded.placements[0]
    if type(placement).__name__ != "Shard":
        return f"the placement is {placement}"
    dim: int = int(placement.dim) % whole.dim()
    if dim == whole.dim() - 1:
        return "the dimension that is exchanged is not the rows"
    if not all(is_one(s) for s in whole.shape[:dim]):
        return f"rows are sharded along dimension {dim}, before which other rows stand: they would have to be moved"
    if not statically_known_true(whole.shape[dim] % size == 0):
        return f"{whole.shape[dim]} rows may be uneven over {size} ranks"
    return dim


def unfit(product: Product) -> str:
    """Empty where each rank holds its share of the weight's outputs, and with them of the result's."""
    w, result, whole = layout_of(product.w), layout_of(product.node), d.tensor(product.node)
    if w is None or result is None or whole is None or len(w.placements) != 1:
        return "the weight is no DTensor on the mesh of one axis"
    if product.contracted != 1 or product.free != 1:
        return "the product sums over several dimensions"
    if not w.sharded(0 if product.transposed else 1, 2) or not result.sharded(-1, whole.dim()):
        return "the weight's outputs are not sharded"
    bias = layout_of(product.bias) if product.bias is not None else None
    if product.bias is not None and (bias is None or not bias.sharded(0, 1)):
        return "the bias is not sharded as the weight's outputs are"
    return ""
