"""Matrix products in any spelling, as one: x [..., K…] times w, contracted over x's last dimensions.

linear, matmul, mm, addmm, bmm with one weight for the whole batch, einsum and tensordot. The weight is taken as
it lies in memory ([K, N], or [N, K] that is viewed transposed); where a spelling would need a copy of it, it is
no product here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.emit import Emitter
from npu_fuse.view import is_one, same_size, static

NAMES = frozenset("linear matmul mm addmm bmm baddbmm einsum tensordot".split())


@dataclass(frozen=True)
class Product:
    """`contracted`: how many of x's last dimensions are summed over. `free`: how many dimensions w adds."""

    node: Node
    x: Node
    w: Node
    transposed: bool
    """w is [free…, contracted…] in memory order, else [contracted…, free…]."""
    contracted: int = 1
    free: int = 1
    bias: Node | None = None
    nodes: tuple[Node, ...] = ()
    """The nodes that stand for the product: itself, and the expansion of a weight over a batch."""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.transposed, self.contracted, self.free, self.bias is not None)

    def operands(self, e: Emitter, env: Mapping[Node, Any], dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """x1 [..., K], x2 [K, N] (a view of w) and the bias [N] or None, in the dtype of the product."""
        x, w = e.cast(e.local(env[self.x]), dtype), e.cast(e.local(env[self.w]), dtype)
        if self.contracted > 1:
            x = e.call(torch.flatten, x, -self.contracted)
        inner = (-self.contracted, -1) if self.transposed else (0, self.contracted - 1)
        outer = (0, self.free - 1) if self.transposed else (-self.free, -1)
        found = d.tensor(w)
        assert found is not None
        if found.dim() > self.contracted + self.free:  # [1, K, N]: a batch of one
            w = e.call(torch.squeeze, w, 0)
        if self.contracted > 1:
            w = e.call(torch.flatten, w, *inner)
        if self.free > 1:
            w = e.call(torch.flatten, w, *outer)
        if self.transposed:
            w = e.call(torch.t, w)
        return x, w, None if self.bias is None else e.cast(e.local(env[self.bias]), dtype)

    def shaped(self, e: Emitter, value: Any, env: Mapping[Node, Any]) -> Any:
        """[..., N] as the spelling gives it: with all of the weight's dimensions."""
        found = d.tensor(env[self.w])
        if self.free == 1 or found is None:
            return value
        sizes = tuple(found.shape)[: self.free] if self.transposed else tuple(found.shape)[-self.free :]
        return e.call(torch.unflatten, value, -1, sizes)


def product_of(node: Node) -> Product | str | None:
    """The product that this node computes; the reason why it is not one; None where it is no matmul at all."""
    if not node.op.startswith("call") or d.name(node) not in NAMES:
        return None
    if d.mutates(node):
        return "the product is written into a given tensor"
    if d.tensor(node) is None:
        return "the product is no tensor"
    name = d.name(node)
    if name == "linear":
        x, w, bias = (d.operand(node, i, k) for i, k in enumerate(("input", "weight", "bias")))
        return _checked(node, x, w, True, bias)
    if name == "addmm":
        bias, x, w = (d.operand(node, i, k) for i, k in enumerate(("input", "mat1", "mat2")))
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return "addmm scales its operands"
        return _checked(node, x, w, False, bias)
    if name in ("einsum", "tensordot"):
        return _einsum(node) if name == "einsum" else _tensordot(node)
    if name == "baddbmm":
        return "what is added to the product is no vector"
    x, w = d.operand(node, 0, "input", node.kwargs.get("self")), d.operand(node, 1, "other", node.kwargs.get("mat2"))
    return _one_weight(node, x, w) if _rank(w) == 3 else _checked(node, x, w, False, None)


def untransposed(product: Product) -> Product:
    """The product with the weight itself, where a transposed view of one was given."""
    w = product.w
    if product.contracted != 1 or product.free != 1 or _rank(w) != 2 or not w.op.startswith("call"):
        return product
    source = d.unary(w)
    plain = d.name(w) == "t" or (d.name(w) in ("transpose", "permute", "movedim") and _swaps(w))
    if not plain or not isinstance(source, Node) or d.tensor(source) is None:
        return product
    return replace(product, w=source, transposed=not product.transposed, nodes=(w, *product.nodes))


def _swaps(node: Node) -> bool:
    """The two dimensions of a matrix change places."""
    first = node.args[1] if len(node.args) > 1 else ()
    given = first if isinstance(first, (tuple, list)) else node.args[1:]
    dims = [a % 2 for a in given if isinstance(a, int)]
    return dims == [1, 0] or (d.name(node) != "permute" and dims == [0, 1])


def _rank(node: Any) -> int:
    found = d.tensor(node)
    return -1 if found is None else found.dim()


def _checked(
    node: Node, x: Any, w: Any, transposed: bool, bias: Any, contracted: int = 1, free: int = 1,
    nodes: tuple[Node, ...] = (), batch: int = 0,
) -> Product | str:  # fmt: skip
    if not isinstance(x, Node) or not isinstance(w, Node) or _rank(x) < contracted + 1:
        return "the left operand has one dimension only"
    if _rank(w) != contracted + free + batch:
        return f"the weight has {_rank(w)} dimensions"
    value, weight = d.tensor(x), d.tensor(w)
    assert value is not None and weight is not None
    if not value.is_floating_point() or not weight.is_floating_point():
        return f"a product of {value.dtype} and {weight.dtype}"
    if not _rows_follow(value):
        return "the left operand is transposed in memory: its rows are the sharded dimension, not its columns"
    if (contracted > 1 or free > 1) and not weight.is_contiguous():
        return "the weight would have to be copied"
    if bias is not None and (_rank(bias) != 1 or not isinstance(bias, Node)):
        return "what is added to the product is no vector"
    return Product(node, x, w, transposed, contracted, free, bias, (*nodes, node))


def _rows_follow(value: torch.Tensor) -> bool:
    """Elements of a row follow one another in memory: no transposed view."""
    last = static(value.stride(-1))
    return last == 1 or is_one(value.shape[-1])


def _one_weight(node: Node, x: Any, w: Any) -> Product | str:
    """A batch of products with one weight: expanded over the batch, or a batch of one."""
    weight = d.tensor(w)
    assert weight is not None
    if is_one(weight.shape[0]):
        return _checked(node, x, w, False, None, batch=1)
    if isinstance(w, Node) and w.op.startswith("call") and d.name(w) in ("expand", "broadcast_to", "expand_as"):
        source = d.unary(w)
        before = d.tensor(source)
        if before is not None and (before.dim() == 2 or (before.dim() == 3 and is_one(before.shape[0]))):
            if all(same_size(a, b) for a, b in zip(before.shape[-2:], weight.shape[-2:], strict=True)):
                return _checked(node, x, source, False, None, nodes=(w,), batch=before.dim() - 2)
    return "each entry of the batch has a weight of its own"


def _einsum(node: Node) -> Product | str:
    equation = d.operand(node, 0, "equation")
    operands = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return "an einsum of other than two operands by letters"
    text = equation.replace(" ", "")
    inputs, _, output = text.partition("->")
    left, _, right = inputs.partition(",")
    for x, w, xi, wi in ((operands[0], operands[1], left, right), (operands[1], operands[0], right, left)):
        found = _contraction(node, x, w, xi, wi, output)
        if found is not None:
            return found
    return f"einsum {text} is no product of rows with one weight"


def _contraction(node: Node, x: Any, w: Any, xi: str, wi: str, out: str) -> Product | str | None:
    """x's last letters are summed, the result is x's other letters and then w's."""
    shared = [c for c in xi if c in wi and c not in out]
    summed, n = "".join(shared), len(shared)
    if not n or len(set(xi)) != len(xi) or len(set(wi)) != len(wi) or not xi.endswith(summed):
        return None
    rest = xi[:-n]
    for transposed, free in ((True, wi[:-n]), (False, wi[n:])):
        inner = wi[-n:] if transposed else wi[:n]
        if inner == summed and free and rest and out == rest + free and not set(rest) & set(free):
            return _checked(node, x, w, transposed, None, n, len(free))
    return None


def _tensordot(node: Node) -> Product | str:
    x, w = d.operand(node, 0, "a"), d.operand(node, 1, "b")
    dims = d.operand(node, 2, "dims", 2)
    if isinstance(dims, int):
        return _checked(node, x, w, False, None, dims, _rank(w) - dims)
    left = [i % _rank(x) for i in dims[0]]
    right = [i % _rank(w) for i in dims[1]]
    n = len(left)
    if left != list(range(_rank(x) - n, _rank(x))):
        return "tensordot sums over other than the last dimensions of the left operand"
    if right == list(range(n)):
        return _checked(node, x, w, False, None, n, _rank(w) - n)
    if right == list(range(_rank(w) - n, _rank(w))):
        return _checked(node, x, w, True, None, n, _rank(w) - n)
    return "tensordot sums over dimensions in the middle of the weight"


def weight_gradient(x1: torch.Tensor, dy: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """x1ᵀ · dy over all rows: x1 [..., K], dy [..., N] → [K, N], in the layout of x2 or of what it is a view of."""
    rows, gradients = x1.reshape(-1, x1.shape[-1]), dy.reshape(-1, dy.shape[-1])
    transposed = x2.stride(0) == 1 and x2.stride(1) != 1
    return (gradients.t() @ rows).t() if transposed else rows.t() @ gradients
