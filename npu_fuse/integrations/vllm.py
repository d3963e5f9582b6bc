"""The fusions inside vLLM: one pass object that vLLM finds by name, and the plugin that sets it.

vLLM reads `"npu_fuse.vllm_pass"` out of the package's `__dict__`, demands an instance of its own pass class, pickles
it to its workers and keys its compile cache with `uuid()`. npu_fuse does not depend on vLLM: it is imported nowhere
but in `register`, which vLLM itself calls.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule

from npu_fuse.errors import OptionError
from npu_fuse.options import Options

if TYPE_CHECKING:
    from npu_fuse.aten import Decompositions
    from npu_fuse.targets import Target

logger = logging.getLogger("npu_fuse")

SWITCH = "NPU_FUSE_VLLM"
OPTIONS_VARIABLE = "NPU_FUSE_OPTIONS"
SECTION = "npu_fuse"
"""The key of `additional_config` under which npu_fuse's options may stand; vLLM hashes it into its cache key."""
PASS = "npu_fuse.vllm_pass"
ASCEND_KEY = "graph_fusion_manager"
PASS_CLASSES = (
    ("vllm.compilation.passes.vllm_inductor_pass", "VllmInductorPass"),
    ("vllm.compilation.vllm_inductor_pass", "VllmInductorPass"),
    ("vllm.compilation.passes.inductor_pass", "InductorPass"),
    ("vllm.compilation.inductor_pass", "InductorPass"),
    ("torch._inductor.custom_graph_pass", "CustomGraphPass"),
)
"""Who demands that a pass be an instance of theirs, the most special first (releases differ in the module)."""


class FusePass:
    """A pass over the functionalised aten graph that vLLM hands to its post-grad passes.

    For vLLM and Inductor it is an instance of their own pass classes (whichever are loaded), for everybody else a
    plain object. Without options of its own it takes those of NPU_FUSE_OPTIONS, a JSON object.
    """

    pass_name = "npu_fuse"

    def __init__(self, options: Options | None = None) -> None:
        self.options = options

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        for module, name in PASS_CLASSES:
            found = getattr(sys.modules.get(module), name, None)
            if isinstance(found, type):
                return found
        return FusePass

    def __reduce__(self) -> Any:
        return "vllm_pass" if self.options is None else (FusePass, (self.options,))

    def __deepcopy__(self, memo: Mapping[int, Any]) -> FusePass:
        return self

    def uuid(self) -> str:
        """Changes with the rules, the options, the target and the versions. Raises `OptionError`, `TargetError`."""
        return self.chosen().cache_tag()

    def is_applicable(self, *_: Any, **__: Any) -> bool:
        return True

    is_applicable_for_range = is_applicable_for_shape = is_applicable

    def __call__(self, graph: Graph | GraphModule) -> None:
        """Fuse in place: vLLM's pass manager gives a graph, vllm-ascend's its module.

        Raises `OptionError`, `TargetError`, and `StrictError` with the option `strict`.
        """
        from npu_fuse.aten import inductor_decompositions
        from npu_fuse.targets import target_of

        options = self.chosen()
        target = target_of(options)
        module = graph if isinstance(graph, GraphModule) else graph.owning_module
        assert module is not None
        expanded = target.name == "reference" and _inside_inductor()
        _fuse(module, (), options, target, inductor_decompositions() if expanded else {}, "vllm")

    def before(self, graph: GraphModule, example_inputs: Sequence[Any], handoff: str) -> None:
        """Fuse Dynamo's graph in place, for a compiler that runs no passes. Raises as `__call__` does."""
        from npu_fuse.targets import target_of

        options = self.chosen()
        _fuse(graph, example_inputs, options, target_of(options), None, handoff)

    def chosen(self) -> Options:
        """Its own options, or those of the environment. Raises `OptionError`."""
        return self.options if self.options is not None else options_of_environment()


vllm_pass = FusePass()


def _fuse(
    module: GraphModule, example_inputs: Sequence[Any], options: Options, target: Target,
    aten: Decompositions | None, handoff: str,
) -> None:  # fmt: skip
    from npu_fuse.announce import announce
    from npu_fuse.backend import plan
    from npu_fuse.report import keep

    # Every worker compiles this.
    report = plan(module, example_inputs, options, False, target, aten=aten, together=True)
    report = replace(report, handoff=handoff, dynamic=_is_dynamic(module.graph))
    keep(report)
    announce(report, replace(options, report_dir=None))  # workers write one table of all graphs


