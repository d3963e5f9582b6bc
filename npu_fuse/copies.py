"""Values that go to all ranks as they are and whose gradients are summed over them: in front of a sharded product.

Megatron's function in front of column-parallel layers (identity forward, all-reduce backward), and DTensor's
`from_local` of a replicated value, whose gradient, a partial sum, is reduced. Either way the gradient of one product
goes into one all-reduce, which no forward graph shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import dtensor_rows, dtensors, functions, layers, pretend
from npu_fuse.collectives import KEEPS_ORDER
from npu_fuse.groups import Group
from npu_fuse.products import Product, untransposed
from npu_fuse.sites import NO_VALUE, StandIn, passed_on
from npu_fuse.view import View


@dataclass(frozen=True)
class Copied:
    """`source` is what is copied, `product` the one that reads it, `value` what is read of the product."""

    anchor: Node
    source: Node
    group: Group
    product: Product
    value: Node
    nodes: tuple[Node, ...]
    moves: tuple[Node, ...] = ()
    """What brings the copy into the product's shape."""
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)


def group_of(node: Node) -> Group | None:
    """The group over which the gradient of what this node gives back is summed; None where it is no such node."""
    if functions.is_function(node):
        return functions.copied_over(node)
    if node.op != "call_function" or d.raw_name(node) != "from_local":
        return None
    layout, local = dtensors.layout_of(node), d.tensor(node.args[0] if node.args else None)
    if layout is None or len(layout.placements) != 1 or not layout.replicated or node.kwargs.get("grad_placements"):
        return None
    return layout.group if local is not None and local.requires_grad else None


def find(view: View, node: Node) -> Copied | str | None:
    """The product behind a copy; why its gradient cannot be fused with the sum; None where no product reads it."""
    layer = layers.find(node, layers.COPIED) if functions.is_function(node) else None
    if layer is not None:
        return layer if isinstance(layer, str) else _of_layer(node, layer)
    group = group_of(node)
    if group is None or group.size == 1 or (made := d.tensor(functions.operand_of(node) or node.args[0])) is None:
        return None
    if not made.requires_grad:
        return None
    return _of_function(view, node, group) if functions.is_function(node) else _of_dtensor(view, node, group)


def _of_layer(node: Node, layer: layers.Layer) -> Copied | None:
    product, group = layer.product, layer.group
    assert group is not None
    return Copied(node, product.x, group, product, product.node, product.nodes, (), layer.stand_ins)


def _of_function(view: View, node: Node, group: Group) -> Copied | str | None:
    source, users = functions.operand_of(node), list(node.users)
    assert source is not None
    if len(users) != 1 or d.raw_name(users[0]) != "getitem":
        return None
    bodies = tuple(a for a in node.args[:2] if isinstance(a, Node))
    stand_ins = {body: NO_VALUE for body in bodies}
    run = partial(pretend.copied, size=group.size)
    stand_ins |= {node: StandIn((source,), run, ("copied", group.size)), users[0]: passed_on(node, "item")}
    found = _reader(view, users[0])
    if not isinstance(found, tuple):
        return found
    product, moves, inner = found
    nodes = (*bodies, node, users[0], *moves, *product.nodes)
    return Copied(node, source, group, product, product.node, nodes, moves, {**stand_ins, **inner})


def _of_dtensor(view: View, node: Node, group: Group) -> Copied | str | None:
    found = _reader(view, node)
    if not isinstance(found, tuple):
        return found
    product, moves, _ = found
    why = dtensor_rows.unfit(product)
    made = dtensors.value_of(product.node)
    if why or isinstance(made, str):
        return why or str(made)
    source, (value, behind) = node.args[0], made
    assert isinstance(source, Node)
    run = partial(pretend.copied, size=group.size)
    stand_ins = {node: StandIn((source,), run, ("copied", group.size))}
    unchanged = [m for m in moves if d.raw_name(m) == "redistribute"]
    stand_ins |= {n: dtensors.same(n) for n in (*unchanged, *behind)}
    nodes = (node, *moves, *product.nodes, *behind)
    return Copied(node, source, group, product, value, nodes, tuple(m for m in moves if m not in unchanged), stand_ins)


def _reader(view: View, node: Node) -> tuple[Product, tuple[Node, ...], Mapping[Node, StandIn]] | str | None:
    """The only reader of a value, a product, what brings the value into its shape, and stand-ins of the reader."""
    moves: list[Node] = []
    while True:
        users = list(node.users)
        readers = [
            p for u in users if (p := layers.product_at(u)) and p[0].x is node and node not in (p[0].w, p[0].bias)
        ]  # fmt: skip
        if len(users) > 1 and readers:
            return "several read the copied value: their gradients are added before they are reduced"
        if len(users) != 1:
            return None
        if readers:
            product, stand_ins = readers[0]
            if product.contracted != 1:
                return "the product sums over several dimensions"
            return untransposed(product), tuple(moves), stand_ins
        node = users[0]
        before, after = dtensors.layout_of(node.args[0] if node.args else None), dtensors.layout_of(node)
        unchanged = before is not None and after is not None and before.same(after)
        if not node.op.startswith("call") or (d.raw_name(node) == "redistribute") != unchanged:
            return None
        if not unchanged and (d.name(node) not in KEEPS_ORDER or d.name(node) in d.LIKE_ANOTHER):
            return None
        moves.append(node)
