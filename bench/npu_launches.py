"""What an NPU would launch for one more decoder layer, counted by the stand-in below the real torch_npu wheel.

    scripts/npu-host python bench/npu_launches.py                    six models, inference and training
    scripts/npu-host python bench/npu_launches.py --model qwen3      one of them, with every operator
    scripts/npu-host python bench/npu_launches.py --experts          blocks of experts, with the router's op and without

Counted are kernels and the bytes of their distinct inputs and of what they write: a model of three layers less one of
two, bf16, attention by torch_npu's own fused op. Variants: eager; the hand-off alone (npugraph_ex in inference,
aot_eager in training); npu_fuse and the same hand-off. The bound: eager's launches with every fusible site as one
launch (forward only: what a site's backward launches in eager mode is not counted apart). Copies and concatenations
that are left are listed: those around fused ops stand above the bound, those of attention do not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import _common as common
import click
import torch
from rich.table import Table

import npu_fuse

MODELS = ("llama", "qwen3", "gemma3_text", "glm4", "deepseek_v3", "cohere2")
LAYERS = {"deepseek_v3": (3, 4)}
"""Where a model of two layers has none of the kind that repeats."""
VARIANTS = ("eager", "hand-off", "npu_fuse")
BLOCKS = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
BLOCK_VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None, "router apart": {"moe_gating": "never"}, "npu_fuse": {"moe_gating": "inference"},
}  # fmt: skip
MOVES = ("aten::cat", "aten::clone", "aten::copy_", "aten::_to_copy", "npu::_npu_dtype_cast", "aten::contiguous")


@dataclass(frozen=True)
class Launches:
    """Kernels by operator, and the bytes that they read and wrote."""

    kernels: Counter[str]
    bytes: int

    @property
    def total(self) -> int:
        return sum(self.kernels.values())


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS))
@click.option("--experts", is_flag=True, help="Blocks of experts in inference, by themselves.")
@click.option("--training/--inference", "training", default=None, help="Only one of the two.")
@click.option("--json", "as_json", is_flag=True)
def main(models: tuple[str, ...], experts: bool, training: bool | None, as_json: bool) -> None:
    torch.set_num_threads(1)
    if experts:
        rows = [measure_experts(name) for name in BLOCKS]
        common.show({"machine": common.machine(), "rows": rows}, [_blocks(rows), _operators(rows)], as_json)
        return
    rows = []
    for name in models or MODELS:
        for train in (False, True) if training is None else (training,):
            rows.append(measure(name, train))
            common.note(f"{name} {'training' if train else 'inference'}: {rows[-1]['launches']}")
    tables = [_table(rows), *([_operators(rows)] if len(models) == 1 else [])]
    common.show({"machine": common.machine(), "rows": rows}, tables, as_json)


def measure(name: str, train: bool) -> dict[str, Any]:
    """One row: launches and bytes a layer of each variant, and the bound."""
    few, many = LAYERS.get(name, (2, 3))
    found = {variant: _per_layer(name, few, many, variant, train) for variant in VARIANTS if variant != "hand-off"}
    try:
        found["hand-off"] = _per_layer(name, few, many, "hand-off", train)
    except RuntimeError as fault:  # plain experts read group sizes on the host, which no capture allows
        common.note(f"{name}: the hand-off alone does not run it: {str(fault).splitlines()[0]}")
    fused, saved = found["npu_fuse"], _saved(name, few, many, train)
    bound = None if train else found["eager"].total - saved
    above = {op: n for op, n in fused.kernels.items() if op in MOVES}
    return {
        "model": name, "training": train, "handoff": _handoff(train),
        "launches": {v: launches.total for v, launches in found.items()}, "bound": bound,
        "bytes": {v: launches.bytes for v, launches in found.items()}, "moves": above,
        "operators": {v: dict(launches.kernels) for v, launches in found.items()},
    }  # fmt: skip


def _handoff(train: bool) -> str:
    return "aot_eager" if train else "npugraph_ex"


def _per_layer(name: str, few: int, many: int, variant: str, train: bool) -> Launches:
    less, more = (_launches(name, layers, variant, train) for layers in (few, many))
    kernels = Counter({op: n - less.kernels[op] for op, n in more.kernels.items() if n != less.kernels[op]})
    return Launches(kernels, more.bytes - less.bytes)


def _launches(name: str, layers: int, variant: str, train: bool) -> Launches:
    import npu_host_ops  # the stand-in's: scripts/npu-host

    torch._dynamo.reset()
    model, ids = _model(name, layers, train)
    called: Any = model
    if variant == "hand-off":
        called = torch.compile(model, backend=_handoff(train))
    elif variant == "npu_fuse":
        called = torch.compile(model, backend="npu_fuse", options={"target": "npu", "handoff": _handoff(train)})
    for _ in range(2):
        npu_host_ops.reset_counts()
        common.step(called, ids, train)
    counts = npu_host_ops.counts()
    kernels = Counter({op: count.launches for op, count in counts.items()})
    return Launches(kernels, sum(count.read + count.written for count in counts.values()))


def measure_experts(name: str) -> dict[str, Any]:
    """Launches of one more block of experts in npugraph_ex's graph: two in a row less one, whose input is copied."""
    found = {kind: _blocks_in_a_row(name, 2, o) - _blocks_in_a_row(name, 1, o) for kind, o in BLOCK_VARIANTS.items()}
    return {
        "model": name, "training": False, "launches": {kind: kernels.total() for kind, kernels in found.items()},
        "operators": {kind: dict(kernels) for kind, kernels in found.items()},
    }  # fmt: skip


