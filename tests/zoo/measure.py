"""One architecture in one mode: what npu_fuse fused, against truth, and what that does to results.

The model is compiled twice, with npu_fuse (reference target, hand-off `aot_eager`) and with the hand-off
alone, and both are compared with an eager float64 run of the same weights. Graphs are weighted by how often a
forward pass calls them, so that a graph that several layers share counts as often as truth counts it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

import npu_fuse

from . import catalog, reference, truth
from .models import Built, first_tensor
from .reference import Mode

OPS = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "rotary_mul": "rotary_mul",
    "swiglu": "glu",
    "geglu": "glu",
    "clipped_swiglu": "glu",
}


MODES = {
    "bf16": Mode(torch.bfloat16),
    "fp32": Mode(torch.float32),
    "bf16-train": Mode(torch.bfloat16, train=True),
    "fp32-train": Mode(torch.float32, train=True),
    "autocast-train": Mode(torch.float32, train=True, autocast=True),
    "dynamic": Mode(torch.bfloat16, dynamic=True),
}


@dataclass
class Compiled:
    """What compiling and running one way gave."""

    results: reference.Results | None = None
    error: str = ""
    graphs: int = 0
    guards: int = 0
    breaks: int = 0
    calls: list[int] = field(default_factory=list)
    report_of_graph: list[int] = field(default_factory=list)


def measure(name: str, mode_name: str, baselines: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """A JSON-able record; raises only if the model does not build.

    `quick` takes eager for the unfused run, which executes the same operations: half the time, but graphs and
    guards are not compared. `baselines` is a folder in which the unfused and the float64 run are kept in
    inference modes, since they do not depend on npu_fuse: empty it when torch, transformers or the zoo change.
    """
    mode = MODES[mode_name]
    built = catalog.build(name, mode.dtype, mode.train)
    kept = (
        baselines / f"{mode_name}-{'quick-' * quick}{name.replace(':', '_')}.pt"
        if baselines and not mode.train
        else None
    )
    plain, exact = _baseline(built, mode, kept, quick)
    npu_fuse.clear_reports()
    fused = compile_and_run(built, mode, fuse=True)
    record: dict[str, Any] = {"name": name, "mode": mode_name, **_sites(fused)}
    record["truth"] = truth.load().get(name, {}).get("expected", {})
    if fused.graphs != 1 or fused.breaks:
        record["captured"] = _captured(name)
    record["plain_error"], record["fused_error"] = plain.error, fused.error
    for key in () if quick else ("graphs", "guards", "breaks"):
        record[key] = [getattr(plain, key), getattr(fused, key)]
    if exact and plain.results and fused.results:
        record["accuracy"] = asdict(reference.compare(plain.results, fused.results, exact, mode))
    return record


def _captured(name: str) -> dict[str, int]:
    """Sites per operation that reach any graph, for a model that Dynamo breaks into several."""
    built = catalog.build(name)
    return truth.expected(Counter(site.kind for site in truth.count_captured(built.model, built.inputs)))


def _baseline(built: Built, mode: Mode, kept: Path | None, quick: bool) -> tuple[Compiled, reference.Results | None]:
    """The unfused run and the float64 run, from the file `kept` if it is there."""
    if kept and kept.exists():
        stored = torch.load(kept, weights_only=True)
        plain, exact = Compiled(**stored["plain"]), stored["exact"]
        plain.results = reference.Results(**stored["plain"]["results"]) if plain.results else None
        return plain, reference.Results(**exact) if exact else None
    plain = run_eager(built, mode) if quick else compile_and_run(built, mode, fuse=False)
    exact_run = reference.run_float64(built, mode.train) if plain.results else None
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        exact = asdict(exact_run) if exact_run else None
        torch.save({"plain": asdict(plain), "exact": exact}, kept)
    return plain, exact_run


def run_eager(built: Built, mode: Mode) -> Compiled:
    """The unfused run without compiling."""
    try:
        return Compiled(run(built.model, built, mode))
    except Exception as error:
        return Compiled(error=_first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"


def compile_and_run(built: Built, mode: Mode, fuse: bool) -> Compiled:
    """Compile, run once to compile everything, run again to count calls and take results."""
    out = Compiled()
    torch._dynamo.reset()
    counters.clear()
    backend, options = _backend(out, fuse)
    model = torch.compile(built.model, backend=backend, dynamic=mode.dynamic or None, options=options)
    try:
        if mode.dynamic:
            run(model, _longer(built), mode)
        run(model, built, mode)
        out.calls = [0] * len(out.calls)
        out.results = run(model, built, mode)
    except Exception as error:
        out.error = _first_line(error)
    out.graphs = len(out.calls)
    out.breaks = sum(counters["graph_break"].values())
    return out


def _backend(out: Compiled, fuse: bool) -> tuple[Any, dict[str, Any]]:
    def count_guards(entries: Sequence[Any]) -> list[bool]:
        out.guards += len(entries)
        return [True] * len(entries)

    def hand_off(gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        compiled = lookup_backend("aot_eager")(gm, list(inputs))
        index = len(out.calls)
        out.calls.append(0)
        out.report_of_graph.append(len(npu_fuse.reports()) - 1)

        def call(*args: Any) -> Any:
            out.calls[index] += 1
            return compiled(*args)

        return call

    options: dict[str, Any] = {"guard_filter_fn": count_guards}
    if fuse:
        return "npu_fuse", options | {"target": "reference", "handoff": hand_off}
    return hand_off, options


def run(model: Callable[..., Any], built: Built, mode: Mode) -> reference.Results:
    """Outputs and, in training, the gradients of a fixed random projection of them."""
    casting = torch.autocast("cpu", torch.bfloat16) if mode.autocast else contextlib.nullcontext()
    if not mode.train:
        with torch.no_grad(), casting:
            return reference.Results(first_tensor(model(**built.inputs)).detach().clone(), {})
    built.model.zero_grad(set_to_none=True)
    with casting:
        output = first_tensor(model(**built.inputs))
    return reference.with_gradients(built.model, output)


def _longer(built: Built) -> Built:
    """The same model on inputs of another length and batch, so that sizes become dynamic."""
    inputs = {k: torch.cat([v, v[:1]], dim=0) if isinstance(v, Tensor) else v for k, v in built.inputs.items()}
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :4]], dim=1)
    return Built(built.name, built.model, inputs, built.config)


def _sites(fused: Compiled) -> dict[str, Any]:
    """Calls per status and operation, and the sites that were not fused with their reasons."""
    reports = npu_fuse.reports()
    counts: dict[str, Counter[str]] = {}
    unfused: Counter[tuple[Any, ...]] = Counter()
    faults: list[str] = []
    for calls, index in zip(fused.calls, fused.report_of_graph, strict=True):
        report = reports[index]
        faults += report.errors
        for site in report.sites:
            group = OPS.get(site.op, site.op)
            counts.setdefault(str(site.status), Counter())[group] += calls
            if str(site.status) != "fused":
                where = f"{(site.file or '?').rsplit('/', 1)[-1]}:{site.line}"
                unfused[(site.op, str(site.status), site.reason, where, site.module)] += calls
    keys = ("op", "status", "reason", "where", "module")
    return {
        "sites": {status: dict(count) for status, count in counts.items()},
        "unfused": [dict(zip(keys, entry, strict=True)) | {"calls": n} for entry, n in unfused.items()],
        "faults": faults,
    }
