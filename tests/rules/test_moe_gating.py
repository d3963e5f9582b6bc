"""moe_gating: routers in every order become one op; near misses stay; training and ties are left alone by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fuse
from npu_fuse import dialect as d
from npu_fuse.emit import RunEmitter
from npu_fuse.passes import RULES
from npu_fuse.prove import prove
from npu_fuse.report import GraphReport, Status
from npu_fuse.sites import Form, Site
from npu_fuse.targets import Target

from .helpers import (
    BF16,
    F16,
    F32,
    OPTIONS,
    Inputs,
    Mode,
    assert_no_fault,
    call,
    compare_outcomes,
    described,
    fresh,
    recognised,
    sites,
    widened,
)
from .routers import EXPERTS, GROUPED, NEAR, PARTS, SPELLINGS, K, Router
from .test_moe_routing import block
from .test_moe_routing import inputs as block_inputs

MODES = (Mode(F32, False), Mode(BF16, False), Mode(F16, False), Mode(F32, False, dynamic=True))


def logits(tokens: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[T, 16] without ties: each row has the same values, which bfloat16 holds, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.3125 * i - 2.5 + 0.03125 * (i * i % 5) for i in range(EXPERTS)])
    return values[torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)].to(dtype)


def inputs(dtype: torch.dtype, tokens: int = 24) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    return {"x": logits(tokens, dtype), "bias": (0.3 * torch.randn(EXPERTS, generator=generator)).to(dtype)}


def dense(router: Router) -> Callable[..., Any]:
    """The weights by expert: in no order of the chosen."""

    def run(x: torch.Tensor, bias: torch.Tensor) -> Any:
        weights, experts = router(x, bias)
        return weights.new_zeros(x.shape).scatter(1, experts, weights)

    return run


def compiled(router: Router, mode: Mode, given: Inputs | None = None, **options: Any) -> list[GraphReport]:
    given = inputs(mode.dtype) if given is None else given
    with fresh():
        function = torch.compile(dense(router), backend="npu_fuse", options={**OPTIONS, **options})

        def marked(x: torch.Tensor, bias: torch.Tensor) -> Any:
            if mode.dynamic:
                torch._dynamo.mark_dynamic(x, 0)
            return function(x, bias)

        fused = call(marked, given, mode.train, ("bias",))
        reports = npu_fuse.reports()
        assert_no_fault(reports)
        exact, eager = (call(dense(router), g, mode.train, ("bias",)) for g in (widened(given), given))
        compare_outcomes(exact, eager, fused)
        return reports


def found(reports: list[GraphReport]) -> list[Status]:
    return [s.status for s in sites(reports, "moe_gating")]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling: str, mode: Mode) -> None:
    reports = compiled(SPELLINGS[spelling], mode)
    assert found(reports) == [Status.FUSED], described(reports)


@pytest.mark.parametrize("mode", [Mode(F32, True), Mode(BF16, True)], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_training_is_left_alone_unless_asked_for(spelling: str, mode: Mode) -> None:
    reports = compiled(SPELLINGS[spelling], mode)
    assert found(reports) == [Status.SKIPPED] and "tied" in sites(reports, "moe_gating")[0].reason, described(reports)
    asked = compiled(SPELLINGS[spelling], mode, moe_gating="always")
    wanted = Status.FUSED if spelling in GROUPED else Status.REFUSED_BY_PROFIT
    assert found(asked) == [wanted], described(asked)


def test_never_and_exact() -> None:
    assert found(compiled(SPELLINGS["sigmoid"], Mode(F32, False), moe_gating="never")) == [Status.SKIPPED]
    reports = compiled(SPELLINGS["logits chosen"], Mode(F32, False), numerics="exact")
    assert found(reports) == [Status.REFUSED_BY_PROOF] and "tied" in sites(reports, "moe_gating")[0].reason


@pytest.mark.parametrize("mode", [Mode(F32, False), Mode(BF16, False)], ids=str)
@pytest.mark.parametrize("near", NEAR)
def test_near_miss(near: str, mode: Mode) -> None:
    reports = compiled(NEAR[near], mode)
    assert Status.FUSED not in found(reports), described(reports)


@pytest.mark.parametrize("part", PARTS)
def test_only_the_choice(part: str) -> None:
    """What is done to the weights stays as it is."""
    reports = compiled(PARTS[part], Mode(F32, False))
    assert Status.FUSED not in found(reports) or sites(reports, "moe_gating")[0].after.ops <= 2, described(reports)


def test_probabilities_that_are_read_elsewhere_stay() -> None:
    """The softmax would be computed anyway: nothing is saved. Sigmoids chosen in groups still pay."""

    def run(x: torch.Tensor, bias: torch.Tensor) -> Any:
        scores = x.float().softmax(-1)
        weights, experts = scores.topk(K, -1)
        return weights, experts.float() + scores.mean(-1, keepdim=True)

    reports = _alone(run, inputs(F32))
    assert found(reports) == [Status.REFUSED_BY_PROFIT], described(reports)

    def grouped(x: torch.Tensor, bias: torch.Tensor) -> Any:
        weights = dense(SPELLINGS["groups by pairs"])(x, bias)
        return weights, x.float().sigmoid().mean(0)

    reports = _alone(grouped, inputs(F32))
    assert found(reports) == [Status.FUSED], described(reports)


def test_the_order_that_is_left_open_is_not_read() -> None:
    def run(x: torch.Tensor, bias: torch.Tensor) -> Any:
        experts = torch.topk(x.float().sigmoid() + bias, K, sorted=False)[1]
        weights = x.float().sigmoid().gather(-1, experts)
        return (weights / weights.sum(-1, keepdim=True))[:, :1], experts

    reports = _alone(run, inputs(F32))
    assert found(reports) == [Status.MISSED] and "order" in sites(reports, "moe_gating")[0].reason


def _alone(function: Callable[..., Any], given: Inputs, **options: Any) -> list[GraphReport]:
    with fresh():
        fused = call(torch.compile(function, backend="npu_fuse", options={**OPTIONS, **options}), given, False)
        reports = npu_fuse.reports()
        assert_no_fault(reports)
        compare_outcomes(call(function, widened(given), False), call(function, given, False), fused)
        return reports


# --- with the experts ------------------------------------------------------------------------------


def _whole(grouped: Any) -> Callable[..., torch.Tensor]:
    experts_ = block(grouped)

    def run(x: torch.Tensor, scores: torch.Tensor, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor) -> Any:
        weights, chosen = torch.topk(torch.softmax(scores, -1, dtype=torch.float32), 2, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return experts_(x, chosen, weights, up, down, bias), scores

    return run


def test_experts_are_found_behind_the_op() -> None:
    """They read its int32 experts: no cast is left, and their rows need no mask."""
    given = block_inputs(BF16)
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(16, 6, generator=generator).argsort(-1)
    given = {"x": given["x"], "scores": torch.tensor([-2.0, -1, 0, 1, 2, 3])[rows].to(BF16), "up": given["up"],
             "down": given["down"], "up_bias": given["up_bias"]}  # fmt: skip
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    run = _whole(torch._grouped_mm)
    with fresh(), torch.no_grad():
        fused = torch.compile(run, backend="npu_fuse", options={**OPTIONS, "handoff": keep})(*given.values())
        reports = npu_fuse.reports()
    torch.testing.assert_close(fused[0], run(*given.values())[0], rtol=2e-2, atol=2e-2)
    assert [(s.op, s.status) for s in sites(reports)][:2] == [
        ("moe_gating", Status.FUSED), ("moe_routing", Status.FUSED),
    ], described(reports)  # fmt: skip
    assert not any(d.name(n) in ("topk", "softmax", "cast:other") for n in graphs[0].graph.nodes)
    (permute,) = [n for n in graphs[0].graph.nodes if "npu_moe_token_permute" in str(n.target)]
    assert permute.args[1].meta["example_value"].dtype is torch.int32


# --- mutants ---------------------------------------------------------------------------------------


def site(name: str) -> Site:
    return recognised("moe_gating", dense(SPELLINGS[name]), inputs(F32), False)


class Wrong(RunEmitter):
    """The op called with other arguments, or its results changed."""

    def __init__(self, e: RunEmitter, change: dict[str, Any]) -> None:
        super().__init__(e.lifted, e.target, e.sizes)
        self.change = change

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        change = dict(self.change)
        result = change.pop("result", lambda y, ids, rest: (y, ids, rest))
        if "k" in change and "k" not in kwargs:
            args = (args[0], args[1] + change.pop("k"))
        elif "k" in change:
            kwargs["k"] += change.pop("k")
        kwargs = {k: v for k, v in {**kwargs, **change}.items() if v != "left out"}
        return result(*super().fused(name, *args, **kwargs))


MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "another k": ("groups by pairs", {"k": 1}),
    "one less": ("logits chosen", {"k": -1}),
    "no bias": ("groups by pairs", {"bias": "left out"}),
    "other groups": ("groups by pairs", {"group_select_mode": 0}),
    "sums of two": ("groups by their largest", {"group_select_mode": 1}),
    "one group less": ("groups by pairs", {"k_group": 3}),
    "softmax for sigmoid": ("sigmoid", {"norm_type": 0}),
    "epsilon": ("sigmoid", {"eps": 1e-3}),
    "no scale": ("groups by pairs", {"routed_scaling_factor": "left out"}),
    "not normalised": ("logits chosen", {"renorm": 0}),
    "weights in another order": ("normalised in place", {"result": lambda y, i, r: (y.flip(-1), i, r)}),
    "the next expert": ("probabilities", {"result": lambda y, i, r: (y, (i + 1) % EXPERTS, r)}),
    "experts in another order": ("sigmoid with a bias", {"result": lambda y, i, r: (y, i.flip(-1), r)}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_form_is_refused(mutant: str) -> None:
    name, change = MUTANTS[mutant]
    found_ = site(name)
    right = found_.forms[0]
    assert prove(found_, right).holds
    assert not prove(found_, Form(mutant, lambda e, env: right.emit(Wrong(e, change), env))).holds


# --- what the NPU's ops take -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "soc", "refused"),
    [
        ("groups by pairs", "Ascend910B3", ""), ("logits chosen", "Ascend910_9391", ""),
        ("probabilities", "Ascend310P3", "no kernel"), ("groups by pairs", "Ascend310P3", "no kernel"),
    ],
)  # fmt: skip
def test_limits_by_chip(name: str, soc: str, refused: str) -> None:
    rule, found_ = next(r for r in RULES if r.name == "moe_gating"), site(name)
    assert rule.limits is not None
    refusal = rule.limits(found_, found_.forms[0], Target("npu", "npu", soc, present=False))
    assert (refusal.reason if refusal is not None else "").find(refused) >= 0 and bool(refusal) == bool(refused)


def test_torchair_has_no_renorm() -> None:
    rule, found_ = next(r for r in RULES if r.name == "moe_gating"), site("normalised in place")
    assert rule.limits is not None
    target = Target("npu", "npu", "Ascend910B3", present=False, names_in_graph=True)
    refusals = [rule.limits(found_, form, target) for form in found_.forms]
    assert refusals[0] is not None and "renorm" in refusals[0].reason and refusals[-1] is None
