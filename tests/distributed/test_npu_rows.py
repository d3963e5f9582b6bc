"""Target npu, rows scattered and gathered: the calls, their limits, and graphs for hand-offs that translate ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from . import npu_stub, ranks
from .row_forms import gather, scatter

pytestmark = pytest.mark.distributed

K, N = 256, 272


def scattered(x: Any, w: Any, b: Any) -> Any:
    return scatter(linear(x, w)) * 1


def gathered(x: Any, w: Any, b: Any) -> Any:
    return linear(gather(x), w) * 1


def shared(x: Any, w: Any, b: Any) -> Any:
    g = gather(x)
    return linear(g, w).sin(), linear(g, w[:64])


def layer(x: Any, w: Any, b: Any) -> Any:
    return scatter(linear(linear(gather(x), w).tanh(), w.t())) * 1


def summed(x: Any, w: Any, b: Any) -> Any:
    y = linear(x, w, b)
    dist.all_reduce(y)
    return y * 1


def with_bias(x: Any, w: Any, b: Any) -> Any:
    return linear(gather(x), w, b) * 1


def narrow(x: Any, w: Any, b: Any) -> Any:
    return linear(gather(x[..., :128]), w[:, :128]) * 1


RS, AG, AR = "npu_mm_reduce_scatter_base", "npu_all_gather_base_mm", "npu_mm_all_reduce_base"


def on_the_chip(rank: int, world: int) -> dict[str, Any]:
    import npu_fuse
    from npu_fuse import groups, mc2

    calls = npu_stub.install("Ascend910B3")
    mc2._on_npu = lambda x: True  # type: ignore[assignment]
    groups.speaks_hccl = lambda name: True  # type: ignore[assignment]
    graphs: list[str] = []

    @torch._dynamo.register_backend(name="npu")  # type: ignore[misc]
    def translates(gm: Any, inputs: Any, **_: Any) -> Any:
        graphs.extend(str(n.target) for n in gm.graph.nodes if "npu" in str(n.target))
        return gm.forward

    found: dict[str, Any] = {}

    def run(name: str, function: Any, shape: Any = (4, K), train: bool = False, **how: Any) -> None:
        torch._dynamo.reset()
        npu_fuse.clear_reports()
        calls.ops.clear()
        graphs.clear()
        chosen = {"target": "npu", "handoff": "aot_eager", "mc2_min_rows": 4, "soc": "Ascend910B3", **how}
        compiled = torch.compile(function, backend="npu_fuse", options=chosen)
        generator = torch.Generator().manual_seed(rank)
        x, w, b = (torch.randn(*s, generator=generator).bfloat16() for s in (shape, (N, K), (N,)))
        given = [t.requires_grad_(train) for t in (x, w, b)]
        with torch.set_grad_enabled(train):
            made, expected = compiled(*given), function(*[t.detach() for t in given])
            if train:
                made.float().sum().backward()
        pairs = zip(*((v if isinstance(v, tuple) else (v,)) for v in (made, expected)), strict=True)
        far = max(float((m - e).abs().max() / e.abs().max()) for m, e in pairs)
        sites = [(str(s.status), s.reason) for r in npu_fuse.reports() for s in r.sites]
        found[name] = (far, sites, list(calls.ops), list(graphs))

    run("scattered", scattered)
    run("scattered 3-D", scattered, (4, 2, K))
    run("gathered", gathered)
    run("shared", shared)
    run("A3", gathered, soc="Ascend910_9391")
    run("trained", layer, train=True)
    run("310P", gathered, soc="Ascend310P3")
    run("bias", with_bias)
    run("narrow", narrow)
    run("decode", gathered, (1, K))
    for name, function in (("scattered", scattered), ("shared", shared), ("summed", summed)):
        run(f"translated {name}", function, (4, 2, K), handoff="npu")
    run("translated 4-D", summed, (2, 2, 2, K), handoff="npu")
    run("translated, trained", layer, train=True, handoff="npu")
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return ranks.run(2, on_the_chip)


CALLS = {
    "scattered": [(RS, (4, K))], "scattered 3-D": [(RS, (8, K))], "gathered": [(AG, (4, K))],
    "shared": [(AG, (4, K))], "A3": [(AG, (4, K))],
    "trained": [(AG, (4, K)), (RS, (8, N)), (AG, (4, K)), (RS, (8, N))],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_calls(outcomes: Any, name: str) -> None:
    for found in outcomes:
        far, sites, ops, _ = found[name]
        assert {s for s, _ in sites} == {"fused"} and far < 2e-2
        assert ops == CALLS[name]


LEFT = {
    "310P": ("refused_by_target", "runs on A2 and A3 only"),
    "bias": ("refused_by_target", "adds no bias"),
    "narrow": ("refused_by_target", "sums over 256 to 65534 columns, the product over 128"),
    "decode": ("refused_by_profit", "2 rows are fewer than 4"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_plain_with_the_reason(outcomes: Any, name: str) -> None:
    for found in outcomes:
        far, sites, ops, _ = found[name]
        assert far == 0.0 and not ops
        assert sites[0][0] == LEFT[name][0] and LEFT[name][1] in sites[0][1]


@pytest.mark.parametrize(("name", "op"), [("scattered", RS), ("shared", AG), ("summed", AR), ("4-D", AR)])
def test_a_handoff_that_translates_ops_sees_the_npus_own(outcomes: Any, name: str, op: str) -> None:
    for found in outcomes:
        far, sites, ops, graph = found[f"translated {name}"]
        assert {s for s, _ in sites} == {"fused"} and far < 2e-2
        assert graph == [f"npu.{op}.default"] and [call[0] for call in ops] == [op]


def test_training_keeps_the_op_with_a_backward(outcomes: Any) -> None:
    for found in outcomes:
        far, sites, _, graph = found["translated, trained"]
        assert {s for s, _ in sites} == {"fused"} and far < 2e-2
        assert graph == ["npu_fuse.all_gather_mm.default", "npu_fuse.mm_reduce_scatter.default"]
