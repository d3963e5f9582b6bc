"""Masks of experts that are elsewhere: nothing where the graph's own top-k chose among those that are here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import npu_fuse
from npu_fuse.report import Status

from .helpers import BF16, F32, OPTIONS, Inputs, Mode, call, compare_outcomes, described, fresh, random, sites, widened
from .test_grouped_matmul import SPELLINGS, loop
from .test_moe_routing import EXPERTS, INNER, WIDTH, Grouped, Program

TOKENS, K = 16, 2


def masked(grouped: Grouped, change: str = "") -> Program:
    """As transformers 5.10 writes it: rows of experts past the last are set to zero in place, before and behind."""

    def run(x: torch.Tensor, scores: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        probs, chosen = torch.topk(scores, K, dim=-1)
        if change == "written after the choice":
            chosen.add_(1)
        ids = chosen.reshape(-1)
        expert, order = torch.sort(ids)
        rows, factor = x[order // K], probs.reshape(-1)[order].unsqueeze(-1)
        offs = torch.cumsum(torch.histc(expert.float(), EXPERTS, 0, EXPERTS - 1), 0, dtype=torch.int32)
        if change == "moved before the mask":
            expert.add_(1)
        elsewhere = (expert > EXPERTS - 1 if change == "greater" else expert >= EXPERTS).unsqueeze(-1)
        if change == "last expert masked":
            elsewhere = (expert >= EXPERTS - 1).unsqueeze(-1)
        elif change == "mask written":
            elsewhere.logical_not_()
        expert.clamp_(max=EXPERTS - 1)
        rows.masked_fill_(elsewhere, 0.0)
        gate, rise = grouped(rows, up.transpose(-2, -1), offs=offs).chunk(2, -1)
        y = grouped(F.silu(gate) * rise, down.transpose(-2, -1), offs=offs) * factor
        y.masked_fill_(elsewhere, 0.0)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return y[back].view(x.shape[0], K, -1).sum(1).to(x.dtype)

    return run


def inputs(dtype: torch.dtype, choices: int = EXPERTS) -> Inputs:
    return {
        "x": random((TOKENS, WIDTH), dtype, 1), "scores": random((TOKENS, choices), dtype, 2).sigmoid(),
        "up": random((EXPERTS, 2 * INNER, WIDTH), dtype, 3, 0.3),
        "down": random((EXPERTS, WIDTH, INNER), dtype, 4, 0.3),
    }  # fmt: skip


def statuses(change: str, given: Inputs, mode: Mode) -> list[Any]:
    pytest.importorskip("transformers.integrations.moe")
    grouped = SPELLINGS["torch" if mode.dtype is BF16 else "fallback"][0]
    options = {**OPTIONS, "fuse": ["moe_routing", "grouped_matmul"]}
    with fresh():
        fused = call(torch.compile(masked(grouped, change), backend="npu_fuse", options=options), given, mode.train)
        reports = npu_fuse.reports()
        eager = call(masked(grouped, change), given, mode.train)
        compare_outcomes(call(masked(loop, change), widened(given), mode.train), eager, fused)
        found = [s.status for s in sites(reports, "moe_routing")]
        assert found, described(reports)
        return found


@pytest.mark.parametrize("mode", [Mode(F32, True), Mode(BF16, False), Mode(BF16, True)], ids=str)
@pytest.mark.parametrize("change", ["", "greater"])
def test_a_mask_that_is_false_everywhere_is_looked_through(change: str, mode: Mode) -> None:
    assert statuses(change, inputs(mode.dtype), mode) == [Status.FUSED]


@pytest.mark.parametrize(
    ("change", "choices"),
    [
        ("", EXPERTS + 2),  # an expert past the last may be chosen
        ("last expert masked", EXPERTS),
        ("written after the choice", EXPERTS),
        ("moved before the mask", EXPERTS),
        ("mask written", EXPERTS),
    ],
)
def test_a_mask_that_may_hold_is_a_miss(change: str, choices: int) -> None:
    assert Status.FUSED not in statuses(change, inputs(F32, choices), Mode(F32, False))
