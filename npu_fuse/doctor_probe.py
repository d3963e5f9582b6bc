"""What can crash a process is tried in another: `import torch` with its device autoload, torch_npu, transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from npu_fuse.doctor_env import installed, version
from npu_fuse.findings import Finding

SECONDS = 180.0
TORCH = """
import json, sys
import torch
told = {"torch": torch.__version__, "cuda": torch.version.cuda}
npu = getattr(torch, "npu", None)
if "torch_npu" in sys.modules and npu is not None:
    import torch_npu
    told["torch_npu"] = torch_npu.__version__
    told["devices"] = npu.device_count() if npu.is_available() else 0
    if told["devices"]:
        told["soc"] = npu.get_device_name()
    try:
        told["cann"] = str(torch_npu.npu.utils.get_cann_version())
    except Exception as fault:
        told["cann"] = ""
from torch._dynamo.backends.registry import list_backends
known = {"npu", "npugraph_ex", "npugraphs", "inductor", "aot_eager"}
told["handoffs"] = sorted(known & set(list_backends(exclude_tags=())))
print("\\n" + json.dumps(told))
"""
TRANSFORMERS = """
import json
import torch, transformers
from transformers.utils import is_torch_npu_available
print("\\n" + json.dumps({"npu": bool(is_torch_npu_available())}))
"""


def probes() -> Iterator[Finding]:
    """Runs two Python processes; each is ended after three minutes."""
    told, died = _run(TORCH)
    if died:
        yield _torch_died(died)
        return
    yield from _machine(told)
    if told.get("torch_npu") and installed("transformers"):
        _, died = _run(TRANSFORMERS)
        if died:
            message = f"transformers cannot be imported beside torch_npu: {died}"
            remedy = "check the driver (npu-smi info), or uninstall torch_npu on machines without an NPU"
            yield Finding("transformers", "error", message, remedy)


def _machine(told: Mapping[str, Any]) -> Iterator[Finding]:
    if not told.get("torch_npu"):
        return
    devices, soc = told.get("devices", 0), told.get("soc", "")
    cann = f", CANN {told['cann']}" if told.get("cann") else ""
    if not devices:
        message = f"torch_npu {told['torch_npu']} loads{cann} and sees no device"
        yield Finding("machine", "warning", message, "check npu-smi info, the driver and ASCEND_RT_VISIBLE_DEVICES")
    else:
        yield Finding("machine", "ok", f"{devices} × {soc}, torch {told['torch']}, torch_npu {told['torch_npu']}{cann}")
    yield Finding("handoffs", "info", f"hand-offs here: {', '.join(told['handoffs'])}")


def _torch_died(died: str) -> Finding:
    """torch loads torch_npu by itself; without that it may be sound."""
    if not installed("torch_npu"):
        return Finding("import_torch", "error", f"import torch fails: {died}", "install torch again")
    _, alone = _run("import torch\nprint('\\n{}')", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    if alone:
        return Finding("import_torch", "error", f"import torch fails: {alone}", "install torch again")
    if "Duplicated key" in died:
        message = f"import torch ends the process: this torch is a CUDA build, and torch_npu {version('torch_npu')}"
        remedy = "install the CPU build of torch (the address that pytorch.org gives for pip and CPU)"
        return Finding("import_torch", "error", f"{message} registers the same allocator settings", remedy)
    remedy = "source CANN's set_env.sh, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to do without torch_npu"
    return Finding("import_torch", "error", f"import torch loads torch_npu by itself and fails: {died}", remedy)


def _run(code: str, **variables: str) -> tuple[Mapping[str, Any], str]:
    """What the code printed as JSON in its last line, and how it died ("" if it did not)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True,
            check=False, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {}, f"it did not end in {SECONDS:.0f} s"
    if done.returncode == 0:
        made: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return made, ""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    key = [line for line in said if "Duplicated key" in line]
    last = key[0] if key else said[-1] if said else "without a word"
    if done.returncode < 0:
        return {}, f"{signal.Signals(-done.returncode).name}: {last}"
    return {}, last
