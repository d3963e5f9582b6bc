"""verl's FSDP engines, compiled block by block: one switch for actor, reference, critic and reward models.

    actor_rollout_ref.model.external_lib=npu_fuse.integrations.verl
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.enable=True

verl imports this module as its external library, in processes without an engine too: nothing happens there but a
look at `sys.modules`. Every option of npu_fuse may stand beside `enable`; so may `verl_patches`: "off" (the default)
leaves out verl's own patches of some models for NPUs, "keep" lets them stand, and what they call is left alone;
and `rollout`: True (the default) switches the pass on in the vLLM rollout too.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

from npu_fuse.doctor import doctor
from npu_fuse.errors import OptionError
from npu_fuse.integrations import verl_rollout
from npu_fuse.integrations.verl_blocks import BlockCompiler, blocks_of
from npu_fuse.integrations.verl_settings import Settings, be_heard, plain, settings_of

logger = logging.getLogger("npu_fuse")

ENGINE_MODULE = "verl.workers.engine.fsdp.transformer_impl"


# --- the hooks ---------------------------------------------------------------------------------------


def install(module: Any) -> None:
    """Wrap three methods of verl's FSDP engine; models without the switch go the way they went. Idempotent."""
    engine = module.FSDPEngine
    if getattr(engine, "npu_fuse", False):
        return
    engine.npu_fuse = True
    construct, build, run = engine.__init__, engine._build_fsdp_module, engine.forward_backward_batch

    @functools.wraps(construct)
    def __init__(self: Any, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        settings = settings_of(model_config.fused_kernel_options)
        if settings is None:
            construct(self, model_config, engine_config, *args, **kwargs)
            return
        be_heard()
        _check_engine(engine_config)
        with _without_patches(settings.verl_patches == "off"):
            construct(self, model_config, engine_config, *args, **kwargs)

    @functools.wraps(build)
    def _build_fsdp_module(self: Any, model: Any) -> Any:
        settings = settings_of(self.model_config.fused_kernel_options)
        if settings is not None:
            self.npu_fuse_blocks = _compile_blocks(self, model, settings)
        return build(self, model)

    @functools.wraps(run)
    def forward_backward_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        compiler = getattr(self, "npu_fuse_blocks", None)
        if compiler is not None:
            compiler.tell()
        return result

    engine.__init__ = __init__
    engine._build_fsdp_module = _build_fsdp_module
    engine.forward_backward_batch = forward_backward_batch


def _check_engine(engine_config: Any) -> None:
    if engine_config.strategy == "fsdp" and not engine_config.use_orig_params:
        raise OptionError(
            "npu_fuse compiles blocks before FSDP flattens their parameters, which FSDP1 does out of sight",
            remedy="add actor_rollout_ref.actor.fsdp_config.use_orig_params=True (and ref's, and the critic's), or "
            "set strategy=fsdp2",
        )


def _compile_blocks(engine: Any, model: Any, settings: Settings) -> BlockCompiler:
    role = _role(engine)
    compiler = BlockCompiler(role, engine.rank, settings.options)
    policy = plain(getattr(engine.engine_config, "wrap_policy", None))
    blocks = blocks_of(model, policy.get("transformer_layer_cls_to_wrap"))
    for _, block in blocks:
        compiler.compile(block)
    kinds = sorted({type(block).__name__ for _, block in blocks})
    logger.info("npu_fuse compiles %d blocks of verl's %s (%s); verl's own NPU patches: %s",
                len(blocks), role, ", ".join(kinds), settings.verl_patches)  # fmt: skip
    if not blocks:
        logger.warning("npu_fuse finds no repeated block in verl's %s: name its class in wrap_policy."
                       "transformer_layer_cls_to_wrap", role)  # fmt: skip
    if engine.rank == 0:
        for finding in doctor():
            if finding.level in ("warning", "error") and not _met_already(finding.code, finding.message):
                logger.warning("%s", finding)
    return compiler


def _met_already(code: str, message: str) -> bool:
    """MindSpeed's dummy torch.compile is got around, and no entry point is needed here."""
    return code == "entry_point" or (code == "dynamo" and "has replaced it" in message)


def _role(engine: Any) -> str:
    if engine.model_config.model_type == "value_model":
        return "critic"
    return "reference" if engine.engine_config.forward_only else "actor"


class _without_patches:
    """verl's patches of single models for NPUs left out while an engine is made: they are put in there, for good."""

    def __init__(self, leave_out: bool) -> None:
        self.leave_out = leave_out

    def __enter__(self) -> None:
        if self.leave_out:
            from verl.workers.engine.fsdp import utils

            self.kept = utils.apply_npu_fsdp_patches
            utils.apply_npu_fsdp_patches = lambda *_: None

    def __exit__(self, *_: Any) -> None:
        if self.leave_out:
            from verl.workers.engine.fsdp import utils

            utils.apply_npu_fsdp_patches = self.kept


class _WhenImported(MetaPathFinder):
    """Waits for a module of verl's: importing an engine here would load MindSpeed into processes that have none."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _hook() -> None:
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, _WhenImported)}
    for name, then in ((ENGINE_MODULE, install), (verl_rollout.SERVER_MODULE, verl_rollout.install)):
        if name in sys.modules:
            then(sys.modules[name])
        elif name not in waiting:
            sys.meta_path.insert(0, _WhenImported(name, then))


_hook()
