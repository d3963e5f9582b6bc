"""What one expert computes, read off a tape: from the rows it was given to the rows it gives.

A segment is a run of products with parameters of one expert and row-wise steps between and behind them. All
experts compute the same with parameters of their own; that this is so, the probes say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from npu_fuse import dialect as d
from npu_fuse.expert_params import Params, Part
from npu_fuse.tape import Step, Tape, tensors_in

PRODUCTS = frozenset(("linear", "matmul", "mm", "addmm"))
LAST = ("sum", "mean", "amax", "norm", "softmax")
"""Reductions that leave rows apart where they run over the last dimension."""
ALLOWED = d.POINTWISE | {
    "cast", "softplus", "hardswish", "mish", "relu6", "leaky_relu", "elu", "logsigmoid", "celu", "selu", "hardtanh",
    "hardsigmoid", "chunk", "split", "getitem", "clone", "contiguous", "dropout", "layer_norm", "rms_norm", "where",
    "masked_fill", "ge", "gt", "le", "lt", "view", "reshape", "float_power", "maximum", "minimum",
    *LAST,
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """rows [n, K] by a part of an expert's matrix, and a bias that the same call adds."""

    step: Step
    rows: torch.Tensor
    weight: Part
    bias: Part | None = None


@dataclass
class Segment:
    expert: int
    experts: int
    rows: torch.Tensor
    out: torch.Tensor
    first: int
    """The first product's step."""
    products: dict[int, Product] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    """In order, products included."""
    aliases: dict[int, int] = field(default_factory=dict)
    """Tensors that stand for others (parts of all experts' rows), by id."""
    known: set[int] = field(default_factory=set)
    constants: set[int] = field(default_factory=set)
    """Vectors made of parameters that all experts share."""


def segment_of(tape: Tape, params: Params, experts: int) -> Segment | str:
    """The segment of the first of `experts` that had rows, or why there is none."""
    found = [p for s in tape.steps if (p := product_of(s, params)) is not None]
    found = [p for p in found if p.weight.family.experts == experts]
    if not found:
        return "no matmul with an expert's own matrix was seen"
    with_rows = [p for p in found if p.rows.shape[0] > 0]
    if not with_rows:
        return "no expert was given a row"
    first = with_rows[0]
    if first.rows.dim() != 2:
        return f"an expert is given {first.rows.dim()} dimensions where rows [n, width] are expected"
    segment = Segment(
        first.weight.expert, first.weight.family.experts, first.rows, first.rows, first.step.index,
        known={id(first.rows)},
    )  # fmt: skip
    problem = _follow(tape, params, segment)
    return problem or segment


def product_of(step: Step, params: Params) -> Product | None:
    """A matmul of rows with a part of one expert's matrix."""
    name = step.plain
    if name not in PRODUCTS or step.kwargs.keys() - {"input", "weight", "bias"}:
        return None
    given = [*step.args, *step.kwargs.values()]
    if name == "addmm":
        given = [given[1], given[2], given[0]]
    if len(given) < 2 or not all(isinstance(t, torch.Tensor) for t in given[:2]):
        return None
    weight = params.part(given[1])
    if weight is None or given[1].dim() != 2 or params.part(given[0]) is not None:
        return None
    if name == "linear":  # x · wᵀ
        weight = Part(weight.family, weight.expert, weight.rows, weight.columns, not weight.turned)
    bias = None
    if len(given) > 2 and given[2] is not None:
        bias = params.part(given[2])
        if bias is None or bias.expert != weight.expert:
            return None
    return Product(step, given[0], weight, bias)


def _follow(tape: Tape, params: Params, segment: Segment) -> str:
    """Collect what is computed from the rows, step by step, until something else comes in."""
    rows = segment.rows.shape[0]
    last = -1
    collected: list[Step] = []
    made_by: dict[int, int] = {}
    for step in tape.steps[segment.first :]:
        given = step.inputs()
        if not any(id(t) in segment.known for t in given):
            if _of_parameters(step, segment, params):
                collected.append(step)
                segment.constants |= {id(t) for t in tensors_in(step.out)}
            continue
        product = product_of(step, params)
        if product is not None and product.weight.expert == segment.expert and id(product.rows) in segment.known:
            if product.weight.family.experts != segment.experts:
                return "the experts' matrices are not as many each"
            segment.products[step.index] = product
            last = step.index
        elif _gathers_parts(step, segment):
            pass
        elif not _stays_in_rows(step, segment, params, rows):
            continue
        if step.random:
            return f"{step.name} inside the experts draws random numbers"
        if step.writes and id(step.args[0]) == id(segment.rows):
            return "the experts write into the rows that they are given"
        collected.append(step)
        for result in tensors_in(step.out):
            segment.known.add(id(result))
            made_by[id(result)] = len(collected) - 1
    if last < 0:
        return "no matmul with an expert's own matrix was seen"
    _end(segment, collected, last)
    return ""


