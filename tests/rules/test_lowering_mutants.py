"""Mutate the lowering: whatever form npu_fuse would emit by mistake, the proof rejects it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from npu_fuse import emit, ops, prove, steps
from npu_fuse.backend import is_training
from npu_fuse.options import Options
from npu_fuse.passes import RULES
from npu_fuse.sites import Form, Site
from npu_fuse.view import view_of

from . import parts_gates, parts_rms_norm, parts_rotary_mul
from .helpers import BF16, F32, OPTIONS, call, fresh
from .programs import Program, program


@dataclass(frozen=True)
class Change:
    """What an emitter does differently: to the arguments of the fused op, to its result, or to casts."""

    name: str
    arguments: Callable[[list[Any], dict[str, Any]], tuple[list[Any], dict[str, Any]]] | None = None
    result: Callable[[Any], Any] | None = None
    cast: Callable[[Any, Any], Any] | None = None


class WrongEmitter(emit.RunEmitter):
    """Runs a form as the proof does, with one mistake in it."""

    def __init__(self, change: Change, like: emit.RunEmitter) -> None:
        super().__init__(like.lifted, like.target)
        self.change = change

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        given, named = list(args), dict(kwargs)
        if self.change.arguments is not None:
            given, named = self.change.arguments(given, named)
        made = ops.op(name)(*given, **named)
        if self.change.result is None:
            return made
        if isinstance(made, tuple):
            return (self.change.result(made[0]), *made[1:])
        return self.change.result(made)

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        made = super().cast(value, dtype)
        return made if self.change.cast is None or self.lifted else self.change.cast(value, made)


def wrong(form: Form, change: Change) -> Form:
    def emitted(e: Any, env: Any) -> Any:
        return form.emit(WrongEmitter(change, e), env)

    return replace(form, emit=emitted, also=())


def at(index: int, function: Callable[[Any], Any]) -> Any:
    """Changes positional argument `index` of the fused op."""

    def change(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return [function(a) if i == index else a for i, a in enumerate(args)], kwargs

    return change


def named(key: str, function: Callable[[Any], Any]) -> Any:
    def change(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return args, {k: function(v) if k == key else v for k, v in kwargs.items()}

    return change


def swapped(first: int, second: int) -> Any:
    def change(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        args[first], args[second] = args[second], args[first]
        return args, kwargs

    return change


def halves_swapped(x: torch.Tensor) -> torch.Tensor:
    return torch.roll(x, x.shape[-1] // 2, -1)


def other_mode(mode: str) -> str:
    return "interleave" if mode == "half" else "half"


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.half().to(x.dtype)


RESULTS = (
    Change("result doubled", result=lambda y: y * 2),
    Change("result clamped", result=lambda y: y.clamp(-40, 40)),
    Change("result without NaN", result=torch.nan_to_num),
    Change("result detached", result=lambda y: y.detach()),
    Change("result shifted by a part in 1e6", result=lambda y: y * (1 + 1e-6)),
    Change("features mirrored", result=lambda y: y.flip(-1)),
    Change("rows mirrored", result=lambda y: y.flip(-2)),
    Change("zero where large", result=lambda y: torch.where(y.abs() < 1e5, y, torch.zeros_like(y))),
)

NORM = (
    Change("epsilon tenfold", at(2, lambda e: e * 10)),
    Change("epsilon off by a thousandth", at(2, lambda e: e * 1.001)),
    Change("no epsilon", at(2, lambda e: 0.0)),
    Change("one plus gamma", at(1, lambda g: g + 1)),
    Change("gamma squared", at(1, lambda g: g * g)),
    Change("no gamma", at(1, torch.ones_like)),
    Change("gamma detached", at(1, lambda g: g.detach())),
    Change("gamma mirrored", at(1, lambda g: g.flip(-1))),
    Change("x detached", at(0, lambda x: x.detach())),
    Change("x clamped", at(0, lambda x: x.clamp(-1e4, 1e4))),
    Change("statistic over rows", at(0, lambda x: x.roll(1, 0))),
    *RESULTS,
)
ROTARY = (
    Change("cos and sin swapped", swapped(1, 2)),
    Change("other mode", at(3, other_mode)),
    Change("sin negated", at(2, torch.neg)),
    Change("first half of cos twice", at(1, lambda r: r[..., : r.shape[-1] // 2].repeat(*[1] * (r.dim() - 1), 2))),
    Change("halves of sin swapped", at(2, halves_swapped)),
    Change("halves of x swapped", at(0, halves_swapped)),
    Change("cos detached", at(1, lambda r: r.detach())),
    Change("x detached", at(0, lambda x: x.detach())),
    Change("cos of one row for all", at(1, lambda r: r[..., :1, :].expand_as(r))),
    *RESULTS,
)
GATES = (
    Change("other half gated", at(0, halves_swapped)),
    Change("input doubled", at(0, lambda x: x * 2)),
    Change("input detached", at(0, lambda x: x.detach())),
    *RESULTS,
)
GELU = (
    Change("other gelu", at(2, lambda a: 1 - a)),
    Change("other side activated", at(3, lambda left: not left)),
    *GATES,
)
CLIPPED = (
    Change("limit off by one", named("limit", lambda v: v + 1)),
    Change("no limit", named("limit", lambda v: 1e30)),
    Change("alpha one", named("alpha", lambda v: 1.0)),
    Change("no bias", named("bias", lambda v: 0.0)),
    Change("other arrangement", named("interleaved", lambda v: not v)),
    *GATES,
)
ROUNDINGS = (
    Change("rounded to half precision", result=rounded),
    Change("rounded on the way in", at(0, rounded)),
)

CASES: dict[str, tuple[Program, Any, tuple[Change, ...]]] = {
    "rms_norm": (parts_rms_norm.combined(1)[0], parts_rms_norm, NORM),
    "rotary_mul": (parts_rotary_mul.combined(6)[1], parts_rotary_mul, ROTARY),
    "swiglu": (parts_gates.swiglu(1)[0], parts_gates, GATES),
    "geglu": (parts_gates.geglu(2)[0], parts_gates, GELU),
    "clipped_swiglu": (parts_gates.clipped_swiglu(1)[0], parts_gates, CLIPPED),
}


STAYS_WIDE = {
    "rms_norm": "h = x.float()\nh * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-5) * w.float()",
    "rotary_mul": "h = x.float(); cos = C[:, None].float(); sin = S[:, None].float()\n"
    "h * cos + torch.cat((-h[..., 8:], h[..., :8]), -1) * sin",
    "swiglu": "p, q = t.chunk(2, -1)\nF.silu(p.float()) * q.float()",
    "geglu": "p, q = t.chunk(2, -1)\nF.gelu(p.float()) * q.float()",
    "clipped_swiglu": "p, q = t.chunk(2, -1)\nF.silu(p.float().clamp(max=7)) * q.float().clamp(-7, 7)",
}
"""bfloat16 in, float32 out: without its casts a form gives another dtype or rounds where the original did not."""


def site_in(made: Program, module: Any, op: str, dtype: torch.dtype) -> Site:
    """The site that the rule finds in the program, in training."""
    found: list[Site] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        options = Options.make(OPTIONS)
        candidates = steps.recognise(view_of(gm.graph), RULES, options, is_training(example_inputs))
        found.extend(c.site for c in candidates if c.site is not None and c.op == op)
        return gm.forward

    with fresh():
        call(torch.compile(made.function(), backend=keep), module.inputs(dtype), train=True)
    assert len(found) == 1
    return found[0]


@functools.cache
def site_and_forms(op: str, dtype: torch.dtype) -> tuple[Site, tuple[Form, ...]]:
    """A plain spelling's site, and the forms that the proof accepts."""
    made, module, _ = CASES[op]
    site = site_in(made, module, op, dtype)
    holding = tuple(form for form in site.forms if prove.prove(site, form).holds)
    assert holding, "no form to mutate"
    return site, holding


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "change"), [(op, c) for op, case in CASES.items() for c in case[2]], ids=lambda v: getattr(v, "name", v)
)
def test_proof_rejects_a_wrong_lowering(op, change, dtype):
    site, forms = site_and_forms(op, dtype)
    for form in forms:
        assert not prove.prove(site, wrong(form, change)).holds or not changes(site, form, change), form.name


