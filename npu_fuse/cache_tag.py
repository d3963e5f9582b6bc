"""The tag under which torch's compile caches keep what comes after npu_fuse.

AOTAutograd's and Inductor's caches know an op by its name only: without a tag they serve a graph made with
an older formula, another target or other options.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Mapping, Set
from dataclasses import fields
from importlib import metadata
from typing import Any

from npu_fuse import device_limits
from npu_fuse.options import Options

CHANGE_NO_GRAPH = frozenset(("proof_cache", "report_dir", "dump", "target"))
"""Options outside the tag: where things are written, and `target`, which is tagged as resolved."""


def cache_tag(options: Options, target: str) -> str:
    """`npu_fuse-<version>-<target>-<hash>`, the same in every process with the same sources and options."""
    from npu_fuse import __version__

    facts = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in CHANGE_NO_GRAPH}
    facts |= {"sources": source_hash(), "torch": _version("torch"), "device": _device(target)}
    digest = hashlib.sha256(_text(facts).encode()).hexdigest()[:32]
    return f"npu_fuse-{__version__}-{target}-{digest}"


@functools.cache
def source_hash() -> str:
    """A hash over every Python file of npu_fuse, the rules in passes/ included."""
    root = os.path.dirname(os.path.abspath(__file__))
    digest = hashlib.sha256()
    for folder, subfolders, names in os.walk(root, followlinks=True):  # passes/ is a link in a checkout
        subfolders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    content = file.read()
                digest.update(f"{os.path.relpath(path, root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(distribution), "__version__", "unknown"))


def _device(target: str) -> str:
    """What a plan depends on besides the options: torch_npu's release, the chip that is present, its limits."""
    if target != "npu":
        return ""
    npu: Any = getattr(sys.modules.get("torch"), "npu", None)
    chip = npu.get_device_name() if npu is not None and npu.is_initialized() else ""
    return f"{_version('torch_npu')} {chip} {device_limits.content()}"


def _text(value: Any) -> str:
    """A text that is the same in every process for equal values.

    An object known only by its address gets a text of its own: a cache miss, never a wrong hit.
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{_text(k)}:{_text(v)}" for k, v in value.items())) + "}"
    if isinstance(value, Set):
        return "{" + ",".join(sorted(_text(v) for v in value)) + "}"
    if isinstance(value, (list, tuple)):
        return type(value).__name__ + "(" + ",".join(_text(v) for v in value) + ")"
    if isinstance(value, functools.partial):
        return f"partial({_text(value.func)},{_text(value.args)},{_text(value.keywords)})"
    if inspect.isfunction(value):
        captured = [_source(c) if inspect.isfunction(c) else _text(c) for c in _captured(value)]
        return f"{_source(value)} {_text(value.__defaults__)} {_text(value.__kwdefaults__)} {captured}"
    return repr(value)


def _source(function: Any) -> str:
    try:
        body = inspect.getsource(function)
    except (OSError, TypeError):  # typed in at a prompt, or built by exec
        body = repr(function)
    return f"{function.__module__}.{function.__qualname__}: {body}"


def _captured(function: Any) -> list[Any]:
    """The values that a closure captured; one that is not assigned yet is left out."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found
