"""Residual add and RMSNorm: s = x1 + x2, y = rms_norm(s, gamma)  →  npu_add_rms_norm(x1, x2, gamma, epsilon).

x1, x2 [..., D] of one shape and dtype, gamma [D] of the same dtype; returns (y, rstd, s). In bf16 the
result is rounded before gamma, as models that cast before the weight do. Which sum is normalised, the
rounded or the unrounded one, depends on the kernel's tiling: both must pass the proof. torch_npu's op
has no backward, so this rule works in inference. Semantics: torch_npu's document of npu_add_rms_norm
and the CANN operator aclnnAddRmsNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import ops
from npu_fuse.emit import Emitter, item
from npu_fuse.limits import on_npu
from npu_fuse.passes import rms_norm
from npu_fuse.report import Status
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View, same_shape

NAME = "add_rms_norm"


def _normalised(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float, rounded: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = ops.compute_dtype(x1.dtype)
    wide = x1.to(dtype) + x2.to(dtype)
    total = wide.to(x1.dtype)
    z = total.to(dtype) if rounded else wide
    dims = list(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(z.pow(2).mean(dims, keepdim=True) + epsilon)
    return ((z * rstd).to(x1.dtype).to(dtype) * gamma.to(dtype)).to(x1.dtype), rstd, total


def _forward(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _normalised(x1, x2, gamma, epsilon, rounded=True)


def _unrounded(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _normalised(x1, x2, gamma, epsilon, rounded=False)


ops.define(
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)", _forward
)
ops.define(
    "npu_add_rms_norm_unrounded(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
    _unrounded,
)


def recognise(view: View) -> list[Site | Miss]:
    """Every RMSNorm found before whose input is a residual sum."""
    found: list[Site | Miss] = []
    for norm in view.found:
        if norm.op == rms_norm.NAME:
            site = _composed(view, norm)
            if site is not None:
                found.append(site)
    return found


def _composed(view: View, norm: Site) -> Site | None:
    total, gamma, epsilon = norm.facts["x"], norm.facts["gamma"], norm.facts["epsilon"]
    if not isinstance(gamma, Node) or not total.op.startswith("call") or d.name(total) != "add" or d.mutates(total):
        return None
    if d.constant(total.kwargs.get("alpha", 1)) != 1:
        return None
    summed = _summed(view, total, norm)
    weight, value = d.tensor(gamma), d.tensor(total)
    if summed is None or weight is None or value is None:
        return None
    first, second, sums, between = summed
    left, right = d.tensor(first), d.tensor(second)
    assert left is not None and right is not None
    if not (left.dtype == right.dtype == weight.dtype) or value.requires_grad:
        return None
    if not same_shape(left.shape, right.shape) or norm.params.get("scale") is not None or norm.twins:
        return None
    at = view.position[total]
    if any(isinstance(n, Node) and view.position[n] > at for n in (gamma, epsilon)):
        return None

    def emit_with(op: str) -> Any:
        def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
            taken = env[epsilon] if isinstance(epsilon, Node) else epsilon
            scale = env[gamma]
            if weight.dim() != norm.facts["kept"]:
                scale = e.call(torch.reshape, scale, tuple(weight.shape)[-norm.facts["kept"] :])
            results = e.fused(op, e.dense(env[first]), e.dense(env[second]), scale, taken)
            return item(e, results, 0), *[item(e, results, 2) for _ in sums]

        return emit

    key = (None if isinstance(epsilon, Node) else epsilon, norm.facts["kept"], len(sums))
    form = Form("as it is", emit_with("npu_add_rms_norm"), key, also=(emit_with("npu_add_rms_norm_unrounded"),))
    inputs = tuple(dict.fromkeys(n for n in (first, second, gamma, epsilon) if isinstance(n, Node)))
    nodes = sorted({*between, total, *sums, *norm.nodes}, key=view.position.__getitem__)
    return replace(norm, op=NAME, inputs=inputs, nodes=tuple(nodes), forms=(form,), extra_outputs=sums, replaces=norm)


def _summed(view: View, total: Node, norm: Site) -> tuple[Node, Node, tuple[Node, ...], list[Node]] | None:
    """x1, x2, the nodes that are their sum in their own dtype, and the casts between x1, x2 and `total`.

    The sum is `total`, or, where x1 and x2 are widened first (vLLM adds in float32), the casts back of it.
    """
    first, second = d.binary(total)
    value, left, right = d.tensor(total), d.tensor(first), d.tensor(second)
    if value is None or left is None or right is None:
        return None
    x1, x2 = view.exact(first, total), view.exact(second, total)
    narrow = d.tensor(x1)
    if narrow is None or narrow.dtype.itemsize >= value.dtype.itemsize:
        return (first, second, (total,), []) if left.dtype == right.dtype == value.dtype else None
    sums = tuple(n for n in total.users if n not in norm.nodes)
    if not sums or not all(d.name(n) == "cast" and _dtype(n) == narrow.dtype for n in sums):
        return None
    return x1, x2, sums, [n for n in (first, second) if n not in (x1, x2)]


def _dtype(node: Node) -> torch.dtype | None:
    found = d.tensor(node)
    return None if found is None else found.dtype


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_add_rms_norm: three tensors of one dtype, float16, bfloat16 or float32 (its document)."""
    value = d.tensor(site.output)
    if target.name != "npu" or value is None:
        return None
    if value.dtype == torch.float64:
        return Refusal(Status.REFUSED_BY_TARGET, "add_rms_norm.dtype", "npu_add_rms_norm takes no float64")
    return on_npu(NAME, target, ("npu_add_rms_norm",), value.dtype)


RULE = Rule(NAME, recognise, limits, training=False, order=90)
