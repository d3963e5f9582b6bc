"""What a fused op becomes: calls into the NPU's own ops, or the same ops in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from npu_fuse.options import Options, npu_is_loaded, resolve_target


@dataclass(frozen=True)
class Target:
    """A namespace of ops, and the chip whose limits hold (None: no limits)."""

    name: str
    namespace: str
    soc: str | None = None
    present: bool = True
    """False where a plan is made for a chip whose torch_npu is not here: our ops stand in the graph instead."""
    concatenates: bool = False
    """Gate and up from two projections are concatenated: the op takes one tensor."""

    def resolve(self, op: str) -> Callable[..., Any]:
        """The callable that a graph node calls, e.g. `torch.ops.npu.npu_rms_norm.default`."""
        namespace = self.namespace if self.present and self.has(op) else "npu_fuse"  # our own, over the target's
        return getattr(getattr(torch.ops, namespace), op).default  # type: ignore[no-any-return]

    def has(self, op: str) -> bool:
        return hasattr(getattr(torch.ops, self.namespace), op)


REFERENCE = Target("reference", "npu_fuse")


def target_of(options: Options, planning: bool = False) -> Target:
    """The target that the options ask for on this machine. Raises `TargetError`.

    With `planning` nothing will run: target "npu" for a chip that is named needs no torch_npu.
    """
    concat = options.glu_concat
    if planning and options.target == "npu" and options.soc is not None and not npu_is_loaded():
        return Target("npu", "npu", options.soc, present=False, concatenates=concat is not False)
    if resolve_target(options) == "reference":
        return replace(REFERENCE, concatenates=concat is True)
    soc = options.soc
    if soc is None:
        npu: Any = torch.npu  # type: ignore[attr-defined]
        soc = str(npu.get_device_name()) if npu.is_available() else None
    return Target("npu", "npu", soc, concatenates=concat is not False)
