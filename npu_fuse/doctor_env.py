"""Findings about the settings and packages around npu_fuse: communication, patches of others, compilers.

As in doctor.py nothing is imported and no device is touched: variables, loaded modules and files are read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any

from npu_fuse.findings import Finding
from npu_fuse.task_queue import task_queue_level

EXPANSION_MODES = ("AI_CPU", "AIV", "HOST", "HOST_TS", "CCU_MS", "CCU_SCHED")
"""Of HCCL's document of HCCL_OP_EXPANSION_MODE; the last two on Ascend 950 only."""
VERL_PATCH = "verl.models.transformers.npu_patch"
ENOUGH_RECOMPILES = 8
DOUBLED = (0, 23)
"""The vllm-ascend release whose own matmul + all-reduce is still there."""


def communication() -> Iterator[Finding]:
    """HCCL_OP_EXPANSION_MODE: where HCCL expands its algorithms."""
    mode = os.environ.get("HCCL_OP_EXPANSION_MODE")
    if not mode:
        if installed("torch_npu"):
            message = "HCCL_OP_EXPANSION_MODE is not set: HCCL takes the chip's default"
            yield Finding(
                "hccl_expansion", "info", message, "AIV is the faster one for inference on one node; see below"
            )
        return
    if mode not in EXPANSION_MODES:
        known = ", ".join(EXPANSION_MODES)
        message = f"HCCL_OP_EXPANSION_MODE={mode} is no mode, HCCL takes its default"
        yield Finding("hccl_expansion", "warning", message, f"set one of {known}, or unset it")
        return
    if mode == "AIV" and os.environ.get("HCCL_DETERMINISTIC", "").lower() in ("true", "strict"):
        message = "HCCL_OP_EXPANSION_MODE=AIV is without effect: HCCL_DETERMINISTIC comes first"
        yield Finding("hccl_expansion", "warning", message, "unset one of the two")
    elif mode == "AIV":
        message = (
            "HCCL_OP_EXPANSION_MODE=AIV: inference only, one communicator at a time; a captured graph with MC2 ops"
            " (matmul fused with communication) was reported to deadlock with it (vllm-ascend issue 13688)"
        )
        remedy = "use HOST or AI_CPU for training and where MC2 ops are captured, AIV for plain inference"
        yield Finding("hccl_expansion", "warning", message, remedy)
    else:
        yield Finding("hccl_expansion", "ok", f"HCCL_OP_EXPANSION_MODE is {mode}")


def other_patches() -> Iterator[Finding]:
    """Who has fused the same ops before: by classes replaced, which leaves npu_fuse nothing to find there."""
    if sys.modules.get(VERL_PATCH) is not None:
        message = f"{VERL_PATCH} is loaded: verl has replaced norms, MLPs and rotations of its model families"
        remedy = "replace verl.workers.engine.fsdp.utils.apply_npu_fsdp_patches before the engine is made: no un-patch"
        yield Finding("verl_patch", "warning", message, remedy)
    kernels = sys.modules.get("kernels")
    if kernels is not None or os.environ.get("USE_HUB_KERNELS", "").upper() in ("1", "YES", "ON", "TRUE"):
        message = "the package kernels is in use: models built with use_kernels=True have their norms swapped already"
        remedy = "build the model with use_kernels=False; doctor(model) tells which modules are swapped"
        yield Finding("use_kernels", "info", message, remedy)
    if os.environ.get("VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", "0") not in ("", "0"):
        yield _matmul_allreduce()


def _matmul_allreduce() -> Finding:
    variable, release = "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", version("vllm_ascend")
    number = tuple(int(part) for part in release.split(".")[:2] if part.isdigit())
    if release and number <= DOUBLED:
        message = f"{variable} is set and vllm-ascend {release} fuses matmul and all-reduce itself"
        return Finding("matmul_allreduce", "warning", message, f"unset {variable}: npu_fuse finds them in the graph")
    message = f"{variable} is set, and vllm-ascend does not read it since July 2026"
    return Finding("matmul_allreduce", "warning", message, f"unset {variable}: it does nothing")


