"""One program on this rank: with npu_fuse beside the same program compiled without it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import npu_fuse
from npu_fuse.report import Status, clear_reports

COLLECTIVES = (
    "all_reduce", "mm_all_reduce", "reduce_scatter_tensor", "mm_reduce_scatter", "all_gather_into_tensor",
    "all_gather_mm", "all_gather_mms", "all_gather_again",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """`differences`: the largest relative difference of each output and gradient; `counts`: collectives by name."""

    differences: tuple[float, ...]
    sites: tuple[tuple[str, str, str], ...]
    """(op, status, reason)"""
    before: Counter[str]
    after: Counter[str]
    errors: tuple[str, ...] = ()
    kept: tuple[int, int] = (0, 0)
    """Bytes kept for the backward, without and with npu_fuse."""

    @property
    def fused(self) -> int:
        return sum(status == "fused" for _, status, _ in self.sites)


class Counting:
    """A hand-off that counts the collectives of AOTAutograd's graphs, forward and backward."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, gm: Any, inputs: Sequence[Any], **_: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self._count, bw_compiler=self._count)(gm, inputs)

    def _count(self, gm: Any, inputs: Sequence[Any]) -> Any:
        for node in gm.graph.nodes:
            name = getattr(node.target, "_schema", None)
            short = name.name.split("::")[1] if name is not None else ""
            if short in COLLECTIVES:
                self.counts[short] += 1
        return gm


def compare(
    function: Callable[..., Any], make: Callable[[], list[Any]], train: bool, dynamic: bool | None = None,
    calls: int = 1, autocast: bool = False, model: torch.nn.Module | None = None, **options: Any,
) -> Outcome:  # fmt: skip
    """`make` gives new inputs for each call, alike in both runs. Both are compiled, for what an in-place
    collective's gradient is differs between torch.compile and eager. `options` are npu_fuse's."""
    counting = [Counting(), Counting()]
    results = []
    kept: list[dict[int, int]] = [{}, {}]
    for fuse in (False, True):
        torch._dynamo.reset()
        clear_reports()
        torch.manual_seed(1)
        compiled = torch.compile(function, dynamic=dynamic, **_backend(fuse, {"handoff": counting[fuse], **options}))
        found: list[Any] = []
        try:
            for _ in range(calls):
                with keeping(kept[fuse]):
                    found += _call(compiled, make(), train, autocast, model)
        except Exception as fault:  # on all ranks alike, or the others will time out
            return Outcome((), (), Counter(), Counter(), (f"{'fused' if fuse else 'plain'}: {fault}"[-600:],))
        results.append(found)
    reports = npu_fuse.reports()
    sites = tuple((s.op, str(s.status), s.reason) for r in reports for s in r.sites)
    errors = tuple(e for r in reports for e in r.errors)
    differences = tuple(_difference(a, b) for a, b in zip(*results, strict=True))
    kept_bytes = (sum(kept[0].values()), sum(kept[1].values()))
    return Outcome(differences, sites, *(c.counts for c in counting), errors, kept_bytes)


def _backend(fuse: bool, options: dict[str, Any]) -> dict[str, Any]:
    if not fuse:
        return {"backend": options["handoff"]}
    return {"backend": "npu_fuse", "options": {"target": "reference", **options}}


@contextlib.contextmanager
def keeping(sizes: dict[int, int]) -> Iterator[None]:
    """Notes the storages that are kept for a backward, by address: all of them live until then."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _call(
    compiled: Callable[..., Any], inputs: list[Any], train: bool, autocast: bool, model: torch.nn.Module | None
) -> list[Any]:
    leaves = [t.requires_grad_(train) if t.is_floating_point() else t for t in inputs]
    given = [t.clone() if train else t for t in leaves]
    scope = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.set_grad_enabled(train), scope:
        made = compiled(*given)
    outputs = list(made) if isinstance(made, (tuple, list)) else [made]
    gradients: list[Any] = []
    if train and any(o.requires_grad for o in outputs):
        generator = torch.Generator().manual_seed(7)
        loss = sum((o.float() * torch.randn(o.shape, generator=generator)).sum() for o in outputs if o.requires_grad)
        wanted = [*leaves, *(model.parameters() if model is not None else ())]
        gradients = [_local(g) for g in torch.autograd.grad(loss, wanted, allow_unused=True)]
    return [*(_local(o.detach()) for o in outputs), *gradients]


def _local(value: Any) -> Any:
    return getattr(value, "_local_tensor", value)


def _difference(left: Any, right: Any) -> float:
    if left is None or right is None:
        return 0.0 if left is right else float("inf")
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    first, second = left.double(), right.double()
    scale = float(first.abs().max()) if first.numel() else 0.0
    difference = float((first - second).abs().max()) if first.numel() else 0.0
    return difference / scale if scale else difference


FUSED = str(Status.FUSED)
