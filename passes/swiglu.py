"""SwiGLU: y = silu(gate) · up  →  npu_swiglu(cat(gate, up)).

x [..., 2·I] with gate in the first half, y [..., I], computed in float32 with one rounding.
Semantics: torch_npu's document of npu_swiglu and the CANN operators aclnnSwiGlu and aclnnSwiGluGrad.
Where gate and up come apart, the reference target has `swiglu_apart(gate, up)`: the same mathematics
without the concatenation, for hand-offs that generate code.
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

NAME = "swiglu"


def _apart(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    dtype = ops.compute_dtype(gate.dtype)
    return (torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def _apart_backward_op(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = ops.compute_dtype(gate.dtype)
    wide, a, b = dy.to(dtype), gate.to(dtype), up.to(dtype)
    s = ops.sigmoid(a)
    return (wide * b * ops.silu_slope(a, s)).to(gate.dtype), (wide * a * s).to(up.dtype)


def _forward(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    gate, up = x.chunk(2, dim)
    return _apart(gate, up)


def _backward_op(dy: torch.Tensor, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    gate, up = x.chunk(2, dim)
    return torch.cat(_apart_backward_op(dy, gate, up), dim)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.dim = inputs[1]


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    return ops.backward_op("npu_swiglu_backward")(dy, ctx.saved_tensors[0], ctx.dim), None


def _setup_apart(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward_apart(ctx: Any, dy: torch.Tensor) -> Any:
    return ops.backward_op("swiglu_apart_backward")(dy, *ctx.saved_tensors)


ops.define("npu_swiglu(Tensor self, int dim=-1) -> Tensor", _forward, keeps=(0,))
ops.define("npu_swiglu_backward(Tensor grad_output, Tensor self, int dim=-1) -> Tensor", _backward_op)
ops.differentiable("npu_swiglu", _backward, _setup)
ops.define("swiglu_apart(Tensor gate, Tensor up) -> Tensor", _apart, keeps=(0, 1))
ops.define("swiglu_apart_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", _apart_backward_op)
ops.differentiable("swiglu_apart", _backward_apart, _setup_apart)


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for gate in g.gates(view):
        if isinstance(gate, tuple):
            found.append(Miss("clipped_swiglu", gate[0], "clipped_swiglu.clamp", gate[1]))
        elif gate.kind == SILU and gate.plain:
            found.append(glu.site_of(view, NAME, gate, _merged, _call_apart, interleaved_ok=False, key=()))
    return found


def _merged(e: Emitter, env: Mapping[Node, Any], value: Any, interleaved: bool) -> Any:
    return e.fused("npu_swiglu", value, -1)


def _call_apart(e: Emitter, env: Mapping[Node, Any], gate: Any, up: Any) -> Any:
    return e.fused("swiglu_apart", gate, up)


RULE = Rule(NAME, recognise, glu.limits, order=30)
