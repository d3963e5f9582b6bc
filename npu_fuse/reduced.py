"""What stands between a product and the collective that sums it over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import layers
from npu_fuse.collectives import KEEPS_ORDER
from npu_fuse.products import Product, product_of
from npu_fuse.sites import StandIn
from npu_fuse.view import View, same_shape, same_size

NEAR = d.POINTWISE | d.MOVEMENT | {"cast", "cast:other", "dropout", "softmax", "where", "masked_fill"}
"""Steps through which a product is looked for, to say what keeps it from being fused."""
DEPTH = 6


@dataclass(frozen=True)
class Reduced:
    """A product on its way into a collective: `order` from the product on, `moves` what follows it."""

    product: Product
    order: tuple[Node, ...]
    moves: tuple[Node, ...] = ()
    """Nodes of `order` behind the product, one for each: what brings it into the shape that is reduced."""
    bias: Node | None = None
    bias_parts: int = 1
    nodes: tuple[Node, ...] = ()
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)


def find(view: View, source: object, reader: Node) -> Reduced | str | None:
    """The product that `source` is; the reason why it is none; None where no product is near."""
    order: list[Node] = []
    bias: Node | None = None
    node = source
    while isinstance(node, Node):
        if not view.same_version(node, order[-1] if order else reader):
            return "the product is changed in place before it is reduced" if _near(node) else None
        function = layers.function_at(node)
        layer = layers.find(function, layers.PLAIN) if function is not None else None
        product = layer.product if isinstance(layer, layers.Layer) else layer or product_of(node)
        if isinstance(product, str):
            return product
        if product is not None:
            if bias is not None and product.bias is not None:
                return "two vectors are added to the product"
            if bias is not None and not _fits(product, bias):
                return "what is added to the product is as wide as a part of it"
            order.append(node)
            order.reverse()
            taken = bias if bias is not None else product.bias
            moves = tuple(n for n in order[1:] if not _adds(n) and not _stays(n))
            stand_ins = layer.stand_ins if isinstance(layer, layers.Layer) else {}
            return Reduced(product, tuple(order), moves, taken, 1, (*product.nodes, *order[1:]), stand_ins)
        if not node.op.startswith("call"):
            return None
        if function is not None and layers.multiplies(function):
            return "the product is computed inside an autograd function, with a backward of its own"
        order.append(node)
        if d.name(node) in KEEPS_ORDER or _stays(node):
            if d.name(node) in d.LIKE_ANOTHER and not _stays(node):
                return f"{d.name(node)} stands between the product and its sum"
            node = d.unary(node)
            continue
        added = _bias(node)
        if added is not None and bias is None and len(order) == 1 + sum(_stays(n) for n in order[:-1]):
            node, bias = added
            continue
        return _blocked(view, node)
    return None


def inside(layer: layers.Layer) -> Reduced:
    """A product that a function sums itself: nothing stands between the two."""
    return Reduced(layer.product, (), (), layer.product.bias, 1, layer.function.nodes)


def keeps_rows(below: Reduced, product: Product) -> bool:
    """What follows the product leaves its columns as they are."""
    result = d.tensor(product.node)
    assert result is not None
    columns = result.shape[result.dim() - product.free :]
    moved = [d.tensor(node) for node in below.moves]
    return all(m is not None and same_shape(m.shape[m.dim() - product.free :], columns) for m in moved)


def _stays(node: Node) -> bool:
    """The same elements in the same shape and order once more."""
    name = d.name(node)
    before, after = d.tensor(d.unary(node)) if node.args else None, d.tensor(node)
    if before is None or after is None or not same_shape(before.shape, after.shape) or before.dtype != after.dtype:
        return False
    if name in ("permute", "transpose", "t", "movedim"):
        return _same_strides(before, after)
    return name in KEEPS_ORDER or name == "clone"


def _fits(product: Product, bias: Node) -> bool:
    result, added = d.tensor(product.node), d.tensor(bias)
    if result is None or added is None or product.free > 1:
        return False
    return same_size(result.shape[-1], added.shape[0])


def _same_strides(before: object, after: object) -> bool:
    left, right = before.stride(), after.stride()  # type: ignore[attr-defined]
    return all(same_size(a, b) for a, b in zip(left, right, strict=True))


def _adds(node: Node) -> bool:
    return d.name(node) == "add"


def _bias(node: Node) -> tuple[Node, Node] | None:
    """`product + b` with b [N]: the sum over ranks then holds the sum of all ranks' b."""
    if d.name(node) != "add" or d.mutates(node) or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = d.binary(node)
    result = d.tensor(node)
    for value, added in ((first, second), (second, first)):
        left, right = d.tensor(value), d.tensor(added)
        if left is None or right is None or result is None or not isinstance(added, Node):
            continue
        if right.dim() == 1 and same_shape(left.shape, result.shape) and left.dtype == right.dtype == result.dtype:
            if same_size(right.shape[0], result.shape[-1]):
                return value, added
    return None


def _blocked(view: View, node: Node) -> str | None:
    """Why a product below `node` is not what is reduced; None where there is no product near."""
    products = _near(node)
    if not products:
        return None
    name = d.name(node)
    if name == "add" and len(products) > 1:
        return "a sum of two products is reduced once; fused, each would be reduced apart"
    if name == "cast":
        return "the product is cast before the sum: the fused op sums in the product's own dtype"
    if d.mutates(node):
        return f"the product is changed in place ({name}) before it is reduced"
    return f"{name} stands between the product and its sum"


def _near(node: Node) -> set[Node]:
    found: set[Node] = set()
    level = [node]
    for _ in range(DEPTH):
        below: list[Node] = []
        for current in level:
            if product_of(current) is not None:
                found.add(current)
            elif current.op.startswith("call") and d.name(current) in NEAR:
                below += d.data_inputs(current)
        level = below
    return found
