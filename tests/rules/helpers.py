"""Compile a program under npu_fuse, run it beside eager and float64, and judge values and gradients.

The bound is the engine's own promise: in ulps of each row's largest magnitude, the fused form's error
against float64 is at most the original's plus 0.25 (16 bit) or 2 (float32), and 1.1 times on average.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.guards

import npu_fuse
from npu_fuse.backend import is_training, plan
from npu_fuse.options import Options
from npu_fuse.passes import RULES
from npu_fuse.report import GraphReport, SiteReport, Status
from npu_fuse.sites import Site
from npu_fuse.view import view_of

from .programs import Program

# torch's structured trace: pytest's log capture switches it on, and nobody reads it here.
logging.getLogger("torch.__trace").disabled = True
# Dynamo measures how fast each guard is, with caches flushed: 0.15 s a compile and nobody reads it here.
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = {"target": "reference", "handoff": "aot_eager"}
SLACK = {F32: 2.0, BF16: 0.25, F16: 0.25}
GRADIENT_SLACK = {F32: 4.0, BF16: 1.0, F16: 1.0}
"""Gradients are summed over rows: one rounding more of the sum, in ulps of the tensor's largest magnitude."""

NOISY = 8.0

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """`dynamic`: every size but the last of each tensor may change, as in a model whose weights are static.

    `all_dynamic`: torch.compile(dynamic=True), which makes the widths of a bare function symbolic too.
    """

    dtype: torch.dtype
    train: bool
    dynamic: bool = False
    all_dynamic: bool = False

    def __str__(self) -> str:
        how = "training" if self.train else "inference"
        return f"{str(self.dtype)[6:]} {how}{' dynamic' if self.dynamic or self.all_dynamic else ''}"


MODES = (Mode(F32, False), Mode(BF16, True), Mode(BF16, False), Mode(F32, True))
NEAR_MODES = (Mode(BF16, False), Mode(F32, True))
DYNAMIC = Mode(BF16, True, dynamic=True)


def modes_of(index: int, named: bool) -> tuple[Mode, ...]:
    """Spellings written by hand run in every mode; combined ones in two of four, some with dynamic shapes."""
    if named:
        return (*MODES, DYNAMIC)
    return (MODES[:2], MODES[2:], (*MODES[:2], DYNAMIC), MODES[2:])[index % 4]


@dataclass
class Outcome:
    """What one call gave: outputs, gradients by input name (where asked), inputs after the call."""

    outputs: list[Any]
    gradients: dict[str, torch.Tensor]
    inputs: Inputs


class Mismatch(AssertionError):
    """A result of the compiled program outside the bound."""


def call(
    function: Callable[..., Any], inputs: Inputs, train: bool, frozen: Sequence[str] = (), second: bool = False
) -> Outcome:
    """Run on copies that are no leaves, so that a program may write into them.

    One tensor under two names stays one. Tensors named in `frozen` want no gradient. With `second`, the
    gradients are those of the gradients' squares.
    """
    copies: dict[int, Any] = {}
    leaves, given = {}, {}
    with torch.set_grad_enabled(train):
        for name, value in inputs.items():
            if id(value) not in copies:
                copies[id(value)] = _leaf_and_copy(value, train and name not in frozen)
            leaves[name], given[name] = copies[id(value)]
        result = function(*given.values())
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        gradients = _gradients(outputs, leaves, second) if train else {}
    return Outcome(outputs, gradients, given)


def _leaf_and_copy(value: Any, wants_gradient: bool) -> tuple[Any, Any]:
    """A leaf, and a tensor of the same strides made from it."""
    if not isinstance(value, torch.Tensor):
        return value, value
    leaf = value.detach().clone()
    if wants_gradient and leaf.is_floating_point():
        leaf.requires_grad_()
    return leaf, leaf.clone()


def _gradients(outputs: Sequence[Any], leaves: Inputs, second: bool = False) -> dict[str, torch.Tensor]:
    tensors = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    wanted = {n: v for n, v in leaves.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    if not tensors or not wanted:
        return {}
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in tensors]
    found = torch.autograd.grad(tensors, list(wanted.values()), cotangents, allow_unused=True, create_graph=second)
    if second:
        total = sum(g.double().square().sum() for g in found if g is not None and g.requires_grad)
        if not isinstance(total, torch.Tensor):
            return {}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


def widened(inputs: Inputs) -> Inputs:
    """In float64; one tensor under two names stays one."""
    made: dict[int, Any] = {}
    for value in inputs.values():
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        made.setdefault(id(value), value.double() if floating else value)
    return {n: made[id(v)] for n, v in inputs.items()}


