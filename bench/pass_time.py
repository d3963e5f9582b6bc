"""What npu_fuse adds to the time of compiling, with the hand-off `aot_eager`.

    python bench/pass_time.py                      all three parts
    python bench/pass_time.py --part model         a 28-layer Qwen3-shaped model, inference and training
    python bench/pass_time.py --part growth        microseconds a node from 1,000 to 100,000 nodes
    python bench/pass_time.py --part proofs        each proof at Llama-70B and Qwen3-235B widths

"cold" proves every structure anew, "warm" finds the verdicts of this process. Seconds are those of
npu_fuse's own steps, beside the first call with the hand-off alone; CPU seconds are given too, because
they hold on a machine that others use.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import _common as common
import _stacked
import _wide
import click
import torch
from rich.table import Table

import npu_fuse
from npu_fuse import proofs
from npu_fuse.options import Options

engine = importlib.import_module("npu_fuse.backend")  # the package's attribute of that name is the function

TARGETS = {"cold": 0.10, "warm": 0.02, "us_per_node": 30.0, "proof_seconds": 1.0, "proof_bytes": 256 << 20}
OPTIONS: dict[str, Any] = {"target": "reference", "handoff": "aot_eager"}
STEPS = ("recognise", "prove", "lower")


@click.command(help=__doc__)
@click.option("--part", "parts", multiple=True, type=click.Choice(("model", "growth", "proofs")))
@click.option("--layers", default=28, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Of each first call.")
@click.option("--nodes", default="1000,3000,10000,30000,100000", show_default=True, help="Sizes for growth.")
@click.option("--json", "as_json", is_flag=True)
def main(parts: tuple[str, ...], layers: int, repeats: int, nodes: str, as_json: bool) -> None:
    torch.set_num_threads(1)
    parts = parts or ("model", "growth", "proofs")
    result: dict[str, Any] = {"machine": common.machine(), "targets": TARGETS}
    tables = []
    if "model" in parts:
        result["model"] = {mode: first_calls(layers, mode == "training", repeats) for mode in ("inference", "training")}
        tables.append(_model_table(result["model"], layers))
    if "growth" in parts:
        result["growth"] = growth([int(n) for n in nodes.split(",")])
        tables.append(_growth_table(result["growth"]))
    if "proofs" in parts:
        result["proofs"] = {name: wide_proofs(name) for name in _wide.WIDE}
        tables.append(_proofs_table(result["proofs"]))
    common.show(result, tables, as_json)


# --- a whole model ---------------------------------------------------------------------------------


def first_calls(layers: int, train: bool, repeats: int) -> dict[str, Any]:
    """Medians of first calls: the hand-off alone, npu_fuse cold, npu_fuse warm, taken in turn."""
    model = common.decoder("qwen3", 64, layers, train, torch.float32, head_dim=16)
    ids = common.words(2, 16)
    _first_call(model, ids, train, "aot_eager")  # imports and one-time set-up belong to nobody
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "cold": [], "warm": []}
    for turn in range(repeats):
        runs["plain"].append(_first_call(model, ids, train, "aot_eager"))
        proofs.forget_verdicts()
        runs["cold"].append(_first_call(model, ids, train, "npu_fuse"))
        runs["warm"].append(_first_call(model, ids, train, "npu_fuse"))
        common.note(f"qwen3 {'training' if train else 'inference'}: turn {turn + 1} of {repeats}")
    facts: dict[str, Any] = {"nodes": runs["warm"][0]["nodes"], "sites": runs["warm"][0]["sites"]}
    for kind, taken in runs.items():
        for clock in ("wall", "cpu", "own_wall", "own_cpu"):
            if clock in taken[0]:
                facts[f"{kind}_{clock}"] = statistics.median(r[clock] for r in taken)
    for kind in ("cold", "warm"):
        facts[f"{kind}_steps"] = {s: statistics.median(r["steps"][s] for r in runs[kind]) for s in STEPS}
        facts[f"{kind}_share"] = facts[f"{kind}_own_cpu"] / facts["plain_cpu"]
        facts[f"{kind}_call"] = facts[f"{kind}_cpu"] / facts["plain_cpu"]
    return facts


def _first_call(model: torch.nn.Module, ids: torch.Tensor, train: bool, backend: str) -> dict[str, Any]:
    torch._dynamo.reset()
    npu_fuse.clear_reports()
    model.zero_grad()
    gc.collect()
    compiled = torch.compile(model, backend=backend, options=OPTIONS if backend == "npu_fuse" else None)
    with _own_cpu() as own:
        taken = common.spent(lambda: common.step(compiled, ids, train))
    facts: dict[str, Any] = {"wall": taken.wall, "cpu": taken.cpu}
    made = npu_fuse.reports()
    if made:
        steps = {s: sum(r.seconds[s] for r in made) for s in STEPS}
        facts |= {"own_wall": sum(steps.values()), "own_cpu": sum(own), "steps": steps}
        facts |= {"nodes": sum(r.nodes for r in made), "sites": sum(r.count(npu_fuse.Status.FUSED) for r in made)}
    return facts


@contextmanager
def _own_cpu() -> Iterator[list[float]]:
    """CPU seconds of every call of npu_fuse's plan."""
    found: list[float] = []
    plan = engine.plan

    def timed(*args: Any, **kwargs: Any) -> Any:
        made: list[Any] = []
        found.append(common.spent(lambda: made.append(plan(*args, **kwargs))).cpu)
        return made[0]

    with mock.patch.object(engine, "plan", timed):
        yield found


