"""Where in the model's own code a node was written."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Source:
    """Where in the model's own code a node was written."""

    file: str | None
    line: int | None
    function: str | None
    code: str | None
    module: str | None


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


def _frames(trace: str) -> list[tuple[str, str, str, str]]:
    """File, line, function and code of the frames outside torch, the outermost first; torch's own if there are none."""
    frames: list[tuple[str, str, str, str]] = _FRAME.findall(trace)
    return [f for f in frames if "/torch/" not in f[0]] or frames


@functools.lru_cache(maxsize=1024)  # all layers have the frames of one
def _innermost(trace: str) -> tuple[str, str, str, str] | tuple[None, None, None, None]:
    ours = _frames(trace)
    return ours[-1] if ours else (None, None, None, None)


def frames_of(node: Node) -> list[tuple[str, int]]:
    """Files (by name) and lines outside torch, the innermost first; torch's own where there are no others."""
    ours = _frames(node.meta.get("stack_trace") or "")
    return [(f[0].replace("\\", "/").rpartition("/")[2], int(f[1])) for f in reversed(ours)]


def source_of(node: Node) -> Source:
    """The innermost frame outside torch, and the innermost module's path."""
    file, line, function, code = _innermost(node.meta.get("stack_trace") or "")
    stack = node.meta.get("nn_module_stack") or {}
    module = None
    for path, _ in stack.values():
        module = path
    if module is not None:
        module = re.sub(r"^L\['(\w+)'\]\.?", "", str(module))
        module = re.sub(r"_modules\['(\w+)'\]", r"\1", module)
        module = re.sub(r"\['?(\w+)'?\]", r".\1", module).lstrip(".")
    return Source(file, int(line) if line else None, function, code or None, module or None)
