"""What a fused op becomes: calls into the NPU's own ops, or the same ops in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from npu_fuse.options import Options, resolve_target


@dataclass(frozen=True)
class Target:
    """A namespace of ops, and the chip whose limits hold (None: no limits)."""

    name: str
    namespace: str
    soc: str | None = None
    concatenates: bool = False
    """Gate and up from two projections are concatenated: the op takes one tensor."""
    min_rows: int = 0
    """Products of fewer rows are not fused with the communication that follows."""

    def resolve(self, op: str) -> Callable[..., Any]:
        """The callable that a graph node calls, e.g. `torch.ops.npu.npu_rms_norm.default`."""
        namespace = self.namespace if self.has(op) else "npu_fuse"  # an op of our own, over the target's
        return getattr(getattr(torch.ops, namespace), op).default  # type: ignore[no-any-return]

    def has(self, op: str) -> bool:
        return hasattr(getattr(torch.ops, self.namespace), op)


REFERENCE = Target("reference", "npu_fuse")


def target_of(options: Options) -> Target:
    """The target that the options ask for on this machine. Raises `TargetError`."""
    concat = options.glu_concat
    if resolve_target(options) == "reference":
        return replace(REFERENCE, concatenates=concat is True)
    soc = options.soc
    if soc is None:
        npu: Any = torch.npu  # type: ignore[attr-defined]
        soc = str(npu.get_device_name()) if npu.is_available() else None
    return Target("npu", "npu", soc, concatenates=concat is not False)