def _model_table(result: dict[str, Any], layers: int) -> Table:
    table = Table(title=f"First call of a {layers}-layer Qwen3, CPU seconds (wall clock in brackets)")
    cold_and_warm = [column for state in ("cold", "warm") for column in (f"{state}: own", "share", "call", "")]
    for name in ("mode", "nodes", "sites", "aot_eager", *cold_and_warm):
        table.add_column(name, justify="right" if name else "left")
    for mode, facts in result.items():
        row = [mode, str(facts["nodes"]), str(facts["sites"]), f"{facts['plain_cpu']:.2f} ({facts['plain_wall']:.2f})"]
        for kind in ("cold", "warm"):
            own = f"{facts[f'{kind}_own_cpu']:.3f} ({facts[f'{kind}_own_wall']:.3f})"
            share = facts[f"{kind}_share"]
            met = common.mark(share <= TARGETS[kind])
            row += [own, f"{share:.1%}", f"{facts[f'{kind}_call']:.3f}", met]
        table.add_row(*row)
    return table


# --- growth ----------------------------------------------------------------------------------------


def growth(sizes: list[int]) -> dict[str, Any]:
    """Microseconds a node of each step with warm proofs, and the exponent of growth between the ends."""
    layer = _stacked.captured_layer()
    options = Options.make(OPTIONS)
    engine.plan(_stacked.stacked(layer, 1), [], options, False)
    rows = []
    for size in sizes:
        runs = []
        for _ in range(max(1, min(5, 20_000 // size))):
            gm = _stacked.stacked(layer, _stacked.depth_for(layer, size))
            gc.collect()
            made: list[Any] = []
            taken = common.spent(lambda gm=gm, made=made: made.append(engine.plan(gm, [], options, False)))
            runs.append((taken, made[0]))
        nodes = runs[0][1].nodes
        micro = {s: statistics.median(r.seconds[s] for _, r in runs) / nodes * 1e6 for s in STEPS}
        rows.append(
            {"nodes": nodes, "sites": runs[0][1].count(npu_fuse.Status.FUSED), "steps": micro,
             "us_per_node": statistics.median(t.cpu for t, _ in runs) / nodes * 1e6,
             "us_per_node_wall": statistics.median(t.wall for t, _ in runs) / nodes * 1e6}
        )  # fmt: skip
        common.note(f"growth: {nodes} nodes, {rows[-1]['us_per_node']:.1f} microseconds of CPU a node")
    first, last = rows[0], rows[-1]
    ratio = (last["us_per_node"] * last["nodes"]) / (first["us_per_node"] * first["nodes"])
    exponent = math.log(ratio) / math.log(last["nodes"] / first["nodes"]) if last["nodes"] > first["nodes"] else 1.0
    return {"rows": rows, "exponent": exponent}


def _growth_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Microseconds a node, warm proofs; time grows as nodes^{result['exponent']:.3f}")
    for name in ("nodes", "sites", *STEPS, "CPU", "wall", ""):
        table.add_column(name, justify="right" if name else "left")
    for row in result["rows"]:
        steps = [f"{row['steps'][s]:.1f}" for s in STEPS]
        met = common.mark(row["us_per_node"] <= TARGETS["us_per_node"])
        cells = [f"{row['us_per_node']:.1f}", f"{row['us_per_node_wall']:.1f}"]
        table.add_row(f"{row['nodes']:,}", str(row["sites"]), *steps, *cells, met)
    return table


# --- proofs ----------------------------------------------------------------------------------------


def wide_proofs(name: str) -> list[dict[str, Any]]:
    """Every proof of one training layer at full width, in bfloat16."""
    results: list[dict[str, Any]] = []

    def plan(gm: Any, inputs: Any) -> None:
        report = engine.plan(gm, inputs, Options.make(OPTIONS), training=True)
        faults = [*report.errors, *(s.reason for s in report.sites if s.status is npu_fuse.Status.ERROR)]
        if faults:
            raise RuntimeError(f"{name}: {faults[0]}")

    proofs.forget_verdicts()
    with _wide.watched_proofs(results):
        _wide.capture(name, torch.bfloat16, 4096, plan)
    proofs.forget_verdicts()
    common.note(f"{name}: {len(results)} proofs")
    return results


def _proofs_table(result: dict[str, Any]) -> Table:
    table = Table(title="Each proof at full width, training, bfloat16")
    for column in ("model", "op", "form", "verdict", "CPU s", "wall s", "MB", ""):
        table.add_column(column, justify="right" if column.endswith(("s", "MB")) else "left")
    for model, found in result.items():
        for proof in found:
            met = proof["cpu"] <= TARGETS["proof_seconds"] and proof["bytes"] <= TARGETS["proof_bytes"]
            verdict = "holds" if proof["holds"] else "refused"
            sizes = (f"{proof['cpu']:.3f}", f"{proof['wall']:.3f}", f"{proof['bytes'] / 2**20:.0f}")
            table.add_row(model, proof["op"], proof["form"], verdict, *sizes, common.mark(met))
    return table


if __name__ == "__main__":
    main()
