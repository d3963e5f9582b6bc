"""verl's vLLM rollout under the switch of the actor: its server gets the pass, the options, and a look at conflicts.

verl starts vLLM with the arguments in `rollout.engine_kwargs.vllm`. vLLM's own plugin of npu_fuse, loaded in each of
its processes, then sets the pass under the platform's key.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from npu_fuse.errors import OptionError
from npu_fuse.integrations.verl_settings import PREFIX, Settings, be_heard, plain, settings_of

logger = logging.getLogger("npu_fuse")

SERVER_MODULE = "verl.workers.rollout.vllm_rollout.vllm_async_server"
METHOD = "_preprocess_engine_kwargs"
KEY = "npu_fuse"
TRAINING_ONLY = ("handoff", "handoff_options", "strict")
"""Options that mean nothing where vLLM hands on the graph itself, or would end a server for one site."""


def install(module: Any) -> None:
    """Wrap where verl's vLLM server looks through its arguments; models without the switch go the way they went.

    Ray runs a class of its own that is derived from the server's, holds every method of it once more, and was made
    before verl imports its external library: that one is wrapped too. Idempotent.
    """
    kinds = [module.vLLMHttpServer]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if METHOD in vars(kind) and "npu_fuse" not in vars(kind):
            kind.npu_fuse = True
            setattr(kind, METHOD, _prepared(vars(kind)[METHOD]))


def _prepared(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(preprocess)
    def _preprocess_engine_kwargs(self: Any, engine_kwargs: dict[str, Any]) -> Any:
        made = preprocess(self, engine_kwargs)
        settings = settings_of(self.model_config.fused_kernel_options)
        if settings is not None and settings.rollout:
            be_heard()
            prepare(self.config, engine_kwargs, settings)
        return made

    return _preprocess_engine_kwargs


def prepare(rollout: Any, kwargs: dict[str, Any], settings: Settings) -> None:
    """Switch the pass on for the engine that this process will start, with the actor's options.

    rollout: verl's rollout configuration. kwargs: the arguments for vLLM, changed in place. Raises `OptionError` where
    the run's settings exclude each other.
    """
    for reason, remedy in conflicts(rollout, kwargs, os.environ):
        raise OptionError(f"the rollout cannot be fused: {reason}", remedy=remedy)
    if rollout.enforce_eager:
        logger.warning("npu_fuse fuses nothing in verl's rollout: enforce_eager=True runs no graph; set "
                       "actor_rollout_ref.rollout.enforce_eager=False, or +%s.rollout=False", PREFIX)  # fmt: skip
        return
    additional = kwargs.get("additional_config") or {}
    additional = json.loads(additional) if isinstance(additional, str) else plain(additional)
    additional.setdefault(KEY, {k: v for k, v in settings.given.items() if k not in TRAINING_ONLY})
    kwargs["additional_config"] = additional
    os.environ["NPU_FUSE_VLLM"] = "1"
    logger.info("npu_fuse's pass is switched on in verl's vLLM rollout")


def conflicts(
    rollout: Any, kwargs: Mapping[str, Any], environment: Mapping[str, str]
) -> list[tuple[str, str]]:  # fmt: skip
    """What cannot work together in this run, each with its remedy."""
    found = []
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and KEY not in [name.strip() for name in plugins.split(",")]:
        found.append((f"VLLM_PLUGINS={plugins} leaves out npu_fuse's plugin", f"add {KEY} to VLLM_PLUGINS"))
    task_queue = environment.get("VLLM_ASCEND_TASK_QUEUE_ENABLE") or environment.get("TASK_QUEUE_ENABLE")
    if task_queue == "2" and not rollout.enforce_eager:
        remedy = "export VLLM_ASCEND_TASK_QUEUE_ENABLE=1, which sets it for the rollout alone"
        found.append(("TASK_QUEUE_ENABLE=2 excludes graph mode", remedy))
    compilation = kwargs.get("compilation_config") or {}
    compilation = json.loads(compilation) if isinstance(compilation, str) else compilation
    if str(compilation.get("mode", 3)) in ("0", "NONE"):
        remedy = "leave out actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config.mode"
        found.append(("compilation_config.mode=0 compiles no graph", remedy))
    return found
