"""Who compiles the rewritten graph, and why: the user's choice, or the default of this machine.

What torch_npu's hand-offs refuse is known before they start: task queue level 2 refuses to capture
(NPUGraph.cpp, capture_begin), and `npugraphs` imports the NPU's Inductor, which asks Triton for an NPU driver in
releases before 2.13. Then the graph goes to aot_eager, with a warning and the reason in the report.
"""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass

from npu_fuse.options import Options
from npu_fuse.targets import Target
from npu_fuse.task_queue import task_queue_level

logger = logging.getLogger("npu_fuse")
_told: set[str] = set()

CAPTURING = frozenset(("npugraph_ex", "npugraphs"))
FALLBACK = "aot_eager"


@dataclass(frozen=True)
class Handoff:
    """A torch.compile backend by name ("callable" or its own name for a function), and why it was taken."""

    name: str
    reason: str
    given: bool = False
    """The user's own choice, as it was given."""


def choose(options: Options, target: Target, training: bool) -> Handoff:
    """The hand-off for one graph. Imports torch_npu's Inductor where the hand-off would do so itself."""
    if options.handoff is not None and not isinstance(options.handoff, str):
        return Handoff(str(getattr(options.handoff, "__name__", "callable")), "the option handoff", given=True)
    wanted = Handoff(options.handoff, "the option handoff", True) if options.handoff else _default(target, training)
    problem = refusal(wanted.name) if target.present and wanted.name in CAPTURING else ""
    if not problem:
        return wanted
    reason = f"{wanted.name} cannot be used here: {problem}"
    if reason not in _told:
        _told.add(reason)
        logger.warning("%s; graphs go to %s", reason, FALLBACK)
    return Handoff(FALLBACK, reason)


def _default(target: Target, training: bool) -> Handoff:
    """Inductor on CPUs and GPUs; on an NPU its graph mode in inference, where it is registered."""
    if target.name != "npu":
        return Handoff("inductor", "the default off an NPU")
    if training:
        return Handoff(FALLBACK, "training: npugraph_ex is made for inference and keeps more for backward")
    if target.soc is not None and "310P" in target.soc:
        return Handoff(FALLBACK, f"npugraph_ex is not in use on {target.soc} (vllm-ascend turns it off there)")
    if target.present and "npugraph_ex" not in _registered():
        return Handoff(FALLBACK, "this torch_npu registers no npugraph_ex")
    return Handoff("npugraph_ex", "inference on an NPU: passes of its own, then one captured graph for each size")


def refusal(name: str) -> str:
    """Why a hand-off that captures cannot run in this process; "" if nothing is known against it."""
    if task_queue_level() == "2":
        return (
            "the task queue is at level 2 (TASK_QUEUE_ENABLE=2), with which torch_npu refuses to capture;"
            " set TASK_QUEUE_ENABLE=1"
        )
    if name == "npugraphs" and "torch_npu" in sys.modules:
        from torch._inductor import config

        before = config.save_config()  # type: ignore[attr-defined, unused-ignore]
        try:
            importlib.import_module("torch_npu._inductor.config")
        except Exception as fault:
            config.load_config(before)  # type: ignore[attr-defined, unused-ignore]
            return (
                f"it imports torch_npu._inductor, which raises {type(fault).__name__}: {fault};"
                " install the triton-ascend that goes with this torch_npu, or use npugraph_ex"
            )
    return ""


def _registered() -> list[str]:
    from torch._dynamo.backends.registry import list_backends

    return list(list_backends(exclude_tags=()))
