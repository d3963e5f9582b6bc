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
    "npu_mm_reduce_scatter_base": (
        '(Tensor input, Tensor x2, str hcom, int world_size, *, str reduce_op="sum", Tensor? bias=None,'
        " Tensor? x1_scale=None, Tensor? x2_scale=None, int comm_turn=0, ScalarType? output_dtype=None,"
        " str? comm_mode=None) -> Tensor"
    ),
    "npu_all_gather_base_mm": (
        "(Tensor input, Tensor x2, str hcom, int world_size, *, Tensor? bias=None, Tensor? x1_scale=None,"
        " Tensor? x2_scale=None, int gather_index=0, bool gather_output=True, int comm_turn=0,"
        " ScalarType? output_dtype=None, str? comm_mode=None) -> (Tensor, Tensor)"
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

    def check(x: Any, x2: Any, hcom: str, world_size: int, rest: dict[str, Any]) -> None:
        assert not any(rest.values()) and x.dim() == 2 and x.stride(1) == 1
        assert x.dtype == x2.dtype and x.dtype in (torch.float16, torch.bfloat16) and 256 <= x.shape[1] < 65535
        assert groups[hcom].size() == world_size

    def mm_reduce_scatter(x: Any, x2: Any, hcom: str, world_size: int, *, reduce_op: str = "sum", **rest: Any) -> Any:
        check(x, x2, hcom, world_size, rest)
        calls.ops.append(("npu_mm_reduce_scatter_base", tuple(x.shape)))
        out = x.new_empty(x.shape[0] // world_size, x2.shape[1])
        dist.reduce_scatter_tensor(out, x @ x2, group=groups[hcom])
        return out

    def all_gather_mm(
        x: Any, x2: Any, hcom: str, world_size: int, *, gather_output: bool = True, **rest: Any
    ) -> tuple[Any, Any]:
        check(x, x2, hcom, world_size, rest)
        calls.ops.append(("npu_all_gather_base_mm", tuple(x.shape)))
        out = x.new_empty(x.shape[0] * world_size, x.shape[1])
        dist.all_gather_into_tensor(out, x, group=groups[hcom])
        return out @ x2, out if gather_output else x.new_empty(0)

    def gathered_meta(x: Any, x2: Any, hcom: str, world_size: int, *, gather_output: bool = True, **rest: Any) -> Any:
        rows = x.shape[0] * world_size
        return x.new_empty(rows, x2.shape[1]), x.new_empty(rows, x.shape[1]) if gather_output else x.new_empty(0)

    library.impl("npu_mm_reduce_scatter_base", mm_reduce_scatter, "CPU")
    library.impl(
        "npu_mm_reduce_scatter_base", lambda x, x2, h, n, **k: x.new_empty(x.shape[0] // n, x2.shape[1]), "Meta"
    )
    library.impl("npu_all_gather_base_mm", all_gather_mm, "CPU")
    library.impl("npu_all_gather_base_mm", gathered_meta, "Meta")
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
