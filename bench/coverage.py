"""How much of every architecture npu_fuse fuses, and whether results stay right: the whole zoo, all modes.

    python bench/coverage.py                              every decoder, bf16 inference
    python bench/coverage.py --all-modes --kind all       everything (hours); stop and start again at will
    python bench/coverage.py --mode fp32-train llama qwen3
    python bench/coverage.py --summary                    only the table of what is in the results file

Each model runs in a child process of its own. Results are kept in a JSON file as they come, and what is there
already is not run again (`--again` does). Sites are counted by eager data flow (tests/zoo/truth.py), never by
npu_fuse; what "right" means is written in tests/zoo/reference.py.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from zoo import catalog, measure, truth  # noqa: E402
from zoo.isolate import isolated  # noqa: E402
from zoo.unfusable import UNFUSABLE  # noqa: E402

Record = dict[str, Any]
OPS = ("rms_norm", "rotary_mul", "glu")
KNOWN = truth.load()
console = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Counts:
    """Sites per forward pass: what truth says, and what became of them.

    `outside`: in no graph, since Dynamo breaks there. `unfusable`: no fused operation computes this.
    """

    true: int = 0
    fused: int = 0
    profit: int = 0
    outside: int = 0
    unfusable: int = 0

    @property
    def missed(self) -> int:
        return self.true - self.fused - self.profit - self.outside - self.unfusable

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def run_one(mode: str, baselines: Path | None, quick: bool, name: str) -> Record:
    """Measure one model; called in the child."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return measure.measure(name, mode, baselines, quick)


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--mode", "modes", multiple=True, type=click.Choice(list(measure.MODES)), help="May be repeated.")
@click.option("--all-modes", is_flag=True)
@click.option("--kind", type=click.Choice(catalog.KINDS), default="decoders", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("coverage.json"), show_default=True)
@click.option("--processes", type=click.IntRange(1, 2), default=2, show_default=True)
@click.option("--timeout", default=400.0, show_default=True, help="Seconds for one model in one mode.")
@click.option("--again", is_flag=True, help="Run also what the results file has.")
@click.option("--short", is_flag=True, help="Run again what the results file has and what lacks sites or is faulty.")
@click.option("--baselines", type=click.Path(path_type=Path), help="Keep unfused inference runs in this folder.")
@click.option("--quick", is_flag=True, help="Compare with eager and not with the compiled hand-off alone.")
@click.option("--summary", is_flag=True, help="Run nothing.")
@click.option("--missed", is_flag=True, help="List every site that was not fused, by reason.")
def main(
    names: tuple[str, ...],
    modes: tuple[str, ...],
    all_modes: bool,
    kind: str,
    output: Path,
    processes: int,
    timeout: float,
    again: bool,
    short: bool,
    baselines: Path | None,
    quick: bool,
    summary: bool,
    missed: bool,
) -> None:
    results: dict[str, Record] = json.loads(output.read_text()) if output.exists() else {}
    chosen = list(measure.MODES) if all_modes else list(modes) or ["bf16"]
    if not summary:
        for mode in chosen:
            known = {n: results.get(f"{mode}/{n}") for n in names or catalog.names(kind)}
            todo = [n for n, r in known.items() if (r is not None and is_short(r) if short else again or r is None)]
            todo.sort(key=lambda n: not sum(KNOWN.get(n, {}).get("expected", {}).values()))  # those with sites first
            work = partial(run_one, mode, baselines, quick)
            sweep(todo, mode, results, lambda: _save(results, output), work, processes, timeout)
    console.print(coverage_table(results.values()))
    console.print(health_table(results.values()))
    for line in filter(None, map(shortfall, results.values())):
        console.print(line, markup=False, highlight=False)
    if missed:
        console.print(missed_table(results.values()))
    problems = [line for record in results.values() for line in faults_of(record)]
    for line in problems:
        console.print(line, style="red", markup=False)
    sys.exit(1 if problems else 0)


