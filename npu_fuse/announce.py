"""Say what was done: one INFO line per compiled graph, each reason once, an exception with `strict`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from npu_fuse.errors import StrictError
from npu_fuse.options import Options
from npu_fuse.report import GraphReport, Status

logger = logging.getLogger("npu_fuse")
_told: set[str] = set()


def announce(report: GraphReport, options: Options) -> None:
    """Raises `StrictError` where `strict` is set and a candidate was left unfused."""
    from npu_fuse.render import one_line

    logger.info("%s", one_line(report))
    if options.report_dir is not None:
        _write(report, Path(options.report_dir))
    for error in report.errors:
        _once(logging.WARNING, f"npu_fuse left a graph as it was: {error}")
    left = [s for s in report.sites if s.status not in (Status.FUSED, Status.SKIPPED)]
    for site in left:
        level = logging.WARNING if site.status is Status.ERROR else logging.INFO
        _once(level, f"{site.op} not fused at {site.file}:{site.line}: {site.reason}")
    if options.strict and (left or report.errors):
        first = f"{left[0].op} at {left[0].file}:{left[0].line}: {left[0].reason}" if left else report.errors[0]
        raise StrictError(f"{len(left) or len(report.errors)} candidate sites were left unfused; the first: {first}")


def _write(report: GraphReport, folder: Path) -> None:
    """One JSON file a graph and process, in the format of docs/report_format.md."""
    from npu_fuse.explain import ExplainReport
    from npu_fuse.report_json import to_json

    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = to_json(ExplainReport(f"graph {report.graph_id}", report.training, (report,)))
        (folder / f"npu_fuse_{os.getpid()}_{report.graph_id:04d}.json").write_text(text, encoding="utf-8")
    except OSError as problem:
        _once(logging.WARNING, f"the report cannot be written to {folder} ({problem}); set report_dir elsewhere")


def _once(level: int, message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.log(level, "%s", message)
