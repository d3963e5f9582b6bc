"""The steps between capture and hand-off, each over all candidates of one graph."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from npu_fuse import costs
from npu_fuse import dialect as d
from npu_fuse.aten import Decompositions
from npu_fuse.lower import Accepted, lower
from npu_fuse.options import Options
from npu_fuse.places import source_of
from npu_fuse.proofs import verdict_on
from npu_fuse.report import Cost, ProofFacts, SiteReport, Status
from npu_fuse.sites import Form, Miss, Rule, Site
from npu_fuse.soundness import obstacle
from npu_fuse.targets import Target
from npu_fuse.view import View

logger = logging.getLogger("npu_fuse")


@dataclass
class Candidate:
    """A site or a miss on its way through the steps."""

    op: str
    site: Site | None = None
    miss: Miss | None = None
    status: Status = Status.MISSED
    code: str = ""
    reason: str = ""
    form: Form | None = None
    proof: ProofFacts | None = None
    notes: list[str] = field(default_factory=list)
    before: Cost = Cost()
    after: Cost = Cost()

    def refuse(self, status: Status, code: str, reason: str) -> None:
        self.status, self.code, self.reason, self.form = status, code, reason, None


def turns(rules: Iterable[Rule]) -> list[list[Rule]]:
    """Rules whose rewrites others read, and then the others, on a new view of the graph."""
    known = list(rules)
    both = [[r for r in known if r.first], [r for r in known if not r.first]]
    return [turn for turn in both if turn]


def recognise(view: View, rules: Iterable[Rule], options: Options, training: bool) -> list[Candidate]:
    """Every rule over the whole view. A rule that throws is reported and loses its own sites only."""
    found: list[Candidate] = []
    for rule in rules:
        if training and not rule.training:
            continue
        try:
            results = rule.recognise(view)
        except Exception as fault:
            logger.debug("rule %s failed", rule.name, exc_info=True)
            found.append(_fault(rule.name, fault))
            continue
        for result in results:
            candidate = _candidate(view, rule.name, result, options)
            if candidate.site is not None and candidate.status is Status.FUSED:
                for node in candidate.site.nodes:
                    view.claimed.setdefault(node, rule.name)
                view.outputs.add(candidate.site.output)
                view.found.append(candidate.site)
            found.append(candidate)
    return found


def _fault(op: str, fault: Exception) -> Candidate:
    return Candidate(op, status=Status.ERROR, code="rule.fault", reason=f"{type(fault).__name__}: {fault}")


def _candidate(view: View, op: str, result: Site | Miss, options: Options) -> Candidate:
    if isinstance(result, Miss):
        made = Candidate(result.op, miss=result, code=result.code, reason=result.reason)
        if not options.fuses(result.op):
            made.refuse(Status.SKIPPED, "skipped", "left out by the options fuse and skip")
        return made
    made = Candidate(result.op, site=result, status=Status.FUSED, notes=list(result.notes))
    stopped = obstacle(view, result)
    if stopped is not None:
        made.refuse(Status.MISSED, *stopped)
    elif not options.fuses(result.op):
        made.refuse(Status.SKIPPED, "skipped", "left out by the options fuse and skip")
    return made


def prove(candidates: list[Candidate], rules: Iterable[Rule], options: Options, target: Target, disk: Any) -> None:
    """The first form that the target runs and the proof accepts; else a refusal that says why."""
    limits = {rule.name: rule.limits for rule in rules}
    composed_first = sorted(candidates, key=lambda c: c.site is None or c.site.replaces is None)
    contained: set[int] = set()
    for candidate in composed_first:
        site = candidate.site
        if site is None or candidate.status is not Status.FUSED or id(site) in contained:
            continue
        reasons: list[tuple[Status, str, str]] = []
        for form in site.forms:
            limit = limits.get(site.op)
            problem = limit(site, form, target) if limit is not None else None
            if problem is not None:
                reasons.append((problem.status, problem.code, problem.reason))
                continue
            try:
                verdict = verdict_on(site, form, options.numerics, options.prove == "always", disk, target)
            except Exception as fault:
                logger.debug("proof of %s failed", site.op, exc_info=True)
                reasons.append((Status.ERROR, "proof.fault", f"{type(fault).__name__}: {fault}"))
                continue
            candidate.proof = verdict.facts
            if verdict.holds:
                candidate.form = form
                candidate.notes += [*verdict.notes, *([form.note] if form.note else [])]
                break
            reasons.append((Status.REFUSED_BY_PROOF, f"{site.op}.proof", f"form '{form.name}': {verdict.reason}"))
        if candidate.form is not None and site.replaces is not None:
            contained.add(id(site.replaces))
        if candidate.form is None:
            candidate.refuse(*_telling(reasons))
    _settle_compositions(candidates, contained)


def _telling(reasons: Sequence[tuple[Status, str, str]]) -> tuple[Status, str, str]:
    """A form that could have been used but for the proof tells more than one that was no choice here.

    Of several, the last is the one that keeps most of the original's digits.
    """
    proved = [r for r in reasons if r[0] is Status.REFUSED_BY_PROOF]
    return (proved or list(reasons) or [(Status.MISSED, "no_form", "no form of the op fits")])[-1]


def _settle_compositions(candidates: list[Candidate], contained: set[int]) -> None:
    """A composition stands for what it contains; a refused one leaves its reason with the simpler site."""
    simple = {id(c.site): c for c in candidates if c.site is not None and c.site.replaces is None}
    kept = []
    for candidate in candidates:
        inner = candidate.site.replaces if candidate.site is not None else None
        if candidate.site is not None and id(candidate.site) in contained:
            continue
        refused = candidate.status in (Status.REFUSED_BY_PROOF, Status.REFUSED_BY_TARGET, Status.MISSED)
        if inner is not None and refused and id(inner) in simple:
            simple[id(inner)].notes.append(f"no {candidate.op}: {candidate.reason}")
            continue
        kept.append(candidate)
    candidates[:] = kept


def put_in(
    gm: GraphModule, view: View, candidates: Sequence[Candidate], target: Target, aten: Decompositions | None = None
) -> None:
    """Lower what was proved, and measure both forms."""
    accepted = [
        Accepted(c.site, c.form, i) for i, c in enumerate(candidates) if c.site is not None and c.form is not None
    ]
    if not accepted:
        return
    known: dict[Hashable, Cost] = {}
    for entry in accepted:
        candidate = candidates[entry.index]
        key = ("before", id(candidate.proof))  # sites of one structure have their proof in common
        if key not in known:
            known[key] = costs.before(entry.site)
        candidate.before = known[key]
    for result in lower(gm, view, accepted, target, _fake_mode(view), aten):
        candidate = candidates[result.index]
        if result.error:
            candidate.refuse(Status.ERROR, "lower.fault", result.error)
        elif result.refused:
            candidate.refuse(Status.REFUSED_BY_PROOF, "interface", f"same interface: {result.refused}")
        else:
            form = ("after", id(candidate.proof), *[n.target for n in result.made])
            if form not in known:
                known[form] = costs.after(result.made, candidate.site)
            candidate.after = known[form]


def _fake_mode(view: View) -> Any:
    """The mode in which the graph's example values live; Dynamo's context has another one by now."""
    for node in view.nodes:
        found = d.tensor(node)
        if isinstance(found, FakeTensor):
            return found.fake_mode
    return None


def site_reports(candidates: Sequence[Candidate]) -> list[SiteReport]:
    """Facts for the user; reports come in the order of the model's code."""
    return [_site_report(c) for c in candidates]


