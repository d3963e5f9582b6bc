"""`npu-fuse verify-device`: every call that npu_fuse emits, made once on the device that is here.

Checks run in a process of their own: a kernel that takes its process down is one failed check, and the next
process goes on behind it. What failed can be written to a file that npu_fuse then leaves alone (`device_limits`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from npu_fuse.errors import TargetError

VERSION = 1
START = "npu_fuse-check "
SILENCE = 120.0
"""Seconds after which a check that says nothing is given up."""


@dataclass(frozen=True)
class Check:
    """One answer. `status`: "ok"; "failed" (does not run), "wrong" (other numbers), "skipped"."""

    name: str
    status: str
    fact: str
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "wrong")


def device() -> dict[str, Any]:
    """What was asked: chip, releases. Raises `TargetError` where no NPU is."""
    import torch

    npu: Any = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        raise TargetError(
            "there is no NPU here: torch_npu is not loaded or sees no device",
            remedy="run npu-fuse doctor on a machine with an NPU; nothing needs to be verified on others",
        )
    import torch_npu  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return {
        "soc": npu.get_device_name(), "devices": npu.device_count(), "torch": torch.__version__,
        "torch_npu": torch_npu.__version__, "python": platform.python_version(),
    }  # fmt: skip


def names(only: Sequence[str] = ()) -> list[str]:
    """The names of all checks, or of those that hold one of the words in `only`."""
    from npu_fuse.device_checks import checks

    return [name for name in checks() if not only or any(word in name for word in only)]


def verify(wanted: Sequence[str], command: Sequence[str] | None = None,
           silence: float = SILENCE) -> Iterator[Check]:  # fmt: skip
    """Each check's answer as soon as it is there.

    `command` starts a process that reads names from its input, one a line, and prints `START` and JSON for the
    beginning and the end of each; by default this module.
    """
    left = list(wanted)
    while left:
        process = subprocess.Popen(
            command or [sys.executable, "-m", "npu_fuse.verify_device"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        yield from _answers(process, left, silence)


def _answers(process: subprocess.Popen[str], left: list[str], silence: float) -> Iterator[Check]:
    """Takes the answered names off `left`; where the process ends early, the check it was in has failed."""
    import threading

    last = [time.monotonic()]
    said: list[str] = []

    def watch() -> None:
        while process.poll() is None:
            if time.monotonic() - last[0] > silence:
                process.kill()
            time.sleep(0.2)

    def listen() -> None:
        assert process.stderr is not None
        said.extend(process.stderr)

    threads = [threading.Thread(target=work, daemon=True) for work in (watch, listen)]
    for thread in threads:
        thread.start()
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("\n".join(left) + "\n")
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once; its words are read below
    for line in process.stdout:
        last[0] = time.monotonic()
        told = json.loads(line.removeprefix(START)) if line.startswith(START) else {}
        if "status" in told:
            left.remove(told["name"])
            yield Check(**told)
    code = process.wait()
    threads[1].join(5)
    if left:
        waited = time.monotonic() - last[0]
        why = "it said nothing for a long time" if waited > silence else f"its process ended with {code}"
        words = [line.strip() for line in said if line.strip()]
        yield Check(left.pop(0), "failed", f"{why}: {words[-1][:300] if words else 'without a word'}", waited)


def run(name: str, check: Callable[[], str]) -> Check:
    """Make one check here and now."""
    from npu_fuse.device_checks import Skipped

    started = time.perf_counter()
    try:
        status, fact = "ok", check()
    except AssertionError as wrong:
        status, fact = "wrong", str(wrong)
    except Skipped as skipped:
        status, fact = "skipped", str(skipped)
    except Exception as fault:
        status, fact = "failed", f"{type(fault).__name__}: {str(fault).strip()[:300]}"
    return Check(name, status, fact, round(time.perf_counter() - started, 3))


def serve() -> None:
    """The process that makes the checks whose names it reads."""
    import torch

    from npu_fuse.device_checks import checks

    device()
    known = checks()
    for name in sys.stdin.read().splitlines():
        print(START + json.dumps({"begins": name}), flush=True)
        torch.manual_seed(0)
        print(START + json.dumps(asdict(run(name, known[name]))), flush=True)


def refused(check: Check) -> list[tuple[str, str, str]]:
    """(op, dtype, reason) of a call or gradient that is bad: the op is left alone on that dtype, in training or not."""
    kind, _, what = check.name.partition(": ")
    if kind not in ("call", "gradient") or not check.bad:
        return []
    case, _, dtype = what.rpartition(" ")
    return [(case.split("-")[0], dtype, f"{check.status}, {kind}: {check.fact}")]


def to_json(machine: dict[str, Any], found: Sequence[Check]) -> str:
    """The whole answer, to attach to an issue."""
    return json.dumps({"version": VERSION, "device": machine, "checks": [asdict(c) for c in found]}, indent=1)


if __name__ == "__main__":
    serve()
