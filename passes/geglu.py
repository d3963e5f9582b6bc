"""GeGLU: y = gelu(gate) · up  →  npu_geglu(cat(gate, up), -1, approximate, activate_left=True)[0].

x [..., 2·I]; approximate 1 is tanh, 0 is erf; activate_left=True gates the first half. Returns
(y [..., I], gelu [..., I]). Semantics: torch_npu's document of npu_geglu and aclnnGeGluV3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import gates as g
from npu_fuse import glu, ops
from npu_fuse.activations import GELU_TANH, SILU
from npu_fuse.emit import Emitter, item
from npu_fuse.sites import Miss, Rule, Site
from npu_fuse.view import View

NAME = "geglu"


def _gelu(x: torch.Tensor, approximate: int) -> torch.Tensor:
    if approximate == 1:
        return torch.nn.functional.gelu(x, approximate="tanh")
    # torch's own kernel of the erf form is off by 4 ulp in float32, the formula by 1.
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_slope(x: torch.Tensor, approximate: int) -> torch.Tensor:
    """The derivative of gelu at x."""
    if approximate == 1:
        scale = math.sqrt(2.0 / math.pi)
        # 0.5 · (1 + tanh z) is sigmoid(2 z), whose slope keeps its digits where 1 - tanh² has none left.
        z = 2 * scale * (x + 0.044715 * x * x * x)
        s = ops.sigmoid(z)
        return s + x * s * torch.sigmoid(-z) * 2 * scale * (1 + 3 * 0.044715 * x * x)
    normal = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2.0))) + x * normal


def _apart(gate: torch.Tensor, up: torch.Tensor, approximate: int = 1) -> torch.Tensor:
    dtype = ops.compute_dtype(gate.dtype)
    return (_gelu(gate.to(dtype), approximate) * up.to(dtype)).to(gate.dtype)


def _apart_backward_op(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, approximate: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = ops.compute_dtype(gate.dtype)
    wide, a, b = dy.to(dtype), gate.to(dtype), up.to(dtype)
    return (wide * b * _gelu_slope(a, approximate)).to(gate.dtype), (wide * _gelu(a, approximate)).to(up.dtype)


def _split(x: torch.Tensor, dim: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = x.chunk(2, dim)
    return (first, second) if left else (second, first)


def _forward(
    x: torch.Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = _split(x, dim, activate_left)
    return _apart(gate, up, approximate), _gelu(gate.to(ops.compute_dtype(x.dtype)), approximate).to(x.dtype)


def _backward_op(
    dy: torch.Tensor, x: torch.Tensor, gelu: torch.Tensor, dim: int = -1, approximate: int = 1,
    activate_left: bool = False,
) -> torch.Tensor:  # fmt: skip
    gate, up = _split(x, dim, activate_left)
    dgate, dup = _apart_backward_op(dy, gate, up, approximate)
    return torch.cat((dgate, dup) if activate_left else (dup, dgate), dim)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.rest = inputs[1:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: torch.Tensor, _: Any) -> Any:
    return ops.backward_op("npu_geglu_grad")(dy, *ctx.saved_tensors, *ctx.rest), None, None, None


def _trained(x: torch.Tensor, approximate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_geglu with a backward that can be traced: the meta kernel of torch_npu's npu_geglu_grad raises."""
    if x.device.type == "npu":
        made: tuple[torch.Tensor, torch.Tensor] = torch.ops.npu.npu_geglu.default(x, -1, approximate, True)
        return made
    return _forward(x, -1, approximate, True)


def _trained_backward(dy: torch.Tensor, x: torch.Tensor, gelu: torch.Tensor, approximate: int) -> torch.Tensor:
    if x.device.type == "npu":
        dx: torch.Tensor = torch.ops.npu.npu_geglu_grad.default(dy, x, gelu, -1, approximate, True)
        return dx
    return _backward_op(dy, x, gelu, -1, approximate, True)


def _fake(x: torch.Tensor, approximate: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, -1, approximate, True)


def _fake_backward(dy: torch.Tensor, x: torch.Tensor, gelu: torch.Tensor, approximate: int) -> torch.Tensor:
    return _backward_op(dy, x, gelu, -1, approximate, True)


def _expand(x: torch.Tensor, approximate: int) -> Any:
    return NotImplemented if x.device.type == "npu" else _fake(x, approximate)


def _expand_backward(dy: torch.Tensor, x: torch.Tensor, gelu: torch.Tensor, approximate: int) -> Any:
    return NotImplemented if x.device.type == "npu" else _fake_backward(dy, x, gelu, approximate)


def _backward_trained(ctx: Any, dy: torch.Tensor, _: Any) -> Any:
    return ops.backward_op("geglu_backward")(dy.contiguous(), *ctx.saved_tensors, *ctx.rest), None


def _setup_apart(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.approximate = inputs[2]


def _backward_apart(ctx: Any, dy: torch.Tensor) -> Any:
    return *ops.backward_op("geglu_apart_backward")(dy, *ctx.saved_tensors, ctx.approximate), None


ops.define(
    "npu_geglu(Tensor self, int dim=-1, int approximate=1, bool activate_left=False) -> (Tensor, Tensor)",
    _forward,
    keeps=(0,),
)
ops.define(
    "npu_geglu_grad(Tensor grad_output, Tensor self, Tensor gelu, int dim=-1, int approximate=1,"
    " bool activate_left=False) -> Tensor",
    _backward_op,
)
ops.differentiable("npu_geglu", _backward, _setup)
ops.define("geglu(Tensor x, int approximate) -> (Tensor, Tensor)", _trained, keeps=(0,), fake=_fake, expand=_expand)
ops.define(
    "geglu_backward(Tensor dy, Tensor x, Tensor gelu, int approximate) -> Tensor", _trained_backward,
    fake=_fake_backward, expand=_expand_backward,
)  # fmt: skip
ops.differentiable("geglu", _backward_trained, _setup)
ops.define("geglu_apart(Tensor gate, Tensor up, int approximate=1) -> Tensor", _apart, keeps=(0, 1))
ops.define(
    "geglu_apart_backward(Tensor dy, Tensor gate, Tensor up, int approximate=1) -> (Tensor, Tensor)", _apart_backward_op
)
ops.differentiable("geglu_apart", _backward_apart, _setup_apart)


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    for gate in g.gates(view):
        if isinstance(gate, tuple) or gate.kind == SILU:
            continue
        if not gate.plain:
            found.append(Miss(NAME, gate.output, "geglu.clamp", "the gate is clamped or scaled, the op does neither"))
            continue
        approximate = 1 if gate.kind == GELU_TANH else 0
        trained = glu.is_trained(gate)
        calls = _calls(approximate, trained)
        found.append(glu.site_of(view, NAME, gate, *calls, interleaved_ok=False, key=(approximate, trained)))
    return found


def _calls(approximate: int, trained: bool) -> tuple[glu.Merged, glu.Apart]:
    def merged(e: Emitter, env: Mapping[Node, Any], value: Any, interleaved: bool) -> Any:
        if trained and e.target.name == "npu":
            return item(e, e.fused("geglu", value, approximate), 0)
        return item(e, e.fused("npu_geglu", value, -1, approximate, True), 0)

    def apart(e: Emitter, env: Mapping[Node, Any], left: Any, right: Any) -> Any:
        return e.fused("geglu_apart", left, right, approximate)

    return merged, apart


RULE = Rule(NAME, recognise, glu.limits, order=30)
