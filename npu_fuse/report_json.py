"""Reports as programs read them: JSON in a versioned format, described in docs/report_format.md."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from npu_fuse.render import sum_costs
from npu_fuse.report import FORMAT_VERSION, Status

if TYPE_CHECKING:
    from npu_fuse.explain import ExplainReport


def to_dict(report: ExplainReport) -> dict[str, Any]:
    """The report as plain dicts, lists, strings and numbers; docs/report_format.md describes them."""
    import torch

    from npu_fuse import __version__

    sites = [site for graph in report.graphs for site in graph.sites]
    fused = [site for site in sites if site.status is Status.FUSED]
    made = _plain(report)
    assert isinstance(made, dict)
    return {
        "format": "npu_fuse.explain",
        "version": FORMAT_VERSION,
        "npu_fuse": __version__,
        "torch": str(torch.__version__),
        **made,
        "totals": {
            "sites": len(sites),
            "by_status": {s.value: n for s, n in Counter(site.status for site in sites).items()},
            "fused": dict(Counter(site.op for site in fused)),
            "before": _plain(sum_costs(site.before for site in fused)),
            "after": _plain(sum_costs(site.after for site in fused)),
        },
    }


def to_json(report: ExplainReport, indent: int | None = 2) -> str:
    """`to_dict` as JSON text that every JSON parser reads (no NaN or Infinity literals)."""
    return json.dumps(to_dict(report), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