def _site_report(candidate: Candidate) -> SiteReport:
    site = candidate.site
    node = site.output if site is not None else candidate.miss.anchor if candidate.miss is not None else None
    if node is None:
        return SiteReport(candidate.op, candidate.status, candidate.reason, candidate.code)
    source = source_of(site.anchor if site is not None else node)
    value = d.tensor(node)
    return SiteReport(
        op=candidate.op, status=candidate.status, reason=candidate.reason, code=candidate.code,
        file=source.file, line=source.line, function=source.function, source=source.code, module=source.module,
        dtype=str(value.dtype).removeprefix("torch.") if value is not None else "",
        shape=tuple(str(s) for s in value.shape) if value is not None else (),
        params=dict(site.params) if site is not None else {},
        rounding=rounding_path(site) if site is not None else (),
        proof=candidate.proof, before=candidate.before, after=candidate.after, notes=tuple(candidate.notes),
        contains=_contained(site),
    )  # fmt: skip


def _contained(site: Site | None) -> tuple[str, ...]:
    inner = site.replaces if site is not None else None
    return () if inner is None else (inner.op, *_contained(inner))


def rounding_path(site: Site) -> tuple[str, ...]:
    """The dtypes that values of the result's size pass through, from input to output, repeats left out."""
    path: list[torch.dtype] = []
    first = d.tensor(site.inputs[0]) if site.inputs else None
    values = [first, *(d.tensor(n) for n in site.nodes)]
    size = d.tensor(site.output)
    for value in values:
        if value is None or size is None or value.dim() < size.dim() or not value.dtype.is_floating_point:
            continue
        if not path or path[-1] != value.dtype:
            path.append(value.dtype)
    return tuple(str(p).removeprefix("torch.") for p in path)
