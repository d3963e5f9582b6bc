"""The option `dump`: numbered, readable graphs before and after, and the candidates in between."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from torch.fx import GraphModule

from npu_fuse.options import Options
from npu_fuse.report import SiteReport

logger = logging.getLogger("npu_fuse")


def graph(options: Options, graph_id: int, step: str, gm: GraphModule) -> None:
    """`<dump>/graph_<id>_<step>.txt`: the graph as Python, with shapes and dtypes."""
    if options.dump is not None:
        _write(Path(options.dump), f"graph_{graph_id:03d}_{step}.txt", gm.print_readable(print_output=False))


def candidates(options: Options, graph_id: int, sites: Iterable[SiteReport]) -> None:
    if options.dump is not None:
        lines = [f"{s.op} {s.status} {s.file}:{s.line} {s.module or ''} {s.reason}" for s in sites]
        _write(Path(options.dump), f"graph_{graph_id:03d}_1_sites.txt", "\n".join(lines) + "\n")


def _write(folder: Path, name: str, text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as problem:
        logger.warning("the graph cannot be written to %s (%s); set the option dump to another folder", folder, problem)
