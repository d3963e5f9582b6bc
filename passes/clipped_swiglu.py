"""Clamped, scaled SwiGLU: a = min(gate, limit), b = clamp(up, ±limit), y = a · sigmoid(alpha · a) · (b + bias)
→  npu_clipped_swiglu(x, alpha=…, limit=…, bias=…, interleaved=…).

x [..., 2·I] with gate and up alternating (interleaved=True) or gate in the first half; y [..., I], one
rounding. Semantics: torch_npu's document of npu_clipped_swiglu and aclnnClippedSwiglu.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import gates as g
from npu_fuse import glu, ops
from npu_fuse.activations import SILU
from npu_fuse.emit import Emitter
from npu_fuse.sites import Miss, Rule, Site
from npu_fuse.view import View

NAME = "clipped_swiglu"


def _apart(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float, bias: float) -> torch.Tensor:
    dtype = ops.compute_dtype(gate.dtype)
    a, b = gate.to(dtype).clamp(max=limit), up.to(dtype).clamp(-limit, limit)
    return (a * torch.sigmoid(alpha * a) * (b + bias)).to(gate.dtype)


def _apart_backward_op(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float, bias: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = ops.compute_dtype(gate.dtype)
    wide, g0, u0 = dy.to(dtype), gate.to(dtype), up.to(dtype)
    a, b = g0.clamp(max=limit), u0.clamp(-limit, limit)
    s = ops.sigmoid(alpha * a)
    dgate = wide * (b + bias) * ops.silu_slope(alpha * a, s) * (g0 <= limit)
    dup = wide * a * s * ((u0 >= -limit) & (u0 <= limit))
    return dgate.to(gate.dtype), dup.to(up.dtype)


def _split(x: torch.Tensor, dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim)
    return first, second


def _forward(
    x: torch.Tensor, *, group_index: torch.Tensor | None = None, dim: int = -1, alpha: float = 1.702,
    limit: float = 7.0, bias: float = 1.0, interleaved: bool = True,
) -> torch.Tensor:  # fmt: skip
    if group_index is not None:
        raise NotImplementedError("npu_clipped_swiglu with group_index has no reference; leave group_index out")
    gate, up = _split(x, dim, interleaved)
    return _apart(gate, up, alpha, limit, bias)


def _backward_op(
    dy: torch.Tensor, x: torch.Tensor, alpha: float, limit: float, bias: float, interleaved: bool
) -> torch.Tensor:
    gate, up = _split(x, -1, interleaved)
    dgate, dup = _apart_backward_op(dy, gate, up, alpha, limit, bias)
    return torch.stack((dgate, dup), -1).flatten(-2) if interleaved else torch.cat((dgate, dup), -1)


def _trained(x: torch.Tensor, alpha: float, limit: float, bias: float, interleaved: bool) -> torch.Tensor:
    """npu_clipped_swiglu with a backward: torch_npu's own op has none and loses gradients silently."""
    if x.device.type == "npu":
        call = torch.ops.npu.npu_clipped_swiglu.default
        made: torch.Tensor = call(x.contiguous(), dim=-1, alpha=alpha, limit=limit, bias=bias, interleaved=interleaved)
        return made
    return _fake(x, alpha, limit, bias, interleaved)


def _fake(x: torch.Tensor, alpha: float, limit: float, bias: float, interleaved: bool) -> torch.Tensor:
    return _forward(x, alpha=alpha, limit=limit, bias=bias, interleaved=interleaved)


def _expand(x: torch.Tensor, alpha: float, limit: float, bias: float, interleaved: bool) -> Any:
    return NotImplemented if x.device.type == "npu" else _fake(x, alpha, limit, bias, interleaved)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.rest = inputs[1:]


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    dx = ops.backward_op("clipped_swiglu_backward")(dy, ctx.saved_tensors[0], *ctx.rest)
    return dx, None, None, None, None


def _setup_apart(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.rest = inputs[2:]


def _backward_apart(ctx: Any, dy: torch.Tensor) -> Any:
    return *ops.backward_op("clipped_swiglu_apart_backward")(dy, *ctx.saved_tensors, *ctx.rest), None, None, None


ops.define(
    "npu_clipped_swiglu(Tensor x, *, Tensor? group_index=None, int dim=-1, float alpha=1.702, float limit=7.,"
    " float bias=1., bool interleaved=True) -> Tensor",
    _forward,
)
ops.define(
    "clipped_swiglu(Tensor x, float alpha, float limit, float bias, bool interleaved) -> Tensor", _trained, keeps=(0,),
    fake=_fake, expand=_expand,
)  # fmt: skip
ops.define(
    "clipped_swiglu_backward(Tensor dy, Tensor x, float alpha, float limit, float bias, bool interleaved) -> Tensor",
    _backward_op,
)
ops.differentiable("clipped_swiglu", _backward, _setup)
ops.define(
    "clipped_swiglu_apart(Tensor gate, Tensor up, float alpha, float limit, float bias) -> Tensor", _apart, keeps=(0, 1)
)
ops.define(
    "clipped_swiglu_apart_backward(Tensor dy, Tensor gate, Tensor up, float alpha, float limit, float bias)"
    " -> (Tensor, Tensor)",
    _apart_backward_op,
)
ops.differentiable("clipped_swiglu_apart", _backward_apart, _setup_apart)


def recognise(view: View) -> list[Site | Miss]:
    return [
        glu.site_of(view, NAME, gate, *_calls(gate), interleaved_ok=True, key=_key(gate))
        for gate in g.gates(view)
        if isinstance(gate, g.Gate) and gate.kind == SILU and not gate.plain
    ]


def _calls(gate: g.Gate) -> tuple[glu.Merged, glu.Apart]:
    """alpha and limit are symbolic where Dynamo made them so, and are passed on as they are."""

    def settings(env: Mapping[Node, Any]) -> list[Any]:
        return [env[v] if isinstance(v, Node) else v for v in (gate.alpha, gate.limit, gate.bias)]

    def merged(e: Emitter, env: Mapping[Node, Any], value: Any, interleaved: bool) -> Any:
        alpha, limit, bias = settings(env)
        if glu.is_trained(gate):
            return e.fused("clipped_swiglu", value, alpha, limit, bias, interleaved)
        return e.fused(
            "npu_clipped_swiglu", e.dense(value), dim=-1, alpha=alpha, limit=limit, bias=bias, interleaved=interleaved
        )

    def apart(e: Emitter, env: Mapping[Node, Any], left: Any, right: Any) -> Any:
        return e.fused("clipped_swiglu_apart", left, right, *settings(env))

    return merged, apart


def _key(gate: g.Gate) -> tuple[Any, ...]:
    settings = ("symbol" if isinstance(v, Node) else v for v in (gate.alpha, gate.limit, gate.bias))
    return (*settings, glu.is_trained(gate))


RULE = Rule(NAME, recognise, glu.limits, order=30)
