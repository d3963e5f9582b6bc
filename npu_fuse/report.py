"""Facts about what was done to each graph: one `SiteReport` per candidate, one `GraphReport` per graph.

The vocabulary follows compiler remarks (passed, missed, failed): every candidate that a rule's
spine matched is reported, fused or not, with a reason that is a fact about the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

FORMAT_VERSION = 1


class Status(str, Enum):
    """What became of a candidate site."""

    FUSED = "fused"
    MISSED = "missed"
    REFUSED_BY_PROOF = "refused_by_proof"
    REFUSED_BY_TARGET = "refused_by_target"
    REFUSED_BY_PROFIT = "refused_by_profit"
    SKIPPED = "skipped"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Cost:
    """What a form of a site costs: kernels launched, bytes read and written, bytes kept for backward.

    `symbolic` is true where a size was symbolic and its hint was used.
    """

    ops: int = 0
    bytes_moved: int = 0
    bytes_saved: int = 0
    symbolic: bool = False


@dataclass(frozen=True)
class ProofFacts:
    """The largest errors seen in the proof.

    `same_function` is the largest relative difference between both forms with every cast lifted to
    float64. `original_ulp` and `fused_ulp` are the largest errors of both forms in the graph's own
    dtypes against float64, in units in the last place of each row's largest magnitude.
    """

    probes: int = 0
    same_function: float = 0.0
    gradients: float | None = None
    original_ulp: float | None = None
    fused_ulp: float | None = None
    bit_equal: bool = False
    cached: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class SiteReport:
    """One candidate site. `file`, `line`, `function` and `code` point into the model's own source."""

    op: str
    status: Status
    reason: str
    code: str = ""
    """A stable reason code such as `rms_norm.mean_dim`; empty when fused."""
    file: str | None = None
    line: int | None = None
    function: str | None = None
    source: str | None = None
    module: str | None = None
    dtype: str = ""
    shape: tuple[str, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    """Epsilon, rotary mode, layout, which half is gated: as text."""
    rounding: tuple[str, ...] = ()
    """The dtypes that the original computation passes through, in order."""
    proof: ProofFacts | None = None
    before: Cost = Cost()
    after: Cost = Cost()
    notes: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    """Simpler ops that this one does as well: add_rms_norm contains an rms_norm."""


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph: its sites, and what each step took in seconds."""

    graph_id: int
    training: bool
    target: str
    handoff: str
    nodes: int
    sites: tuple[SiteReport, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    dynamic: bool = False
    errors: tuple[str, ...] = ()
    """Faults inside npu_fuse; the graph was handed on as it was."""
    handoff_reason: str = ""
    soc: str | None = None
    """The chip whose limits were applied; None for the target reference."""

    def count(self, status: Status, op: str | None = None) -> int:
        """Sites of that status; of `op` only, those contained in a bigger fusion included."""
        return sum(s.status is status and op in (None, s.op, *s.contains) for s in self.sites)


_lock = threading.Lock()
_reports: list[GraphReport] = []


def reports() -> list[GraphReport]:
    """The reports of every graph compiled by npu_fuse in this process, oldest first."""
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forget the reports kept so far."""
    with _lock:
        _reports.clear()


def keep(report: GraphReport) -> None:
    with _lock:
        _reports.append(report)


def drop(report: GraphReport) -> None:
    """Forget one report: Dynamo threw its graph away and traced again."""
    with _lock:
        if report in _reports:
            _reports.remove(report)
