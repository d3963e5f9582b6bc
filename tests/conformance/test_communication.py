"""Matmuls with communication on the real wheel: two processes, torch_npu's own process group, gloo beneath."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.nn.functional import linear

from npu_fuse.device_cases import COMMUNICATING
from tests.conformance.test_ops import npu, ours

pytestmark = pytest.mark.real_wheel

WORLD, K, N, ROWS = 2, 256, 320, 8


def inputs(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(*s, generator=generator).bfloat16() for s in ((ROWS, K), (N, K), (ROWS, N))]


def summed(x: Any, w: Any, s: Any) -> Any:
    y = linear(x, w)
    dist.all_reduce(y)
    return y * 1


def scattered(x: Any, w: Any, s: Any) -> Any:
    return funcol.reduce_scatter_tensor(linear(x, w), "sum", 0, dist.group.WORLD) * 1


def gathered(x: Any, w: Any, s: Any) -> Any:
    g = funcol.all_gather_tensor(x, 0, dist.group.WORLD)
    return linear(g, w) * 1, torch.mm(g, w.t()[:, :K])


def layer(x: Any, w: Any, s: Any) -> Any:
    y = linear(funcol.all_gather_tensor(x, 0, dist.group.WORLD), w)
    return funcol.reduce_scatter_tensor(linear(torch.tanh(y), w.t()), "sum", 0, dist.group.WORLD) * 1


PROGRAMS: dict[str, tuple[Callable[..., Any], dict[str, int], dict[str, int]]] = {
    "summed": (summed, {"npu_mm_all_reduce_base": 1}, {"npu_mm_all_reduce_base": 1}),
    "scattered": (
        scattered, {"npu_mm_reduce_scatter_base": 1}, {"npu_mm_reduce_scatter_base": 1, "npu_all_gather_base_mm": 1}
    ),
    "layer": (
        layer, {"npu_mm_reduce_scatter_base": 1, "npu_all_gather_base_mm": 1},
        {"npu_mm_reduce_scatter_base": 2, "npu_all_gather_base_mm": 2},
    ),
    "gathered": (gathered, {"npu_all_gather_base_mm": 1}, {}),
}  # fmt: skip
"""Programs, and what each launches in inference and in training; `summed`'s gradient is reduced plainly, which needs
data to move through HCCL, and so it and `gathered`'s are run in inference only."""
HAS_GRADIENTS = torch._C._dispatch_has_kernel_for_dispatch_key("_c10d_functional::reduce_scatter_tensor", "Autograd")
TRAINED = ("scattered", "layer") if HAS_GRADIENTS else ()
"""Functional collectives of torch 2.10 have no gradient, in eager mode neither."""
HANDOFFS = ("aot_eager", "npugraph_ex")


def work(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    import npu_host_ops
    import torch_npu  # type: ignore[import-not-found, unused-ignore]  # noqa: F401

    import npu_fuse

    torch.npu.set_device(rank)  # type: ignore[attr-defined]
    dist.init_process_group("cpu:gloo,npu:hccl", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    found: dict[Any, Any] = {}

    def launched() -> dict[str, int]:
        told = {name.split("::")[-1].split(".")[0]: c.launches for name, c in npu_host_ops.counts().items()}
        return {name: told[name] for name in COMMUNICATING if told.get(name)}

    def run(name: str, function: Any, handoff: str, train: bool) -> None:
        torch._dynamo.reset()
        npu_fuse.clear_reports()
        options = {"target": "npu", "handoff": handoff, "mc2_min_rows": 4, "soc": "Ascend910B3"}
        compiled = torch.compile(function, backend="npu_fuse", options=options)
        given = [t.requires_grad_(train) for t in inputs(rank)]
        moved = [t.detach().to("npu").requires_grad_(train) for t in given]
        npu_host_ops.reset_counts()
        with torch.set_grad_enabled(train):
            made, expected = compiled(*moved), function(*given)
        outputs = [(m, e) for m, e in zip(*map(several, (made, expected)), strict=True)]
        pairs = [(m.detach().cpu(), e.detach()) for m, e in outputs]
        if train:
            (outputs[0][0].float() * outputs[0][1].detach().to("npu").float()).sum().backward()
            (outputs[0][1].float() * outputs[0][1].detach().float()).sum().backward()
            pairs += [(m.grad.cpu(), e.grad) for m, e in zip(moved[:2], given[:2], strict=True)]
        far = max(float((m.float() - e.float()).norm() / e.float().norm()) for m, e in pairs)
        sites = [(s.op, str(s.status), s.reason) for r in npu_fuse.reports() for s in r.sites]
        found[name, handoff, train] = (far, launched(), sites)

    try:
        for name, (function, _, _) in PROGRAMS.items():
            for handoff in HANDOFFS:
                run(name, function, handoff, False)
            if name in TRAINED:
                run(name, function, "aot_eager", True)
        backend = dist.group.WORLD._get_backend(torch.device("npu"))  # type: ignore[union-attr]
        found["name"] = backend.get_hccl_comm_name(rank, init_comm=False)
        results.put((rank, found, ""))
    except BaseException as fault:
        import traceback

        results.put((rank, found, traceback.format_exc()))
        raise fault
    dist.destroy_process_group()


def several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: Any) -> list[dict[Any, Any]]:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    store = str(tmp_path_factory.mktemp("store") / "file")
    os.environ["NPU_HOST_DEVICES"] = str(WORLD)
    processes = [context.Process(target=work, args=(r, store, results)) for r in range(WORLD)]
    for process in processes:
        process.start()
    try:
        told = sorted(results.get(timeout=400) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for _, _, failure in told:
        assert not failure, failure
    return [found for _, found, _ in told]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("handoff", HANDOFFS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_graphs_launch_the_wheels_ops(outcomes: Any, name: str, handoff: str, train: bool) -> None:
    if train and (name not in TRAINED or handoff != "aot_eager"):
        assert all((name, handoff, train) not in found for found in outcomes)
        return
    for found in outcomes:
        far, launched, sites = found[name, handoff, train]
        assert {s[1] for s in sites} == {"fused"}, sites
        assert launched == PROGRAMS[name][2 if train else 1]
        assert far < 1e-2


def test_the_communicators_name_is_alike_on_both_ranks(outcomes: Any) -> None:
    assert outcomes[0]["name"] == outcomes[1]["name"] != ""


@pytest.mark.parametrize("op", COMMUNICATING)
def test_meta_kernels_agree(op: str) -> None:
    """The wheel's meta kernel and ours: shapes, dtypes, strides."""
    x, w = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((ROWS, K), (N, K)))
    ranks = () if op == "npu_mm_all_reduce_base" else (WORLD,)
    made = [several(call(x, w.t(), socket.gethostname(), *ranks)) for call in (npu(op), ours(op))]
    facts = [[(t.shape, t.dtype, t.stride()) for t in results] for results in made]
    assert facts[0] == facts[1]
