"""Seconds and peak memory of one update of a real verl actor: eager, plain Inductor, npu_fuse with Inductor.

    python bench/verl_step.py                       a Qwen3 of width 256, float32, FSDP2 on one rank, on the CPU
    python bench/verl_step.py --model llama --handoff aot_eager

Needs verl (the environment of `nox -s real_verl`). Each kind is an actor in a process of its own; they take turns,
in an order that is drawn anew for each round, on the same tokens. "Plain" compiles the same blocks by the hand-off
alone, "again" is plain once more: what equal code differs by here. Times are CPU seconds, compilers' included; the
ratio is plain's time over the other's, the median over rounds with its 95 % bootstrap interval. Compiling is what the
first updates take above the median of later ones; "own" of it are npu_fuse's steps: recognise, prove, lower. The peak
is of tensors within one update, weights not included.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common as common
import click
import torch
from cpu_runtime import interval
from rich.table import Table

KINDS = ("eager", "plain", "again", "fused")
WARM = 4
TARGET = 0.98


@click.command(help=__doc__)
@click.option("--model", default="qwen3", show_default=True, type=click.Choice(common.ARCHITECTURES))
@click.option("--handoff", default="inductor", show_default=True, type=click.Choice(("inductor", "aot_eager")))
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(("fp32", "bf16")))
@click.option("--width", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--tokens", default=128, show_default=True, help="At most, in each of eight sequences.")
@click.option("--rounds", default=20, show_default=True)
@click.option("--updates", default=200, show_default=True, help="Of the run whose share of compiling is told.")
@click.option("--json", "as_json", is_flag=True)
def main(
    model: str, handoff: str, dtype: str, width: int, layers: int, tokens: int, rounds: int, updates: int,
    as_json: bool,
) -> None:  # fmt: skip
    if importlib.util.find_spec("verl") is None:
        raise click.UsageError("verl is not installed here; `nox -s real_verl` makes an environment with it")
    import _verl_actor as actors

    with tempfile.TemporaryDirectory(prefix="npu_fuse_bench_") as folder, contextlib.ExitStack() as stack:
        checkpoint = Path(folder) / model
        common.decoder(model, width, layers, train=True, dtype=torch.float32).save_pretrained(checkpoint)
        asks = {k: stack.enter_context(actors.actor(k, checkpoint, dtype, tokens, handoff)) for k in KINDS}
        first = {}
        for kind, ask in asks.items():
            first[kind] = [ask("update", step) for step in range(WARM)]
            common.note(f"{kind}: the first {WARM} updates took {sum(cpu for _, cpu in first[kind]):.1f} s")
        times = taken(asks, rounds)
        rows = [
            {"kind": kind, **judged(kind, first[kind], times, updates), "peak": ask("peak", WARM), **ask("facts")}
            for kind, ask in asks.items()
        ]
    setting = {"model": model, "handoff": handoff, "dtype": dtype, "width": width, "layers": layers, "tokens": tokens,
               "rounds": rounds, "updates": updates}  # fmt: skip
    common.show(
        {"machine": common.machine(), "target": TARGET, **setting, "rows": rows}, [_table(rows, setting)], as_json
    )


def taken(asks: dict[str, Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of wall clock and CPU of each kind in each round."""
    order, draw = list(asks), random.Random(0)
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in asks}
    for step in range(WARM, WARM + rounds):
        draw.shuffle(order)
        for kind in order:
            times[kind].append(asks[kind]("update", step))
    return times


def judged(kind: str, first: list[tuple[float, float]], times: Any, updates: int) -> dict[str, Any]:
    own, plain, eager = ([cpu for _, cpu in times[k]] for k in (kind, "plain", "eager"))
    update = statistics.median(own)
    compiling = max(sum(cpu for _, cpu in first) - WARM * update, 0.0)
    ratios = [p / o for p, o in zip(plain, own, strict=True)]
    return {
        "update": update,
        "wall": statistics.median(wall for wall, _ in times[kind]),
        "to_eager": statistics.median(e / o for e, o in zip(eager, own, strict=True)),
        "ratio": statistics.median(ratios),
        "interval": interval(ratios),
        "compiling": 0.0 if kind == "eager" else compiling,
        "share": 0.0 if kind == "eager" else compiling / (compiling + updates * update),
    }


def _table(rows: list[dict[str, Any]], setting: dict[str, Any]) -> Table:
    title = "{model}, width {width}, {layers} layers, {dtype}, hand-off {handoff}".format(**setting)
    table = Table(title=f"One update of verl's actor: {title}")
    share = f"of {setting['updates']}"
    columns = ("kind", "update", "eager/it", "plain/it", "interval", "peak MB", "compile", share, "own", "sites", "")
    for column in columns:
        table.add_column(column, justify="left" if column in ("kind", "") else "right")
    plain = next(row for row in rows if row["kind"] == "plain")
    for row in rows:
        low, high = row["interval"]
        met = row["ratio"] >= TARGET and row["peak"] <= plain["peak"]
        seconds = f"{row['compiling']:.0f} s", f"{row['share']:.0%}", f"{row['own']:.2f} s"
        ratios = f"{row['to_eager']:.3f}", f"{row['ratio']:.3f}", f"{low:.3f}–{high:.3f}"
        marked = common.mark(met) if row["kind"] == "fused" else ""
        update, peak = f"{row['update']:.3f} s", f"{row['peak'] / 1e6:.1f}"
        table.add_row(row["kind"], update, *ratios, peak, *seconds, str(row["sites"]), marked)
    return table


if __name__ == "__main__":
    main()
