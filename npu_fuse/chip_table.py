"""What each chip would fuse of some models: one plan for each chip, none of which has to be here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npu_fuse.explain import ExplainReport
from npu_fuse.report import SiteReport, Status


@dataclass(frozen=True)
class Coverage:
    """Sites of one op on one chip: fused, refused by the target with the reasons, and left for other causes."""

    fused: int
    refused: int
    other: int
    reasons: tuple[str, ...]

    @property
    def text(self) -> str:
        """`5` or `3 of 5`; the refused by target apart: `0 of 5 (5 refused)`."""
        total = self.fused + self.refused + self.other
        short = str(self.fused) if self.fused == total else f"{self.fused} of {total}"
        return short + (f" ({self.refused} refused)" if self.refused else "")


def coverage(report: ExplainReport) -> dict[str, Coverage]:
    """By op, what one report says. A composition counts as the ops that it contains too."""
    sites: dict[str, list[SiteReport]] = {}
    for site in (s for graph in report.graphs for s in graph.sites):
        for op in (site.op, *site.contains):
            sites.setdefault(op, []).append(site)
    return {op: _of(found) for op, found in sites.items()}


def _of(sites: Sequence[SiteReport]) -> Coverage:
    count = Counter(site.status for site in sites)
    refused = [site.reason for site in sites if site.status is Status.REFUSED_BY_TARGET]
    refused += [note for site in sites for note in site.notes if note.startswith("no ")]
    fused, by_target = count[Status.FUSED], count[Status.REFUSED_BY_TARGET]
    return Coverage(fused, by_target, len(sites) - fused - by_target, tuple(dict.fromkeys(refused)))


def rows(models: Mapping[str, Mapping[str, Mapping[str, Coverage]]], chips: Sequence[str]) -> list[list[str]]:
    """[model, op, a cell for each chip] from coverage by model, chip and op."""
    made = []
    for model, by_chip in models.items():
        ops = sorted({op for found in by_chip.values() for op in found})
        made += [[model, op, *(_cell(by_chip[chip].get(op)) for chip in chips)] for op in ops]
    return made


def _cell(found: Coverage | None) -> str:
    return found.text if found is not None else "-"


def reasons(models: Mapping[str, Mapping[str, Mapping[str, Coverage]]]) -> list[str]:
    """Why sites are refused: `chip: reason`, each once."""
    told: dict[str, None] = {}
    for by_chip in models.values():
        for chip, found in by_chip.items():
            told.update(dict.fromkeys(f"{chip}: {reason}" for c in found.values() for reason in c.reasons))
    return list(told)


def to_dict(models: Mapping[str, Mapping[str, Mapping[str, Coverage]]]) -> dict[str, Any]:
    """The same as plain data."""
    return {
        model: {
            chip: {
                op: {"fused": c.fused, "refused_by_target": c.refused, "other": c.other, "reasons": list(c.reasons)}
                for op, c in found.items()
            }
            for chip, found in by_chip.items()
        }
        for model, by_chip in models.items()
    }


def lines(header: Sequence[str], table: Iterable[Sequence[str]]) -> list[str]:
    """A table in plain text."""
    whole = [list(header), *(list(row) for row in table)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in whole]