def _blocks_in_a_row(name: str, count: int, options: dict[str, Any] | None) -> Counter[str]:
    import npu_host_ops

    torch._dynamo.reset()
    torch.manual_seed(0)
    from npu_fuse.architectures import build

    model, _ = build(name, dtype=torch.bfloat16, layers=count + LAYERS.get(name, (2, 3))[0])
    blocks = [m for m in model.eval().modules() if any(child == "experts" for child, _ in m.named_children())]
    chain = blocks[-count:]
    width = model.config.get_text_config().hidden_size
    x = torch.randn(1, 24, width, dtype=torch.bfloat16).npu()  # type: ignore[attr-defined]
    for block in chain:
        block.npu()

    def run(x: torch.Tensor) -> torch.Tensor:
        for block in chain:
            y = block(x)
            x = y[0] if isinstance(y, tuple) else y
        return x

    called: Any = run
    if options is not None:
        options = {"target": "npu", "handoff": _handoff(False), **options}
        called = torch.compile(run, backend="npu_fuse", options=options)
    with torch.no_grad():
        for _ in range(2):
            npu_host_ops.reset_counts()
            called(x)
    return Counter({op: count.launches for op, count in npu_host_ops.counts().items() if count.launches})


def _model(name: str, layers: int, train: bool) -> tuple[Any, torch.Tensor]:
    from npu_fuse.architectures import build

    torch.manual_seed(0)
    model, inputs = build(name, dtype=torch.bfloat16, layers=layers)
    return model.train(train).npu(), inputs["input_ids"].npu()  # type: ignore[attr-defined]


def _saved(name: str, few: int, many: int, train: bool) -> int:
    """Launches that fusing every site of one layer saves, as the report counts them before, one left for each."""

    def saved(layers: int) -> int:
        model, ids = _model(name, layers, train)
        with torch.set_grad_enabled(train):
            report = npu_fuse.explain(model, input_ids=ids, use_cache=False, options={"target": "npu"})
        sites = [site for graph in report.graphs for site in graph.sites if site.status is npu_fuse.Status.FUSED]
        return sum(site.before.ops - 1 for site in sites)

    return saved(many) - saved(few)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Launches (and KB moved) for one more decoder layer, bf16, stand-in for the NPU")
    for column in ("model", "", *VARIANTS, "bound", "copies and concatenations left"):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    for row in rows:
        known = [v for v in VARIANTS if v in row["launches"]]
        cells = [f"{row['launches'][v]} ({row['bytes'][v] / 1024:,.0f})" if v in known else "fails" for v in VARIANTS]
        moves = ", ".join(f"{n} {op.split('::')[1]}" for op, n in row["moves"].items())
        bound = "" if row["bound"] is None else str(row["bound"])
        table.add_row(row["model"], "training" if row["training"] else "inference", *cells, bound, moves)
    return table


def _blocks(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Launches of one more block of experts, bf16, inference, stand-in for the NPU")
    for column in ("model", *BLOCK_VARIANTS):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(row["model"], *(str(row["launches"][v]) for v in BLOCK_VARIANTS))
    return table


def _operators(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="By operator")
    variants = list(dict.fromkeys(v for row in rows for v in row["operators"]))
    for column in ("", "operator", *variants):
        table.add_column(column)
    for row in rows:
        for op in sorted({op for kernels in row["operators"].values() for op in kernels}):
            counts = [str(row["operators"].get(v, {}).get(op, "")) for v in variants]
            mode = "training" if row["training"] else "inference"
            table.add_row(f"{row['model']} {mode}", op, *counts)
    return table


if __name__ == "__main__":
    main()
