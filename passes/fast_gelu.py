"""QuickGELU: y = x · sigmoid(1.702 · x)  →  npu_fast_gelu(x).

x of any shape, y like x, computed in float32 with one rounding. Semantics: torch_npu's document of
npu_fast_gelu and the CANN operator aclnnFastGelu.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra, ops
from npu_fuse import dialect as d
from npu_fuse.activations import SILU, activation_of
from npu_fuse.emit import Emitter
from npu_fuse.limits import on_npu
from npu_fuse.report import Status
from npu_fuse.sites import Form, Miss, Refusal, Rule, Site
from npu_fuse.targets import Target
from npu_fuse.view import View

NAME = "fast_gelu"
ALPHA = 1.702
MAX_RANK = 8


def _forward(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(ops.compute_dtype(x.dtype))
    return (wide * torch.sigmoid(ALPHA * wide)).to(x.dtype)


def _backward_op(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    wide = x.to(ops.compute_dtype(x.dtype))
    s = ops.sigmoid(ALPHA * wide)
    return (dy.to(wide.dtype) * ops.silu_slope(ALPHA * wide, s)).to(x.dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    return ops.backward_op("npu_fast_gelu_backward")(dy, ctx.saved_tensors[0])


ops.define("npu_fast_gelu(Tensor self) -> Tensor", _forward, keeps=(0,))
ops.define("npu_fast_gelu_backward(Tensor grad, Tensor self) -> Tensor", _backward_op)
ops.differentiable("npu_fast_gelu", _backward, _setup)


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for node in view.named("mul"):
        if node in view.claimed:
            continue
        act = activation_of(view, node)
        if act is None or act.kind != SILU or act.alpha != ALPHA:
            continue
        x, inside = view.exact(act.x, node), frozenset(act.nodes)
        region = algebra.between(view, [node], [x], _only(inside))
        value, result = d.tensor(x), d.tensor(node)
        if region.stopped is None and value is not None and result is not None and value.dtype == result.dtype:
            found.append(Site(NAME, node, (x,), region.nodes, (_form(x),), node, twins=region.twins))
    return found


def _only(inside: frozenset[Node]) -> Callable[[Node], bool]:
    return lambda n: n in inside or d.name(n) == "cast"


def _form(x: Node) -> Form:
    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        return e.fused("npu_fast_gelu", e.dense(env[x]))

    return Form("as it is", emit)


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """npu_fast_gelu: float16, bfloat16 (from 910B on), float32 of rank up to 8 (its document and aclnnFastGelu)."""
    value = d.tensor(site.output)
    if target.name != "npu" or value is None:
        return None
    if value.dtype == torch.float64:
        return Refusal(Status.REFUSED_BY_TARGET, "fast_gelu.dtype", "npu_fast_gelu takes no float64")
    if value.dim() > MAX_RANK:
        return Refusal(Status.REFUSED_BY_TARGET, "fast_gelu.rank", f"npu_fast_gelu takes rank {MAX_RANK} at most")
    return on_npu(NAME, target, ("npu_fast_gelu",), value.dtype)


RULE = Rule(NAME, recognise, limits, order=40)