def changes(site: Site, form: Form, change: Change) -> bool:
    """The form passes what the change is about (arguments by name are in some forms only)."""
    if change.arguments is None:
        return True
    seen: list[bool] = []

    def watched(args: list[Any], kwargs: dict[str, Any]) -> Any:
        made = change.arguments(list(args), dict(kwargs))
        seen.append(made[1] != kwargs or any(a is not b for a, b in zip(made[0], args, strict=True)))
        return made

    prove.prove(site, wrong(form, replace(change, arguments=watched)))
    return any(seen)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("change", ROUNDINGS, ids=lambda c: c.name)
def test_proof_rejects_a_wrong_rounding(op, change):
    site, forms = site_and_forms(op, BF16)
    for form in forms:
        assert not prove.prove(site, wrong(form, change)).holds, form.name


@pytest.mark.parametrize("op", CASES)
def test_proof_rejects_a_missing_cast(op):
    _, module, _ = CASES[op]
    site = site_in(program(f"{op} stays wide", module.INPUTS, STAYS_WIDE[op]), module, op, BF16)
    holding = [form for form in site.forms if prove.prove(site, form).holds]
    assert holding
    for form in holding:
        assert not prove.prove(site, wrong(form, Change("no cast", cast=lambda value, made: value))).holds, form.name


@pytest.mark.parametrize("op", CASES)
def test_the_right_lowering_holds_through_the_same_wrapper(op):
    for dtype in (F32, BF16):
        site, forms = site_and_forms(op, dtype)
        for form in forms:
            assert prove.prove(site, wrong(form, Change("nothing"))).holds
