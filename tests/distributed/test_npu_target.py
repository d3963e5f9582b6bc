"""Target npu: what is emitted takes torch_npu's schema and sums over ranks; what the op cannot do stays plain."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from npu_fuse.targets import Target

from . import npu_stub, ranks

pytestmark = pytest.mark.distributed


def function(x: Any, w: Any, b: Any) -> Any:
    y = linear(x, w, b)
    dist.all_reduce(y)
    return y * 1


def elsewhere(x: Any, w: Any, b: Any) -> Any:
    y = linear(x, w, b)
    dist.all_reduce(y)
    return y * 2


def over(group: Any) -> Any:
    def reduced(x: Any, w: Any, b: Any) -> Any:
        y = linear(x, w, b)
        dist.all_reduce(y, group=group)
        return y * 1

    return reduced


def on_the_chip(rank: int, world: int) -> dict[str, Any]:
    import npu_fuse
    from npu_fuse import groups, mc2

    calls = npu_stub.install("Ascend910B3")
    mc2._on_npu = lambda x: True  # type: ignore[assignment]
    groups.speaks_hccl = lambda name: True  # type: ignore[assignment]
    found: dict[str, Any] = {}

    def run(name: str, function: Any, rows: Any, dtype: Any = torch.bfloat16, train: bool = False, **how: Any) -> None:
        torch._dynamo.reset()
        npu_fuse.clear_reports()
        calls.ops.clear()
        chosen = {"target": "npu", "handoff": "aot_eager", "mc2_min_rows": 4, "soc": "Ascend910B3", **how}
        compiled = torch.compile(function, backend="npu_fuse", options=chosen)
        generator = torch.Generator().manual_seed(rank)
        x, w, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((1, 1, 8), (16, 8), (16,)))
        far = 0.0
        for count in rows:
            given = [t.detach().clone().requires_grad_(train) for t in (x.expand(2, count, 8).contiguous(), w, b)]
            with torch.set_grad_enabled(train):
                y, expected = compiled(*given), function(*[t.detach() for t in given])
            far = max(far, float((y - expected).abs().max() / expected.abs().max()))
            if train:
                y.float().sum().backward()
                assert all(t.grad is not None for t in given)
        sites = [(str(s.status), s.reason) for r in npu_fuse.reports() for s in r.sites]
        found[name] = (far, sites, list(calls.ops))

    run("prefill", function, [3])
    run("training", function, [3], train=True)
    run("lengths", function, [4, 7, 2, 9], mc2_min_rows=6)
    run("decode", function, [1])
    run("default threshold", function, [100], mc2_min_rows=None)
    run("float32", function, [3], torch.float32)
    run("A3", function, [3], soc="Ascend910_9391")
    other = dist.new_group([0, 1])
    run("same ranks", over(other), [3])
    calls.capturing = True
    run("captured", function, [3])
    calls.capturing = False
    found["names"] = list(calls.names)
    alone = dist.new_group([0, 1, 2] if world > 2 else [0, 1])
    groups._claim[:] = [groups.Group((0, 5), "0")]
    groups.claimed = lambda: groups._claim[0]
    run("second communicator", over(alone), [3])
    groups.claimed = lambda: None
    socket.gethostname = lambda: f"host{rank}"  # type: ignore[assignment]
    run("two hosts", elsewhere, [3])
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return ranks.run(2, on_the_chip)


@pytest.mark.parametrize("name", ["prefill", "training", "same ranks"])
def test_the_call_takes_the_schema_and_sums_over_ranks(outcomes: Any, name: str) -> None:
    for found in outcomes:
        far, sites, ops = found[name]
        assert [s for s, _ in sites] == ["fused"] and far < 1e-2
        assert [(op[0], *op[2:]) for op in ops] == [("npu_mm_all_reduce_base", (2, 3, 8), True, True)]


def test_a_length_known_in_the_call_only_is_compared_in_the_op(outcomes: Any) -> None:
    for found in outcomes:
        far, sites, ops = found["lengths"]
        assert {s for s, _ in sites} == {"fused"} and far < 1e-2
        assert [op[2] for op in ops] == [(2, 4, 8), (2, 7, 8), (2, 9, 8)]  # two rows each stay plain


LEFT = {
    "decode": ("refused_by_profit", "2 rows are fewer than 4"),
    "default threshold": ("refused_by_profit", "200 rows are fewer than 512"),
    "float32": ("refused_by_target", "float16 and bfloat16"),
    "A3": ("refused_by_target", "runs on A2 only, the chip is Ascend910_9391 (A3)"),
    "second communicator": ("refused_by_target", "share one communicator"),
    "two hosts": ("missed", "spans 2 hosts"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_plain_with_the_reason(outcomes: Any, name: str) -> None:
    for found in outcomes:
        far, sites, ops = found[name]
        assert far == 0.0 and not ops
        assert sites[0][0] == LEFT[name][0] and LEFT[name][1] in sites[0][1]


def test_the_communicators_name_is_made_once_a_group_and_kept(outcomes: Any) -> None:
    for found in outcomes:
        assert len(found["names"]) == 1  # the world's, which serves another group of the same ranks, too
        assert found["captured"][2]  # made before the capture began


def test_families_of_chips() -> None:
    names = {"Ascend910B3": "A2", "Ascend910_9391": "A3", "Ascend310P3": "310P", "Ascend910A": "910A", "Other": ""}
    for soc, family in names.items():
        assert Target("npu", "npu", soc).generation == family


def test_the_reference_op_has_the_schema_of_torch_npu() -> None:
    import npu_fuse.passes

    assert npu_fuse.passes.RULES
    for name, schema in npu_stub.SCHEMAS.items():
        found = getattr(torch.ops.npu_fuse, name).default._schema
        wanted = torch._C.parse_schema(f"npu_fuse::{name}{schema}")
        assert str(found) == str(wanted)
