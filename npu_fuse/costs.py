"""What a form costs, counted on the graph: kernels, bytes moved, bytes kept for backward.

An estimate from shapes and dtypes (a symbolic size counts by its hint): views cost nothing, every
other node reads its operands and writes its result once. What autograd keeps is read off the
derivative formulas of the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import ops
from npu_fuse.report import Cost
from npu_fuse.sites import Site

FREE = (d.MOVEMENT - {"cat", "stack", "roll", "flip", "clone", "repeat", "repeat_interleave", "hstack"}) | {"detach"}
KEEPS_RESULT = frozenset("rsqrt sqrt reciprocal sigmoid tanh exp".split())
KEEPS_INPUT = frozenset("pow square silu gelu relu abs log norm rms_norm erf clamp".split())


def before(site: Site) -> Cost:
    return _cost(site.nodes, _gradient(site), frozenset(site.inputs))


def after(made: Sequence[Node], site: Site | None) -> Cost:
    inputs = frozenset(site.inputs) if site is not None else frozenset()
    return _cost(made, site is not None and _gradient(site), inputs)


def _gradient(site: Site) -> bool:
    found = d.tensor(site.output)
    return found is not None and found.requires_grad


def _cost(nodes: Sequence[Node], gradient: bool, inputs: frozenset[Node]) -> Cost:
    ops = moved = 0
    kept: dict[int, int] = {}
    symbolic = False
    for node in nodes:
        if _is_free(node):
            continue
        ops += 1
        results = _tensors(d.value(node))
        operands = [t for n in dict.fromkeys(d.tensors_in(node)) for t in _tensors(d.value(n))]
        moved += sum(_bytes(t) for t in (*results, *operands))
        symbolic |= any(not isinstance(s, int) for t in results for s in t.shape)
        if gradient:
            for t in _kept(node):
                kept[id(t)] = _bytes(t)
    return Cost(ops, moved, sum(kept.values()), symbolic)


def _is_free(node: Node) -> bool:
    name = d.name(node)
    if name == "cast":
        source = d.tensor(node.args[0])
        result = d.tensor(node)
        return source is not None and result is not None and source.dtype == result.dtype
    return name in FREE or name == "getitem"


def _kept(node: Node) -> list[Any]:
    name = d.name(node)
    fused = ops.kept_arguments(name)
    if fused is not None:
        return [t for i in fused if i < len(node.args) for t in _tensors(d.value(node.args[i]))]
    if name in KEEPS_RESULT:
        return _tensors(d.value(node))
    if name in KEEPS_INPUT:
        return _tensors(d.value(d.unary(node)))
    if name in ("mul", "div"):
        first, second = d.binary(node)
        left, right = d.tensor(first), d.tensor(second)
        needed = []
        if left is not None and right is not None:
            needed += [right] if left.requires_grad else []
            needed += [left] if right.requires_grad else []
        return needed
    return []


def _tensors(value: Any) -> list[Any]:
    import torch

    values = value if isinstance(value, (tuple, list)) else (value,)
    return [getattr(v, "_local_tensor", v) for v in values if isinstance(v, torch.Tensor)]


def _bytes(value: Any) -> int:
    count = 1
    for size in value.shape:
        hint = size if isinstance(size, int) else size.node.hint
        count *= int(hint) if hint is not None else 1
    return count * int(value.dtype.itemsize)
