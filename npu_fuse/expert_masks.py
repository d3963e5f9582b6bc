"""Masks for experts that are elsewhere, which change nothing where all experts are here.

With expert parallelism a token's expert on another rank has the index past the last, and its rows are set to zero.
Where one graph holds the choice, a top-k among no more experts than the mask lets through, the mask is false
everywhere: known from the structure, not from probes.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.view import View, static

_THROUGH = frozenset(("reshape", "view", "flatten", "contiguous", "clone", "int", "long", "cast:other"))
_SPREAD = frozenset(("unsqueeze", "reshape", "view", "expand"))


def changes_nothing(view: View, node: Node) -> bool:
    """A mask that is false everywhere, rows that are filled under it, or chosen experts held in their range."""
    name = d.name(node)
    if name == "masked_fill":
        return _is_false(view, d.operand(node, 1, "mask"))
    if name == "clamp":
        count = _chosen_among(view, d.unary(node))
        return count is not None and _keeps(node, count)
    return name in ("ge", "gt") and _is_false(view, node)


def _is_false(view: View, mask: Any) -> bool:
    while isinstance(mask, Node) and d.name(mask) in _SPREAD and not d.mutates(mask):
        mask = mask.args[0]
    if not isinstance(mask, Node) or d.name(mask) not in ("ge", "gt") or view.mutations.get(view.storage.get(mask, -1)):
        return False
    ids, bound = d.binary(mask)
    count = _chosen_among(view, ids)
    return count is not None and type(bound) is int and count <= bound + (d.name(mask) == "gt")


def _chosen_among(view: View, ids: Any) -> int | None:
    """n where all of `ids` are results of a top-k among n, in any order: 0 ≤ ids < n."""
    walked: list[Node] = []
    node = ids
    while isinstance(node, Node) and node.op.startswith("call"):
        walked.append(node)
        name = d.name(node)
        source = node.args[0] if node.args else None
        if name == "getitem" and isinstance(source, Node) and d.name(source) == "topk" and node.args[1] == 1:
            count = _choices(source)
            return count if count is not None and _unwritten(view, walked, count) else None
        sorts = name == "getitem" and isinstance(source, Node) and d.name(source) == "sort" and node.args[1] == 0
        if not sorts and name not in _THROUGH and not (name == "clamp" and d.mutates(node)):
            return None
        node = d.unary(source) if sorts and isinstance(source, Node) else source
    return None


def _choices(topk: Node) -> int | None:
    value, dim = d.tensor(d.unary(topk)), d.operand(topk, 2, "dim", -1)
    if value is None or type(dim) is not int or not value.dim():
        return None
    return static(value.shape[dim])


def _unwritten(view: View, nodes: list[Node], count: int) -> bool:
    """Nothing but clamps that change nothing is written into any of them."""
    writers = (view.nodes[w] for n in nodes for w in view.mutations.get(view.storage.get(n, -1), ()))
    return all(d.name(writer) == "clamp" and _keeps(writer, count) for writer in writers)


def _keeps(clamp: Node, count: int) -> bool:
    low, high = d.operand(clamp, 1, "min"), d.operand(clamp, 2, "max")
    return (low is None or (type(low) is int and low <= 0)) and (
        high is None or (type(high) is int and high >= count - 1)
    )
