"""What fusing matmuls with their communication changes in a tensor-parallel decoder layer.

    python bench/mc2.py                                   counts and the model, Llama-70B and Qwen3-235B, TP 2, 4, 8
    python bench/mc2.py --model llama-70b --ranks 8 --form sequence
    python bench/mc2.py --measure                         and seconds over gloo, plain and fused side by side

**Counted**: kernels, collectives and bytes that one rank sends a layer, from the graphs that npu_fuse makes of the
layer at its real widths (fake tensors, a pretended process group of that many ranks); forward only.
**Modelled**: seconds. A matmul takes its operations over PEAK; a ring collective takes its bytes over LINK and a
latency a step; communication that nothing overlaps is exposed. A fused call is taken to cut its rows into TILES parts
and to communicate one while the next is computed, which is the kernels' principle as Ascend describes it: exposed
are one part's communication, and what communication takes longer than the matmul. PEAK and LINK are published
numbers (--peak, --link for others); they say how the forms compare, not what an NPU measures.
**Measured** (`--measure`): seconds of a smaller layer over gloo on this machine's CPU. The reference op is there the
same matmul and the same collective: it shows what npu_fuse costs, and nothing about an NPU.
"""

from __future__ import annotations

import datetime
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import _common as common
import click
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from rich.table import Table
from torch import nn
from torch.nn.functional import linear

from npu_fuse.mc2_split import BYTES, LATENCY, LINK, PEAK, TILES, exposed

FORMS = ("all-reduce", "sequence")


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder layer, from the models' published configurations."""

    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    """Of the MLP; of experts, whose reduction is no matmul's, 0."""


SHAPES = {
    "llama-70b": Shape(8192, 64, 8, 128, 28672),
    "qwen3-235b": Shape(4096, 64, 4, 128, 0),
    "tiny": Shape(32, 4, 2, 16, 64),
}
"""Qwen3-235B's MLP is made of experts, which end in a sum over the chosen ones: its attention is what is counted."""


