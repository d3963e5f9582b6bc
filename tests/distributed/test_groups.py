"""Several groups in one graph, groups made anew, and HCCL's names for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.nn.functional import linear

from npu_fuse import groups

from . import ranks
from .judge import compare

pytestmark = pytest.mark.distributed


def tensor_and_data_parallel(rank: int, world: int) -> Any:
    """Two by two: the product is summed over one axis, the loss and a gradient by hand over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp, dp = mesh.get_group("tp"), mesh.get_group("dp")

    def function(x: Any, w: Any, v: Any) -> Any:
        y = funcol.all_reduce(linear(x, w), "sum", tp).relu()
        dist.all_reduce(z := linear(y, v), group=tp)
        return funcol.all_reduce(z.square().mean(), "sum", dp), funcol.all_reduce(x.flatten(0, 1).t() @ y[0], "sum", dp)

    def chained(x: Any, w: Any, v: Any) -> Any:
        return funcol.all_reduce(funcol.all_reduce(linear(x, w), "sum", tp), "sum", dp)

    def inputs() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(rank)
        return [torch.randn(*shape, generator=generator) for shape in ((1, 4, 6), (8, 6), (6, 8))]

    outcomes = [compare(f, inputs, train) for f in (function, chained) for train in (False, True)]
    found = groups.group_of(str(tp.group_name))
    assert isinstance(found, groups.Group) and found.same(groups.described(tp))
    return [(max(o.differences), o.sites, o.errors) for o in outcomes], found.ranks, str(tp.group_name)


def test_groups_do_not_mix() -> None:
    results = ranks.run(4, tensor_and_data_parallel)
    assert [r[1] for r in results] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    for outcomes, _, _ in results:
        for differs, _, errors in outcomes:
            assert differs < 1e-6 and not errors
        for _, sites, _ in outcomes[:2]:
            assert [s[1] for s in sites] == ["fused", "fused", "missed"], sites
            assert "transposed in memory" in sites[2][2]
        for _, sites, _ in outcomes[2:]:
            assert [s[1] for s in sites] == ["fused"], sites


def made_anew(rank: int, world: int, store: str) -> Any:
    """A group is destroyed, and another one gets its name: compiled code uses the new one."""

    def function(x: Any, w: Any) -> Any:
        y = linear(x, w)
        dist.all_reduce(y)
        return y.sin()

    compiled = torch.compile(function, backend="npu_fuse", options={"target": "reference", "handoff": "aot_eager"})
    x, w = torch.full((2, 3), rank + 1.0), torch.ones(4, 3)
    first = compiled(x, w)
    name = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    assert str(dist.group.WORLD.group_name) == name  # type: ignore[union-attr]
    second = compiled(x, w)
    torch._dynamo.reset()
    third = compiled(x, w)
    wanted = torch.full((2, 4), 9.0).sin()
    return [bool(torch.allclose(y, wanted)) for y in (first, second, third)]


def test_a_group_made_anew_under_an_old_name(tmp_path: Any) -> None:
    assert ranks.run(2, made_anew, str(tmp_path / "store")) == [[True] * 3] * 2


class Backend:
    """Stands for ProcessGroupHCCL: its names are new for every group."""

    made = 0

    def get_hccl_comm_name(self, rank: int) -> str:
        Backend.made += 1
        return f"hccl_{rank}_{Backend.made}"


class ProcessGroup:
    def _get_backend(self, device: torch.device) -> Backend:
        assert device.type == "npu"
        return Backend()


def test_hccls_name_is_asked_for_once_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [ProcessGroup()]
    monkeypatch.setattr(groups, "resolve", lambda name: current[0])
    monkeypatch.setattr(torch, "device", lambda kind: type("Device", (), {"type": kind})())
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    first = groups.communicator("0")
    assert first == groups.communicator("0") and first.startswith("hccl_3_") and groups.has_communicator("0")
    current[0] = ProcessGroup()  # destroyed and made anew
    assert not groups.has_communicator("0")
    assert groups.communicator("0") != first
    monkeypatch.setattr(groups, "resolve", lambda name: None)
    with pytest.raises(RuntimeError, match="compile again"):
        groups.communicator("0")


def test_a_group_that_cannot_be_known_is_a_reason() -> None:
    graph = torch.fx.Graph()
    assert "value of the graph" in str(groups.group_of(graph.placeholder("group")))
    assert groups.group_of("0") == "no process group is initialised"
