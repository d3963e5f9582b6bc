"""The share of sites that one textbook Inductor pattern per op fuses, beside npu_fuse's, on the same zoo.

    python bench/peers.py                       the representative quarter of the zoo (minutes a dozen models)
    python bench/peers.py --kind decoders       all of it (hours)
    python bench/peers.py --mode fp32 llama gemma3_text

The patterns are written as tutorials write them, for the dtype that is run: RMSNorm as in Llama, RoPE by
rotate_half, silu(gate) * up. They go through torch's own `register_replacement` onto the graph that AOTAutograd
gives in inference. Sites are counted as calls, by tests/zoo/truth.json; a pattern that matches more than
truth counts as all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import _common as common
import click
import torch
from rich.table import Table
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from zoo import catalog, measure, truth
from zoo.isolate import isolated

OPS = ("rms_norm", "rotary_mul", "glu")
MODES = ("bf16", "fp32")


# --- the patterns, as a tutorial writes them -------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    found: torch.Tensor = torch.ops.npu_fuse.npu_rms_norm(x, weight, eps)[0]
    return found


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def fused_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.npu_fuse.npu_rotary_mul(x, cos, sin, "half")
    return found


def glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def fused_glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.npu_fuse.swiglu_apart(gate, up)
    return found


@functools.cache
def patterns(dtype: torch.dtype) -> dict[str, PatternMatcherPass]:
    """One pass for each op, traced in `dtype`."""
    import npu_fuse.passes  # noqa: F401  defines the ops of the replacements

    def example(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    made = {op: PatternMatcherPass(pass_name=op) for op in OPS}
    norm = [example(2, 8, 32), example(32)]
    turn = [example(2, 4, 8, 16), example(2, 1, 8, 16), example(2, 1, 8, 16)]
    gate = [example(2, 8, 32), example(2, 8, 32)]
    register_replacement(rms_norm, fused_rms_norm, norm, fwd_only, made["rms_norm"], scalar_workaround={"eps": 1e-6})
    register_replacement(rotary, fused_rotary, turn, fwd_only, made["rotary_mul"])
    register_replacement(glu, fused_glu, gate, fwd_only, made["glu"])
    return made


# --- counting --------------------------------------------------------------------------------------


def by_patterns(name: str, mode_name: str) -> dict[str, int]:
    """Calls fused by the patterns in one forward pass of the compiled model."""
    mode = measure.MODES[mode_name]
    built = catalog.build(name, mode.dtype)
    matched: list[dict[str, int]] = []
    calls: list[int] = []

    def compile_graph(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        matched.append({op: found.apply(gm) for op, found in patterns(mode.dtype).items()})
        gm.recompile()
        index = len(calls)
        calls.append(0)

        def call(*args: Any) -> Any:
            calls[index] += 1
            return gm(*args)

        return call

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_graph, decompositions=select_decomp_table())
    model = torch.compile(built.model, backend=backend)
    measure.run(model, built, mode)
    calls[:] = [0] * len(calls)
    measure.run(model, built, mode)
    return {op: sum(n * found[op] for n, found in zip(calls, matched, strict=True)) for op in OPS}


def compared(mode: str, name: str) -> dict[str, Any]:
    """What a child process measures for one architecture."""
    torch.set_num_threads(1)
    expected = {op: truth.load().get(name, {}).get("expected", {}).get(op, 0) for op in OPS}
    built = catalog.build(name, measure.MODES[mode].dtype)
    fused = measure.compile_and_run(built, measure.MODES[mode], fuse=True)
    if fused.error:
        raise RuntimeError(fused.error)
    ours = measure._sites(fused)["sites"].get("fused", {})
    return {"truth": expected, "patterns": by_patterns(name, mode), "npu_fuse": {op: ours.get(op, 0) for op in OPS}}


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--kind", default="quarter", show_default=True, type=click.Choice(catalog.KINDS))
@click.option("--mode", default="bf16", show_default=True, type=click.Choice(MODES))
@click.option("--processes", default=1, show_default=True)
@click.option("--timeout", default=400.0, show_default=True, help="Seconds for one architecture.")
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], kind: str, mode: str, processes: int, timeout: float, as_json: bool) -> None:
    known = truth.load()
    chosen = [n for n in names or catalog.names(kind) if n in known]
    rows: dict[str, Any] = {}
    for name, found in isolated(functools.partial(compared, mode), chosen, timeout, processes):
        rows[name] = found
        common.note(f"{len(rows)}/{len(chosen)} {name}: {found.get('error') or found['patterns']}")
    result = {"machine": common.machine(), "mode": mode, "models": rows, "total": totals(rows)}
    common.show(result, [_table(result["total"], mode)], as_json)


def totals(rows: dict[str, Any]) -> dict[str, Any]:
    """Per op: sites, those fused by either, and the architectures in which all are fused."""
    done = {name: row for name, row in rows.items() if "error" not in row}
    found: dict[str, Any] = {"architectures": len(done), "failed": sorted(set(rows) - set(done))}
    for op in OPS:
        with_sites = [row for row in done.values() if row["truth"][op]]
        found[op] = {"sites": sum(row["truth"][op] for row in with_sites), "architectures": len(with_sites)}
        for kind in ("patterns", "npu_fuse"):
            capped = [min(row[kind][op], row["truth"][op]) for row in with_sites]
            full = sum(n == row["truth"][op] for n, row in zip(capped, with_sites, strict=True))
            found[op][kind] = {"fused": sum(capped), "complete": full}
    return found


def _table(total: dict[str, Any], mode: str) -> Table:
    table = Table(title=f"Sites fused in {total['architectures']} architectures, {mode} inference")
    for column in ("op", "sites", "one pattern", "architectures whole", "npu_fuse", "architectures whole"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for op in OPS:
        facts = total[op]
        cells = []
        for kind in ("patterns", "npu_fuse"):
            share = facts[kind]["fused"] / facts["sites"] if facts["sites"] else 0.0
            cells += [f"{facts[kind]['fused']} ({share:.0%})", f"{facts[kind]['complete']}/{facts['architectures']}"]
        table.add_row(op, str(facts["sites"]), *cells)
    return table


if __name__ == "__main__":
    main()
