"""What a fused op becomes: calls into the NPU's own ops, or the same ops in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from npu_fuse.chip_names import family
from npu_fuse.options import Options, npu_is_loaded, resolve_target

MC2_MIN_ROWS = 512
"""Rows below which vllm-ascend leaves matmul and all-reduce apart: the fused kernel's tiles are as tall
(its pass for matmul + all-reduce + RMSNorm). Ascend's document of npu_mm_all_reduce_base says to use the op
for prefill and not for decode, without a number."""


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
    names_in_graph: bool = False
    """The hand-off translates ops one by one and must see the NPU's own: communicators' names are constants then."""
    min_rows: int = 0
    """Products of fewer rows are not fused with the communication that follows."""
    gating: str = "inference"
    """Where routers may be fused: the option moe_gating."""
    models_rows: bool = False
    """`min_rows` is no word of the user's: where a form pays by a model only, the model says from how many rows on."""
    gather: str = "graph"
    """Whether gathered rows are kept for the weights' gradients: "graph" (as it is), "keep" or "again"."""

    @property
    def generation(self) -> str:
        """The chip's family as Ascend's documents call it: "A2", "A3", "310P"…; "" where it is not known."""
        return (family(self.soc) if self.soc else None) or ""

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
    chosen: dict[str, Any] = {"gating": options.moe_gating, "gather": options.mc2_gather}
    rows = MC2_MIN_ROWS if options.mc2_min_rows is None else options.mc2_min_rows
    on_npu: dict[str, Any] = {"concatenates": concat is not False, "min_rows": rows, **chosen}
    on_npu["models_rows"] = options.mc2_min_rows is None
    if planning and options.target == "npu" and options.soc is not None and not npu_is_loaded():
        return Target("npu", "npu", options.soc, present=False, **on_npu)
    if resolve_target(options) == "reference":
        return replace(REFERENCE, concatenates=concat is True, min_rows=options.mc2_min_rows or 0, **chosen)
    soc = options.soc
    if soc is None:
        npu: Any = torch.npu  # type: ignore[attr-defined]
        soc = str(npu.get_device_name()) if npu.is_available() else None
    return Target("npu", "npu", soc, names_in_graph=_translates(options.handoff), **on_npu)


def _translates(handoff: Any) -> bool:
    """torchair's GE: the backend "npu", or a callable of torchair's own."""
    return handoff == "npu" or "torchair" in str(getattr(handoff, "__module__", "") or "")
