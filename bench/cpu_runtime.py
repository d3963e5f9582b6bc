"""Steps a second with npu_fuse and Inductor against Inductor alone, on the CPU.

    python bench/cpu_runtime.py                          four decoders, inference and training (an hour: compiles)
    python bench/cpu_runtime.py --model llama --mode inference

Three compiled copies of one model take turns in one process, in an order that is drawn anew for each round:
plain, plain once more (the A/A control: what equal code differs by here), and npu_fuse. The ratio of a round is
plain's CPU time over the other's; the median over rounds is given with its 95 % bootstrap interval.
"""

from __future__ import annotations

import random
import statistics
import time
import types
from typing import Any

import _common as common
import click
import torch
from rich.table import Table

TARGET = 0.98
KINDS = ("plain", "again", "fused")
MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(common.ARCHITECTURES))
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES))
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(tuple(DTYPES)))
@click.option("--width", default=512, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--tokens", default=128, show_default=True, help="In each of two sequences.")
@click.option("--rounds", default=40, show_default=True)
@click.option("--clock", default="cpu", show_default=True, type=click.Choice(("cpu", "wall")))
@click.option("--json", "as_json", is_flag=True)
def main(
    models: tuple[str, ...], modes: tuple[str, ...], dtype: str, width: int, layers: int, tokens: int, rounds: int,
    clock: str, as_json: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    rows = []
    for name in models or common.ARCHITECTURES:
        for mode in modes or MODES:
            steps = compiled_steps(name, mode == "training", DTYPES[dtype], width, layers, tokens)
            times = taken(steps, rounds, time.process_time if clock == "cpu" else time.perf_counter)
            rows.append({"model": name, "mode": mode, "dtype": dtype, **judged(times)})
            common.note(f"{name} {mode}: {rows[-1]['ratio']:.3f}, A/A {rows[-1]['control']:.3f}")
    setting = {"width": width, "layers": layers, "tokens": 2 * tokens, "rounds": rounds, "clock": clock}
    result = {"machine": common.machine(), "target": TARGET, **setting, "rows": rows}
    common.show(result, [_table(rows, clock)], as_json)


def compiled_steps(name: str, train: bool, dtype: torch.dtype, width: int, layers: int, tokens: int) -> dict[str, Any]:
    """One callable of each kind, compiled and warm. Each has a model of its own with the same weights."""
    ids = common.words(2, tokens)
    options: dict[str, Any] = {"target": "reference", "handoff": "inductor"}
    made = {}
    torch._dynamo.reset()
    for kind in KINDS:
        model = common.decoder(name, width, layers, train, dtype)
        fused = kind == "fused"
        compiled = torch.compile(
            _own_code(_forward, kind), backend="npu_fuse" if fused else "inductor", options=options if fused else None
        )

        def step(model: Any = model, compiled: Any = compiled) -> None:
            common.step(lambda **inputs: compiled(model, **inputs), ids, train)
            for parameter in model.parameters():
                parameter.grad = None

        made[kind] = step
        for _ in range(3):
            step()
        common.note(f"{name} {'training' if train else 'inference'}: {kind} compiled")
    return made


def _forward(model: torch.nn.Module, **inputs: Any) -> Any:
    return model(**inputs)


def _own_code(function: Any, kind: str) -> Any:
    """The function with a code object of its own: Dynamo would try the guards of all kinds in turn."""
    return types.FunctionType(function.__code__.replace(co_name=f"{function.__name__}_{kind}"), function.__globals__)


def taken(steps: dict[str, Any], rounds: int, clock: Any) -> dict[str, list[float]]:
    """Seconds of each kind in each round."""
    order, draw = list(steps), random.Random(0)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        draw.shuffle(order)
        for kind in order:
            start = clock()
            steps[kind]()
            times[kind].append(clock() - start)
    return times


def judged(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median ratios to plain with their intervals, and steps a second of plain and npu_fuse."""
    facts: dict[str, Any] = {f"{k}_per_second": 1 / statistics.median(times[k]) for k in ("plain", "fused")}
    for kind, name in (("fused", "ratio"), ("again", "control")):
        ratios = [plain / other for plain, other in zip(times["plain"], times[kind], strict=True)]
        facts[name] = statistics.median(ratios)
        facts[f"{name}_interval"] = interval(ratios)
    facts["met"] = facts["ratio"] >= TARGET
    return facts


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def _table(rows: list[dict[str, Any]], clock: str) -> Table:
    table = Table(title=f"Steps a second against plain Inductor ({clock} time); 95 % intervals")
    for column in ("model", "mode", "plain /s", "npu_fuse /s", "ratio", "interval", "A/A", "interval", ""):
        table.add_column(column, justify="right" if column not in ("model", "mode", "") else "left")
    for row in rows:
        cells = [f"{row['plain_per_second']:.2f}", f"{row['fused_per_second']:.2f}"]
        for name in ("ratio", "control"):
            low, high = row[f"{name}_interval"]
            cells += [f"{row[name]:.3f}", f"{low:.3f}–{high:.3f}"]
        table.add_row(row["model"], row["mode"], *cells, common.mark(row["met"]))
    return table


if __name__ == "__main__":
    main()