def ulps(error: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, rowwise: bool = True) -> torch.Tensor:
    """The error in units in the last place of the largest magnitude of each row (or of the whole tensor)."""
    size = exact.abs().nan_to_num(0.0, 0.0, 0.0)
    scale = size.amax(-1, keepdim=True) if rowwise and exact.dim() else size.max() if size.numel() else size
    info = torch.finfo(dtype)
    return error / (torch.exp2(torch.floor(torch.log2(scale.clamp_min(info.smallest_normal)))) * info.eps)


@dataclass(frozen=True)
class Bound:
    """Ulps beyond eager's own error, and the share of elements that may be off by a step of what is rounded to
    float8 or to integers (a value on the edge of two steps takes the other one). Each derivative rounds once more."""

    slack: Mapping[torch.dtype, float]
    flips: float = 0.0
    derivatives: int = 1
    noise: float = 1.0
    """Where eager itself is off by more than `NOISY`, what stands before the site is ill-conditioned (a rounded
    product deep in a sigmoid's tail): its luck with one more rounding decides nothing up to this factor."""


EXACT_SITE = Bound(SLACK)


def judge(what: str, exact: Any, eager: Any, fused: Any, gradient: bool = False, bound: Bound = EXACT_SITE) -> None:
    """Raise `Mismatch` where `fused` is another interface than eager or less accurate than the bound allows.

    Of a gradient only what is finite in eager is compared: x / (1 + exp(-x)) has none where silu has one.
    """
    slack, rowwise = (GRADIENT_SLACK, False) if gradient else (bound.slack, True)
    allowed = slack.get(eager.dtype, 0.0) * (bound.derivatives if gradient else 1) if hasattr(eager, "dtype") else 0.0
    if not isinstance(eager, torch.Tensor):
        if eager != fused:
            raise Mismatch(f"{what}: {fused!r} instead of {eager!r}")
        return
    if eager.shape != fused.shape or eager.dtype != fused.dtype or eager.requires_grad != fused.requires_grad:
        raise Mismatch(f"{what}: {_interface(fused)} instead of {_interface(eager)}")
    eager, fused = eager.detach(), fused.detach()
    if eager.is_complex():
        eager, fused, exact = (torch.view_as_real(t.detach()) for t in (eager, fused, exact))
    if bound.flips and not eager.dtype.is_floating_point and eager.dtype is not torch.bool and eager.numel():
        steps = (eager.long() - fused.long()).abs()
        if bool((steps > 1 + eager.double().abs() * 2 * torch.finfo(F32).eps).any()) or (
            float((steps > 0).double().mean()) > bound.flips
        ):
            raise Mismatch(f"{what}: integers differ by {int(steps.max())}")
        return
    if eager.dtype not in slack or eager.numel() == 0:
        if not torch.allclose(eager.double(), fused.double(), rtol=1e-9, atol=0.0, equal_nan=True):
            raise Mismatch(f"{what}: values of dtype {eager.dtype} differ")
        return
    exact = exact.detach().double()
    finite = torch.isfinite(eager)
    if bool((finite & ~torch.isfinite(fused)).any()):
        raise Mismatch(f"{what}: not finite where eager is")
    # Infinity or NaN in eager: by overflow alone where float64 rounds to what fused gives.
    lost = ~finite & ~torch.isfinite(exact) & (not gradient) & (exact.to(eager.dtype) != fused)
    if not torch.equal(eager[lost].isnan(), fused[lost].isnan()):
        raise Mismatch(f"{what}: NaN for infinity or the reverse")
    if bool(torch.isfinite(fused[lost]).any()):
        raise Mismatch(f"{what}: finite where eager and float64 are not")
    usable = finite & torch.isfinite(exact)
    if not bool(usable.any()):
        return
    before = ulps((eager.double() - exact).abs(), exact, eager.dtype, rowwise)[usable]
    after = ulps((fused.double() - exact).abs(), exact, eager.dtype, rowwise)[usable]
    largest = float(after.quantile(1 - bound.flips) if bound.flips else after.max())
    own = float(before.max())
    noisy = bound.noise if own > NOISY else 1.0
    if largest > own * noisy + allowed:
        raise Mismatch(f"{what}: error {largest:.2f} ulp, eager's is {float(before.max()):.2f} ulp")
    if eager.dtype is not F32 and not bound.flips and float(after.mean()) > 1.1 * noisy * float(before.mean()) + 0.05:
        raise Mismatch(f"{what}: mean error {float(after.mean()):.3f} ulp, eager's {float(before.mean()):.3f} ulp")


def _dtype(inputs: Inputs) -> torch.dtype:
    return next(v.dtype for v in inputs.values() if isinstance(v, torch.Tensor))


