"""How many fusable computations one eager forward pass holds: the judge that coverage is measured against.

`count(model, inputs)` runs a float32 model once under `flow.Flow` and returns its sites. The engine takes no
part in this. `truth.json` keeps the reference counts: for the architectures that a second, older counter has
measured (by hooks, patched functions and tags; "source": "given"), its numbers, else ours ("source": "flow").

From tests/, to count again and print what disagrees with truth.json:

    python -m zoo.truth [NAMES...]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from . import catalog
from .facts import Site
from .flow import Flow
from .isolate import isolated

TRUTH = Path(__file__).with_name("truth.json")

# What must be fused: operation -> kinds of site. Everything else that is counted is for information.
EXPECTED: dict[str, tuple[str, ...]] = {
    "rms_norm": ("rmsnorm", "rmsnorm_noweight", "rmsnorm_inline", "rmsnorm_gated"),
    "rotary_mul": ("rope", "rope_inline"),
    "glu": ("swiglu", "swiglu_in_experts", "swiglu_modified", "geglu", "geglu_in_experts"),
}


def count(model: nn.Module, inputs: Mapping[str, Any]) -> list[Site]:
    """The sites of one forward pass of a float32 model, calls and not modules."""
    flow = Flow(model)
    with torch.no_grad(), flow:
        model(**inputs)
    return [_named(site) for site in flow.sites]


def count_captured(model: nn.Module, inputs: Mapping[str, Any]) -> list[Site]:
    """Those sites that Dynamo gives to a backend at all: what a graph break leaves to Python is in no graph."""
    flow = Flow(model)

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with flow:
                return gm(*args)

        return call

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(**inputs)
        flow.forget()
        compiled(**inputs)
    return [_named(site) for site in flow.sites]


def _named(site: Site) -> Site:
    if site.kind == "rmsnorm" and not site.weighted:
        site.kind = "rmsnorm_noweight"
    return site


def expected(kinds: Mapping[str, int]) -> dict[str, int]:
    """Counts per kind -> sites to fuse per operation (rms_norm, rotary_mul, glu)."""
    return {op: sum(kinds.get(kind, 0) for kind in group) for op, group in EXPECTED.items()}


def load() -> dict[str, dict[str, Any]]:
    """truth.json: architecture -> {"source", "kinds", "expected", "where"}."""
    found: dict[str, dict[str, Any]] = json.loads(TRUTH.read_text()) if TRUTH.exists() else {}
    return found


def measure(name: str) -> dict[str, Any]:
    """Build architecture `name` and count: {"kinds": counts, "sites": what and where}."""
    torch.set_num_threads(1)
    built = catalog.build(name)
    sites = count(built.model, built.inputs)
    return {
        "kinds": dict(sorted(Counter(s.kind for s in sites).items())),
        "sites": [asdict(s) for s in sites],
    }


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--kind", type=click.Choice(catalog.KINDS), default="decoders", show_default=True)
@click.option("--write", is_flag=True, help="Store the counts of architectures without given ones.")
@click.option("--new", is_flag=True, help="Only architectures that truth.json does not have.")
@click.option("--processes", default=2, show_default=True)
@click.option("--details", type=click.Path(path_type=Path), help="Write every site found into this folder.")
def main(names: tuple[str, ...], kind: str, write: bool, new: bool, processes: int, details: Path | None) -> None:
    known = load()
    todo = [name for name in names or catalog.names(kind) if not (new and name in known)]
    for name, result in isolated(measure, todo, processes=processes):
        if "error" in result:
            click.echo(f"{name}: {result['error'].splitlines()[0]} at {result.get('where')}")
            continue
        given = known.get(name)
        if given and given["expected"] != expected(result["kinds"]):
            click.echo(f"{name}: counted {result['kinds']}, truth.json has {given['kinds']}")
        if write and not (given and given["source"] == "given"):
            store(name, result["kinds"])
        if details:
            details.mkdir(parents=True, exist_ok=True)
            (details / f"{name.replace(':', '_')}.json").write_text(json.dumps(result, indent=1))


def store(name: str, kinds: dict[str, int]) -> None:
    """Add our own count of `name` to truth.json."""
    stored = load() | {name: {"source": "flow", "kinds": kinds, "expected": expected(kinds)}}
    TRUTH.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
