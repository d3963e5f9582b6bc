"""Blocks of experts on the CPU: npu_fuse beside the ways that transformers runs them, in one run.

    python bench/moe.py                                        four shapes, inference and training
    python bench/moe.py --model mixtral --mode inference --experts 8

Kinds: the loop in eager mode; `grouped_mm` and `batched_mm` under plain torch.compile (Inductor); npu_fuse and
Inductor on transformers' default (`grouped_mm`). They take turns in one process in an order drawn anew each round.
Ratio: the fastest of the others' CPU time over npu_fuse's, median over rounds with its 95 % bootstrap interval. Peak
memory is what a step allocates at most at once (torch's profiler). Kernels: calls in the graph that npu_fuse hands
on, movement left out; they must not grow with the number of experts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import _common as common
import click
import cpu_runtime
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from npu_fuse import dialect as d

SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024},
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "decoder_sparse_step": 1,
                  "mlp_only_layers": []},
    "deepseek_v3": {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "n_group": 8,
                    "topk_group": 4, "n_shared_experts": 1, "first_k_dense_replace": 0},
    "gpt_oss": {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 512},
}  # fmt: skip
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
KINDS = ("loop", "grouped_mm", "batched_mm", "npu_fuse")
TARGET = 0.98


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(tuple(SHAPES)))
@click.option("--mode", "modes", multiple=True, type=click.Choice(cpu_runtime.MODES))
@click.option("--experts", type=int, help="Another number of experts.")
@click.option("--width", default=512, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    models: tuple[str, ...], modes: tuple[str, ...], experts: int | None, width: int, tokens: int, rounds: int,
    as_json: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    rows = []
    for name in models or tuple(SHAPES):
        for mode in modes or cpu_runtime.MODES:
            rows.append({"model": name, "mode": mode, **measure(name, mode, experts, width, tokens, rounds)})
            common.note(f"{name} {mode}: {rows[-1]['ratio']:.3f} of {rows[-1]['fastest']}")
    result = {"machine": common.machine(), "target": TARGET, "width": width, "tokens": tokens, "rows": rows}
    common.show(result, [_table(rows)], as_json)


def block_of(name: str, experts: int | None, width: int, implementation: str) -> torch.nn.Module:
    """The experts' block of one layer in bfloat16, seeded, with the way its experts run."""
    shape = dict(SHAPES[name])
    if experts is not None:
        key = next(k for k in COUNTS if k in shape)
        shape |= {key: experts, "num_experts_per_tok": min(shape["num_experts_per_tok"], experts)}
    config = CONFIG_MAPPING[name](
        vocab_size=256, hidden_size=width, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, **shape,
    )  # fmt: skip
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = common.transformers.AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config._experts_implementation = implementation
    (block,) = [m for m in model.modules() if any(n == "experts" for n, _ in m.named_children())][:1]
    return block.to(torch.bfloat16)


def measure(name: str, mode: str, experts: int | None, width: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One row: tokens a second and peak bytes of each kind, the ratio, the kernels."""
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch._dynamo.reset()
    kernels = _kernels(name, experts, width, x, mode == "training")
    steps = {kind: _step(kind, name, experts, width, x, mode == "training") for kind in KINDS}
    for step in steps.values():
        for _ in range(3):
            step()
    times = cpu_runtime.taken(steps, rounds, time.process_time)
    fastest = min((k for k in KINDS if k != "npu_fuse"), key=lambda k: statistics.median(times[k]))
    ratios = [other / ours for other, ours in zip(times[fastest], times["npu_fuse"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "tokens_per_second": {k: tokens / statistics.median(t) for k, t in times.items()},
        "peak_bytes": {k: peak_bytes(step) for k, step in steps.items()}, "fastest": fastest, "ratio": ratio,
        "interval": cpu_runtime.interval(ratios), "kernels": kernels, "met": ratio >= TARGET,
    }  # fmt: skip


def _step(kind: str, name: str, experts: int | None, width: int, x: torch.Tensor, train: bool,
          handoff: Any = "inductor") -> Any:  # fmt: skip
    implementation = {"loop": "eager", "npu_fuse": "grouped_mm"}.get(kind, kind)
    block = block_of(name, experts, width, implementation).train(train)
    called: Any = block
    if kind == "npu_fuse":
        called = torch.compile(block, backend="npu_fuse", options={"target": "reference", "handoff": handoff})
    elif kind != "loop":
        called = torch.compile(block, backend="inductor")

    def step() -> None:
        leaf = x.detach().requires_grad_(train)
        with torch.set_grad_enabled(train):
            y = called(leaf)
            y = y[0] if isinstance(y, tuple) else y
            if train:
                y.float().square().mean().backward()
        for parameter in block.parameters():
            parameter.grad = None

    return step


def _kernels(name: str, experts: int | None, width: int, x: torch.Tensor, train: bool) -> int:
    """Calls that are more than movement in the graph that npu_fuse hands on. Inductor itself is named by its name:
    only then are the ops code of its own."""
    found: list[int] = []

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append(sum(n.op in ("call_function", "call_method") and not d.moves(n) for n in gm.graph.nodes))
        return gm.forward

    _step("npu_fuse", name, experts, width, x, train, count)()
    torch._dynamo.reset()
    return sum(found)


def peak_bytes(step: Any) -> int:
    """The most that one step holds at once beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Blocks of experts, bf16, one thread: tokens a second (peak MB)")
    for column in ("model", "mode", *KINDS, "beside the fastest", "95 %", "kernels", ""):
        table.add_column(column, justify="right" if column not in ("model", "mode") else "left")
    for row in rows:
        cells = [f"{row['tokens_per_second'][k]:,.0f} ({row['peak_bytes'][k] / 2**20:.1f})" for k in KINDS]
        low, high = row["interval"]
        beside = f"{row['ratio']:.3f} of {row['fastest']}"
        mark = common.mark(row["met"])
        table.add_row(row["model"], row["mode"], *cells, beside, f"{low:.3f}–{high:.3f}", str(row["kernels"]), mark)
    return table


if __name__ == "__main__":
    main()