def sweep(
    names: list[str],
    mode: str,
    results: dict[str, Record],
    save: Callable[[], None],
    work: Callable[[str], Record],
    processes: int,
    timeout: float,
) -> None:
    """Run `names` in `mode`, adding to `results` under "mode/name"."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(mode, total=len(names))
        for name, record in isolated(work, names, timeout, processes):
            results[f"{mode}/{name}"] = {"name": name, "mode": mode, **record}
            save()
            progress.update(task, advance=1, description=f"{mode} {name}")


def _save(results: dict[str, Record], output: Path) -> None:
    partial_file = output.with_suffix(".partial")
    partial_file.write_text(json.dumps(results, indent=1))
    partial_file.replace(output)


def faults_of(record: Record) -> list[str]:
    """What must never happen, as lines of text: failures with npu_fuse only, results outside the bound."""
    label = f"{record['mode']} {record['name']}"
    found = []
    if record.get("fused_error") and not record.get("plain_error"):
        found.append(f"{label}: runs without npu_fuse and not with it: {record['fused_error']}")
    accuracy = record.get("accuracy")
    if accuracy and not accuracy["within_bound"]:
        found.append(f"{label}: outside the bound: {', '.join(accuracy['outside'])}")
    if record.get("graphs") and record["graphs"][0] != record["graphs"][1]:
        found.append(f"{label}: {record['graphs'][0]} graphs without npu_fuse, {record['graphs'][1]} with it")
    if record.get("guards") and record["guards"][1] > record["guards"][0]:
        found.append(f"{label}: {record['guards'][0]} guards without npu_fuse, {record['guards'][1]} with it")
    found += [f"{label}: fault inside npu_fuse: {fault}" for fault in record.get("faults", ())]
    return found


def shortfall(record: Record) -> str:
    """What one model lacks of truth, as a line of text; empty if nothing."""
    if "sites" not in record or record["plain_error"]:
        return ""
    parts = []
    for op in OPS:
        counts = _counts(record, (op,))
        if counts.missed:
            parts.append(f"{op} {counts.fused + counts.profit} of {counts.true}")
    return f"{record['mode']} {record['name']}: {', '.join(parts)}" if parts else ""


def is_short(record: Record) -> bool:
    """Lacks sites, is faulty or was not measured."""
    return bool("sites" not in record or shortfall(record) or faults_of(record))


def coverage_table(records: Iterable[Record]) -> Table:
    """Sites per forward pass, summed over models: one row per mode and operation."""
    table = Table(title="sites per forward pass, and what npu_fuse made of them")
    for column in ("mode", "op", "models", "true", "fused", "by profit", "in no graph", "no op", "missed", "share"):
        table.add_column(column, justify="left" if column in ("mode", "op") else "right")
    for mode, group in _by_mode(records).items():
        ran = [r for r in group if "sites" in r and not r["plain_error"]]
        for op in (*OPS, "all"):
            each = [_counts(r, OPS if op == "all" else (op,)) for r in ran]
            total = sum(each, Counts())
            share = f"{100 * (total.fused + total.profit) / total.true:.2f} %" if total.true else "-"
            numbers = (sum(c.true > 0 for c in each), *astuple(total), total.missed)
            table.add_row(mode, op, *map(str, numbers), share, end_section=op == "all")
    return table


def _counts(record: Record, ops: tuple[str, ...]) -> Counts:
    """What one op has beyond truth never makes up for another's lack."""
    total = Counts()
    for op in ops:
        wanted = KNOWN.get(record["name"], {}).get("expected", {}).get(op, 0)
        fused = min(wanted, record["sites"].get("fused", {}).get(op, 0))
        profit = min(wanted - fused, record["sites"].get("refused_by_profit", {}).get(op, 0))
        rest = wanted - fused - profit
        outside = min(rest, max(0, wanted - record.get("captured", {}).get(op, wanted)))
        unfusable = min(rest - outside, UNFUSABLE.get(record["name"], {}).get(op, (0, ""))[0])
        total += Counts(wanted, fused, profit, outside, unfusable)
    return total


def health_table(records: Iterable[Record]) -> Table:
    """Per mode: how many models ran, and what went wrong."""
    table = Table(title="models")
    columns = (
        "mode",
        "models",
        "ran",
        "decide",
        "bit equal",
        "outside bound",
        "plain only",
        "not even plain",
        "no run",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, group in _by_mode(records).items():
        judged = [r["accuracy"] for r in group if r.get("accuracy")]
        row = (
            len(group),
            len(judged),
            sum(a["decides"] for a in judged),
            sum(a["bit_equal"] for a in judged),
            sum(not a["within_bound"] for a in judged),
            sum(bool(r.get("fused_error")) and not r["plain_error"] for r in group),
            sum(bool(r.get("plain_error")) for r in group),
            sum("sites" not in r for r in group),
        )
        table.add_row(mode, *map(str, row))
    return table


def _by_mode(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["mode"], []).append(record)
    return groups


def missed_table(records: Iterable[Record]) -> Table:
    """Sites not fused, grouped by operation, status and reason."""
    groups: Counter[tuple[str, str, str]] = Counter()
    models: dict[tuple[str, str, str], set[str]] = {}
    for record in records:
        for site in record.get("unfused", ()):
            key = (site["op"], site["status"], site["reason"])
            groups[key] += site["calls"]
            models.setdefault(key, set()).add(f"{record['name']} {site['where']}")
    table = Table(title="not fused")
    for column in ("op", "status", "reason", "sites", "where"):
        table.add_column(column, overflow="fold")
    for key, number in groups.most_common():
        examples = sorted(models[key])
        table.add_row(*key, str(number), f"{', '.join(examples[:3])} ({len(examples)})")
    return table


if __name__ == "__main__":
    main()