def _interface(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}{' with gradient' if value.requires_grad else ''}"


def compare(program: Program, inputs: Inputs, train: bool, compiled: Callable[..., Any]) -> None:
    """Outputs, gradients and the inputs as the call left them: all within the bound of eager's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        eager = call(program.function(), inputs, train)
        torch.manual_seed(11)
        exact = call(program.lifted(_dtype(inputs)), widened(inputs), train)
        torch.manual_seed(11)
        fused = call(compiled, inputs, train)
    compare_outcomes(exact, eager, fused)


def compare_outcomes(exact: Outcome, eager: Outcome, fused: Outcome, bound: Bound = EXACT_SITE) -> None:
    """Raise `Mismatch` at the first output, written input or gradient out of bounds."""
    for i, (a, b, c) in enumerate(zip(exact.outputs, eager.outputs, fused.outputs, strict=True)):
        judge(f"output {i}", a, b, c, bound=bound)
    for name, value in eager.inputs.items():
        judge(f"input {name} after the call", exact.inputs[name], value, fused.inputs[name], bound=bound)
    if eager.gradients.keys() != fused.gradients.keys():
        raise Mismatch(f"gradients to {sorted(fused.gradients)} instead of {sorted(eager.gradients)}")
    for name, value in eager.gradients.items():
        judge(f"gradient to {name}", exact.gradients[name], value, fused.gradients[name], True, bound)


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """No compiled code and no report from elsewhere."""
    torch._dynamo.reset()
    npu_fuse.clear_reports()
    yield
    torch._dynamo.reset()


def through_torch_compile(program: Program, mode: Mode, inputs: Inputs, **options: Any) -> list[GraphReport]:
    """`torch.compile(fn, backend="npu_fuse")`, compared with eager; the reports of its graphs."""
    with fresh():
        made = torch.compile(
            program.function(), backend="npu_fuse", options={**OPTIONS, **options}, dynamic=mode.all_dynamic or None
        )
        compare(program, inputs, mode.train, _marked(made) if mode.dynamic else made)
        return npu_fuse.reports()


def _marked(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Every size of activations but the last may change; weights keep theirs."""

    def marked(*inputs: Any) -> Any:
        for value in inputs:
            for dim in range(value.dim() - 1 if value.dim() > 2 else 0):
                torch._dynamo.maybe_mark_dynamic(value, dim)
        return compiled(*inputs)

    return marked


def planned(program: Program, mode: Mode) -> tuple[Callable[..., Any], list[GraphReport]]:
    """The program as npu_fuse rewrites it, run in eager: no hand-off. Reports come with the first call."""
    reports: list[GraphReport] = []
    options = Options.make(OPTIONS)

    def rewrite(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(plan(gm, example_inputs, options, is_training(example_inputs)))
        return gm.forward

    made = torch.compile(program.function(), backend=rewrite, dynamic=mode.all_dynamic or None)
    return _marked(made) if mode.dynamic else made, reports


def recognised(rule_name: str, program: Callable[..., Any], inputs: Inputs, train: bool) -> Site:
    """The first site that the rule finds in the program's graph: neither proved nor lowered."""
    found: list[Site] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        rule = next(r for r in RULES if r.name == rule_name)
        found.extend(s for s in rule.recognise(view_of(gm.graph)) if isinstance(s, Site))
        return gm.forward

    with fresh():
        call(torch.compile(program, backend=keep), inputs, train)
    return found[0]


def sites(reports: Sequence[GraphReport], op: str | None = None) -> list[SiteReport]:
    return [s for r in reports for s in r.sites if op in (None, s.op)]


def described(reports: Sequence[GraphReport]) -> str:
    found = [f"{s.op}: {s.status} {s.code} {s.reason}" for s in sites(reports)]
    return "; ".join([*found, *(e for r in reports for e in r.errors)]) or "no candidate"


def assert_one_fused(reports: Sequence[GraphReport], ops: set[str]) -> None:
    """Exactly one site is there, it is fused to one of `ops`, and nothing failed."""
    assert_no_fault(reports)
    found = [(s.op, s.status) for s in sites(reports)]
    assert len(found) == 1 and found[0][0] in ops and found[0][1] is Status.FUSED, described(reports)


def assert_no_fault(reports: Sequence[GraphReport]) -> None:
    faults = [s for s in sites(reports) if s.status is Status.ERROR]
    assert not faults and not any(r.errors for r in reports), described(reports)


def random(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1.0, shift: float = 0.0) -> Any:
    """Seeded values apart from the proof's probes."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale + shift).to(dtype)
