"""What a router chooses from: the softmax or sigmoid of logits x [T, E], or the logits, a bias, groups of experts.

Read upwards from the values that a top-k looks at. What a mask of groups is made of is read as far as its top-k over
groups; the proof says what it masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.view import View, same_size, static

SOFTMAX, SIGMOID, LOGITS = "softmax", "sigmoid", "logits"
VIEWS = frozenset("view reshape squeeze unsqueeze flatten contiguous clone unflatten".split())
MASKS = VIEWS | frozenset(
    "expand repeat_interleave bool invert logical_not bitwise_not cast cast:other zeros_like zeros new_zeros scatter"
    " ones_like ones new_ones full_like getitem eq ne".split()
)
"""What a mask of groups is made of besides the groups that were chosen."""
LOWEST = -1e30


@dataclass(frozen=True)
class Groups:
    """`kept` of `count` groups of equal size stay, by their largest score or, `pairs`, the sum of their two largest."""

    count: int
    kept: int
    pairs: bool


@dataclass
class Choice:
    """What the top-k looks at: `scores` (LOGITS: x itself) plus `bias`, outside of the groups left out masked."""

    x: Node
    kind: str
    scores: Node
    bias: Node | None = None
    groups: Groups | None = None


def is_last(dim: Any, rank: int) -> bool:
    return isinstance(dim, int) and dim in (-1, rank - 1)


def choice_of(view: View, node: Node) -> Choice | str | None:
    masked, groups = _unmasked(view, node), None
    if masked is not None:
        node, mask, _ = masked
        found = _groups(view, mask, node)
        if not isinstance(found, Groups):
            return found
        groups = found
    node, bias = _unbiased(unchanged(view, node))
    node = unchanged(view, node)
    scores = _scores(view, node)
    if scores is None:
        if bias is not None or groups is not None:
            return None  # chosen among biased logits: no fused op does that
        scores = Choice(view.exact(node), LOGITS, node)
    elif isinstance(scores, str):
        return scores
    if masked is not None and masked[2] == 0.0 and bias is not None:
        return "groups are masked with 0, which a score with its bias may lie below; the op masks with -inf"
    return Choice(scores.x, scores.kind, scores.scores, bias, groups)


def unchanged(view: View, node: Node) -> Node:
    """Before casts that lose nothing and views that change no shape."""
    while node.op.startswith("call") and isinstance(node.args[0] if node.args else None, Node):
        before, after = d.tensor(node.args[0]), d.tensor(node)
        same = (
            before is not None and after is not None and tuple(map(str, before.shape)) == tuple(map(str, after.shape))
        )
        if d.name(node) in VIEWS and same and view.same_version(node.args[0], node):  # type: ignore[arg-type]
            node = node.args[0]  # type: ignore[assignment]
            continue
        outer = view.exact(node)
        if outer is node:
            return node
        node = outer
    return node


def _scores(view: View, node: Node) -> Choice | str | None:
    if not node.op.startswith("call"):
        return None
    if d.name(node) == "sigmoid":
        x = d.unary(node)
        return Choice(view.exact(x, node), SIGMOID, node) if isinstance(x, Node) else None
    if d.name(node) in ("softmax", "_softmax"):
        x, value = d.unary(node), d.tensor(node)
        if not isinstance(x, Node) or value is None:
            return None
        if not is_last(d.operand(node, 1, "dim"), value.dim()):
            return f"the softmax runs over dimension {d.operand(node, 1, 'dim')}, not over the experts"
        return Choice(view.exact(x, node), SOFTMAX, node)
    return None


def _unbiased(node: Node) -> tuple[Node, Node | None]:
    """Scores and the bias [E] (or [1, E]) that is added to them."""
    value = d.tensor(node)
    if not node.op.startswith("call") or d.name(node) != "add" or value is None:
        return node, None
    first, second = d.binary(node)
    if d.constant(node.kwargs.get("alpha", 1)) != 1:
        return node, None
    for scores, bias in ((first, second), (second, first)):
        wide, narrow = d.tensor(scores), d.tensor(bias)
        if wide is None or narrow is None or wide.dim() != value.dim() or not narrow.is_floating_point():
            continue
        if same_size(narrow.shape[-1] if narrow.dim() else 1, value.shape[-1]) and all(
            static(s) == 1 for s in narrow.shape[:-1]
        ):
            return scores, bias
    return node, None


def _unmasked(view: View, node: Node) -> tuple[Node, Node, float] | None:
    """Scores, the mask, and what stands in the place of those that are masked."""
    if not node.op.startswith("call"):
        return None
    name = d.name(node)
    if name == "masked_fill":
        scores, mask, fill = d.unary(node), d.operand(node, 1, "mask"), d.operand(node, 2, "value")
    elif name == "where" and len(node.args) == 3:
        mask, scores, fill = node.args
        if d.constant(scores) is not None:
            scores, fill = fill, scores
    elif name == "mul":
        first, second = d.binary(node)
        scores, mask, fill = (first, second, 0.0) if _made_of_groups(second) else (second, first, 0.0)
        if not _made_of_groups(mask):
            return None
    else:
        return None
    number = d.constant(fill)
    if not isinstance(scores, Node) or not isinstance(mask, Node) or number is None:
        return None
    return (scores, mask, number) if number == 0.0 or number < LOWEST else None


def _made_of_groups(mask: Any) -> bool:
    return isinstance(mask, Node) and _chosen_groups(mask) is not None


def _chosen_groups(mask: Node) -> Node | None:
    """The top-k over groups that a mask is made of."""
    stack, seen = [mask], {mask}
    while stack:
        node = stack.pop()
        if not node.op.startswith("call"):
            continue
        if d.name(node) == "topk":
            return node
        if d.name(node) not in MASKS:
            continue
        for operand in node.all_input_nodes:
            if operand not in seen and d.name(node) not in ("zeros_like", "ones_like", "full_like"):
                seen.add(operand)
                stack.append(operand)
        stack += [u for u in node.users if d.mutates(u) and d.name(u) == "scatter" and u not in seen]
        seen.update(u for u in node.users if d.mutates(u))
    return None


def _groups(view: View, mask: Node, scores: Node) -> Groups | str | None:
    top = _chosen_groups(mask)
    if top is None:
        return None
    kept, of = d.operand(top, 1, "k"), d.operand(top, 0, "input")
    value = d.tensor(of)
    count = static(value.shape[-1]) if value is not None and value.dim() == 2 else None
    if not isinstance(kept, int) or count is None or not isinstance(of, Node):
        return None
    name, inner = d.name(of), d.unary(of)
    pairs = name == "sum"
    if name == "getitem" and isinstance(inner, Node) and d.name(inner) == "max" and of.args[1] == 0:
        inner = d.unary(inner)
    elif pairs and isinstance(inner, Node) and d.name(inner) == "getitem" and inner.args[1] == 0:
        best = inner.args[0]
        if not isinstance(best, Node) or d.name(best) != "topk" or d.operand(best, 1, "k") != 2:
            return "groups are compared by other sums than those of their two largest scores"
        inner = d.operand(best, 0, "input")
    elif name not in ("amax", "max"):
        return "groups are compared neither by their largest score nor by the sum of their two largest"
    grouped = d.tensor(inner)
    if not isinstance(inner, Node) or grouped is None or grouped.dim() != 3 or d.name(inner) not in VIEWS:
        return "the scores of groups are no view of the scores"
    source = inner.args[0]
    if not isinstance(source, Node) or view.vn(source) != view.vn(scores):
        return "groups are compared by other scores than experts are"
    return Groups(count, kept, pairs)
