"""moe_routing: every expert on every token becomes grouped matmuls of the chosen ones; what is none stays right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import npu_fuse
from npu_fuse.report import Status

from .helpers import (
    BF16,
    F32,
    OPTIONS,
    Mode,
    assert_no_fault,
    call,
    compare_outcomes,
    described,
    fresh,
    random,
    widened,
)
from .helpers import sites as sites_of

EXPERTS, WIDTH, INNER, K, TOKENS = 6, 16, 24, 2, 14
MODES = (Mode(F32, False), Mode(F32, True), Mode(BF16, False))


def gated(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, rise = (x @ up).chunk(2, -1)
    return (F.silu(gate) * rise) @ down


def weights_of(how: str, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """r [T, E], zero where an expert was not chosen."""
    if how == "one-hot":
        return (F.one_hot(chosen, EXPERTS).to(weights.dtype) * weights.unsqueeze(-1)).sum(1)
    return torch.zeros(TOKENS, EXPERTS, dtype=weights.dtype).scatter(1, chosen, weights)


def branches(how: str, change: str = "") -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, router: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = (x @ router).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        r = weights_of(how, weights, chosen) if how in ("one-hot", "scatter") else None
        for e in range(EXPERTS):
            factor = r[:, e] if r is not None else (weights * (chosen == e)).sum(-1)
            if change == "another expert":
                factor = (weights * (chosen == (e + 1) % EXPERTS)).sum(-1)
            elif change == "one left out" and e == 3:
                factor = factor * 0
            elif change == "weight squared":
                factor = factor * factor
            elif change == "once for all":
                factor = (chosen == e).to(x.dtype).sum(-1)
            elif change == "every expert":
                factor = (x @ router).softmax(-1)[:, e]
            last = (e + 1) % EXPERTS if change == "other order" else e
            out = out + gated(x, up[e], down[last]) * factor.unsqueeze(-1)
        return out

    return run


def batched(how: str) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, router: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights, chosen = (x @ router).softmax(-1).topk(K)
        r = weights_of("scatter", weights, chosen)
        if how == "matmul":
            return (gated(x.unsqueeze(0), up, down) * r.t().unsqueeze(-1)).sum(0)
        gate, rise = torch.einsum("th,ehi->tei", x, up).chunk(2, -1)
        return torch.einsum("te,teh->th", r, torch.einsum("tei,eih->teh", F.silu(gate) * rise, down))

    return run


def weighted_before(k: int, change: str = "") -> Callable[..., torch.Tensor]:
    """Every expert gets all tokens, those that did not choose it weighted with 0."""

    def run(x: torch.Tensor, router: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        logits = x @ router
        values, chosen = torch.topk(logits, k, dim=1)
        fill = 0.0 if change == "half for the others" else -torch.inf
        scores = torch.full_like(logits, fill).scatter_(1, chosen, values)
        scores = scores.to(torch.promote_types(x.dtype, torch.float32)).sigmoid().to(x.dtype)
        if change == "normalised":
            scores = scores / scores.sum(-1, keepdim=True)
        rows = x.repeat(EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)
        if change == "another token":
            rows = rows.roll(1, 0)
        gate, rise = torch.bmm(rows.view(EXPERTS, -1, WIDTH), up).chunk(2, dim=-1)
        act = F.softplus(gate) + rise if change == "not zero at zero" else rise * F.silu(gate)
        return torch.bmm(act, down).view(-1, WIDTH).reshape(EXPERTS, -1, WIDTH).sum(0)

    return run


def in_batches(change: str = "") -> Callable[..., torch.Tensor]:
    """Results [E, B, S, H] weighted and added, as GPT-OSS was trained with."""

    def run(x: torch.Tensor, router: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        logits = x @ router
        weights, chosen = torch.topk(logits, K, dim=-1)
        r = torch.zeros_like(logits).scatter_(1, chosen, weights.softmax(1))
        rows = x.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)
        gate, rise = torch.bmm(rows, up).chunk(2, dim=-1)
        y = torch.bmm((rise + 1) * F.silu(gate), down).view(EXPERTS, 2, -1, WIDTH)
        r = r.roll(1, 1) if change == "another expert" else r.roll(1, 0) if change == "another token" else r
        return (y * r.transpose(0, 1).view(EXPERTS, 2, -1)[..., None]).sum(dim=0)

    return run


def compiled(program: Callable[..., torch.Tensor], mode: Mode, tokens: int = TOKENS) -> list[Any]:
    given = {
        "x": random((tokens, WIDTH), mode.dtype, 1), "router": random((WIDTH, EXPERTS), mode.dtype, 2),
        "up": random((EXPERTS, WIDTH, 2 * INNER), mode.dtype, 3, 0.3),
        "down": random((EXPERTS, INNER, WIDTH), mode.dtype, 4, 0.3),
    }  # fmt: skip
    with fresh():
        made = torch.compile(program, backend="npu_fuse", options={**OPTIONS, "fuse": ["moe_routing"]}, fullgraph=True)
        fused = call(made, given, mode.train)
        reports = npu_fuse.reports()
        assert_no_fault(reports)
        compare_outcomes(call(program, widened(given), mode.train), call(program, given, mode.train), fused)
        return reports


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
@pytest.mark.parametrize("how", ["compared", "one-hot", "scatter"])
def test_a_branch_for_each_expert(how: str, mode: Mode) -> None:
    reports = compiled(branches(how), mode)
    assert [s.status for s in sites_of(reports, "moe_routing")] == [Status.FUSED], described(reports)


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
@pytest.mark.parametrize("how", ["matmul", "einsum"])
def test_one_product_for_all_experts(how: str, mode: Mode) -> None:
    reports = compiled(batched(how), mode)
    assert [s.status for s in sites_of(reports, "moe_routing")] == [Status.FUSED], described(reports)


@pytest.mark.parametrize("change", ["another expert", "one left out", "weight squared", "once for all",
                                    "every expert", "other order"])  # fmt: skip
def test_near_miss_is_no_block(change: str) -> None:
    reports = compiled(branches("compared", change), Mode(F32, True))
    assert Status.FUSED not in [s.status for s in sites_of(reports, "moe_routing")], described(reports)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_weighted_before_the_experts(k: int, mode: Mode) -> None:
    reports = compiled(weighted_before(k), mode)
    assert [s.status for s in sites_of(reports, "moe_routing")] == [Status.FUSED], described(reports)


@pytest.mark.parametrize("change", ["half for the others", "normalised", "another token", "not zero at zero"])
def test_weighted_before_near_miss(change: str) -> None:
    reports = compiled(weighted_before(2, change), Mode(F32, True))
    assert Status.FUSED not in [s.status for s in sites_of(reports, "moe_routing")], described(reports)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("tokens", [TOKENS, 256])
def test_results_in_batches(tokens: int, mode: Mode) -> None:
    reports = compiled(in_batches(), mode, tokens)
    assert [s.status for s in sites_of(reports, "moe_routing")] == [Status.FUSED], described(reports)


@pytest.mark.parametrize("change", ["another expert", "another token"])
def test_results_in_batches_near_miss(change: str) -> None:
    reports = compiled(in_batches(change), Mode(F32, True))
    assert Status.FUSED not in [s.status for s in sites_of(reports, "moe_routing")], described(reports)
