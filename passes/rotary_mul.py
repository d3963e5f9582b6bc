"""RoPE: y = x · cos + rot(x) · sin  →  npu_rotary_mul(x, r1, r2, rotary_mode).

x [..., D] with D even, r1 and r2 broadcastable to x with full width D, y like x.
half:       rot(x) = cat(-x[D/2:], x[:D/2]);  interleave: rot(x)[2i] = -x[2i+1], rot(x)[2i+1] = x[2i].
Computed in float32 with one rounding; r1 and r2 are first cast to x's dtype, as the op does.
Semantics: torch_npu's document of npu_rotary_mul and the CANN operators RotaryPositionEmbedding and
RotaryPositionEmbeddingGrad.

The rule reads the map y[d] = a(d)·x[i(d)] + b(d)·x[j(d)] off the traced elements; no spelling is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import ops, regions, rotation_forms, rotation_npu
from npu_fuse import rotation as r
from npu_fuse.emit import Emitter
from npu_fuse.sites import Form, Miss, Rule, Site
from npu_fuse.view import View

NAME = "rotary_mul"


# --- the op: reference kernel, backward ------------------------------------------------------------


def _rotate(x: torch.Tensor, mode: str, back: bool = False) -> torch.Tensor:
    """[-x1, x0] of x's halves, or its transpose; of an odd width (a symbolic one may be) the second half is longer."""
    if mode == "half":
        width = x.shape[-1]
        middle = width - width // 2 if back else width // 2
        first, second = x[..., :middle], x[..., middle:]
        return torch.cat((second, -first) if back else (-second, first), -1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((odd, -even) if back else (-odd, even), -1).flatten(-2)


def _forward(
    x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: torch.Tensor | None = None
) -> torch.Tensor:
    dtype = ops.compute_dtype(x.dtype)
    wide, cos, sin = x.to(dtype), r1.to(x.dtype).to(dtype), r2.to(x.dtype).to(dtype)
    return (wide * cos + _rotate(wide, rotary_mode) * sin).to(x.dtype)


def _backward_op(dy: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half") -> torch.Tensor:
    """dx alone: it needs neither x nor the forward's result."""
    dtype = ops.compute_dtype(dy.dtype)
    wide, cos, sin = dy.to(dtype), r1.to(dy.dtype).to(dtype), r2.to(dy.dtype).to(dtype)
    return (wide * cos + _rotate(wide * sin, rotary_mode, back=True)).to(dy.dtype)


def _backward_tables(
    dy: torch.Tensor, x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = ops.compute_dtype(dy.dtype)
    wide, turned = dy.to(dtype), _rotate(x.to(dtype), rotary_mode)
    dcos, dsin = wide * x.to(dtype), wide * turned
    return dcos.sum_to_size(r1.shape).to(r1.dtype), dsin.sum_to_size(r2.shape).to(r2.dtype)


def _interleaved(x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    """Mode interleave where the graph leaves batch · heads open: the kernel where it takes the call's, else plain."""
    if x.device.type == "npu" and rotation_npu.takes(x, r1):
        return cast(torch.Tensor, torch.ops.npu.npu_rotary_mul.default(x.contiguous(), r1, r2, "interleave"))
    return _forward(x, r1, r2, "interleave").contiguous()


def _interleaved_dx(dy: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    """The rotation back is the rotation by the neighbour's sin, negated."""
    if dy.device.type == "npu" and rotation_npu.takes(dy, r1):
        back = r2.reshape(*r2.shape[:-1], -1, 2).flip(-1).flatten(-2) * -1
        return cast(torch.Tensor, torch.ops.npu.npu_rotary_mul.default(dy.contiguous(), r1, back, "interleave"))
    return _backward_op(dy, r1, r2, "interleave").contiguous()


def _fake(x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _expand(x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> Any:
    return NotImplemented if x.device.type == "npu" else _interleaved(x, r1, r2)


def _expand_dx(dy: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> Any:
    return NotImplemented if dy.device.type == "npu" else _interleaved_dx(dy, r1, r2)


def _setup_interleaved(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_interleaved(ctx: Any, dy: torch.Tensor) -> Any:
    """Tables that need a gradient are refused before (`rotation_npu.limits`)."""
    return ops.backward_op("rotary_mul_interleaved_dx")(dy, *ctx.saved_tensors), None, None


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, r1, r2, mode, rotate = inputs
    if rotate is not None:
        raise NotImplementedError("npu_rotary_mul with rotate= has no backward; leave rotate out in training")
    tables = r1.requires_grad or r2.requires_grad
    # x is kept for the tables' gradients only: less than the spelled form keeps.
    ctx.save_for_backward(r1, r2, *((x,) if tables else ()))
    ctx.mode = mode


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    r1, r2, *rest = ctx.saved_tensors
    dx = ops.backward_op("npu_rotary_mul_dx")(dy, r1, r2, ctx.mode)
    dcos = dsin = None
    if rest:
        dcos, dsin = ops.backward_op("npu_rotary_mul_dtables")(dy, rest[0], r1, r2, ctx.mode)
    return dx, dcos, dsin, None, None


ops.define(
    "npu_rotary_mul(Tensor self, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
    _forward,
    keeps=(1, 2),
)
ops.define("npu_rotary_mul_dx(Tensor dy, Tensor r1, Tensor r2, str rotary_mode='half') -> Tensor", _backward_op)
ops.define(
    "npu_rotary_mul_dtables(Tensor dy, Tensor self, Tensor r1, Tensor r2, str rotary_mode) -> (Tensor, Tensor)",
    _backward_tables,
)
ops.differentiable("npu_rotary_mul", _backward, _setup)
ops.define(
    "rotary_mul_interleaved(Tensor x, Tensor r1, Tensor r2) -> Tensor", _interleaved, keeps=(1, 2), fake=_fake,
    expand=_expand,
)  # fmt: skip
ops.define(
    "rotary_mul_interleaved_dx(Tensor dy, Tensor r1, Tensor r2) -> Tensor", _interleaved_dx, fake=_fake,
    expand=_expand_dx,
)  # fmt: skip
ops.differentiable("rotary_mul_interleaved", _backward_interleaved, _setup_interleaved)


# --- the rule --------------------------------------------------------------------------------------


def recognise(view: View) -> list[Site | Miss]:
    found: list[Site | Miss] = []
    done: set[Node] = set()
    for node in view.named(*regions.ANCHORS):
        if node not in done and node not in view.claimed and regions.is_anchor(node):
            result = _from_anchor(view, node, done)
            if result is not None:
                found.append(result)
    return found


def _from_anchor(view: View, anchor: Node, done: set[Node]) -> Site | Miss | None:
    """The first value on the anchor's way forward that is a whole rotation of something of its shape."""
    near_miss: Miss | None = None
    nearest: tuple[regions.Region, Node, r.Turn] | None = None
    for output in regions.ways_forward(view, anchor):
        if output in done:
            return None
        region = regions.collect(view, output)
        if region is None:
            continue
        for x in regions.rotated_values(view, region):
            found = r.turn_of(view, region, x)
            if isinstance(found, r.Turn):
                if r.turned_by_itself(x, found):
                    continue
                if not r.pairs_of_made_tables(region, found):
                    return _taken(view, region, x, found, anchor, done)
                nearest = nearest or (region, x, found)
                break
            if found:
                near_miss = near_miss or Miss(NAME, anchor, "rotary_mul.map", found)
        indexed = regions.indexed_value(view, region)
        if indexed is not None:
            reason = f"{indexed.name} is x permuted by an index tensor, whose values are not in the graph"
            near_miss = near_miss or Miss(NAME, anchor, "rotary_mul.index", reason)
    return _taken(view, *nearest, anchor, done) if nearest else near_miss


def _taken(view: View, region: regions.Region, x: Node, turn: r.Turn, anchor: Node, done: set[Node]) -> Site | Miss:
    site = _site(view, region, x, turn, anchor)
    if isinstance(site, Site):
        done.update(site.nodes)
    return site


def _site(view: View, region: regions.Region, x: Node, turn: r.Turn, anchor: Node) -> Site | Miss:
    output, tail = rotation_forms.narrowing_tail(view, region.output)
    source = view.exact(x, output)
    inputs = tuple(dict.fromkeys((source, turn.cos.node, turn.sin.node)))
    found = rotation_forms.nodes_between(view, output, inputs, {*region.nodes, *tail})
    if found.stopped is not None:
        name = d.name(found.stopped) or found.stopped.op
        return Miss(NAME, anchor, "rotary_mul.between", f"{name} stands inside the rotation")
    value, result = d.tensor(source), d.tensor(output)
    assert value is not None and result is not None
    forms = tuple(_forms(source, turn, value.dtype, result.dtype))
    params = {"mode": turn.mode}
    if turn.deinterleave:
        params["input"] = "de-interleaved first"
    return Site(NAME, output, inputs, found.nodes, forms, anchor, params, twins=found.twins,
                facts={"kept": 1, "x": source, "turn": turn})  # fmt: skip


def _forms(x: Node, turn: r.Turn, dtype: torch.dtype, result: torch.dtype) -> list[Form]:
    made = []
    for width in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
        if width.itemsize < result.itemsize:
            continue
        name = "as it is" if width == dtype else f"x in {str(width)[6:]}"

        def emit(e: Emitter, env: Mapping[Node, Any], width: torch.dtype = width) -> Any:
            value = e.cast(env[x], width)
            if turn.deinterleave:
                value = rotation_forms.emit_deinterleave(e, value)
            cos = rotation_forms.emit_table(e, env[turn.cos.node], turn.cos, width)
            sin = rotation_forms.emit_table(e, env[turn.sin.node], turn.sin, width)
            if e.target.name == "npu":
                return e.cast(rotation_npu.emit(e, value, cos, sin, turn, x, width), result)
            return e.cast(e.fused("npu_rotary_mul", value, cos, sin, turn.mode), result)

        made.append(Form(name, emit, (width, turn.mode, turn.deinterleave, turn.cos.key, turn.sin.key)))
    return made


RULE = Rule(NAME, recognise, rotation_npu.limits, order=20)
