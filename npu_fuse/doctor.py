"""What in this process and its environment keeps npu_fuse from working, or from being fast.

Every check only looks: nothing is imported that is not imported already (but torch itself), nothing is
written, no device is initialised.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

from npu_fuse import doctor_env
from npu_fuse.findings import Finding
from npu_fuse.options import CACHE_DIR_VARIABLE

OLDEST_TORCH = (2, 10)
NEWEST_TORCH = (2, 14)
BACKEND = "npu_fuse.backend:backend"
CANN_LIBRARY = "libascendcl.so"


def doctor(model: Any = None, *, probe: bool = False) -> list[Finding]:
    """Look at torch, torch_npu, the entry point and the environment; the good findings are listed too.

    With a `model` its modules are looked at as well; with `probe` what may crash is tried in a child process.
    """
    found = [finding for check in (*CHECKS, *doctor_env.CHECKS) for finding in check()]
    if model is not None:
        found += doctor_env.model_kernels(model)
    if probe:
        from npu_fuse.doctor_probe import probes

        found += probes()
    return found


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # torch loads torch_npu by itself, which raises what its libraries raise
        remedy = "install torch 2.10 to 2.14"
        if _installed("torch_npu"):
            remedy = "source CANN's set_env.sh, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to do without torch_npu"
        yield Finding("torch", "error", f"import torch failed: {type(error).__name__}: {error}", remedy)
        return
    release = _release(torch.__version__)
    if release < OLDEST_TORCH:
        remedy = f"install torch {_dotted(OLDEST_TORCH)} to {_dotted(NEWEST_TORCH)}"
        yield Finding("torch", "error", f"torch {torch.__version__} is too old", remedy)
    elif release > NEWEST_TORCH:
        message = f"torch {torch.__version__} is newer than any that npu_fuse was tried with"
        yield Finding("torch", "warning", message, f"go back to torch {_dotted(NEWEST_TORCH)} if graphs fail")
    else:
        yield Finding("torch", "ok", f"torch {torch.__version__}")


def _torch_npu() -> Iterator[Finding]:
    if not _installed("torch_npu"):
        yield Finding("torch_npu", "info", "torch_npu is not installed: target 'auto' is reference")
        return
    ours, theirs = _version("torch_npu"), _version("torch")
    if ours and theirs and _release(ours) != _release(theirs):
        message = f"torch_npu {ours} was built for another torch than {theirs}"
        remedy = f"install torch_npu {_dotted(_release(theirs))} or torch {_dotted(_release(ours))}"
        yield Finding("torch_npu", "error", message, remedy)
    elif _loaded("torch_npu"):
        npu = _npu()
        if npu is not None and npu.is_available():
            yield Finding("torch_npu", "ok", f"torch_npu {ours} sees {npu.device_count()} device(s)")
        else:
            remedy = "check npu-smi info, the driver and ASCEND_RT_VISIBLE_DEVICES"
            yield Finding("torch_npu", "warning", f"torch_npu {ours} is loaded but sees no device", remedy)
    elif not _cann_on_path():
        message = f"torch_npu {ours} cannot be loaded: {CANN_LIBRARY} is in no folder of LD_LIBRARY_PATH"
        yield Finding("torch_npu", "error", message, "source CANN's set_env.sh before starting Python")
    else:
        message = f"torch_npu {ours} is installed but not loaded: target 'auto' is reference"
        yield Finding("torch_npu", "warning", message, "import torch_npu before compiling")


def _entry_point() -> Iterator[Finding]:
    found = [e.value for e in metadata.entry_points(group="torch_dynamo_backends", name="npu_fuse")]
    if BACKEND in found:
        yield Finding("entry_point", "ok", 'torch.compile(backend="npu_fuse") is registered')
    else:
        message = f'torch.compile(backend="npu_fuse") is not registered (found: {", ".join(found) or "nothing"})'
        yield Finding("entry_point", "error", message, "pip install npu_fuse into this environment")


def _dynamo() -> Iterator[Finding]:
    """Ways in which torch.compile silently does nothing."""
    if not _loaded("torch"):
        return
    found = False
    for message, remedy in _dynamo_off():
        found = True
        yield Finding("dynamo", "error", f"torch.compile does nothing: {message}", remedy)
    config = sys.modules.get("torch._dynamo.config")
    if os.environ.get("TORCHDYNAMO_SUPPRESS_ERRORS") or getattr(config, "suppress_errors", False):
        message = "suppress_errors is on: a graph that fails to compile runs eagerly without a word"
        yield Finding("dynamo", "warning", message, "unset TORCHDYNAMO_SUPPRESS_ERRORS")
    elif not found:
        yield Finding("dynamo", "ok", "torch.compile is on")


def _dynamo_off() -> Iterator[tuple[str, str]]:
    torch: Any = sys.modules["torch"]
    for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(variable) == "1":
            yield f"{variable}=1", f"unset {variable}"
    config = sys.modules.get("torch._dynamo.config")
    if getattr(config, "disable", False) and os.environ.get("TORCH_COMPILE_DISABLE") != "1":
        yield "torch._dynamo.config.disable is set", "set torch._dynamo.config.disable = False"
    stance = getattr(getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None), "stance", "default")
    if stance == "force_eager":
        yield (
            "torch.compiler.set_stance('force_eager') is in force",
            "call torch.compiler.set_stance('default')",
        )
    owner = getattr(torch.compile, "__module__", None)
    if owner != "torch":
        name = getattr(torch.compile, "__qualname__", repr(torch.compile))
        yield (
            f"{owner}.{name} has replaced it (MindSpeed does so on import)",
            "write torch._dynamo.optimize('npu_fuse')(model) instead of torch.compile(model, …)",
        )


def _task_queue() -> Iterator[Finding]:
    blocking = os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1"
    if blocking:
        message = "ASCEND_LAUNCH_BLOCKING=1: every op waits for the device, and the task queue is off"
        yield Finding("launch_blocking", "warning", message, "unset it except to find a failing op")
    level = os.environ.get("TASK_QUEUE_ENABLE", "1")
    with contextlib.suppress(Exception):  # since torch_npu 2.13 it can be changed at run time
        level = str(_npu().get_task_queue_enable())
    if level == "2" and not blocking:
        message = "the task queue is at level 2, with which torch_npu refuses to capture graphs"
        remedy = "set TASK_QUEUE_ENABLE=1 for hand-offs that capture (npugraph_ex, npugraphs)"
        yield Finding("task_queue", "warning", message, remedy)
    else:
        yield Finding("task_queue", "ok", f"TASK_QUEUE_ENABLE is {level}")
    if "pin_memory_expandable_segments:True" in os.environ.get("PYTORCH_NPU_ALLOC_CONF", "").replace(" ", ""):
        message = "PYTORCH_NPU_ALLOC_CONF has pin_memory_expandable_segments, which graph capture refuses"
        yield Finding("alloc_conf", "warning", message, "take it out of PYTORCH_NPU_ALLOC_CONF")


def _internal_format() -> Iterator[Finding]:
    """Tensors in a private (NZ) format make some ops fall back to kernels that cannot be captured."""
    value = None
    if _loaded("torch_npu"):
        with contextlib.suppress(Exception):
            value = sys.modules["torch_npu"]._C._npu_getOption("ALLOW_INTERNAL_FORMAT")
    if value is None:
        return
    text = value.decode() if isinstance(value, bytes) else str(value)
    if text == "enable":
        message = "torch.npu.config.allow_internal_format is on: some ops then cannot be captured in a graph"
        yield Finding("internal_format", "warning", message, "set torch.npu.config.allow_internal_format = False")
    else:
        yield Finding("internal_format", "ok", f"allow_internal_format: {text or 'not set'}")


def _cache_dir() -> Iterator[Finding]:
    given = os.environ.get(CACHE_DIR_VARIABLE)
    if not given:
        message = f"proofs are kept in memory only ({CACHE_DIR_VARIABLE} is not set)"
        yield Finding("cache_dir", "info", message)
        return
    path = Path(given).expanduser().absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        yield Finding("cache_dir", "ok", f"proofs are kept in {path}")
    else:
        message = f"{CACHE_DIR_VARIABLE}={given}: {existing} is not a folder that can be written to"
        yield Finding("cache_dir", "warning", message, "name another folder; proofs are made anew meanwhile")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _torch,
    _torch_npu,
    _entry_point,
    _dynamo,
    _task_queue,
    _internal_format,
    _cache_dir,
)


def _npu() -> Any:
    return getattr(sys.modules.get("torch"), "npu", None)


def _loaded(module: str) -> bool:
    return sys.modules.get(module) is not None


def _installed(module: str) -> bool:
    return _loaded(module) or util.find_spec(module) is not None


def _version(distribution: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return ""


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) of "2.13.0+cpu", "2.10.0a0", …"""
    return tuple(int(part) for part in version.split(".")[:2])


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _cann_on_path() -> bool:
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return any(folder and (Path(folder) / CANN_LIBRARY).exists() for folder in folders)
