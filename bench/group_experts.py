"""What `npu_fuse.group_experts` makes of loops over experts, in every architecture that has them.

    python bench/group_experts.py                             every decoder of transformers, bf16 inference
    python bench/group_experts.py --mode fp32-train qwen3_moe gpt_oss

Experts are set to loop (`experts_implementation="eager"`). Which blocks loop is counted without npu_fuse
(tests/zoo/grouping.py). The grouped model is compiled with npu_fuse and held to the zoo's bound against eager,
gradients included. Each model runs in a child process of its own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import _common  # noqa: F401  (puts the repository on the path)
import click
import torch
from zoo import catalog, measure
from zoo.grouping import measure_grouping
from zoo.isolate import isolated

Record = dict[str, Any]


def run_one(mode: str, name: str) -> Record:
    """One model, in the child."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return measure_grouping(name, mode)


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--mode", type=click.Choice(list(measure.MODES)), default="bf16", show_default=True)
@click.option("--processes", type=click.IntRange(1, 2), default=1, show_default=True)
@click.option("--timeout", default=300.0, show_default=True, help="Seconds for one model.")
def main(names: tuple[str, ...], mode: str, processes: int, timeout: float) -> None:
    records: list[Record] = []
    chosen = list(names) or catalog.names("decoders")
    for name, record in isolated(partial(run_one, mode), chosen, timeout, processes):
        if record.get("loops") or "error" in record:
            records.append({"name": name, **record})
            print(line_of(records[-1]), flush=True)
    sys.exit(summary(records))


def line_of(record: Record) -> str:
    if "error" in record:
        return f"{record['name']}: does not run: {str(record['error'])[:100]}"
    accuracy = record.get("accuracy") or {}
    right = "within the bound" if accuracy.get("within_bound") else f"OUTSIDE {accuracy.get('outside')}"
    if not accuracy:
        right = record.get("plain_error") or record.get("fused_error") or "not compared"
    left = "; ".join(record.get("left", []))
    return (
        f"{record['name']}: {record['grouped']} of {record['loops']} loops grouped, {record.get('graphs')} graphs, "
        f"routing {record.get('routing')}, {right}{'; left: ' + left if left else ''}"
    )


def summary(records: Iterable[Record]) -> int:
    """The totals; 1 where a result is outside the bound."""
    ran = [r for r in records if "error" not in r]
    loops, grouped = (sum(r[k] for r in ran) for k in ("loops", "grouped"))
    wrong = [r["name"] for r in ran if r.get("accuracy") and not r["accuracy"]["within_bound"]]
    broken = [r["name"] for r in ran if r.get("fused_error") and not r.get("plain_error")]
    print(f"{grouped} of {loops} loops grouped in {len(ran)} architectures; outside the bound: {wrong or 'none'}; "
          f"run without npu_fuse only: {broken or 'none'}")  # fmt: skip
    return int(bool(wrong or broken))


if __name__ == "__main__":
    main()
