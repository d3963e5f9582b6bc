"""grouped_matmul: every call of a grouped matmul fuses, trains, and stays within the bound; wrong forms are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import npu_fuse
from npu_fuse.emit import RunEmitter
from npu_fuse.passes import RULES
from npu_fuse.prove import prove
from npu_fuse.sites import Form, Site
from npu_fuse.view import view_of

from .helpers import (
    BF16,
    F32,
    OPTIONS,
    assert_no_fault,
    call,
    compare_outcomes,
    described,
    fresh,
    random,
    sites,
    widened,
)

EXPERTS, WIDTH, INNER = 6, 16, 24
ALONE = {**OPTIONS, "fuse": ["grouped_matmul"]}
"""Without the routing around, which would take the whole block."""
Block = Callable[..., torch.Tensor]


def loop(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """The judge: one matmul for each expert, in any dtype."""
    ends = offs.tolist()
    parts = [x[a:b] @ w for a, b, w in zip([0, *ends[:-1]], ends, weight.unbind(), strict=True)]
    return torch.cat([*parts, torch.zeros(x.shape[0] - ends[-1], weight.shape[2], dtype=x.dtype)])


def aten(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._grouped_mm.default(x, weight, offs)


def fallback(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offs)


SPELLINGS = {
    "torch": (torch._grouped_mm, BF16),
    "functional": (torch.nn.functional.grouped_mm, BF16),
    "aten": (aten, BF16),
    "fallback": (fallback, F32),
}


@pytest.fixture(autouse=True)
def _fallback_op() -> None:
    pytest.importorskip("transformers.integrations.moe")


def block(grouped: Callable[..., torch.Tensor], k: int, transposed: bool = True, counts: str = "histc") -> Block:
    """Top-k of a softmax, rows sorted by expert, relu² between two grouped matmuls, weighted and summed."""

    def run(x: torch.Tensor, router: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = torch.topk((x @ router).softmax(-1), k, dim=-1)
        expert, order = torch.sort(chosen.reshape(-1))
        if counts == "histc":
            number = torch.histc(expert.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        else:
            number = torch.bincount(expert, minlength=EXPERTS)
        offs = torch.cumsum(number, 0, dtype=torch.int32)
        first, second = (w.transpose(-2, -1) if transposed else w for w in (up, down))
        y = grouped(torch.relu(grouped(x[order // k], first, offs=offs)).square(), second, offs=offs)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return y[back].view(x.shape[0], k, -1).sum(1)

    return run


def inputs(dtype: torch.dtype, tokens: int = 20, transposed: bool = True, route: str = "") -> dict[str, Any]:
    router = random((WIDTH, EXPERTS), dtype, 2)
    if route == "one":
        router = torch.cat((router[:, :1] * 0, random((WIDTH, EXPERTS - 1), dtype, 2) * 0 - 1), 1)
    if route == "empty":
        router[:, 1::2] = 0
    x = random((tokens, WIDTH), dtype, 1)
    up, down = (INNER, WIDTH), (WIDTH, INNER)
    if not transposed:
        up, down = down, up
    return {
        "x": x.abs() if route else x, "router": router.abs() if route == "empty" else router,
        "up": random((EXPERTS, *up), dtype, 3), "down": random((EXPERTS, *down), dtype, 4),
    }  # fmt: skip


def check(made: Callable[[Callable[..., Any]], Block], spelling: str, given: dict[str, Any], train: bool,
          dynamic: bool = False, expected: int = 2) -> None:  # fmt: skip
    grouped = SPELLINGS[spelling][0]
    with fresh():
        compiled = torch.compile(made(grouped), backend="npu_fuse", options=ALONE)

        def marked(x: torch.Tensor, *rest: torch.Tensor) -> Any:
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)
            return compiled(x, *rest)

        fused = call(marked, given, train)
        reports = npu_fuse.reports()
        assert_no_fault(reports)
        found = [s.status for s in sites(reports, "grouped_matmul")]
        assert found == [npu_fuse.report.Status.FUSED] * expected, described(reports)
        eager = call(made(grouped), given, train)
        assert all(torch.equal(a, b) for a, b in zip(eager.outputs, fused.outputs, strict=True))
        compare_outcomes(call(made(loop), widened(given), train), eager, fused)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_fuses(spelling: str, train: bool, dynamic: bool) -> None:
    check(lambda g: block(g, 2), spelling, inputs(SPELLINGS[spelling][1]), train, dynamic)


@pytest.mark.parametrize("spelling", ["torch", "fallback"])
@pytest.mark.parametrize(("tokens", "k", "route"), [(20, 2, "one"), (20, 2, "empty"), (1, 1, ""), (7, EXPERTS, "")])
def test_routing_fuses(tokens: int, k: int, route: str, spelling: str) -> None:
    check(lambda g: block(g, k), spelling, inputs(SPELLINGS[spelling][1], tokens, route=route), True)


@pytest.mark.parametrize("spelling", ["torch", "fallback"])
@pytest.mark.parametrize("counts", ["histc", "bincount"])
def test_weights_as_they_are_and_counts(counts: str, spelling: str) -> None:
    given = inputs(SPELLINGS[spelling][1], transposed=False)
    check(lambda g: block(g, 2, False, counts), spelling, given, True)


@pytest.mark.parametrize("spelling", ["torch", "fallback"])
def test_under_gradient_checkpointing(spelling: str) -> None:
    def made(g: Callable[..., Any]) -> Block:
        return lambda *given: checkpoint(block(g, 2), *given, use_reentrant=False)

    check(made, spelling, inputs(SPELLINGS[spelling][1]), True)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_no_group_never_matter(dtype: torch.dtype, transposed: bool) -> None:
    """NaN in rows past the last end reaches no weight gradient and no row of a group."""
    x = random((32, WIDTH), dtype, 1).requires_grad_()
    stored = random((EXPERTS, 8, WIDTH) if transposed else (EXPERTS, WIDTH, 8), dtype, 2).requires_grad_()
    weight = stored.transpose(1, 2) if transposed else stored
    ends = torch.tensor([4, 4, 9, 20, 20, 25], dtype=torch.int32)
    poisoned = x.detach().clone()
    poisoned[25:] = torch.nan
    poisoned.requires_grad_()
    dy = random((32, 8), dtype, 3)
    bad = dy.clone()
    bad[25:] = torch.nan
    for zero_rest in (False, True):
        y = torch.ops.npu_fuse.grouped_matmul(poisoned, weight, ends, zero_rest)
        dx, dw = torch.autograd.grad(y, (poisoned, stored), bad)
        want = loop(x, weight, offs=ends)
        dx_want, dw_want = torch.autograd.grad(want, (x, stored), dy)
        assert not zero_rest or (not bool(y[25:].count_nonzero()) and not bool(dx[25:].count_nonzero()))
        close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
        torch.testing.assert_close(y[:25], want[:25], **close)
        torch.testing.assert_close(dx[:25], dx_want[:25], **close)
        torch.testing.assert_close(dw, dw_want, **close)
        assert dw.stride() == stored.stride()


def test_second_derivative() -> None:
    given = [random((12, 8), torch.float64, 1), random((3, 8, 4), torch.float64, 2)]
    ends = torch.tensor([5, 5, 12])
    for value in given:
        value.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: torch.ops.npu_fuse.grouped_matmul(x, w, ends, False), given)


def site_of(spelling: str = "torch", train: bool = True) -> Site:
    """The first site of a block's graph."""
    found: list[Site] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        rule = next(r for r in RULES if r.name == "grouped_matmul")
        found.extend(s for s in rule.recognise(view_of(gm.graph)) if isinstance(s, Site))
        return gm.forward

    with fresh():
        grouped, dtype = SPELLINGS[spelling]
        call(torch.compile(block(grouped, 2), backend=keep), inputs(dtype), train)
    return found[0]


