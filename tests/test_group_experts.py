"""group_experts: hand-written blocks are served, equal to their own forward, reversibly; what differs is left."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import npu_fuse
from npu_fuse import experts
from npu_fuse.block_inputs import Signature, make
from npu_fuse.block_proof import in_float64, prove_block
from npu_fuse.report import Status
from tests.rules import expert_blocks, near_expert_blocks
from tests.rules.expert_blocks import BLOCKS, Block
from tests.rules.helpers import BF16, EXACT_SITE, F32, OPTIONS, fresh, judge, random, sites

WIDTH = 16
DTYPES = (F32, BF16)


def given(kind: str, block: Block, tokens: tuple[int, int] = (2, 9), how: str = "") -> tuple[torch.Tensor, ...]:
    dtype = next(block.parameters()).dtype
    x = random((*tokens, WIDTH), dtype, 3)
    if how == "same":
        x = x[:1, :1].expand_as(x).clone()
    if kind != "Given":
        return (x,)
    number = tokens[0] * tokens[1]
    generator = torch.Generator().manual_seed(number)
    chosen = torch.rand((number, block.experts_), generator=generator).topk(block.k).indices
    if how == "same":
        chosen = chosen[:1].expand_as(chosen)
    return x.reshape(-1, WIDTH), chosen, random((number, block.k), dtype, 4).sigmoid()


def run(block: nn.Module, inputs: tuple[torch.Tensor, ...], call: Callable[..., Any] | None = None) -> list[Any]:
    """Outputs, then gradients to the float inputs and all parameters."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    result = (block if call is None else call)(*leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    wanted = [t for t in (*leaves, *block.parameters()) if t.requires_grad]
    factors = [random(t.shape, t.dtype, 9 + i) for i, t in enumerate(outputs)]
    found = torch.autograd.grad(outputs, wanted, factors, allow_unused=True)
    return [*outputs, *(torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True))]


def check(block: Block, inputs: tuple[torch.Tensor, ...], call: Callable[..., Any] | None = None) -> None:
    """The grouped block beside its own forward and that in float64."""
    own = copy.deepcopy(block)
    npu_fuse.ungroup_experts(own)
    wide = copy.deepcopy(own).double()
    with in_float64():
        exact = run(wide, tuple(t.double() if t.is_floating_point() else t for t in inputs))
    names = [f"value {i}" for i in range(len(exact))]
    for name, a, b, c in zip(names, exact, run(own, inputs), run(block, inputs, call), strict=True):
        judge(name, a, b, c, gradient=not b.requires_grad, bound=EXACT_SITE)


def grouped(kind: str, dtype: torch.dtype = F32, **sizes: Any) -> tuple[Block, npu_fuse.ExpertsReport]:
    block = expert_blocks.make(kind, dtype, **sizes)
    report = npu_fuse.group_experts(block)
    assert [b.status for b in report.blocks] == [Status.FUSED], str(report)
    assert {"eval", "train"} <= set(report.blocks[0].modes), str(report)
    return block, report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_block_is_grouped_and_stays_right(kind: str, dtype: torch.dtype) -> None:
    block, report = grouped(kind, dtype)
    assert (report.blocks[0].experts, report.blocks[0].k) == (6, 1 if kind == "Switch" else 2)
    for tokens, how in (((2, 9), ""), ((1, 1), ""), ((3, 5), "same")):
        check(block, given(kind, block, tokens, how))


@pytest.mark.parametrize(("number", "k"), [(5, 1), (5, 5)])
@pytest.mark.parametrize("kind", ["MaskedLoop", "EveryExpert", "Counted", "Clamped", "Halves", "Given"])
def test_sizes(kind: str, number: int, k: int) -> None:
    block, report = grouped(kind, experts=number, k=k)
    assert report.blocks[0].experts == number
    check(block, given(kind, block))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_compiled_in_one_graph(kind: str, dtype: torch.dtype) -> None:
    with fresh():
        block = expert_blocks.make(kind, dtype)
        inputs = given(kind, block)
        with pytest.raises(Exception, match=r"(?i)data-dependent|dynamic|nonzero|unique|item|branch"):
            torch.compile(block, backend="eager", fullgraph=True)(*inputs)
    block, _ = grouped(kind, dtype)
    with fresh():
        # The experts' own gates have their tests: only what happens to the rows is judged here.
        options = {**OPTIONS, "fuse": ["moe_routing", "grouped_matmul"]}
        check(block, inputs, torch.compile(block, backend="npu_fuse", options=options, fullgraph=True))
        found = {(s.op, s.status) for s in sites(npu_fuse.reports()) if s.status is not Status.SKIPPED}
    if kind == "Before":  # weights before the experts: the matmuls are grouped, the rows go as they are written
        assert found == {("moe_routing", Status.MISSED)}
    else:
        assert found == {("moe_routing", Status.FUSED)}


