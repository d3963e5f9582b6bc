"""Limits of the NPU target that every rule asks for: is the op in this torch_npu, and does the chip run it?"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from npu_fuse.chip_names import family
from npu_fuse.device_limits import measured_limit
from npu_fuse.report import Status
from npu_fuse.sites import Refusal
from npu_fuse.targets import Target
from npu_fuse.targets.chips import chip_limit

OLD_CHIPS = ("310P", "910A")


def on_npu(rule: str, target: Target, calls: Iterable[str], *dtypes: torch.dtype) -> Refusal | None:
    """Whether the target has these torch_npu ops, and its chip runs them on tensors of these dtypes."""
    if target.name != "npu":
        return None
    for call in calls:
        if target.present and not target.has(call):
            reason = f"this torch_npu has no op {call}; a newer release has"
            return Refusal(Status.REFUSED_BY_TARGET, f"{rule}.release", reason)
        for dtype in dtypes:
            limit = chip_limit(call, target.soc, dtype) or measured_limit(call, str(dtype)[6:], target.soc)
            if limit is not None:
                return Refusal(Status.REFUSED_BY_TARGET, f"{rule}.soc", limit)
    return None


def is_old(target: Target) -> bool:
    """310P and 910A, whose kernels are narrower than those of A2 and later chips."""
    return target.name == "npu" and target.soc is not None and family(target.soc) in OLD_CHIPS
