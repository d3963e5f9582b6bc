"""What each worker of a vLLM engine fused: one line in vLLM's own log, and one JSON file for each model and rank.

vLLM compiles a model in pieces, and not at all where its compile cache has it: what was told when the graphs were
made is kept in vLLM's cache folder and told again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npu_fuse import merged
from npu_fuse.report import GraphReport, reports

HANDOFFS = ("vllm", "npugraph_ex")
"""Who gets the graphs that the pass has fused."""

logger = logging.getLogger("vllm.npu_fuse")
"""Below vLLM's logger, which has a handler and the level INFO; npu_fuse's own has neither in a worker."""


def watch(enabled: Callable[[Any], Any]) -> None:
    """Tell after the warm-up of every worker whose `VllmConfig` has the pass. Idempotent.

    A worker loads the plugins while it is made, so the first method behind that is wrapped.
    `enabled` gives the pass in a configuration, or None.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    original = WorkerWrapperBase.init_device
    if getattr(original, "npu_fuse", False):
        return

    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        worker, before = self.worker, len(reports())
        warm_up, fuse = worker.compile_or_warm_up_model, enabled(worker.vllm_config)

        def compile_or_warm_up_model(*given: Any, **named: Any) -> Any:
            result = warm_up(*given, **named)
            graphs = [report for report in reports()[before:] if report.handoff in HANDOFFS]
            tell(worker.vllm_config, worker.rank, graphs, fuse.chosen().report_dir)
            return result

        if fuse is not None:
            worker.compile_or_warm_up_model = compile_or_warm_up_model
        return made

    init_device.npu_fuse = True  # type: ignore[attr-defined]
    WorkerWrapperBase.init_device = init_device


def tell(config: Any, rank: int, graphs: list[GraphReport], folder: str | None) -> None:
    """One line for this worker, and its table as JSON where `folder` names one. Raises nothing for a full disk."""
    model = str(config.model_config.model)
    kept = _kept(config, rank)
    try:
        if graphs:
            text, line = merged.to_json(model, graphs), merged.summary(graphs)
            merged.write(kept, text)
            merged.write(kept.with_suffix(".txt"), line)
        elif kept.exists():
            text = kept.read_text(encoding="utf-8")
            line = f"{kept.with_suffix('.txt').read_text(encoding='utf-8')} (graphs from vLLM's compile cache)"
        else:
            logger.warning("npu_fuse in rank %d of %s: no graph has reached the pass; run npu-fuse doctor", rank, model)
            return
        level = logging.INFO if "fused nothing" not in line else logging.WARNING
        logger.log(level, "npu_fuse in rank %d of %s: %s", rank, model, line)
        if folder is not None:
            merged.write(Path(folder) / merged.file_name("vllm", Path(model).name, f"rank{rank}"), text)
    except OSError as problem:
        logger.warning(
            "npu_fuse's report cannot be written (%s); set report_dir and VLLM_CACHE_ROOT elsewhere", problem
        )


def _kept(config: Any, rank: int) -> Path:
    """Beside vLLM's compile cache, under the hash by which that finds a graph."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "npu_fuse" / f"{config.compute_hash()}_rank{rank}.json"
