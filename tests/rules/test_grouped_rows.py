"""Experts with gathered weights (`bmm(W[ids], x)`) become grouped matmuls of sorted rows, and only what may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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
    widened,
)
from .helpers import sites as sites_of

EXPERTS, WIDTH, INNER, K = 5, 16, 24, 2
Program = Callable[..., torch.Tensor]
MODES = (Mode(F32, False), Mode(F32, True), Mode(BF16, False), Mode(BF16, True), Mode(F32, True, dynamic=True))


def silu_chunks(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def clamped_interleaved(y: torch.Tensor) -> torch.Tensor:
    gate, up = y[..., ::2].clamp(max=2.0), y[..., 1::2].clamp(-2.0, 2.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def halves_by_split(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.split(y.shape[-1] // 2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


ACTS = {
    "silu": silu_chunks,
    "clamped": clamped_interleaved,
    "split": halves_by_split,
    "relu2": lambda y: F.relu(y) ** 2,
}


def product(x: torch.Tensor, weight: torch.Tensor, how: str) -> torch.Tensor:
    """x [S, I] by weight [S, O, I]."""
    if how == "matrix first":
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)
    if how == "row first":
        return torch.bmm(x.unsqueeze(1), weight.transpose(1, 2)).squeeze(1)
    return (x[:, None, :] @ weight.mT)[:, 0]


def block(act: str = "silu", how: str = "matrix first", bias: str = "", slots: str = "repeat", between: str = "",
          second: str = "") -> Program:  # fmt: skip
    """The experts of k slots for each token, weighted and summed."""

    def run(x: torch.Tensor, chosen: torch.Tensor, probs: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
            up_bias: torch.Tensor, down_bias: torch.Tensor) -> torch.Tensor:  # fmt: skip
        ids = chosen.reshape(-1)
        if slots == "repeat":
            rows = x.repeat_interleave(K, dim=0)
        elif slots == "expand":
            rows = x[:, None].expand(-1, K, -1).reshape(-1, WIDTH)
        elif slots == "tiled":
            rows, ids = x.repeat(K, 1), chosen.t().reshape(-1)
        y = product(rows, up[ids], how)
        if bias == "in place":
            y.add_(up_bias[ids])
        elif bias:
            y = y + up_bias[ids]
        y = ACTS[act](y)
        if between == "rows":
            y = y.cumsum(0)
        elif between == "softmax":
            y = y.softmax(0)
        elif between == "shift":
            y = y.roll(1, 0)
        if second == "flipped":
            ids = ids.flip(0)
        elif second == "next":
            ids = (ids + 1) % EXPERTS
        y = product(y, down[ids], how)
        if bias == "in place":
            y.add_(down_bias[ids])
        elif bias:
            y = y + down_bias[ids]
        if slots == "tiled":
            return (y.view(K, -1, WIDTH) * probs.t().contiguous().unsqueeze(-1)).sum(0)
        return (y.view(-1, K, WIDTH) * probs.unsqueeze(-1)).sum(1)

    return run


def inputs(dtype: torch.dtype, act: str = "silu", tokens: int = 12) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    inner = INNER if act == "relu2" else 2 * INNER
    return {
        "x": random((tokens, WIDTH), dtype, 1),
        "chosen": torch.randint(0, EXPERTS, (tokens, K), generator=generator),
        "probs": random((tokens, K), dtype, 2).sigmoid(),
        "up": random((EXPERTS, inner, WIDTH), dtype, 3, 0.3), "down": random((EXPERTS, WIDTH, INNER), dtype, 4, 0.3),
        "up_bias": random((EXPERTS, inner), dtype, 5), "down_bias": random((EXPERTS, WIDTH), dtype, 6),
    }  # fmt: skip


def compiled(program: Program, given: Inputs, mode: Mode, **options: Any) -> list[Any]:
    """Run beside eager and float64 within the bound; the reports."""
    with fresh():
        made = torch.compile(program, backend="npu_fuse", options={**OPTIONS, **options})

        def marked(x: torch.Tensor, chosen: torch.Tensor, probs: torch.Tensor, *rest: torch.Tensor) -> Any:
            for value in (x, chosen, probs) if mode.dynamic else ():
                torch._dynamo.mark_dynamic(value, 0)
            return made(x, chosen, probs, *rest)

        fused = call(marked, given, mode.train)
        reports = npu_fuse.reports()
        assert_no_fault(reports)
        compare_outcomes(call(program, widened(given), mode.train), call(program, given, mode.train), fused)
        return reports


def check(program: Program, given: Inputs, mode: Mode) -> None:
    # What is inside the experts stays as it was written: only the order of the rows is judged here.
    reports = compiled(program, given, mode, fuse=["moe_routing"])
    found = sites_of(reports, "moe_routing")
    assert [(s.status, s.params["matmuls"]) for s in found] == [(Status.FUSED, "2")], described(reports)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activation(act: str, mode: Mode) -> None:
    check(block(act), inputs(mode.dtype, act), mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("how", ["row first", "matmul"])
def test_spelling_of_the_product(how: str, mode: Mode) -> None:
    check(block(how=how), inputs(mode.dtype), mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("bias", ["in place", "added"])
def test_bias(bias: str, mode: Mode) -> None:
    check(block(bias=bias, act="clamped"), inputs(mode.dtype), mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("slots", ["expand", "tiled"])
def test_slots(slots: str, mode: Mode) -> None:
    check(block(slots=slots), inputs(mode.dtype), mode)


@pytest.mark.parametrize("route", ["one", "first and last"])
def test_routing(route: str) -> None:
    given = inputs(F32)
    given["chosen"] = torch.full((12, K), 3) if route == "one" else torch.tensor([[0, EXPERTS - 1]] * 12)
    check(block(), given, Mode(F32, True))


@pytest.mark.parametrize("mode", [Mode(F32, True), Mode(BF16, False)], ids=str)
@pytest.mark.parametrize("change", ["rows", "softmax", "shift"])
def test_rows_that_are_tied_together_are_no_chain(change: str, mode: Mode) -> None:
    reports = compiled(block(between=change), inputs(mode.dtype), mode, fuse=["moe_routing"])
    assert all(s.params["matmuls"] == "1" for s in sites_of(reports, "moe_routing")), described(reports)


@pytest.mark.parametrize("mode", [Mode(F32, True), Mode(BF16, False)], ids=str)
@pytest.mark.parametrize("change", ["flipped", "next"])
def test_other_experts_for_the_second_product_are_no_chain(change: str, mode: Mode) -> None:
    reports = compiled(block(second=change), inputs(mode.dtype), mode, fuse=["moe_routing"])
    assert all(s.params["matmuls"] == "1" for s in sites_of(reports, "moe_routing")), described(reports)


@pytest.mark.parametrize("act", ["silu", "clamped"])
def test_gates_between_the_experts_are_fused_next(act: str) -> None:
    """And know that they are trained: the NPU's clipped gate has no backward."""
    reports = compiled(block(act), inputs(F32, act), Mode(F32, True))
    ops = sorted(s.op for s in sites_of(reports) if s.status is Status.FUSED)
    assert ops == sorted(["moe_routing", "swiglu" if act == "silu" else "clipped_swiglu"]), described(reports)