MUTANTS: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "experts in another order": lambda x, w, ends: (x, w.flip(0), ends),
    "next expert": lambda x, w, ends: (x, w.roll(1, 0), ends),
    "counts for cumulative ends": lambda x, w, ends: (x, w, ends.diff(prepend=ends[:1] * 0).clamp(max=x.shape[0])),
    "starts for ends": lambda x, w, ends: (x, w, torch.cat((ends[:1] * 0, ends[:-1]))),
    "ends one too early": lambda x, w, ends: (x, w, torch.cat(((ends[:-1] - 1).clamp(min=0), ends[-1:]))),
    "ends one too late": lambda x, w, ends: (x, w, (ends + 1).clamp(max=x.shape[0])),
    "rows in another order": lambda x, w, ends: (x.flip(0), w, ends),
    "unsorted groups": lambda x, w, ends: (x.roll(1, 0), w, ends),
}


@pytest.mark.parametrize("spelling", ["torch", "fallback"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_form_is_refused(mutant: str, spelling: str) -> None:
    site = site_of(spelling)
    x, weight, ends = site.inputs

    def emit(e: RunEmitter, env: Any) -> Any:
        return site.forms[0].emit(
            e, dict(zip(site.inputs, MUTANTS[mutant](env[x], env[weight], env[ends]), strict=True))
        )

    assert prove(site, site.forms[0]).holds
    assert not prove(site, Form(mutant, emit)).holds


def test_lost_gradient_is_refused() -> None:
    site = site_of()
    for lost in site.inputs[:2]:

        def emit(e: RunEmitter, env: Any, lost: Any = lost) -> Any:
            return site.forms[0].emit(e, {**env, lost: env[lost].detach()})

        assert "gradient" in prove(site, Form("lost", emit)).reason


@pytest.mark.parametrize("change", ["no top-k", "wider top-k", "other bins"])
def test_rows_past_the_end_stay_zeros_where_nothing_says_that_there_are_none(change: str) -> None:
    """The fallback's contract is zeros: kept unless the indices are those of a top-k among the experts."""

    def made(g: Callable[..., Any]) -> Block:
        def run(x: torch.Tensor, router: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            scores = x @ router
            if change == "wider top-k":
                chosen = torch.topk(torch.cat((scores, scores), -1), 1).indices
            else:
                chosen = torch.topk(scores, 1).indices + (2 if change == "no top-k" else 0)
            expert, order = torch.sort(chosen.reshape(-1))
            high = EXPERTS - 1 - (change == "other bins")
            number = torch.histc(expert.float(), bins=EXPERTS, min=0, max=high)
            offs = torch.cumsum(number, 0, dtype=torch.int32)
            return g(x[order], up.transpose(-2, -1), offs=offs)

        return run

    check(made, "fallback", inputs(F32), True, expected=1)
    with fresh():
        call(torch.compile(made(fallback), backend="npu_fuse", options=ALONE), inputs(F32), False)
        assert [s.params["rest"] for s in sites(npu_fuse.reports(), "grouped_matmul")] == ["zeros"]


def test_what_is_no_site() -> None:
    """Weights by groups (a 2-D second operand) stay torch's own call."""

    def gradient(x: torch.Tensor, dy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x.t(), dy, offs=ends)

    given = {"x": random((16, 8), BF16, 1), "dy": random((16, 8), BF16, 2), "ends": torch.tensor([3, 16]).int()}
    with fresh():
        fused = call(torch.compile(gradient, backend="npu_fuse", options=ALONE), given, False)
        found = sites(npu_fuse.reports())
        assert [s.code for s in found] == ["grouped_matmul.arguments"]
        assert torch.equal(fused.outputs[0], gradient(**given))
