"""Stands for torch_npu in a process of its own: the op by its real schema, a communicator's name, gloo beneath."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch.distributed as dist

SCHEMAS = {
    "npu_mm_all_reduce_base": (
        '(Tensor x1, Tensor x2, str hcom, *, str reduce_op="sum", Tensor? bias=None, Tensor? antiquant_scale=None,'
        " Tensor? antiquant_offset=None, Tensor? x3=None, Tensor? dequant_scale=None, Tensor? pertoken_scale=None,"
        " Tensor? comm_quant_scale_1=None, Tensor? comm_quant_scale_2=None, int antiquant_group_size=0,"
        " int comm_turn=0, int[]? group_sizes=None, int? y_dtype=None, int? x1_dtype=None, int? x2_dtype=None,"
        " int? dequant_scale_dtype=None, int? pertoken_scale_dtype=None, int comm_quant_mode=0,"
        " str? comm_mode=None) -> Tensor"
    ),
}
"""Schemas of the ops in torch_npu 2.13."""


class Calls:
    """What was asked of the stand-in, in order."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, ...]] = []
        self.names: list[str] = []
        self.capturing = False


def install(soc: str) -> Calls:
    calls = Calls()
    torch.utils.rename_privateuse1_backend("npu")
    npu = types.ModuleType("torch.npu")
    npu.is_available = lambda: False  # type: ignore[attr-defined] # or torch would ask it for streams
    npu.is_initialized = lambda: True  # type: ignore[attr-defined]
    npu.get_device_name = lambda: soc  # type: ignore[attr-defined]
    npu.is_current_stream_capturing = lambda: calls.capturing  # type: ignore[attr-defined]
    torch._register_device_module("npu", npu)
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    library = torch.library.Library("npu", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)

    def mm_all_reduce(x1: Any, x2: Any, hcom: str, *, reduce_op: str = "sum", bias: Any = None, **rest: Any) -> Any:
        assert reduce_op == "sum" and not any(rest.values())
        assert x1.dtype == x2.dtype and x1.dtype in (torch.float16, torch.bfloat16)
        assert x1.dim() in (2, 3) and x1.stride(-1) == 1 and x2.dim() == 2
        calls.ops.append(("npu_mm_all_reduce_base", hcom, tuple(x1.shape), x2.stride(0) == 1, bias is not None))
        y = torch.nn.functional.linear(x1, x2.t(), bias)
        dist.all_reduce(y, group=groups[hcom])
        return y

    library.impl("npu_mm_all_reduce_base", mm_all_reduce, "CPU")
    library.impl("npu_mm_all_reduce_base", lambda x1, x2, *a, **k: x1.new_empty(*x1.shape[:-1], x2.shape[1]), "Meta")
    calls.library = library  # type: ignore[attr-defined]
    groups: dict[str, Any] = {}
    plain = dist.ProcessGroup._get_backend

    class Hccl:
        def __init__(self, group: Any) -> None:
            self.group = group

        def get_hccl_comm_name(self, rank: int) -> str:
            assert rank == dist.get_rank()
            dist.all_reduce(torch.zeros(1), group=self.group)  # as the real one: every rank must come
            name = f"hccl_{len(calls.names)}"
            calls.names.append(name)
            groups[name] = self.group
            return name

    dist.ProcessGroup._get_backend = (  # type: ignore[method-assign]
        lambda self, device: Hccl(self) if device.type == "npu" else plain(self, device)
    )
    return calls
