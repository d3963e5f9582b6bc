"""One fused matmul and all-reduce on two devices of this machine, for `verify_device`."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

SHAPE = (1024, 256, 128)  # rows, this rank's columns, results


def on_two_ranks() -> float:
    """The larger error of both ranks in roundings. Raises what a rank raises."""
    from torch.multiprocessing import get_context
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = get_context("spawn").SimpleQueue()
    spawn(_rank, (port, queue), nprocs=2)  # type: ignore[no-untyped-call]
    return float(max(queue.get(), queue.get()))


def _rank(rank: int, port: int, queue: Any) -> None:
    import torch.distributed as dist
    import torch_npu  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401

    from npu_fuse.device_checks import npu, roundings

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.npu.set_device(rank)  # type: ignore[attr-defined]
    dist.init_process_group("cpu:gloo,npu:hccl", rank=rank, world_size=2)
    rows, columns, results = SHAPE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, columns, generator=generator).half()
    w = torch.randn(2, columns, results, generator=generator).half()
    group: Any = dist.group.WORLD
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    y = npu("npu_mm_all_reduce_base")(x[rank].npu(), w[rank].npu(), name, reduce_op="sum")  # type: ignore[attr-defined]
    queue.put(roundings(y, (x.double() @ w.double()).sum(0)))
    dist.destroy_process_group()
