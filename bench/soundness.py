"""Mutants of every rule, judged by eager: 0 wrong values and gradients are allowed.

    python bench/soundness.py                     10,000 mutants (about two hours on one core)
    python bench/soundness.py --mutants 500 --op rotary_mul
    python bench/soundness.py --summary           only the table of what is in the results file

A mutant is a spelling of a fused op with 0 to 2 mistakes in it (tests/soundness/mutations.py). It runs as
npu_fuse rewrites it, without a hand-off, on inputs that no proof has seen, and is compared with eager and with
float64. Results are kept in a file, a line for every batch, under the hash of npu_fuse's sources: stop and start
again at will; what was run with other sources counts no more.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
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
from soundness.campaign import campaign  # noqa: E402
from soundness.strategies import OPS  # noqa: E402

from npu_fuse.cache_tag import source_hash  # noqa: E402

BATCH = 50
FIRST_SEED = 1_000
"""Apart from the seeds of tests/soundness/test_soundness.py."""
Record = dict[str, Any]
console = Console(width=None if sys.stdout.isatty() else 120)


@click.command(help=__doc__)
@click.option("--mutants", default=10_000, show_default=True, type=click.IntRange(min=BATCH))
@click.option("--op", type=click.Choice(OPS), help="Mutants of one op only.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("soundness.jsonl"), show_default=True)
@click.option("--summary", is_flag=True, help="Run nothing.")
def main(mutants: int, op: str | None, output: Path, summary: bool) -> None:
    torch.set_num_threads(1)
    sources = source_hash()
    wanted = [] if summary else [(FIRST_SEED + i, op) for i in range(mutants // BATCH)]
    done = {(r["seed"], r["op"]) for r in records(output, sources)}
    run([batch for batch in wanted if batch not in done], output, sources)
    kept = [r for r in records(output, sources) if summary or (r["seed"], r["op"]) in set(wanted)]
    wrong = report(kept)
    sys.exit(1 if wrong else 0)


def run(batches: list[tuple[int, str | None]], output: Path, sources: str) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("mutants", total=len(batches) * BATCH)
        for number, op in batches:
            tally = campaign(number, BATCH, op)
            record = {"sources": sources, "seed": number, "op": op, **vars(tally)}
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            for text in (*tally.wrong, *tally.faults):
                progress.console.print(text, markup=False, style="red")
            progress.advance(task, BATCH)


def records(output: Path, sources: str) -> list[Record]:
    """What was run with these sources; a line that was cut off is run again."""
    found = []
    for line in output.read_text(encoding="utf-8").splitlines() if output.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["sources"] == sources:
            found.append(record)
    return found


def report(kept: list[Record]) -> int:
    """Print the table; the number of wrong results."""
    mutants: Counter[str] = Counter()
    rewritten: Counter[str] = Counter()
    for record in kept:
        mutants.update(record["mutants"])
        rewritten.update(record["rewritten"])
    wrong = [text for record in kept for text in record["wrong"]]
    faults = [text for record in kept for text in record["faults"]]
    table = Table("rule", "mutants", "with a rewrite")
    for column in table.columns[1:]:
        column.justify = "right"
    for op in OPS:
        table.add_row(op, f"{mutants[op]:,}", f"{rewritten[op]:,}")
    table.add_row("all", f"{mutants.total():,}", f"{rewritten.total():,}", style="bold")
    console.print(table)
    console.print(
        f"{sum(r['calls'] for r in kept):,} calls compared; {sum(r['discarded'] for r in kept)} mutants that"
        f" torch.compile alone gets wrong; {len(faults)} faults inside npu_fuse; wrong results: {len(wrong)}"
    )
    for text in (*wrong[:20], *faults[:20]):
        console.print(text, markup=False, style="red")
    return len(wrong) + len(faults)


if __name__ == "__main__":
    main()