def test_under_gradient_checkpointing() -> None:
    block, _ = grouped("MaskedLoop", BF16)
    inputs = given("MaskedLoop", block)
    check(block, inputs, lambda x: checkpoint(block, x, use_reentrant=False))
    with fresh():
        compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="npu_fuse",
                                 options={**OPTIONS, "fuse": ["moe_routing"]}, fullgraph=True)  # fmt: skip
        check(block, inputs, compiled)


def test_nothing_moves_and_all_comes_back() -> None:
    block = expert_blocks.make("Groups")
    names, before = list(block.state_dict()), {n: id(p) for n, p in block.named_parameters()}
    own, training = block.forward, block.training
    npu_fuse.group_experts(block)
    assert list(block.state_dict()) == names and {n: id(p) for n, p in block.named_parameters()} == before
    assert block.training == training and block.forward != own
    assert npu_fuse.ungroup_experts(block) == 1 and npu_fuse.ungroup_experts(block) == 0
    assert block.forward == own and "forward" not in vars(block)


def test_weights_that_change_and_copies() -> None:
    block, _ = grouped("MaskedLoop")
    twin = copy.deepcopy(block)
    inputs = given("MaskedLoop", block)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    check(twin, inputs)
    check(block, inputs)
    block.load_state_dict(twin.state_dict())
    assert torch.equal(block(*inputs)[0], twin(*inputs)[0])


def count_grouped(monkeypatch: pytest.MonkeyPatch, block: nn.Module) -> list[int]:
    """How often the grouped form was run."""
    calls = [0]
    forms = block.forward.__func__.__closure__  # type: ignore[union-attr]
    functions = next(c.cell_contents for c in forms if _functions(c.cell_contents))
    for mode, function in list(functions.items()):

        def counted(*args: Any, inner: Callable[..., Any] = function) -> Any:
            calls[0] += 1
            return inner(*args)

        monkeypatch.setitem(functions, mode, counted)
    return calls


def _functions(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, types.FunctionType) for v in value.values())