def options_of_environment() -> Options:
    """The options in NPU_FUSE_OPTIONS, which every process of an engine inherits. Raises `OptionError`."""
    text = os.environ.get(OPTIONS_VARIABLE) or "{}"
    try:
        given = json.loads(text)
    except ValueError as error:
        why = f"{OPTIONS_VARIABLE} is no JSON ({error}): {text}"
        raise OptionError(why, remedy=f"write {OPTIONS_VARIABLE}='{{\"strict\": true}}', for example") from error
    return Options.make(given)


def _inside_inductor() -> bool:
    """Inductor generates code from what the pass leaves; everybody else runs the calls."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    if virtualized is None:
        return False
    from torch._subclasses.fake_tensor import FakeTensorMode

    return isinstance(virtualized.V.fake_mode, FakeTensorMode)


def _is_dynamic(graph: Graph) -> bool:
    return any(isinstance(n.meta.get("val"), torch.SymInt) for n in graph.nodes if n.op == "placeholder")


# --- the plugin --------------------------------------------------------------------------------------


def register() -> None:
    """vLLM's general plugin, called in each of its processes, possibly several times.

    It looks at each finished `VllmConfig`: with NPU_FUSE_VLLM=1 it sets the pass under the platform's own key, and
    it gives a pass that was named by hand the options in `additional_config["npu_fuse"]`.
    """
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    from npu_fuse.integrations import vllm_ascend, vllm_report

    if _pass_key() == ASCEND_KEY:
        vllm_ascend.watch(current_platform, pass_of)
    try:
        vllm_report.watch(pass_of)
    except (ImportError, AttributeError) as unknown:  # the plugin is loaded into engines without npu_fuse too
        logger.info("workers of this vLLM release are not known to npu_fuse and tell nothing: %s", unknown)
    original = VllmConfig.__post_init__
    if getattr(original, "npu_fuse", False):
        return

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        settle(self)

    post_init.npu_fuse = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = post_init


def pass_of(config: Any) -> FusePass | None:
    """The pass in a `VllmConfig`."""
    found = [value for value in config.compilation_config.inductor_compile_config.values() if type(value) is FusePass]
    return found[0] if found else None


def settle(config: Any) -> None:
    """Put the pass and its options into a `VllmConfig`, and warn where it would never run. Raises `OptionError`."""
    compilation = config.compilation_config
    passes = compilation.inductor_compile_config
    additional = config.additional_config
    section = additional.get(SECTION) if isinstance(additional, Mapping) else None
    ours = [key for key, value in passes.items() if type(value) is FusePass]
    switched_on = os.environ.get(SWITCH) == "1"
    by_backend = compilation.backend == SECTION
    if not ours and not switched_on:
        return
    key = _pass_key()
    if not ours and not by_backend:
        if key in passes:
            logger.warning("%s=1 does nothing: another pass stands under inductor_passes.%s", SWITCH, key)
            return
        compilation.inductor_passes[key] = PASS
        passes[key] = vllm_pass
        ours = [key]
    for name in ours:
        if section is not None:
            passes[name] = FusePass(Options.make(section))
        passes[name].uuid()  # a wrong option is told here, before any worker starts
        if name != key:
            logger.warning("npu_fuse's pass stands under inductor_passes.%s and this platform reads %s only: no pass "
                           "will run; rename the key to %s", name, key, key)  # fmt: skip
    for reason, remedy in obstacles(config, key):
        logger.warning("npu_fuse fuses nothing in this engine: %s; %s", reason, remedy)


def _pass_key() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.pass_key)


def obstacles(config: Any, key: str) -> list[tuple[str, str]]:
    """Why no pass runs in an engine with this `VllmConfig`, each with what to do."""
    compilation = config.compilation_config
    found = []
    mode = getattr(compilation.mode, "name", str(compilation.mode))
    if getattr(config.model_config, "enforce_eager", False):
        found.append(("enforce_eager is set", "leave it out"))
    elif mode == "NONE":
        found.append(("the compilation mode is 0", "set compilation_config.mode to 3"))
    if key == ASCEND_KEY:
        capture = getattr(compilation.cudagraph_mode, "name", str(compilation.cudagraph_mode))
        ascend = config.additional_config.get("ascend_compilation_config") or {}
        skipped = capture in ("FULL", "FULL_DECODE_ONLY") and ascend.get("enable_npugraph_ex", True)
        if skipped and not _fuses_before_npugraph_ex():
            remedy = (
                "use cudagraph_mode FULL_AND_PIECEWISE, or set "
                'additional_config={"ascend_compilation_config": {"enable_npugraph_ex": false}}'
            )
            found.append((f"vllm-ascend runs no pass manager with cudagraph_mode {capture}", remedy))
    return found


def _fuses_before_npugraph_ex() -> bool:
    from vllm.platforms import current_platform

    from npu_fuse.integrations import vllm_ascend

    return vllm_ascend.fuses_first(str(current_platform.get_compile_backend()), pass_of)
