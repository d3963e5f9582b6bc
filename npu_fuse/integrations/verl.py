"""verl's FSDP engines, compiled block by block: one switch for actor, reference, critic and reward models.

    actor_rollout_ref.model.external_lib=npu_fuse.integrations.verl
    +actor_rollout_ref.model.fused_kernel_options.npu_fuse.enable=True

verl imports this module as its external library, in processes without an engine too: nothing happens there but a
look at `sys.modules`. Every option of npu_fuse may stand beside `enable`; so may `verl_patches`: "off" (the default)
leaves out verl's own patches of some models for NPUs, "keep" lets them stand, and what they call is left alone.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from npu_fuse.doctor import doctor
from npu_fuse.errors import OptionError
from npu_fuse.option_checks import check, check_choice
from npu_fuse.options import Options

logger = logging.getLogger("npu_fuse")

SECTION = "npu_fuse"
PREFIX = "actor_rollout_ref.model.fused_kernel_options.npu_fuse"
ENGINE_MODULE = "verl.workers.engine.fsdp.transformer_impl"
PATCHES = ("off", "keep")


@dataclass(frozen=True)
class Settings:
    """What stands under `fused_kernel_options.npu_fuse`, checked."""

    options: Options
    verl_patches: str = "off"


def settings_of(fused_kernel_options: Any) -> Settings | None:
    """The settings in a model's `fused_kernel_options`, None where npu_fuse is not enabled. Raises `OptionError`."""
    section = _plain(fused_kernel_options).get(SECTION)
    if section is None:
        return None
    given = _plain(section)
    if not given and section != {}:
        raise OptionError(f"{PREFIX} is {section!r}", remedy=f"write +{PREFIX}.enable=True")
    enable, patches = given.pop("enable", False), given.pop("verl_patches", "off")
    check("enable", isinstance(enable, bool), enable, "True or False")
    check_choice("verl_patches", patches, PATCHES)
    try:
        options = Options.make(given)
    except OptionError as error:
        raise OptionError(f"{PREFIX}: {error.args[0]}", key=error.key, remedy=error.remedy) from error
    return Settings(options, patches) if enable else None


def _plain(section: Any) -> dict[str, Any]:
    """A dict of a dict or of OmegaConf's."""
    if isinstance(section, Mapping):
        return {str(key): _plain(value) if isinstance(value, Mapping) else value for key, value in section.items()}
    return {}


# --- blocks ------------------------------------------------------------------------------------------


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
        """One line: graphs, sites fused by op, sites left by status, the hand-offs."""
        from collections import Counter

        from npu_fuse.report import Status

        sites = [site for graph in self.graphs for site in graph.sites]
        fused = Counter(s.op for s in sites if s.status is Status.FUSED)
        left = Counter(str(s.status) for s in sites if s.status is not Status.FUSED)
        handoffs = sorted({g.handoff for g in self.graphs})
        parts = [f"{n} {op}" for op, n in sorted(fused.items())] or ["nothing"]
        rest = ", ".join(f"{n} {status}" for status, n in sorted(left.items())) or "none"
        return f"{len(self.graphs)} graphs; fused {', '.join(parts)}; left {rest}; handed to {', '.join(handoffs)}"

    def write(self, folder: Path) -> None:
        """The table as JSON, one file a model and rank, in the format of docs/report_format.md."""
        from npu_fuse.explain import ExplainReport
        from npu_fuse.report_json import to_json

        training = any(g.training for g in self.graphs)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = to_json(ExplainReport(self.role, training, tuple(self.graphs)))
            (folder / f"npu_fuse_verl_{self.role}_rank{self.rank}.json").write_text(text, encoding="utf-8")
        except OSError as problem:
            logger.warning("the report cannot be written to %s (%s); set %s.report_dir", folder, problem, PREFIX)

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
    policy = _plain(getattr(engine.engine_config, "wrap_policy", None))
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
    """Waits for verl's engine: importing it here would load MindSpeed into processes that have no engine."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != ENGINE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                install(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _hook() -> None:
    if ENGINE_MODULE in sys.modules:
        install(sys.modules[ENGINE_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


_hook()