def test_other_calls_take_the_blocks_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    block, _ = grouped("MaskedLoop")
    calls = count_grouped(monkeypatch, block)
    inputs = given("MaskedLoop", block)
    block(*inputs)
    block(hidden=inputs[0])
    assert calls == [2]
    block.double()(inputs[0].double())  # another dtype than was proved
    assert calls == [2]
    block.float()(inputs[0][:, :0])  # no rows
    assert calls == [2]
    jitter, report = near_expert_blocks.Jitter(), None
    report = npu_fuse.group_experts(jitter)
    assert report.blocks[0].modes[0] == "eval" and "random" in report.blocks[0].notes[0]
    calls = count_grouped(monkeypatch, jitter)
    jitter.train()(*inputs)
    assert calls == [0]
    jitter.eval()(*inputs)
    assert calls == [1]


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the proof held under autocast too, grouped matmuls run in its dtype; else the block is as it was."""
    for kind in ("MaskedLoop", "Halves"):
        block, report = grouped(kind)
        own = copy.deepcopy(block)
        npu_fuse.ungroup_experts(own)
        calls = count_grouped(monkeypatch, block)
        with torch.autocast("cpu", BF16):
            results = block(*given(kind, block)), own(*given(kind, block))
        y, want = (r[0] if isinstance(r, tuple) else r for r in results)
        assert calls == [int("autocast" in report.blocks[0].modes)]
        assert y.dtype == want.dtype
        torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", near_expert_blocks.LEFT)
def test_what_computes_something_else_is_left(case: str) -> None:
    kind, words = near_expert_blocks.LEFT[case]
    expert_blocks.BLOCKS[case] = kind
    try:
        block = expert_blocks.make(case)
    finally:
        del expert_blocks.BLOCKS[case]
    own = block.forward
    state = {n: t.clone() for n, t in block.state_dict().items()}
    attributes = set(vars(block))
    report = npu_fuse.group_experts(block)
    assert [b.status is Status.FUSED for b in report.blocks] == [False], str(report)
    assert report.blocks[0].reason and words in report.blocks[0].reason
    assert block.forward == own and set(vars(block)) == attributes
    assert all(torch.equal(t, state[n]) for n, t in block.state_dict().items())


def test_detached_weights_keep_no_gradient() -> None:
    block = near_expert_blocks.DetachedWeights()
    assert npu_fuse.group_experts(block).blocks[0].status is Status.FUSED
    out, _ = block(random((2, 5, WIDTH), F32, 1))
    assert torch.autograd.grad(out.sum(), block.gate.weight, allow_unused=True)[0] is None


def test_layers_of_a_model_and_a_report() -> None:
    model = nn.Sequential(*[expert_blocks.make("MaskedLoop") for _ in range(2)])
    report = npu_fuse.group_experts(model)
    assert [b.path for b in report.blocks] == ["0", "1"]
    assert str(report).startswith("2 of 2 blocks grouped")
    assert "routed(" in report.blocks[0].source and report.blocks[0].proof is not None
    assert npu_fuse.ungroup_experts(model) == 2


def test_no_experts_no_blocks() -> None:
    layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    model = nn.ModuleDict({"layers": layers, "conv": nn.Conv1d(4, 4, 3), "types": nn.Embedding(2, 8)})
    assert npu_fuse.group_experts(model).blocks == ()
    with pytest.raises(npu_fuse.errors.OptionError):
        npu_fuse.group_experts(model, numerics="fast")


def test_exact_numerics() -> None:
    """Bit-equal on every probe, or left."""
    report = npu_fuse.group_experts(expert_blocks.make("Groups"), numerics="exact")
    assert report.blocks[0].status is Status.REFUSED_BY_PROOF and "bit-equal" in report.blocks[0].reason
    report = npu_fuse.group_experts(expert_blocks.make("Switch"), numerics="exact")
    assert report.blocks[0].status is Status.FUSED


MUTANTS: dict[str, Callable[..., dict[str, Any]]] = {
    "another expert": lambda x, i, w, n: {"indices": (i + 1) % n},
    "experts exchanged": lambda x, i, w, n: {"indices": i.flip(1)},
    "next token": lambda x, i, w, n: {"x": x.roll(1, 0)},
    "weights dropped": lambda x, i, w, n: {"weights": torch.ones_like(w)},
    "weights detached": lambda x, i, w, n: {"weights": w.detach()},
    "weights squared": lambda x, i, w, n: {"weights": w * w},
    "weight before the experts": lambda x, i, w, n: {"before": True},
    "top-k less one": lambda x, i, w, n: {"weights": torch.cat((w[:, :-1], w[:, -1:] * 0), 1)},
    "a token counted twice": lambda x, i, w, n: {"weights": torch.cat((w[:1] * 2, w[1:]))},
    "first expert for all": lambda x, i, w, n: {"indices": i * 0},
    "last expert never": lambda x, i, w, n: {"indices": i.clamp(max=n - 2)},
}
INNER: dict[str, Callable[[Any, Any, Any], tuple[Any, Any, Any]]] = {
    "counts for ends": lambda r, i, e: (r, i, e.diff(prepend=e[:1] * 0)),
    "ends one late": lambda r, i, e: (r, i, torch.cat(((e[:-1] + 1).clamp(max=e[-1]), e[-1:]))),
    "ends one early": lambda r, i, e: (r, i, torch.cat(((e[:-1] - 1).clamp(min=0), e[-1:]))),
    "unsorted rows": lambda r, i, e: (r.roll(1, 0), i, e),
}


def mutated(form: Callable[..., Any], routed: Callable[..., Any]) -> Callable[..., Any]:
    return types.FunctionType(form.__code__, {**form.__globals__, "routed": routed})


def proved(kind: str) -> tuple[Block, Callable[..., Any], Signature]:
    block, _ = grouped(kind)
    cells = [c.cell_contents for c in block.forward.__func__.__closure__]  # type: ignore[attr-defined]
    functions = next(c for c in cells if _functions(c))
    npu_fuse.ungroup_experts(block)
    kinds = {"hidden": "states"} if kind != "Given" else dict(zip(("hidden", "indices", "weights"), KINDS, strict=True))
    return block, functions[True], Signature(kinds, 2 if kind == "Given" else 3, WIDTH, 6, F32)


KINDS = ("states", "indices", "weights")


@pytest.mark.parametrize("kind", ["EveryExpert", "Given"])
def test_wrong_forms_are_refused(kind: str) -> None:
    block, form, signature = proved(kind)
    assert prove_block(block, form, signature, False).holds
    for name, change in MUTANTS.items():

        def routed(run: Any, x: Any, indices: Any, weights: Any, number: int, before: bool, rest: bool,
                   change: Any = change) -> Any:  # fmt: skip
            values = {"x": x, "indices": indices, "weights": weights, "before": before}
            return experts.routed(run, **{**values, **change(x, indices, weights, number)}, number=number, rest=rest)

        assert not prove_block(block, mutated(form, routed), signature, False).holds, name
    for name, inner in INNER.items():

        def other(run: Any, *rest: Any, inner: Any = inner) -> Any:
            return experts.routed(lambda r, i, e: run(*inner(r, i, e)), *rest)

        assert not prove_block(block, mutated(form, other), signature, False).holds, name


def test_an_index_of_no_expert_counts_for_nothing() -> None:
    block, _ = grouped("Given")
    x, chosen, weights = given("Given", block)
    chosen[::3, 0] = block.experts_
    check(block, (x, chosen, weights))
    with fresh():
        options = {**OPTIONS, "fuse": ["moe_routing"]}
        compiled = torch.compile(block, backend="npu_fuse", options=options, fullgraph=True)
        check(block, (x, chosen, weights), compiled)
    assert make(Signature({"hidden": "states"}, 2, WIDTH, 6), block, (1, 2), 0).names == ("hidden",)
