"""Target npu on a chip without matmul + all-reduce: matmul + reduce-scatter and an all-gather, where that pays."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from npu_fuse import mc2_split

from . import npu_stub, ranks
from .forms import copy_to_region, reduce_from_region, total

pytestmark = pytest.mark.distributed

K, N = 256, 272
RS = "npu_mm_reduce_scatter_base"


def summed(x: Any, w: Any, b: Any) -> Any:
    return total(linear(x, w)) * 1


def megatron(x: Any, w: Any, b: Any) -> Any:
    return reduce_from_region(linear(x, w)) + b


def column_parallel(x: Any, w: Any, b: Any) -> Any:
    return linear(copy_to_region(x), w, b) * 1


def bias_inside(x: Any, w: Any, b: Any) -> Any:
    return total(linear(x, w, b)) * 1


def narrow(x: Any, w: Any, b: Any) -> Any:
    return total(linear(x[..., :128], w[:, :128])) * 1


def on_the_chip(rank: int, world: int) -> dict[str, Any]:
    import npu_fuse
    from npu_fuse import groups, mc2

    calls = npu_stub.install("Ascend910_9391")
    mc2._on_npu = lambda x: True  # type: ignore[assignment]
    groups.speaks_hccl = lambda name: True  # type: ignore[assignment]

    @torch._dynamo.register_backend(name="npu")  # type: ignore[misc]
    def translates(gm: Any, inputs: Any, **_: Any) -> Any:
        return gm.forward

    found: dict[str, Any] = {}

    def step(run: Any, shape: Any, train: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(rank)
        given = [torch.randn(*s, generator=generator).bfloat16() for s in (shape, (N, K), (N,))]
        given = [t.requires_grad_(train) for t in given]
        with torch.set_grad_enabled(train):
            made = run(*[t * 1 for t in given] if train else given)
        if not train:
            return [made]
        made.float().square().sum().backward()
        return [made.detach(), *(t.grad for t in given if t.grad is not None)]

    def run(name: str, function: Any, *shapes: Any, train: bool = False, **how: Any) -> None:
        torch._dynamo.reset()
        npu_fuse.clear_reports()
        options = {"target": "npu", "handoff": "aot_eager", "mc2_min_rows": 4, "soc": "Ascend910_9391", **how}
        compiled = torch.compile(function, backend="npu_fuse", options=options)
        far, ops = 0.0, []
        for shape in shapes or ((4, K),):
            expected = step(function, shape, train)
            calls.ops.clear()
            made = step(compiled, shape, train)
            ops += calls.ops
            assert len(made) == len(expected)
            far = max(far, *(float((m - e).norm() / e.norm()) for m, e in zip(made, expected, strict=True)))
        sites = [(s.op, str(s.status), s.reason, s.notes) for r in npu_fuse.reports() for s in r.sites]
        found[name] = (far, sites, ops)

    run("inference", summed)
    run("3-D", summed, (4, 3, K))
    run("training", summed, (4, 3, K), train=True)
    run("megatron", megatron, (4, 3, K), train=True)
    run("column parallel", column_parallel, (4, 3, K), train=True)
    run("lengths", summed, (4, K), (7, K), (10, K), (2, K))
    run("lengths in training", megatron, (4, K), (7, K), (10, K), train=True)
    run("odd", summed, (5, K))
    run("decode", summed, (2, K))
    run("by the model", summed, (64, K), mc2_min_rows=None)
    run("bias", bias_inside)
    run("narrow", narrow)
    run("translated", summed, handoff="npu")
    run("310P", summed, soc="Ascend310P3")
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return ranks.run(2, on_the_chip)


CALLS = {
    "inference": [(RS, (4, K))], "3-D": [(RS, (12, K))], "training": [(RS, (12, K))], "megatron": [(RS, (12, K))],
    "column parallel": [(RS, (12, N))], "lengths": [(RS, (4, K)), (RS, (10, K))],
    "lengths in training": [(RS, (4, K)), (RS, (10, K))],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_and_the_gradients(outcomes: Any, name: str) -> None:
    for found in outcomes:
        far, sites, ops = found[name]
        assert {s[1] for s in sites} == {"fused"}, sites
        assert far < 1e-2 and ops == CALLS[name]
        if "lengths" not in name:
            assert any("modelled" in note for note in sites[0][3]), sites


LEFT = {
    "odd": ("refused_by_target", r"runs on A2 only.*5 rows cannot be scattered over 2 ranks"),
    "decode": ("refused_by_profit", r"2 rows are fewer than 4"),
    "by the model": ("refused_by_profit", r"64 rows are fewer than \d+, .*modelled: \d+ µs.*apart \d+ µs"),
    "bias": ("refused_by_target", r"runs on A2 only.*adds no bias"),
    "narrow": ("refused_by_target", r"runs on A2 only.*sums over 256 to 65534 columns, the product over 128"),
    "translated": ("refused_by_target", r"runs on A2 only.*translates ops one by one"),
    "310P": ("refused_by_target", r"runs on A2 only.*instead of it .*runs on A2 and A3 only"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_plain_with_both_reasons(outcomes: Any, name: str) -> None:
    for found in outcomes:
        far, sites, ops = found[name]
        assert far == 0.0 and not ops
        assert sites[0][1] == LEFT[name][0] and re.search(LEFT[name][1], sites[0][2]), sites


def test_the_model() -> None:
    """Splitting an all-reduce hides at most half of it; few rows do not pay for one more launch."""
    for width, size in ((2048, 2), (4096, 8), (8192, 16)):
        least = mc2_split.least_rows(width, size)
        assert least % size == 0
        for rows, pays in ((least, True), (2 * least, True), (least // 2, False)):
            apart, split = mc2_split.seconds(rows, 256, width, size)
            assert (split < apart) == pays and split > apart / 2
