"""Loops over experts in one architecture, and what `npu_fuse.group_experts` makes of them.

Which blocks there are is counted without npu_fuse: a module of a mixture of experts, by the name of its class, whose
own forward asks for values of tensors (`nonzero`, `where`, `tolist`, …) as it runs.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import npu_fuse
from npu_fuse.report import Status

from . import catalog, measure, reference
from .models import Built

READS = frozenset("nonzero tolist item unique __bool__ __index__ __int__ where".split())


MOE = re.compile(r"(Experts|Mo[eE]|MOE|MoeBlock|MoeMLP|TopKGating|MoeLayer|MoELayer|SparseMLP)$")


class _Reads(TorchFunctionMode):
    """The innermost module in whose forward a value of integers or flags was asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.stack and name in READS and (name != "where" or len(args) == 1):
            self.found[self.paths[self.stack[-1]]] += 1
        return func(*args, **(kwargs or {}))


def loops(built: Built) -> list[str]:
    """Paths of the modules that loop over their experts as the data says."""
    mode = _Reads(built.model)

    def enter(module: nn.Module, _: Any) -> None:
        mode.stack.append(module)

    def leave(*_: Any) -> None:
        mode.stack.pop()

    handles = [m.register_forward_pre_hook(enter) for m in built.model.modules()]
    handles += [m.register_forward_hook(leave) for m in built.model.modules()]
    try:
        with torch.no_grad(), mode:
            built.model(**built.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in mode.found if MOE.search(type(built.model.get_submodule(path)).__name__)]


def build(name: str, mode: reference.Mode) -> Built:
    """The architecture with its experts in loops."""
    built = catalog.build(name, mode.dtype, mode.train)
    if hasattr(built.model, "set_experts_implementation"):
        built.model.set_experts_implementation("eager")
    return built


def _within(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}.")


def measure_grouping(name: str, mode_name: str) -> dict[str, Any]:
    """Blocks found and grouped, reasons, and results of the compiled model against eager and float64."""
    mode = measure.MODES[mode_name]
    built = build(name, mode)
    found = loops(built)
    record: dict[str, Any] = {"name": name, "mode": mode_name, "loops": len(found), "grouped": 0}
    if not found:
        return record
    plain = measure.run_eager(Built(name, copy.deepcopy(built.model), built.inputs, built.config), mode)
    exact = reference.run_float64(built, mode.train) if plain.results else None
    built.model.zero_grad(set_to_none=True)
    report = npu_fuse.group_experts(built.model)
    served = [b.path for b in report.blocks if b.status is Status.FUSED]
    record["grouped"] = sum(any(_within(p, s) or _within(s, p) for s in served) for p in found)
    record["left"] = [f"{b.path}: {b.reason}" for b in report.blocks if b.status is not Status.FUSED]
    record["modes"] = sorted({m for b in report.blocks for m in b.modes})
    npu_fuse.clear_reports()
    fused = measure.compile_and_run(built, mode, fuse=True)
    record["graphs"], record["plain_error"], record["fused_error"] = fused.graphs, plain.error, fused.error
    sites = [s for r in npu_fuse.reports() for s in r.sites if s.op == "moe_routing"]
    record["routing"] = dict(Counter(str(s.status) for s in sites))
    if exact and plain.results and fused.results:
        record["accuracy"] = asdict(reference.compare(plain.results, fused.results, exact, mode))
    return record
