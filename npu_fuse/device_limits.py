"""What `npu-fuse verify-device --limits FILE` found on one chip: ops and dtypes that npu_fuse leaves alone there.

The file is named by the environment variable NPU_FUSE_LIMITS, which every process of a run inherits.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from npu_fuse.chip_names import family
from npu_fuse.errors import OptionError

logger = logging.getLogger("npu_fuse")

VARIABLE = "NPU_FUSE_LIMITS"
VERSION = 1


def measured_limit(op: str, dtype: str, soc: str | None) -> str | None:
    """Why this chip was found not to run `op` on `dtype` ("float16"); None where nothing is known against it.

    Raises `OptionError` where NPU_FUSE_LIMITS names no file of limits.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    made_for, refused = _read(path, _stamp(path))
    if soc is not None and family(made_for) != family(soc):
        _tell_once(path, made_for, soc)
        return None
    reason = refused.get((op, dtype))
    return None if reason is None else f"{op} failed on {dtype} when this chip was verified: {reason}"


def content() -> str:
    """The text of the file, "" without one: a plan depends on it."""
    path = os.environ.get(VARIABLE)
    return Path(path).read_text(encoding="utf-8") if path and os.path.isfile(path) else ""


def write(path: str, soc: str, refused: Iterable[tuple[str, str, str]]) -> None:
    """`refused`: op, dtype, reason."""
    entries = [{"op": op, "dtype": dtype, "reason": reason} for op, dtype, reason in refused]
    text = json.dumps({"version": VERSION, "soc": soc, "refuse": entries}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _stamp(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError as problem:
        raise _wrong(path, str(problem)) from problem


@functools.cache
def _read(path: str, _: float) -> tuple[str, dict[tuple[str, str], str]]:
    try:
        told: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if told["version"] != VERSION:
            raise _wrong(path, f"its version is {told['version']}, this npu_fuse reads {VERSION}")
        return str(told["soc"]), {(e["op"], e["dtype"]): str(e["reason"]) for e in told["refuse"]}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise _wrong(path, f"{type(problem).__name__}: {problem}") from problem


def _wrong(path: str, why: str) -> OptionError:
    remedy = f"write it anew with npu-fuse verify-device --limits {path}, or unset {VARIABLE}"
    return OptionError(f"{VARIABLE}={path} is no file of limits: {why}", key=VARIABLE, remedy=remedy)


@functools.cache
def _tell_once(path: str, made_for: str, soc: str) -> None:
    logger.warning("%s=%s was measured on %s, this is %s: it is not used", VARIABLE, path, made_for, soc)
