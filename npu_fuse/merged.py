"""One account of many graphs: a model that a framework compiles in pieces is told of, and written, as one."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from npu_fuse.report import GraphReport, Status


def summary(graphs: Sequence[GraphReport]) -> str:
    """One line: graphs, sites fused by op, sites left by status, the hand-offs."""
    sites = [site for graph in graphs for site in graph.sites]
    fused = Counter(s.op for s in sites if s.status is Status.FUSED)
    left = Counter(str(s.status) for s in sites if s.status is not Status.FUSED)
    handoffs = sorted({g.handoff for g in graphs})
    parts = [f"{n} {op}" for op, n in sorted(fused.items())] or ["nothing"]
    rest = ", ".join(f"{n} {status}" for status, n in sorted(left.items())) or "none"
    faults = sum(len(g.errors) for g in graphs)
    told = f"{len(graphs)} graphs; fused {', '.join(parts)}; left {rest}"
    return told + (f"; {faults} faults" if faults else "") + f"; handed to {', '.join(handoffs)}"


def to_json(subject: str, graphs: Sequence[GraphReport]) -> str:
    """All graphs as one report in the format of docs/report_format.md."""
    from npu_fuse.explain import ExplainReport
    from npu_fuse.report_json import to_json as text

    return text(ExplainReport(subject, any(g.training for g in graphs), tuple(graphs)))


def file_name(*parts: object) -> str:
    """`npu_fuse_<part>_….json`, with nothing in a part that a file's name cannot have."""
    return "_".join(["npu_fuse", *[re.sub(r"[^\w.-]+", "_", str(part)).strip("_") for part in parts]]) + ".json"


def write(path: Path, text: str) -> None:
    """All or nothing: whoever reads while another process writes sees the old text. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
