"""Sites and forms shared by the gated MLPs: one tensor with both halves, or gate and up apart."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra
from npu_fuse import dialect as d
from npu_fuse import gates as g
from npu_fuse.emit import Emitter
from npu_fuse.halves import Halves, halves_of
from npu_fuse.limits import on_npu
from npu_fuse.report import Status
from npu_fuse.rotation_forms import narrowing_tail
from npu_fuse.sites import Emit, Form, Miss, Refusal, Site
from npu_fuse.targets import Target
from npu_fuse.view import View, static

MAX_RANK = 8

Merged = Callable[[Emitter, Mapping[Node, Any], Any, bool], Any]
"""The fused op on [gate | up] (False) or [gate0, up0, gate1, …] (True)."""
Apart = Callable[[Emitter, Mapping[Node, Any], Any, Any], Any]


def site_of(view: View, name: str, gate: g.Gate, merged: Merged, apart: Apart, interleaved_ok: bool,
            key: tuple[Any, ...]) -> Site | Miss:  # fmt: skip
    """A gate as a site: `merged` where both lie in one tensor, else apart or concatenated."""
    output, tail = narrowing_tail(view, gate.output)
    halves = halves_of(view, gate.gate, gate.up)
    allowed = {*gate.nodes, *tail, *(halves.nodes if halves else ())}
    tensors = (halves.source,) if halves else (gate.gate, gate.up)
    inputs = tuple(dict.fromkeys((*tensors, *gate.scalars)))
    found = algebra.between(view, [output], inputs, lambda n: n in allowed or d.name(n) == "cast")
    if found.stopped is not None:
        stopped = d.name(found.stopped) or found.stopped.op
        return Miss(name, gate.output, f"{name}.between", f"{stopped} stands inside the gate")
    value, result = d.tensor(gate.gate), d.tensor(output)
    assert value is not None and result is not None
    other = d.tensor(gate.up)
    natural = torch.promote_types(value.dtype, other.dtype if other is not None else value.dtype)
    forms = []
    for width in dict.fromkeys((natural, torch.promote_types(natural, torch.float32))):
        if width.itemsize < result.dtype.itemsize:
            continue
        suffix = "" if width == natural else f", in {str(width)[6:]}"
        if halves is not None:
            emit = _merged_form(halves, merged, interleaved_ok, width, result.dtype)
            forms.append(Form(f"one tensor{suffix}", emit, (*key, width, halves.arrange, halves.start)))
        else:
            forms.append(Form(f"apart{suffix}", _apart_form(gate, apart, width, result.dtype), (*key, width, "apart")))
            forms.append(
                Form(f"concatenated{suffix}", _cat_form(gate, merged, width, result.dtype), (*key, width, "cat"))
            )
    params = {"halves": halves.arrange if halves else "two tensors"}
    if not gate.plain:
        params |= {"alpha": str(gate.alpha), "limit": str(gate.limit), "bias": f"{gate.bias:g}"}
    return Site(name, output, inputs, found.nodes, tuple(forms), gate.output, params, twins=found.twins,
                facts={"kept": 1, "halves": halves, "gate": gate})  # fmt: skip


def _merged_form(halves: Halves, merged: Merged, interleaved_ok: bool, width: torch.dtype, result: torch.dtype) -> Any:
    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        value = e.cast(env[halves.source], width)
        size, start = halves.width, halves.start
        full = d.tensor(halves.source)
        if full is not None and static(full.shape[-1]) != 2 * size:
            value = e.call(torch.narrow, value, -1, start, 2 * size)
        interleaved = halves.arrange.startswith("interleaved")
        if halves.arrange == "up_gate":
            value = e.call(torch.roll, value, size, -1)
        elif halves.arrange == "interleaved_up_gate":
            value = e.call(torch.cat, (_strided(e, value, 1), _strided(e, value, 0)), -1)
            interleaved = False
        elif interleaved and not interleaved_ok:
            value = e.call(torch.cat, (_strided(e, value, 0), _strided(e, value, 1)), -1)
            interleaved = False
        return e.cast(merged(e, env, value, interleaved), result)

    return emit


def _strided(e: Emitter, value: Any, start: int) -> Any:
    return e.call(operator.getitem, value, (Ellipsis, slice(start, None, 2)))


def _apart_form(gate: g.Gate, apart: Apart, width: torch.dtype, result: torch.dtype) -> Emit:
    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        return e.cast(apart(e, env, e.cast(env[gate.gate], width), e.cast(env[gate.up], width)), result)

    return emit


def _cat_form(gate: g.Gate, merged: Merged, width: torch.dtype, result: torch.dtype) -> Emit:
    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        both = e.call(torch.cat, (e.cast(env[gate.gate], width), e.cast(env[gate.up], width)), -1)
        return e.cast(merged(e, env, both, False), result)

    return emit


def limits(site: Site, form: Form, target: Target) -> Refusal | None:
    """Apart where the target has an op for it, concatenated where it has not and the user allows it."""
    value = d.tensor(site.output)
    if target.name == "npu" and value is not None:
        if value.dtype == torch.float64:
            return Refusal(Status.REFUSED_BY_TARGET, "glu.dtype", f"npu_{site.op} takes no float64 (its document)")
        lowest = 2 if site.op == "clipped_swiglu" else 1
        if not lowest <= value.dim() <= MAX_RANK:
            reason = f"npu_{site.op} takes rank {lowest} to {MAX_RANK}, x has {value.dim()} (its document)"
            return Refusal(Status.REFUSED_BY_TARGET, "glu.rank", reason)
        refused = on_npu(site.op, target, (f"npu_{site.op}",), value.dtype)
        if refused is not None:
            return refused
    if form.name.startswith("apart") and target.concatenates:
        return Refusal(Status.REFUSED_BY_TARGET, "glu.apart", "the op takes gate and up in one tensor")
    if form.name.startswith("concatenated") and not target.concatenates:
        return Refusal(
            Status.REFUSED_BY_PROFIT, "glu.concat", "gate and up would have to be concatenated (option glu_concat)"
        )
    return None


def is_trained(gate: g.Gate) -> bool:
    """Whether a gradient passes through the gate."""
    output = d.tensor(gate.output)
    return output is not None and output.requires_grad