def _end(segment: Segment, collected: list[Step], last: int) -> None:
    """The last value made of the last product alone: what follows weighs rows or adds them up."""
    position = next(i for i, s in enumerate(collected) if s.index == last)
    current = tensors_in(collected[position].out)[0]
    for i in range(position + 1, len(collected)):
        step = collected[i]
        results = tensors_in(step.out)
        if any(t is current for t in step.inputs()) and len(results) == 1 and _narrow(results[0], segment):
            current, position = results[0], i
    segment.steps = collected[: position + 1]
    segment.out = current


def _narrow(result: torch.Tensor, segment: Segment) -> bool:
    return result.dim() == 2 and result.shape[0] == segment.rows.shape[0]


def _gathers_parts(step: Step, segment: Segment) -> bool:
    """All experts' rows in one tensor (`cat` of one part for each) and apart again: the same for each of them."""
    if step.plain == "cat" and isinstance(step.args[0], (tuple, list)) and len(step.args[0]) == segment.experts:
        member = step.args[0][segment.expert]
        if id(member) in segment.known and step.kwargs.get("dim", step.args[1] if len(step.args) > 1 else 0) == 0:
            segment.aliases[id(step.out)] = id(member)
            return True
    if step.plain == "split" and isinstance(step.out, (tuple, list)) and len(step.out) == segment.experts:
        if id(step.args[0]) in segment.known and step.kwargs.get("dim", 0) == 0 and len(step.args) < 3:
            if step.args[0].shape[0] != segment.rows.shape[0] or segment.experts == 1:
                member = step.out[segment.expert]
                segment.aliases[id(member)] = id(step.args[0])
                return True
    return False


def _stays_in_rows(step: Step, segment: Segment, params: Params, rows: int) -> bool:
    """Row r of the result depends on row r of what is known, and on parameters that are the same for all rows."""
    name = step.plain
    if name not in ALLOWED:
        return False
    number = {t.shape[0] for t in step.inputs() if id(t) in segment.known and t.dim() == 2}
    if len(number) != 1:
        return False
    for tensor in step.inputs():
        if id(tensor) in segment.known:
            continue
        part = params.part(tensor)
        own = part is not None and part.expert == segment.expert and tensor.dim() == 1
        shared = id(tensor) in segment.constants or (tensor.dim() == 1 and id(tensor) in params.paths)
        if not own and not shared and tensor.dim() > 0:
            return False
    results = tensors_in(step.out)
    if any(t.dim() != 2 or {t.shape[0]} != number for t in results):
        return False
    return _over_features(step, name)


def _of_parameters(step: Step, segment: Segment, params: Params) -> bool:
    """A vector made of shared vectors alone, such as 1 + weight of a norm behind the experts."""
    given = step.inputs()
    if not given or step.plain not in d.POINTWISE | {"cast"} or step.writes:
        return False
    for tensor in given:
        path = params.paths.get(id(tensor))
        shared = path is not None and not params.member(path) and tensor.dim() == 1
        if not shared and id(tensor) not in segment.constants:
            return False
    return all(t.dim() == 1 for t in tensors_in(step.out))


def _over_features(step: Step, name: str) -> bool:
    """Chunks, slices and reductions run over the last dimension; views change nothing."""
    source = step.args[0] if step.args else None
    if name in ("chunk", "split"):
        return _dim(step, 2, 0) in (-1, 1)
    if name in LAST:
        if name == "softmax":
            return _dim(step, 1, None) in (-1, 1)
        kept = step.kwargs.get("keepdim", step.args[2] if len(step.args) > 2 else False)
        return _dim(step, 1, None) in (-1, 1, [-1], (-1,), [1], (1,)) and bool(kept)
    if name in ("view", "reshape"):
        return isinstance(source, torch.Tensor) and tuple(source.shape) == tuple(step.out.shape)
    if name == "getitem":
        return _features_only(step.args[1])
    return True


def _dim(step: Step, position: int, default: Any) -> Any:
    return step.kwargs.get("dim", step.args[position] if len(step.args) > position else default)


def _features_only(index: Any) -> bool:
    """`[..., a:b:c]`, `[:, a:b:c]`, or an element of a pair."""
    if not isinstance(index, tuple) or len(index) != 2 or not isinstance(index[1], slice):
        return False
    return index[0] is Ellipsis or index[0] == slice(None)
