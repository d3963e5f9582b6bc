"""Run a mutant under npu_fuse without a hand-off and judge it by eager, on inputs that no proof has seen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rules.helpers import (
    Bound,
    Inputs,
    Mismatch,
    Mode,
    Outcome,
    call,
    compare_outcomes,
    fresh,
    planned,
    sites,
    ulps,
    widened,
)
from rules.near import spoiled

from npu_fuse.report import GraphReport, Status

from .strategies import Mutant, draw_inputs, frozen_names, prepared

FAR = 64.0
"""Where most of eager is further from float64 than this (in ulps of the row), float64 computes something else."""


SLACK = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Ulps of the row beyond eager's own error. A mutant rounds before and behind its site too (a matmul, an added
clamp), where eager can be luckier by a rounding; the proof's own bound is tested on whole sites in tests/rules."""


@dataclass
class Verdict:
    """What became of a mutant: fused ops, whether npu_fuse failed inside, and what was wrong with a result."""

    fused: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    wrong: str = ""
    calls: int = 0
    discarded: str = ""


def judge(mutant: Mutant) -> Verdict:
    verdict = Verdict()
    logging.disable(logging.WARNING)
    try:
        with fresh(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _judge(mutant, verdict)
    finally:
        logging.disable(logging.NOTSET)
    return verdict


def _judge(mutant: Mutant, verdict: Verdict) -> None:
    mode = Mode(mutant.dtype, mutant.train, mutant.dynamic == "rows", mutant.dynamic == "all")
    function, reports = planned(mutant.program, mode)
    for inputs in _draws(mutant):
        problem = _one_call(mutant, function, inputs, verdict)
        if problem and _is_dynamos(mutant, mode, inputs):
            verdict.discarded = f"so does torch.compile alone: {problem}"
        elif problem and not _is_overflow(problem, reports):
            verdict.wrong = problem
        if problem:
            break
    found = sites(reports)
    verdict.fused = [s.op for s in found if s.status is Status.FUSED]
    verdict.faults = [f"{s.op}: {s.code} {s.reason}" for s in found if s.status is Status.ERROR]
    verdict.faults += [e for r in reports for e in r.errors]


def _draws(mutant: Mutant) -> list[Inputs]:
    """The mutant's own inputs, others, larger ones, other rows where shapes are dynamic, NaN and infinity."""
    plain = [
        draw_inputs(mutant.op, mutant.dtype, mutant.seed, mutant.scale),
        draw_inputs(mutant.op, mutant.dtype, mutant.seed + 7, 100.0 if mutant.dtype is torch.float16 else 3e3),
    ]
    if mutant.dynamic:
        plain.append(draw_inputs(mutant.op, mutant.dtype, mutant.seed + 14, 1.0, rows=9))
        plain.append(draw_inputs(mutant.op, mutant.dtype, mutant.seed + 21, 1.0, rows=130))
    if not mutant.train:
        plain.append(spoiled(plain[0]))
    return [prepared(mutant, inputs) for inputs in plain]


def _one_call(mutant: Mutant, function: Callable[..., Any], inputs: Inputs, verdict: Verdict) -> str:
    """What is wrong with one call; empty where nothing is, or where eager raises."""
    frozen, second = frozen_names(mutant, inputs), mutant.special == "second derivative"

    def run(called: Callable[..., Any], given: Inputs) -> Outcome:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return call(called, given, mutant.train, frozen, second)

    try:
        eager = run(mutant.program.function(), inputs)
    except Exception:
        return ""
    verdict.calls += 1
    try:
        exact = run(mutant.program.lifted(mutant.dtype), widened(inputs))
    except Exception:
        exact = eager  # the mistake is about dtypes: only eager can judge
    try:
        fused = run(function, inputs)
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        flips = 0.1 if "float8" in mutant.program.text or mutant.special == "integer" else 0.0
        compare_outcomes(exact, eager, fused, Bound(SLACK, flips, 2 if second else 1, noise=2.5))
        _compare_directly(exact, eager, fused, _coarsest(mutant))
    except Mismatch as problem:
        values_agree = str(problem).startswith("gradient to") and "ulp" in str(problem)
        if second and values_agree and _is_conditioning(eager, fused, run(mutant.program.function(), _nudged(inputs))):
            return ""
        return str(problem)
    return ""


def _nudged(inputs: Inputs) -> Inputs:
    """Every value one ulp up or down: what a rounding in front of the function does."""
    generator = torch.Generator().manual_seed(5)

    def nudge(value: torch.Tensor) -> torch.Tensor:
        ends = torch.rand(value.shape, generator=generator).sub(0.5).div(0.0).to(value.dtype)
        return torch.nextafter(value.detach(), ends).requires_grad_(value.requires_grad)

    return {n: nudge(v) if v.is_floating_point() else v for n, v in inputs.items()}


def _is_conditioning(eager: Outcome, fused: Outcome, nudged: Outcome) -> bool:
    """Second derivatives that are no further apart than eager's are from its own on inputs an ulp away, and a rounding:
    the first derivative is rounded between the two, once more where the fused op takes it."""

    def largest(one: torch.Tensor, other: torch.Tensor) -> float:
        apart = (one.detach().double() - other.detach().double()).abs()
        return float(apart[torch.isfinite(apart)].max()) if bool(torch.isfinite(apart).any()) else 0.0

    def step(value: torch.Tensor) -> float:
        finite = value.detach()[torch.isfinite(value.detach())].abs().double()
        return float(finite.max()) * torch.finfo(value.dtype).eps if finite.numel() else 0.0

    pairs = [(eager.gradients[n], fused.gradients[n], nudged.gradients[n]) for n in eager.gradients]
    return all(largest(left, right) <= largest(left, moved) + step(left) for left, right, moved in pairs)


def _coarsest(mutant: Mutant) -> torch.dtype:
    """The dtype with the largest steps that the mutant rounds to (float8 apart)."""
    text = mutant.program.text
    found = {mutant.dtype}
    found |= {torch.float16} if "float16" in text.replace("bfloat16", "") or "half()" in text else set()
    found |= {torch.bfloat16} if "bfloat16" in text else set()
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _compare_directly(exact: Outcome, eager: Outcome, fused: Outcome, coarsest: torch.dtype) -> None:
    """Where float64 computes something else than eager, fused has to be near eager, in ulps of the inputs' dtype."""
    found = [
        (f"output {i}", *values)
        for i, values in enumerate(zip(exact.outputs, eager.outputs, fused.outputs, strict=True))
    ]
    found += [
        (f"gradient to {n}", exact.gradients[n], eager.gradients[n], fused.gradients[n])
        for n in eager.gradients
        if n in exact.gradients
    ]
    for what, reference, before, after in found:
        if not isinstance(before, torch.Tensor) or not before.is_floating_point() or before.numel() == 0:
            continue
        wide, left, right = (t.detach().double() for t in (reference, before, after))
        finite = torch.isfinite(wide) & torch.isfinite(left) & torch.isfinite(right)
        if not bool(finite.any()) or float(ulps((left - wide).abs(), wide, coarsest)[finite].median()) < FAR:
            continue
        apart = float(ulps((left - right).abs(), left, coarsest)[finite].max())
        if apart > FAR:
            raise Mismatch(f"{what}: {apart:.0f} ulp from eager, which itself is far from float64")


def _is_dynamos(mutant: Mutant, mode: Mode, inputs: Inputs) -> bool:
    """torch.compile with the backend "eager" has a problem with this call too."""
    torch._dynamo.reset()
    alone = torch.compile(mutant.program.function(), backend="eager", dynamic=mode.all_dynamic or None)
    return bool(_one_call(mutant, alone, inputs, Verdict()))


def _is_overflow(problem: str, reports: Sequence[GraphReport]) -> bool:
    """The report says that the original overflows where the fused form does not: a promise, no fault."""
    noted = any("overflows" in note for s in sites(reports) for note in s.notes)
    return noted and ("ulp" in problem or "finite where" in problem)