def model_kernels(model: Any) -> Iterator[Finding]:
    """Modules whose forward is not their class's own: `kernelize`, Liger and others put another in."""
    swapped: dict[str, int] = {}
    for module in model.modules():
        own = vars(module).get("forward")
        told = getattr(getattr(own, "__func__", own), "__module__", None) if own is not None else None
        if told is not None and told != type(module).__module__:
            name = f"{type(module).__name__} (from {told})"
            swapped[name] = swapped.get(name, 0) + 1
    for name, count in swapped.items():
        message = f"{count} modules {name} have another forward than their class: their ops are no graph to read"
        yield Finding("swapped_forward", "warning", message, "build the model with use_kernels=False and without Liger")


def binary_mode() -> Iterator[Finding]:
    """Task queue level 2 speeds up launches in binary mode only (torch_npu's document of TASK_QUEUE_ENABLE)."""
    npu: Any = getattr(sys.modules.get("torch"), "npu", None)
    if task_queue_level() != "2" or npu is None:
        return
    with contextlib.suppress(Exception):
        if not npu.is_jit_compile_false():
            message = "task queue level 2 works in binary mode only, and jit_compile is on"
            yield Finding("binary_mode", "warning", message, "call torch.npu.set_compile_mode(jit_compile=False)")


def compilers() -> Iterator[Finding]:
    """What Inductor as a hand-off needs: a C++ compiler on a CPU, the NPU's Triton on an NPU."""
    if installed("torch_npu"):
        if not installed("triton") or not _has_npu_triton():
            message = (
                "no Triton for the NPU is installed: Inductor (and npugraphs before torch_npu 2.13) cannot be handed to"
            )
            remedy = "install the triton-ascend that goes with this torch_npu, or keep to npugraph_ex and aot_eager"
            yield Finding("triton", "info", message, remedy)
        return
    wanted = os.environ.get("CXX", "")
    if not any(shutil.which(name) for name in ((wanted,) if wanted else ("g++", "clang++", "c++"))):
        message = (
            f"no C++ compiler ({wanted or 'g++ or clang++'}): Inductor, the default hand-off on a CPU, cannot compile"
        )
        yield Finding("compiler", "warning", message, "install g++, or set the option handoff='aot_eager'")


def _has_npu_triton() -> bool:
    spec = util.find_spec("triton")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return any(os.path.isdir(os.path.join(folder, "backends", "ascend")) for folder in folders)


def recompiles() -> Iterator[Finding]:
    """Past its limit Dynamo runs a function eagerly, fused ops and all."""
    config: Any = sys.modules.get("torch._dynamo.config")
    limit = getattr(config, "recompile_limit", None)
    if isinstance(limit, int) and limit < ENOUGH_RECOMPILES:
        message = f"torch._dynamo.config.recompile_limit is {limit}: a function with more shapes than that runs eagerly"
        remedy = "raise it, compile with dynamic=True, or set torch._dynamo.config.fail_on_recompile_limit_hit"
        yield Finding("recompile_limit", "warning", message, remedy)


def cann() -> Iterator[Finding]:
    """CANN's environment script sets ASCEND_HOME_PATH and ASCEND_OPP_PATH beside LD_LIBRARY_PATH."""
    if not installed("torch_npu"):
        return
    lacking = [name for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH") if not os.environ.get(name)]
    if lacking:
        message = f"{' and '.join(lacking)} not set: CANN's environment script was not sourced in this shell"
        yield Finding("cann", "warning", message, "source /usr/local/Ascend/ascend-toolkit/set_env.sh")
    else:
        yield Finding("cann", "ok", f"CANN is at {os.environ['ASCEND_HOME_PATH']}")


CHECKS = (cann, communication, other_patches, binary_mode, compilers, recompiles)


def installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return util.find_spec(module) is not None


def version(distribution: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return ""
