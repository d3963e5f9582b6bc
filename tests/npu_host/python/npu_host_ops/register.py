"""How a kernel of an `npu::` operator is registered, and how it refuses a call as hardware would."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_library = torch.library.Library("npu_host", "FRAGMENT")


def kernel(function: Callable[..., Any], namespace: str = "npu") -> Callable[..., Any]:
    """Register `function` as the kernel of `npu::<its name>`, under the wheel's own schema.

    It gets CPU tensors over the device's memory and returns new tensors; `requires_grad` of an input
    is what it was on the device. Left out where the wheel has no such operator.
    """
    name = function.__name__
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is not None:
        _library.define(str(packet.default._schema).removeprefix(f"{namespace}::"))
        _library.impl(name, function, "CPU")
    return function


def aten_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for an `aten::` operator that has no CPU kernel, or one for fewer dtypes than the NPU's."""
    return kernel(function, "aten")


def refuse(op: str, reason: str) -> None:
    raise RuntimeError(f"npu_host: {op} on {soc()}: {reason}")


def check(op: str, holds: bool, reason: str) -> None:
    if not holds:
        refuse(op, reason)


def soc() -> str:
    return os.environ.get("NPU_HOST_SOC", "Ascend910B3")


def family() -> str:
    """A2, A3, A5, 310P or 910A: the words of CANN's documents."""
    name = soc()
    if "910_93" in name:
        return "A3"
    if "910B" in name:
        return "A2"
    if "950" in name:
        return "A5"
    if "310P" in name:
        return "310P"
    return "910A"


def vector_cores() -> int:
    return 40


def unwritten(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """Memory that the hardware leaves as it was."""
    return torch.full(tuple(shape), torch.nan, dtype=dtype)
