"""Say what was done: one INFO line per compiled graph, each reason once, an exception with `strict`."""

from __future__ import annotations

import logging

from npu_fuse.errors import StrictError
from npu_fuse.options import Options
from npu_fuse.report import GraphReport, Status

logger = logging.getLogger("npu_fuse")
_told: set[str] = set()


def announce(report: GraphReport, options: Options) -> None:
    """Raises `StrictError` where `strict` is set and a candidate was left unfused."""
    from npu_fuse.render import one_line

    logger.info("%s", one_line(report))
    for error in report.errors:
        _once(logging.WARNING, f"npu_fuse left a graph as it was: {error}")
    left = [s for s in report.sites if s.status not in (Status.FUSED, Status.SKIPPED)]
    for site in left:
        level = logging.WARNING if site.status is Status.ERROR else logging.INFO
        _once(level, f"{site.op} not fused at {site.file}:{site.line}: {site.reason}")
    if options.strict and (left or report.errors):
        first = f"{left[0].op} at {left[0].file}:{left[0].line}: {left[0].reason}" if left else report.errors[0]
        raise StrictError(f"{len(left) or len(report.errors)} candidate sites were left unfused; the first: {first}")


def _once(level: int, message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.log(level, "%s", message)
