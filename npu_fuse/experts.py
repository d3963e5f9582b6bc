"""What the rules of mixtures of experts share: ends of groups, their probes, what is known about them.

Rows sorted by expert form groups. `ends` [E] holds where each group ends (cumulative sums of counts,
non-decreasing); rows at and past the last end belong to no expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.sites import MakeInput
from npu_fuse.view import View, same_size, static

CHOOSING = frozenset("topk npu_moe_gating_top_k npu_moe_gating_top_k_softmax npu_moe_gating_top_k_softmax_v2".split())
"""Calls whose second result are indices of what they choose from."""
PLAIN_STEPS = frozenset(("cast", "cast:other", "int", "long", "float", "clone", "contiguous"))


def grouped_mm_in_float64(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, *rest: Any,
                          **named: Any) -> torch.Tensor:  # fmt: skip
    """x [S, K] · weight [E, K, N] by groups that end at `offs` [E] → [S, N]; zeros in rows of no group.

    Row by row, with the weight of its expert gathered: another way than any kernel takes.
    """
    rows = torch.arange(x.shape[0], device=offs.device)
    expert = torch.searchsorted(offs.to(rows.dtype), rows, right=True)
    inside = expert < weight.shape[0]
    chosen = weight[expert.clamp(max=weight.shape[0] - 1)]
    y = torch.bmm(x.unsqueeze(1), chosen).squeeze(1)
    return torch.where(inside.unsqueeze(1), y, torch.zeros_like(y))


def arguments(node: Node) -> tuple[Node, Node, Node] | None:
    """x [S, K], weight [E, K, N] and ends of groups [E] of a call with torch's arguments, and nothing else."""

    def argument(index: int, *names: str) -> Any:
        if len(node.args) > index:
            return node.args[index]
        return next((node.kwargs[n] for n in names if n in node.kwargs), None)

    x, weight = argument(0, "input", "self", "mat_a"), argument(1, "weight", "mat2", "mat_b")
    ends = argument(2, "offs")
    bias = None if d.name(node) == "grouped_matmul" else argument(3, "bias")
    value, other, groups = d.tensor(x), d.tensor(weight), d.tensor(ends)
    if value is None or other is None or groups is None or (value.dim(), other.dim(), groups.dim()) != (2, 3, 1):
        return None
    dtype = argument(4, "out_dtype")
    if bias is not None or value.dtype != other.dtype or dtype not in (None, value.dtype):
        return None
    return x, weight, ends


