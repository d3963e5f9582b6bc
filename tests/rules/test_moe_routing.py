"""moe_routing: a block of sorted experts becomes permute, grouped matmuls, unpermute; what is no block stays right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import npu_fuse
from npu_fuse.emit import RunEmitter
from npu_fuse.prove import prove
from npu_fuse.report import Status
from npu_fuse.sites import Form, Site

from .helpers import (
    BF16,
    F32,
    OPTIONS,
    Inputs,
    Mode,
    assert_no_fault,
    call,
    compare_outcomes,
    described,
    fresh,
    random,
    recognised,
    sites,
    widened,
)  # fmt: skip
from .test_grouped_matmul import SPELLINGS, loop
from .test_grouped_rows import ACTS, OTHERWISE, Wrong

EXPERTS, WIDTH, INNER = 6, 16, 24
Grouped = Callable[..., torch.Tensor]
Program = Callable[..., torch.Tensor]


def block(grouped: Grouped, k: int = 2, act: str = "silu", inverse: str = "written", bias: bool = False,
          change: str = "") -> Program:  # fmt: skip
    def run(x: torch.Tensor, chosen: torch.Tensor, probs: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
            up_bias: torch.Tensor) -> torch.Tensor:  # fmt: skip
        chosen, probs = chosen.view(x.shape[0], k), probs.view(x.shape[0], k)  # as many rows as tokens
        weights, ids = probs.reshape(-1), chosen.reshape(-1)
        expert, order = torch.sort(ids)
        rows, factor = x[order // k], weights[order].unsqueeze(-1)
        number = torch.histc(expert.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        if change == "rounded counts":
            number = number.clamp(max=2.0)
        offs = torch.cumsum(number, 0, dtype=torch.int32)
        if change == "masked rows":
            rows = rows.masked_fill((expert >= EXPERTS - 1).unsqueeze(-1), 0.0)
        elif change == "next token":
            rows = x[(order // k + 1) % x.shape[0]]
        elif change == "weight before the experts":
            rows = rows * factor
        y = grouped(rows, up.transpose(-2, -1), offs=offs)
        if bias:
            y.add_(up_bias[expert])
        y = ACTS[act](y)
        if change == "weight before the last matmul":
            y = y * factor
        y = grouped(y, down.transpose(-2, -1), offs=offs)
        if change == "weight squared":
            factor = factor * factor
        elif change == "weights unsorted":
            factor = weights.unsqueeze(-1)
        if not change.startswith("weight before") and change != "weight dropped":
            y = y * factor
        if inverse == "written":
            back = torch.empty_like(order)
            back[order] = torch.arange(order.shape[0])
        else:
            back = torch.argsort(order)
        if change == "order for its inverse":
            back = order
        elif change == "rows left sorted":
            back = torch.arange(order.shape[0])
        elif change == "a token counted twice":
            back = torch.cat((back[:1], back[:-1]))
        y = y[back].view(x.shape[0], k, -1)
        y = y.amax(1) if change == "largest" else y.sum(1)
        return (y if change != "sum clamped" else y.clamp(-1, 1)).to(x.dtype)

    return run


def inputs(dtype: torch.dtype, act: str = "silu", tokens: int = 16, k: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    inner = INNER if act == "relu2" else 2 * INNER
    return {
        "x": random((tokens, WIDTH), dtype, 1),
        "chosen": torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)]),
        "probs": random((tokens, k), dtype, 2).sigmoid(),
        "up": random((EXPERTS, inner, WIDTH), dtype, 3, 0.3), "down": random((EXPERTS, WIDTH, INNER), dtype, 4, 0.3),
        "up_bias": random((EXPERTS, inner), dtype, 5),
    }  # fmt: skip


def compiled(made: Callable[[Grouped], Program], given: Inputs, mode: Mode, **options: Any) -> list[Any]:
    grouped = SPELLINGS["torch" if mode.dtype is BF16 else "fallback"][0]
    with fresh():
        function = torch.compile(made(grouped), backend="npu_fuse", options={**OPTIONS, **options})

        def marked(x: torch.Tensor, chosen: torch.Tensor, probs: torch.Tensor, *rest: torch.Tensor) -> Any:
            for value in (x, chosen, probs) if mode.dynamic else ():
                torch._dynamo.mark_dynamic(value, 0)
            return function(x, chosen, probs, *rest)

        fused = call(marked, given, mode.train)
        reports = npu_fuse.reports()
        assert_no_fault(reports)
        compare_outcomes(call(made(loop), widened(given), mode.train), call(made(grouped), given, mode.train), fused)
        return reports


MODES = (Mode(F32, False), Mode(F32, True), Mode(BF16, False), Mode(BF16, True), Mode(F32, True, dynamic=True),
         Mode(BF16, False, dynamic=True))  # fmt: skip


@pytest.fixture(autouse=True)
def _fallback_op() -> None:
    pytest.importorskip("transformers.integrations.moe")


def check(made: Callable[[Grouped], Program], given: Inputs, mode: Mode) -> None:
    reports = compiled(made, given, mode, fuse=["moe_routing", "grouped_matmul"])
    found = [(s.op, s.status) for s in sites(reports) if s.status is not Status.SKIPPED]
    assert found == [("moe_routing", Status.FUSED)], described(reports)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_block(act: str, mode: Mode) -> None:
    check(lambda g: block(g, act=act), inputs(mode.dtype, act), mode)


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
@pytest.mark.parametrize(("k", "tokens"), [(1, 16), (EXPERTS, 16), (2, 1), (3, 7), (5, 30)])
def test_sizes(k: int, tokens: int, mode: Mode) -> None:
    check(lambda g: block(g, k), inputs(mode.dtype, tokens=tokens, k=k), mode)


@pytest.mark.parametrize("train", [False, True])
def test_more_tokens_than_a_probe_has(train: bool) -> None:
    """Rows are gathered by indices that fit fewer of them as well."""
    check(block, inputs(F32, tokens=256), Mode(F32, train))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_bias_in_place_and_inverse_by_sorting(mode: Mode) -> None:
    check(lambda g: block(g, bias=True, inverse="sorted", act="clamped"), inputs(mode.dtype, "clamped"), mode)


def test_under_gradient_checkpointing() -> None:
    def made(g: Grouped) -> Program:
        return lambda *given: checkpoint(block(g), *given, use_reentrant=False)

    check(made, inputs(BF16), Mode(BF16, True))


def test_exact_numerics_leave_the_block_to_its_matmuls() -> None:
    """The op rounds once where the code rounds each weighted row: not bit-equal in 16 bits."""
    reports = compiled(block, inputs(BF16), Mode(BF16, False), numerics="exact", fuse=["moe_routing", "grouped_matmul"])
    assert [(s.op, s.status) for s in sites(reports) if s.status is not Status.SKIPPED] == [
        ("moe_routing", Status.REFUSED_BY_PROOF), *[("grouped_matmul", Status.FUSED)] * 2,
    ]  # fmt: skip


CHANGES = (
    "rounded counts", "masked rows", "next token", "weight before the experts", "weight before the last matmul",
    "weight squared", "weight dropped", "weights unsorted", "order for its inverse", "rows left sorted",
    "a token counted twice", "largest",
)  # fmt: skip


@pytest.mark.parametrize("mode", [Mode(F32, True), Mode(BF16, False)], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_near_miss_is_no_block(change: str, mode: Mode) -> None:
    if change == "rounded counts":  # rows of no group are torch's own to fill
        mode = Mode(F32, mode.train)
    alone = ["moe_routing", "grouped_matmul"]  # no other rounding inside the experts
    reports = compiled(lambda g: block(g, change=change), inputs(mode.dtype), mode, fuse=alone)
    found = [s.status for s in sites(reports, "moe_routing")]
    assert Status.FUSED not in found, described(reports)


def site() -> Site:
    return recognised("moe_routing", block(SPELLINGS["fallback"][0], act="relu2"), inputs(F32, "relu2"), True)


MUTANTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "another expert": lambda x, ids, p, up, down: (x, (ids + 1) % up.shape[0], p, up, down),
    "slots exchanged": lambda x, ids, p, up, down: (x, ids.flip(1), p, up, down),
    "weights exchanged": lambda x, ids, p, up, down: (x, ids, p.flip(1), up, down),
    "weights of the next token": lambda x, ids, p, up, down: (x, ids, p.roll(1, 0), up, down),
    "weights dropped": lambda x, ids, p, up, down: (x, ids, torch.ones_like(p), up, down),
    "weights without gradient": lambda x, ids, p, up, down: (x, ids, p.detach(), up, down),
    "next token": lambda x, ids, p, up, down: (x.roll(1, 0), ids, p, up, down),
    "experts in another order": lambda x, ids, p, up, down: (x, ids, p, up.flip(0), down),
    "top-k less one": lambda x, ids, p, up, down: (x, ids, torch.cat((p[:, :-1], p[:, -1:] * 0), 1), up, down),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_form_is_refused(mutant: str) -> None:
    found = site()
    assert prove(found, found.forms[0]).holds

    def emit(e: RunEmitter, env: Any) -> Any:
        values = MUTANTS[mutant](*(env[n] for n in found.inputs))
        return found.forms[0].emit(e, {**env, **dict(zip(found.inputs, values, strict=True))})

    assert not prove(found, Form(mutant, emit)).holds


@pytest.mark.parametrize("mutant", OTHERWISE)
def test_wrong_order_is_refused(mutant: str) -> None:
    found = site()
    name, change = OTHERWISE[mutant]
    assert not prove(found, Form(mutant, lambda e, env: found.forms[0].emit(Wrong(e, name, change), env))).holds


def test_silu_is_what_the_experts_use() -> None:
    """The judge itself: the block written with one expert after the other."""
    given = inputs(torch.float64)
    x, chosen, probs, up, down, _ = given.values()
    want = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(chosen.shape[1]):
            gate, rise = (x[t] @ up[chosen[t, j]].T).chunk(2)
            want[t] += probs[t, j] * ((F.silu(gate) * rise) @ down[chosen[t, j]].T)
    torch.testing.assert_close(block(loop)(*given.values()), want)