def site(bias: str = "") -> Site:
    return recognised("moe_routing", block("relu2", bias=bias), inputs(F32, "relu2"), True)


def _twice(indices: torch.Tensor) -> torch.Tensor:
    return torch.cat((indices[:, :1], indices[:, :1]), 1)


MUTANTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "another expert": lambda x, ids, up, down: (x, (ids + 1) % up.shape[0], up, down),
    "first expert twice": lambda x, ids, up, down: (x, _twice(ids), up, down),
    "slots exchanged": lambda x, ids, up, down: (x, ids.flip(1), up, down),
    "next token": lambda x, ids, up, down: (x.roll(1, 0), ids, up, down),
    "experts of the second matmul in another order": lambda x, ids, up, down: (x, ids, up, down.flip(0)),
    "last expert never": lambda x, ids, up, down: (x, ids.clamp(max=up.shape[0] - 2), up, down),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_form_is_refused(mutant: str) -> None:
    found = site()
    assert prove(found, found.forms[0]).holds

    def emit(e: RunEmitter, env: Any) -> Any:
        values = MUTANTS[mutant](*(env[n] for n in found.inputs))
        return found.forms[0].emit(e, {**env, **dict(zip(found.inputs, values, strict=True))})

    assert not prove(found, Form(mutant, emit)).holds


class Wrong(RunEmitter):
    """An emitter that writes one op otherwise."""

    def __init__(self, like: RunEmitter, name: str, change: Callable[..., Any]) -> None:
        super().__init__(like.lifted, like.target)
        self.name, self.change = name, change

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        result = super().fused(name, *args, **kwargs)
        return self.change(result) if name == self.name else result


OTHERWISE: dict[str, tuple[str, Callable[..., Any]]] = {
    "unsorted rows": ("npu_moe_token_permute", lambda r: (r[0][r[1]], r[1])),
    "order for its inverse": ("npu_moe_token_permute", lambda r: (r[0], r[1].argsort())),
    "ends one late": ("expert_ends", lambda r: torch.cat(((r[:-1] + 1).clamp(max=r[-1]), r[-1:]))),
    "counts for ends": ("expert_ends", lambda r: r.diff(prepend=r[:1] * 0)),
    "rows left permuted": ("npu_moe_token_unpermute", lambda r: r.flip(0)),
}


@pytest.mark.parametrize("mutant", OTHERWISE)
def test_wrong_order_is_refused(mutant: str) -> None:
    found = site()
    name, change = OTHERWISE[mutant]
    assert not prove(found, Form(mutant, lambda e, env: found.forms[0].emit(Wrong(e, name, change), env))).holds


def test_a_bias_of_slots_not_sorted_is_refused() -> None:
    found = site("added")

    class Unsorted(RunEmitter):
        def shared(self, key: Any, values: Any, build: Any) -> Any:
            return values[0].reshape(-1) if key == "sorted_ids" else super().shared(key, values, build)

    assert prove(found, found.forms[0]).holds
    emit = lambda e, env: found.forms[0].emit(Unsorted(e.lifted, e.target), env)  # noqa: E731
    assert not prove(found, Form("unsorted bias", emit)).holds
