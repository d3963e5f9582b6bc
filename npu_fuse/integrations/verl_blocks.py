"""The decoder blocks of a model that FSDP is to wrap: found, compiled one by one by npu_fuse, and told of together."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from npu_fuse import merged
from npu_fuse.integrations.verl_settings import be_heard
from npu_fuse.options import Options

logger = logging.getLogger("npu_fuse")


def blocks_of(model: Any, wrapped: Any = None) -> list[tuple[str, Any]]:
    """The modules that FSDP wraps, by name: those of the classes in `wrapped` or in the model's `_no_split_modules`.

    Where neither names one, the elements of the longest list of modules of one class. Of nested ones the inner.
    """
    names = set(wrapped or getattr(model, "_no_split_modules", None) or ())
    found = [(path, m) for path, m in model.named_modules() if type(m).__name__ in names]
    if not found:
        found = _longest_list(model)
    inner = [entry for entry in found if not any(p.startswith(f"{entry[0]}.") for p, _ in found)]
    return inner


def _longest_list(model: Any) -> list[tuple[str, Any]]:
    import torch

    best: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len({type(m) for m in module}) == 1 and len(module) > len(best):
            best = [(f"{path}.{i}", m) for i, m in enumerate(module)]
    return best


def mark_rows(values: Any) -> None:
    """Let Dynamo take batch and token dimensions as symbolic from the first call on: all but the last one of what
    has features, all of a mask. A dimension that the model fixes stays fixed, without an error."""
    import torch

    if isinstance(values, torch.Tensor):
        square = values.dim() == 4 and values.shape[-1] >= values.shape[-2]  # a mask, of keys by queries
        features = values.is_floating_point() and not square
        for dim in range(values.dim() - 1 if features else values.dim()):
            if values.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(values, dim)
    elif isinstance(values, (tuple, list)):
        for value in values:
            mark_rows(value)
    elif isinstance(values, dict):
        for value in values.values():
            mark_rows(value)


class BlockCompiler:
    """The backend of one model's blocks: npu_fuse, and the reports of the graphs that it compiled."""

    def __init__(self, role: str, rank: int, options: Options) -> None:
        self.role, self.rank, self.options = role, rank, options
        self.graphs: list[Any] = []
        self.code: set[Any] = set()
        self.told = 0
        self.warned = False

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        from npu_fuse.backend import backend
        from npu_fuse.report import reports

        # The graphs are told of together, in one table for the model.
        compiled = backend(gm, example_inputs, options=replace(self.options, report_dir=None))
        self.graphs.append(reports()[-1])
        return compiled

    def compile(self, module: Any) -> None:
        """Replace `module.forward` by its compiled form: no wrapper module, so every parameter keeps its name.

        By Dynamo itself and not by `torch.compile`, which MindSpeed replaces by a dummy. Not with `dynamic=True`:
        Dynamo would make the integers of an FSDP module symbolic too, such as the width of a head.
        """
        import torch

        forward = module.forward
        self.code.add(getattr(forward, "__func__", forward).__code__)
        compiled = torch._dynamo.optimize(backend=self)(forward)

        @functools.wraps(forward)
        def with_dynamic_rows(*args: Any, **kwargs: Any) -> Any:
            mark_rows((args, kwargs))
            return compiled(*args, **kwargs)

        module.forward = with_dynamic_rows

    def tell(self) -> None:
        """After a batch: what is new, whether anything was compiled at all, and whether Dynamo is about to give up."""
        be_heard()
        if not self.graphs and not self.warned:
            self.warned = True
            logger.warning("npu_fuse compiled nothing in verl's %s: Dynamo is off or left every block to eager; "
                           "run npu-fuse doctor", self.role)  # fmt: skip
        if len(self.graphs) > self.told:
            self.told = len(self.graphs)
            level = logging.WARNING if not any(g.sites for g in self.graphs) else logging.INFO
            logger.log(level, "npu_fuse in verl's %s: %s", self.role, self.summary())
            if self.options.report_dir is not None:
                self.write(Path(self.options.report_dir))
        self._watch_recompiles()

    def summary(self) -> str:
        return merged.summary(self.graphs)

    def write(self, folder: Path) -> None:
        """The table as JSON, one file a model and rank, in the format of docs/report_format.md."""
        try:
            merged.write(folder / merged.file_name("verl", self.role, f"rank{self.rank}"),
                         merged.to_json(self.role, self.graphs))  # fmt: skip
        except OSError as problem:
            logger.warning("the report cannot be written to %s (%s); set the option report_dir", folder, problem)

    def _watch_recompiles(self) -> None:
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
        from torch._dynamo import config

        used = max((len(_debug_get_cache_entry_list(code)) for code in self.code), default=0)
        if used >= config.recompile_limit and not self.warned:
            self.warned = True
            logger.warning(
                "verl's %s has been compiled %d times and Dynamo stops at %d: further shapes run unfused. Set "
                "pad_to_length=True in the engine's configuration, or raise torch._dynamo.config.recompile_limit",
                self.role, used, config.recompile_limit,
            )  # fmt: skip