class Layer(nn.Module):
    """One rank's part of a layer: attention without its softmax (which communicates nothing), and a gated MLP."""

    def __init__(self, shape: Shape, ranks: int, form: str, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        h, d = shape.hidden, shape.head
        q, kv, i = shape.heads * d // ranks, max(shape.kv_heads // ranks, 1) * d, shape.intermediate // ranks
        make = {"device": device, "dtype": dtype}
        self.q, self.k, self.v = (nn.Parameter(torch.randn(n, h, **make) / h**0.5) for n in (q, kv, kv))
        self.o = nn.Parameter(torch.randn(h, q, **make) / q**0.5)
        self.mlp = i > 0
        if self.mlp:
            self.gate, self.up = (nn.Parameter(torch.randn(i, h, **make) / h**0.5) for _ in range(2))
            self.down = nn.Parameter(torch.randn(h, i, **make) / i**0.5)
        self.sequence = form == "sequence"

    def gather(self, x: torch.Tensor) -> Any:
        return funcol.all_gather_tensor(x, 0, dist.group.WORLD) if self.sequence else x

    def reduce(self, y: torch.Tensor) -> Any:
        if self.sequence:
            return funcol.reduce_scatter_tensor(y, "sum", 0, dist.group.WORLD)
        return funcol.all_reduce(y, "sum", dist.group.WORLD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.gather(x)
        q, k, v = linear(rows, self.q), linear(rows, self.k), linear(rows, self.v)
        mixed = q * (k.sum(-1, keepdim=True) + v.sum(-1, keepdim=True))
        x = x + self.reduce(linear(mixed, self.o))
        if not self.mlp:
            return x
        rows = self.gather(x)
        hidden = torch.sigmoid(linear(rows, self.gate)) * linear(rows, self.up)
        result: torch.Tensor = x + self.reduce(linear(hidden, self.down))
        return result


@dataclass(frozen=True)
class Call:
    """A kernel that multiplies or communicates: operations, bytes that one rank sends, steps of the collective."""

    kind: str
    operations: float = 0.0
    sent: float = 0.0
    steps: int = 0


def calls_of(layer: nn.Module, x: torch.Tensor, ranks: int, fuse: bool) -> list[Call]:
    """The matmuls and collectives of the layer's compiled graph, in order."""
    found: list[Call] = []

    def read(gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        def count(made: torch.fx.GraphModule, _: Any) -> Any:
            found.extend(call for node in made.graph.nodes if (call := call_of(node, ranks)) is not None)
            return made

        return aot_autograd(fw_compiler=count)(gm, inputs)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    options = {"target": "reference", "handoff": read}
    chosen: dict[str, Any] = {"backend": "npu_fuse", "options": options} if fuse else {"backend": read}
    with torch.no_grad():
        torch.compile(layer, **chosen)(x)
    return found


def call_of(node: torch.fx.Node, ranks: int) -> Call | None:
    """One node of AOTAutograd's graph; None where it neither multiplies nor communicates."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else ""
    values = [n.meta.get("val") for n in node.args if isinstance(n, torch.fx.Node)]
    shapes = [tuple(v.shape) for v in values if isinstance(v, torch.Tensor)]
    share = (ranks - 1) / ranks
    if name == "mm":
        (m, k), (_, n) = shapes[:2]
        return Call("matmul", 2.0 * m * k * n)
    if name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        size = torch.Size(shapes[0]).numel() * BYTES
        times = {"all_reduce": 2 * share, "reduce_scatter_tensor": share}.get(name, float(ranks - 1))
        return Call(name, sent=size * times, steps=(2 if name == "all_reduce" else 1) * (ranks - 1))
    if name in ("mm_all_reduce", "mm_reduce_scatter", "all_gather_mm"):
        k, n = shapes[1]
        m = torch.Size(shapes[0]).numel() // k * (ranks if name == "all_gather_mm" else 1)
        width = k if name == "all_gather_mm" else n
        sent = m * width * BYTES * share * (2 if name == "mm_all_reduce" else 1)
        return Call(name, 2.0 * m * k * n, sent, (2 if name == "mm_all_reduce" else 1) * (ranks - 1))
    return None


def modelled(calls: Sequence[Call], peak: float, link: float) -> dict[str, float]:
    """Seconds in matmuls and of communication that nothing hides, as the heading says."""
    busy = bare = 0.0
    for call in calls:
        work, talk = call.operations / peak, call.sent / link + call.steps * LATENCY
        busy += work
        bare += exposed(work, talk)
    return {"matmul": busy, "exposed": bare}


def counted(calls: Sequence[Call], peak: float = PEAK, link: float = LINK) -> dict[str, Any]:
    kinds = Counter(call.kind for call in calls)
    return {
        "kernels": len(calls), "collectives": sum(call.sent > 0 for call in calls),
        "fused": sum(call.sent > 0 and call.operations > 0 for call in calls),
        "sent": sum(call.sent for call in calls), "kinds": dict(kinds), **modelled(calls, peak, link),
    }  # fmt: skip


def in_theory(shape: Shape, rows: int, ranks: int, form: str, peak: float, link: float) -> dict[str, Any]:
    """One layer on a pretended group of that many ranks, plain and fused."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with FakeTensorMode():
            layer = Layer(shape, ranks, form, "cpu", torch.bfloat16)
            x = torch.empty(rows // ranks if form == "sequence" else rows, shape.hidden, dtype=torch.bfloat16)
            each = {kind: calls_of(layer, x, ranks, kind == "fused") for kind in ("plain", "fused")}
    finally:
        dist.destroy_process_group()
    return {kind: counted(calls, peak, link) for kind, calls in each.items()}


def measured(shape: Shape, rows: int, ranks: int, form: str, rounds: int) -> dict[str, float]:
    """Median seconds of a call over gloo, in turns: the slower rank's."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, f"{folder}/store", shape, rows, form, rounds, results)
        processes = [context.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        told = [results.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    return {kind: max(times[kind] for times in told) for kind in ("plain", "fused")}


def _rank(rank: int, ranks: int, store: str, shape: Shape, rows: int, form: str, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    minutes = datetime.timedelta(minutes=10)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=minutes
    )  # fmt: skip
    torch.manual_seed(rank)
    layer = Layer(shape, ranks, form, "cpu", torch.float32)
    x = torch.randn(rows // ranks if form == "sequence" else rows, shape.hidden)
    options = {"target": "reference", "handoff": "aot_eager"}
    steps = {
        "plain": torch.compile(layer, backend="aot_eager"),
        "fused": torch.compile(Layer.forward, backend="npu_fuse", options=options),
    }
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for kind, call in steps.items():
                started = time.perf_counter()
                call(x) if kind == "plain" else call(layer, x)
                if turn:  # the first compiles
                    times[kind].append(time.perf_counter() - started)
    results.put({kind: statistics.median(spent) for kind, spent in times.items()})
    dist.destroy_process_group()


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(tuple(SHAPES)))
@click.option("--ranks", "sizes", multiple=True, type=int, help="Ranks that share a layer (default: 2, 4 and 8).")
@click.option("--form", "forms", multiple=True, type=click.Choice(FORMS))
@click.option("--rows", default=8192, show_default=True, help="Tokens of a prefill.")
@click.option("--peak", default=PEAK, show_default=True, help="Operations a second.")
@click.option("--link", default=LINK, show_default=True, help="Bytes a second that one rank sends.")
@click.option("--measure", is_flag=True, help="Seconds over gloo as well, of the tiny shape times --scale.")
@click.option("--scale", default=16, show_default=True, help="How many times the tiny shape's widths are measured.")
@click.option("--rounds", default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    models: tuple[str, ...], sizes: tuple[int, ...], forms: tuple[str, ...], rows: int, peak: float, link: float,
    measure: bool, scale: int, rounds: int, as_json: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    found = []
    for name in models or [n for n in SHAPES if n != "tiny"]:
        for ranks in sizes or (2, 4, 8):
            for form in forms or FORMS:
                facts = in_theory(SHAPES[name], rows, ranks, form, peak, link)
                row = {"model": name, "ranks": ranks, "form": form, **facts}
                common.note(f"{name}, {ranks} ranks, {form}")
                found.append(row)
    timed = []
    if measure:
        small = Shape(*(value * scale for value in asdict(SHAPES["tiny"]).values()))
        small = Shape(small.hidden, SHAPES["tiny"].heads, SHAPES["tiny"].kv_heads, small.head, small.intermediate)
        timed = [{"form": form, "ranks": 2, **measured(small, 256, 2, form, rounds)} for form in forms or FORMS]
    assumed = {"peak": peak, "link": link, "latency": LATENCY, "tiles": TILES}
    result = {"machine": common.machine(), "rows": found, "tokens": rows, "assumed": assumed, "measured": timed}
    common.show(result, [_table(found), *([_timed(timed)] if timed else [])], as_json)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="one layer's forward, plain -> fused (seconds are modelled)")
    for title in ("model", "ranks", "form", "kernels", "collectives", "MB sent", "matmul ms", "exposed ms"):
        table.add_column(title, justify="left" if title in ("model", "form") else "right")
    for row in rows:
        a, b = row["plain"], row["fused"]
        table.add_row(
            row["model"], str(row["ranks"]), row["form"], f"{a['kernels']} -> {b['kernels']}",
            f"{a['collectives']} -> {b['collectives']} ({b['fused']} fused)",
            f"{a['sent'] / 1e6:.0f} -> {b['sent'] / 1e6:.0f}", f"{a['matmul'] * 1e3:.2f}",
            f"{a['exposed'] * 1e3:.2f} -> {b['exposed'] * 1e3:.2f}",
        )  # fmt: skip
    return table


def _timed(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="measured over gloo on this machine's CPU, ms")
    for title in ("form", "ranks", "plain", "fused"):
        table.add_column(title)
    for row in rows:
        table.add_row(row["form"], str(row["ranks"]), *(f"{row[kind] * 1e3:.2f}" for kind in ("plain", "fused")))
    return table


if __name__ == "__main__":
    main()
