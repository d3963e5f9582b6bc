"""Hypothesis strategies: a rule, a spelling of it composed from parts, 0 to 2 mistakes, and how it is run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from rules import parts_gates, parts_rms_norm, parts_rotary_mul
from rules.helpers import BF16, F16, F32, Inputs, call
from rules.near_gates import GUARDED as GUARDED_GATES
from rules.near_gates import NEAR_MISSES as NEAR_GATES
from rules.near_rms_norm import GUARDED as GUARDED_NORMS
from rules.near_rms_norm import NEAR_MISSES as NEAR_NORMS
from rules.near_rotary_mul import GUARDED as GUARDED_ROTARY
from rules.near_rotary_mul import NEAR_MISSES as NEAR_ROTARY
from rules.programs import Program, program

from .mutations import MUTATIONS

OPS = ("rms_norm", "rotary_mul", "swiglu", "geglu", "clipped_swiglu")
TRIES = 6
"""Mutations tried until one runs in eager."""


@dataclass(frozen=True)
class Mutant:
    """A program, the rule it imitates and how it is run. `special` is what is odd about the call."""

    op: str
    program: Program
    dtype: torch.dtype
    train: bool
    dynamic: str
    special: str
    seed: int
    scale: float

    def __str__(self) -> str:
        how = "training" if self.train else "inference"
        dynamic = f", {self.dynamic} dynamic" if self.dynamic else ""
        return f"{self.op} in {self.dtype}, {how}{dynamic}, {self.special or 'plain'}, seed {self.seed}\n{self.program}"


def draw_inputs(op: str, dtype: torch.dtype, seed: int, scale: float, rows: int = 5) -> Inputs:
    module: Any = {"rms_norm": parts_rms_norm, "rotary_mul": parts_rotary_mul}.get(op, parts_gates)
    made: Inputs = module.inputs(dtype, seed, scale, rows)
    return made


def prepared(mutant: Mutant, inputs: Inputs) -> Inputs:
    """The inputs as `special` wants them."""
    names = [n for n in inputs if n in mutant.program.text.split("(", 1)[1].split("):", 1)[1]]
    first = names[0] if names else next(iter(inputs))
    made = dict(inputs)
    if mutant.special == "strided":
        made = {n: v.transpose(0, -1).contiguous().transpose(0, -1) for n, v in inputs.items()}
    elif mutant.special == "tied":
        twins = [n for n, v in inputs.items() if v.shape == inputs[first].shape]
        made |= dict.fromkeys(twins, inputs[first])
    elif mutant.special == "zero rows" and inputs[first].dim() > 1:
        made[first] = inputs[first] * (torch.arange(inputs[first].shape[-2]) % 2).unsqueeze(-1).to(inputs[first].dtype)
    elif mutant.special == "integer":
        made[first] = (inputs[first] * 3).to(torch.int32)
    elif mutant.special == "wider weights":
        made = {n: v.float() if n != first else v for n, v in inputs.items()}
    elif mutant.special == "wider x":
        made[first] = inputs[first].float()
    return made


def frozen_names(mutant: Mutant, inputs: Inputs) -> tuple[str, ...]:
    if mutant.special == "frozen weights":
        return tuple(list(inputs)[1:])
    if mutant.special == "frozen x":
        return tuple(list(inputs)[:1])
    return ()


SPECIALS = (
    "", "", "", "", "strided", "tied", "zero rows", "integer", "wider weights", "wider x", "frozen weights", "frozen x",
    "second derivative", "vmap", "grad", "checkpoint", "nested",
)  # fmt: skip


def runs(mutant: Mutant) -> bool:
    """Eager takes it, on its own inputs."""
    inputs = prepared(mutant, draw_inputs(mutant.op, mutant.dtype, mutant.seed, mutant.scale))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(
                mutant.program.function(),
                inputs,
                mutant.train,
                frozen_names(mutant, inputs),
                mutant.special == "second derivative",
            )
    except Exception:
        return False
    return True


@st.composite
def mutants(draw: Callable[[Any], Any], op: str | None = None) -> Mutant:
    def choose(options: Sequence[Any]) -> Any:
        return draw(st.sampled_from(list(options)))

    op = op or choose(OPS)
    special = choose(SPECIALS)
    dtype = choose((BF16, F32, F32, BF16, F16))
    mutant = Mutant(
        op, _spelling(op, choose), dtype, special == "second derivative" or choose((True, True, False)),
        choose(("", "", "", "", "rows", "all")), "", draw(st.integers(10_000, 99_999)), choose((1.0, 1.0, 30.0, 1e-3)),
    )  # fmt: skip
    for _ in range(choose((0, 1, 1, 1, 1, 2, 2))):
        for _ in range(TRIES):
            tried = replace(mutant, program=choose(MUTATIONS)(mutant.program, choose))
            if tried.program.text != mutant.program.text and runs(tried):
                mutant = tried
                break
    tried = replace(mutant, special=special, program=_wrapped(mutant.program, special))
    return tried if runs(tried) else mutant


def _spelling(op: str, choose: Any) -> Program:
    """Mostly composed of parts, sometimes written by hand, sometimes a known near miss."""
    kind = choose(("parts", "parts", "parts", "named", "near"))
    if kind == "near":
        table = {
            "rms_norm": (*NEAR_NORMS, *GUARDED_NORMS), "rotary_mul": (*NEAR_ROTARY, *GUARDED_ROTARY),
        }.get(op, (*NEAR_GATES, *GUARDED_GATES))  # fmt: skip
        found: Program = choose(table).program
        return found
    if op == "rms_norm":
        return _norm(choose) if kind == "parts" else choose(parts_rms_norm.NAMED)  # type: ignore[no-any-return]
    if op == "rotary_mul":
        return _rotation(choose) if kind == "parts" else choose(parts_rotary_mul.NAMED)  # type: ignore[no-any-return]
    return _gate(op, choose)


def _norm(choose: Any) -> Program:
    p = parts_rms_norm
    if choose((True, True, True, False)):
        return p.composed(*map(choose, (p.WIDEN, p.SQUARE, p.MEAN, p.ROOT, p.PRODUCT, p.GAMMA)))
    return p.composed(*map(choose, (p.WIDEN, p.SQUARE, p.MEAN)), "", choose(p.QUOTIENT), choose(p.GAMMA))


def _rotation(choose: Any) -> Program:
    p = parts_rotary_mul
    tables = choose(
        ((p.FULL, p.ROTATED, p.COMBINED), (p.PAIRS, p.HALF_TABLES, p.TURNED, p.JOINED),
         (p.NEIGHBOURS, p.HALF_TABLES, p.TURNED, p.WOVEN), (p.PAIRS, p.HALF_TABLES, p.TURNED, p.WOVEN))
    )  # fmt: skip
    parts = [choose(table) for table in tables]
    return program(" | ".join(parts), p.INPUTS, "\n".join(parts))


def _gate(op: str, choose: Any) -> Program:
    p = parts_gates
    split = choose((*p.ONE_TENSOR, *p.TWO_TENSORS))
    if op == "clipped_swiglu":
        text = choose(p.CLIPPED).replace("ACT", choose(p.SCALED)).replace("BIAS", choose(p.BIASED))
        clamp = choose((*p.CLAMP, ""))
        return program(f"{split} | {clamp} | {text}", p.INPUTS, f"{split}\n{clamp}\n{text}")
    acts = {"swiglu": (*p.SILU, *p.SILU_MIXED), "geglu": (*p.GELU_TANH, *p.GELU_ERF)}[op]
    act = choose(acts)
    return p.gated(split, choose(p.WIDE), act, "ACT" if act in p.SILU_MIXED else choose((*p.TIMES, *p.IN_PLACE)))


def _wrapped(made: Program, special: str) -> Program:
    """The program inside a transform of functions."""
    names = ", ".join(made.inputs)
    first, *rest = made.inputs
    calls = {
        "vmap": f"torch.vmap(inner, in_dims=(0, {'None, ' * len(rest)}))({names})",
        "grad": f"torch.func.grad(lambda one: inner(one, {', '.join(rest)}).float().sum())({first})",
        "checkpoint": f"torch.utils.checkpoint.checkpoint(inner, {names}, use_reentrant=False)",
        "nested": f"inner({names})",
    }
    if special not in calls:
        return made
    body = [f"    {line}" for line in (*made.lines, f"return {made.result}")]
    return Program(f"{special} of {made.name}", made.inputs, (f"def inner({names}):", *body), calls[special])