def ends_probe(x: Node, covers_all: bool) -> MakeInput:
    """Ends of groups over the rows of `x`: empty experts, all rows to one, and rows of no expert if allowed."""

    def make(made: Mapping[Node, Any], shape: tuple[int, ...], index: int, generator: torch.Generator) -> torch.Tensor:
        rows, experts = int(made[x].shape[0]), shape[0]
        last = rows if covers_all or index % 2 == 0 else rows - rows // 3
        if index % 4 == 3:  # all to one expert, every other one empty
            first = index // 4 % experts
            return torch.tensor([0] * first + [last] * (experts - first))
        inner = torch.randint(0, last + 1, (experts - 1,), generator=generator).sort().values
        if index % 4 == 2 and experts > 2:
            inner[: experts // 2] = inner[0]
        return torch.cat((inner, torch.tensor([last])))

    return make


def indices_probe(weight: Node, listed: int = 0, rest: bool = False, distinct: bool = False) -> MakeInput:
    """Indices of experts [E, …] or of a list: any; one for all rows; a few of them, so that others are empty.

    rest: some of no expert, past the last. distinct: a token's experts differ, as those of a top-k do.
    """

    def make(made: Mapping[Node, Any], shape: tuple[int, ...], index: int, generator: torch.Generator) -> torch.Tensor:
        experts = listed or int(made[weight].shape[0])
        if distinct and shape[-1] <= experts:
            ranked = torch.rand((*shape[:-1], experts), generator=generator).argsort(-1)
            ranked = ranked[:1].expand_as(ranked) if index % 4 == 3 else ranked
            return ranked[..., : shape[-1]].clone()
        drawn = torch.randint(0, experts, shape, generator=generator)
        if index % 4 == 3:
            return torch.full(shape, index // 4 % experts)
        drawn = drawn // 2 * 2 if index % 4 == 2 else drawn
        none = torch.rand(shape, generator=generator) < 0.3
        return torch.where(none, experts, drawn) if rest and index % 4 < 2 else drawn

    return make


def covers_all_rows(view: View, ends: Any, rows: Any) -> bool:
    """True where the structure says that the last end is the number of rows: no row is without an expert.

    ends = cumsum(histc(indices, E bins from 0 to E - 1)) or cumsum(bincount(indices)), the indices being those
    of a top-k among at most E, sorted or gathered by a sort, never masked or changed.
    """
    counts = _through(ends, {"cumsum"})
    if not isinstance(counts, Node) or not counts.op.startswith("call"):
        return False
    found = d.tensor(counts)
    experts = static(found.shape[0]) if found is not None and found.dim() == 1 else None
    if d.name(counts) == "histc":
        low, high = d.operand(counts, 2, "min", 0), d.operand(counts, 3, "max", 0)
        if experts is None or low != 0 or high != experts - 1:
            return False
    elif d.name(counts) != "bincount" or d.operand(counts, 1, "weights") is not None:
        return False
    indices = d.operand(counts, 0, "input")
    value = d.tensor(indices)
    if value is None or not same_size(value.numel(), rows):
        return False
    return d.name(counts) == "bincount" or _below(view, indices, experts)


def _below(view: View, indices: Any, experts: int | None) -> bool:
    """Every index is one of a top-k (or an argmax) over at most `experts` values."""
    node = _through(indices, {"view", "reshape", "flatten", "getitem", "sort", "index_select", "gather"})
    if not isinstance(node, Node) or experts is None or d.name(node) not in CHOOSING | {"argmax", "argsort"}:
        return False
    scores = d.tensor(d.operand(node, 0, "input"))
    dim = d.operand(node, 1, "dim") if d.name(node) == "argmax" else node.kwargs.get("dim", -1)
    if d.name(node) in ("topk", "argsort") and len(node.args) > 2:
        dim = node.args[2]
    if scores is None or not isinstance(dim, int):
        return False
    width = static(scores.shape[dim])
    return width is not None and width <= experts


def _through(node: Any, names: set[str]) -> Any:
    """The first value before `node` that no step of `names`, no cast and no copy made from its first operand.

    An element of a pair is followed where it is the index of a top-k or the values of a sort.
    """
    while isinstance(node, Node) and node.op.startswith("call"):
        name = d.name(node)
        if name == "getitem":
            pair = node.args[0]
            if isinstance(pair, Node) and d.name(pair) in CHOOSING | {"sort"} and isinstance(node.args[1], int):
                wanted = 0 if d.name(pair) == "sort" else 1
                if node.args[1] != wanted:
                    return None
                if wanted == 1:
                    return pair
                node = pair.args[0]
                continue
        if name not in names and name not in PLAIN_STEPS:
            return node
        if d.mutates(node):
            return None
        node = d.operand(node, 0, "input")
    return node


def routed(
    experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor,
    indices: torch.Tensor, weights: torch.Tensor, number: int, before: bool, rest: bool,
) -> torch.Tensor:  # fmt: skip
    """Σ_j weights[t, j] · experts(x[t]) of the expert indices[t, j]: x [T, H], indices and weights [T, k] → [T, N].

    `experts(rows, ids, ends)` takes rows sorted by expert. before: the rows are weighted, not the results. rest:
    indices from `number` on belong to no expert and count for nothing.
    """
    tokens, k = indices.shape
    if rest:
        weights = weights.masked_fill(indices >= number, 0)
    ids, order = torch.sort(indices.reshape(-1))
    counted = ids.float() if ids.device.type in ("cpu", "mps") else ids.int()  # as torch's kernels demand
    ends = torch.histc(counted, bins=number, min=0, max=number - 1).cumsum(0, dtype=torch.int64)
    rows, factor = x[order // k], weights.reshape(-1)[order].unsqueeze(-1)
    y = experts((rows * factor).to(rows.dtype) if before else rows, ids.clamp(max=number - 1) if rest else ids, ends)
    y = y if before else y * factor
    return y[torch.argsort(order)].view(tokens, k, y.shape[1]).sum(1)


def grouped_matmul(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, rest: bool) -> torch.Tensor:
    """rows [S, K] · weight [E, K, N] by groups, under autocast in its dtype as a linear layer would."""
    rows, weight = _autocast(rows, [rows, weight])
    made: torch.Tensor = torch.ops.npu_fuse.grouped_matmul(rows, weight, ends, rest)
    return made


def grouped_linear(
    rows: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], ends: torch.Tensor, turned: bool,
    rest: bool,
) -> torch.Tensor:  # fmt: skip
    """rows [S, K] by weights [K, N], or [N, K] if `turned`, and biases [N] or none; under autocast as above."""
    number = len(weights)
    rows, *others = _autocast(rows, [rows, *weights, *biases])
    made: torch.Tensor = torch.ops.npu_fuse.grouped_linear(rows, others[:number], others[number:], ends, turned, rest)
    return made


def _autocast(like: torch.Tensor, values: list[torch.Tensor]) -> list[torch.Tensor]:
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return values
    dtype = torch.get_autocast_dtype(device)
    return [v.to(dtype) if v.dtype is torch.float32 else v for v in values]
