"""Bytes that a compiled layer keeps for backward, with npu_fuse and without, under the same hand-off.

    python bench/memory.py                                    everything (half an hour: Inductor compiles)
    python bench/memory.py --handoff aot_eager --model llama  one cell of the table

The compiled model runs once under `saved_tensors_hooks`: each distinct storage that autograd is handed
counts once; parameters, buffers and inputs do not count. Bytes a layer are the difference between a model
of three layers and one of two, so that what all layers share does not count.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import _common as common
import click
import torch
from rich.table import Table

MODES = ("bf16", "autocast")


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(common.ARCHITECTURES))
@click.option("--handoff", "handoffs", multiple=True, type=click.Choice(("aot_eager", "inductor")))
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES))
@click.option("--checkpoint", "checkpoints", multiple=True, type=click.Choice(("no", "yes")))
@click.option("--width", default=128, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="In each of two sequences.")
@click.option("--json", "as_json", is_flag=True)
def main(
    models: tuple[str, ...], handoffs: tuple[str, ...], modes: tuple[str, ...], checkpoints: tuple[str, ...],
    width: int, tokens: int, as_json: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    rows = []
    for name, handoff, mode, checkpoint in itertools.product(
        models or common.ARCHITECTURES,
        handoffs or ("aot_eager", "inductor"),
        modes or MODES,
        checkpoints or ("no", "yes"),
    ):
        setting = {"model": name, "handoff": handoff, "mode": mode, "checkpoint": checkpoint == "yes"}
        plain = per_layer(name, handoff, mode, checkpoint == "yes", width, tokens, fuse=False)
        fused = per_layer(name, handoff, mode, checkpoint == "yes", width, tokens, fuse=True)
        rows.append({**setting, "plain": plain, "fused": fused, "met": fused <= plain})
        common.note(f"{' '.join(str(v) for v in setting.values())}: {plain:,} -> {fused:,} bytes a layer")
    result = {"machine": common.machine(), "width": width, "tokens": 2 * tokens, "rows": rows}
    common.show(result, [_table(rows)], as_json)


def per_layer(name: str, handoff: str, mode: str, checkpoint: bool, width: int, tokens: int, fuse: bool) -> int:
    """Bytes kept for backward by one more layer."""
    two, three = (
        kept_bytes(compiled_step(name, layers, handoff, mode, checkpoint, width, fuse), common.words(2, tokens))
        for layers in (2, 3)
    )
    return three - two


class Step:
    """A compiled training model under a mode; calling it gives the logits."""

    def __init__(self, model: torch.nn.Module, compiled: Any, autocast: bool) -> None:
        self.model, self.compiled, self.autocast = model, compiled, autocast

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        context = torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            logits: torch.Tensor = self.compiled(input_ids=ids, use_cache=False).logits
        return logits


def compiled_step(name: str, layers: int, handoff: str, mode: str, checkpoint: bool, width: int, fuse: bool) -> Step:
    """The model compiled by `handoff`, with npu_fuse in front where `fuse` says so."""
    torch._dynamo.reset()
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    model: Any = common.decoder(name, width, layers, train=True, dtype=dtype)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"target": "reference", "handoff": handoff}
    if fuse:
        compiled = torch.compile(model, backend="npu_fuse", options=options)
    else:
        compiled = torch.compile(model, backend=handoff)
    return Step(model, compiled, mode == "autocast")


def kept_bytes(step: Step, ids: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps after one forward pass of `step`."""
    step(ids).float().sum().backward()  # compiles both directions
    own = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.model.buffers(), ids)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # alive until the graph is freed: no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = step(ids)
    total = sum(kept.values())
    logits.float().sum().backward()
    return total


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Bytes kept for backward, per layer")
    for column in ("model", "hand-off", "mode", "checkpoint", "plain", "npu_fuse", "ratio", ""):
        table.add_column(column, justify="right" if column in ("plain", "npu_fuse", "ratio") else "left")
    for row in rows:
        ratio = f"{row['fused'] / row['plain']:.3f}" if row["plain"] else "-"
        sizes = (f"{row['plain']:,}", f"{row['fused']:,}", ratio)
        where = (row["model"], row["handoff"], row["mode"], "yes" if row["checkpoint"] else "no")
        table.add_row(*where, *sizes, common.mark(row["met"]))
    return table


if __name__ == "__main__":
    main()
