"""Reports as people read them: a table, and one log line for each graph.

Sites that differ only in the number of their layer are one row with a count: 28 decoder layers give one
row `model.layers.*.input_layernorm`. Bytes are printed in decimal units (1 kB = 1000 bytes).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from npu_fuse.report import Cost, GraphReport, ProofFacts, SiteReport, Status

if TYPE_CHECKING:
    from npu_fuse.explain import ExplainReport
    from npu_fuse.stops import Break, Failure

WIDTH = 120
MIN_WIDTH = 80
_LONG_MODULE = 28
_REASONS_IN_ONE_LINE = 4
_SHORT_DTYPE = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "complex64": "c64",
    "complex128": "c128",
}
_STYLE = {
    Status.FUSED: "green",
    Status.SKIPPED: "dim",
    Status.ERROR: "bold red",
    Status.REFUSED_BY_PROOF: "red",
}


# ---------------------------------------------------------------------------------------------- one log line


def one_line(graph: GraphReport) -> str:
    """What was fused in one graph and what was not, for the log: never empty."""
    fused = Counter(s.op for s in graph.sites if s.status is Status.FUSED)
    missed = Counter((s.op, f"{s.reason} at {place(s)}") for s in graph.sites if s.status is not Status.FUSED)
    parts = []
    if fused:
        parts.append("fused " + ", ".join(f"{op} {n}" for op, n in fused.items()))
    if missed:
        shown = [f"{op} {n} ({why})" for (op, why), n in missed.most_common(_REASONS_IN_ONE_LINE)]
        left = sum(missed.values()) - sum(n for _, n in missed.most_common(_REASONS_IN_ONE_LINE))
        parts.append("not fused: " + ", ".join(shown) + (f", and {left} more" if left else ""))
    if not graph.sites:
        parts.append(f"no site to fuse among {graph.nodes} nodes")
    parts += [f"fault in npu_fuse, graph left as it was: {first_line(error)}" for error in graph.errors]
    return f"graph {graph.graph_id} ({_mode(graph)}): " + "; ".join(parts)


# ---------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """Sites that a reader takes for one: `site` is the first of them, `module` the pattern of all."""

    site: SiteReport
    count: int
    module: str | None


def rows(sites: Iterable[SiteReport]) -> list[Row]:
    """Sites grouped over layers and graphs, fused ones first, each half in the order of the graphs."""
    groups: dict[Any, list[SiteReport]] = {}
    for site in sites:
        groups.setdefault(_identity(site), []).append(site)
    made = [Row(g[0], len(g), _pattern([s.module for s in g])) for g in groups.values()]
    return sorted(made, key=lambda row: row.site.status is not Status.FUSED)


def text(report: ExplainReport | Sequence[GraphReport], width: int | None = None) -> str:
    """The report as plain text, `width` characters wide (default 120)."""
    console = Console(width=max(width or WIDTH, MIN_WIDTH), color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def renderable(report: ExplainReport | Sequence[GraphReport]) -> RenderableType:
    """The report for a rich console: the table of sites, totals, graph breaks, failures."""
    if isinstance(report, Sequence):
        return Group(*_graphs("", list(report)))
    parts = _graphs(report.subject, list(report.graphs))
    if not report.graphs:
        parts.append(Text("Nothing was compiled: Dynamo captured no graph.", style="bold red"))
    for title, items in (("Graph breaks", report.breaks), ("Failures of Dynamo", report.failures)):
        if items:
            parts += [Text(), Text(f"{title} ({len(items)})", style="bold")]
            parts += [_stop(item) for item in items]
    return Group(*parts)


def totals(graphs: Sequence[GraphReport]) -> str:
    """One line: how many sites are fused, and what those cost before and after ("kept" is for backward)."""
    sites = [site for graph in graphs for site in graph.sites]
    if not sites:
        nodes = sum(graph.nodes for graph in graphs)
        return f"Fused 0 of 0 sites: no candidate in {_plural(len(graphs), 'graph')} of {nodes} nodes."
    status = Counter(site.status for site in sites)
    rest = ", ".join(f"{n} {_words(s)}" for s, n in status.items() if s is not Status.FUSED)
    line = f"Fused {status[Status.FUSED]} of {_plural(len(sites), 'site')}" + (f" ({rest})" if rest else "")
    fused = [site for site in sites if site.status is Status.FUSED]
    if fused:
        line += ": " + ", ".join(_saved(sum_costs(s.before for s in fused), sum_costs(s.after for s in fused)))
    return line + "."


def _graphs(subject: str, graphs: list[GraphReport]) -> list[RenderableType]:
    """A title, a table if there are sites, the totals, and npu_fuse's own faults."""
    if not graphs:
        return [Text(subject, style="bold")] if subject else [Text("npu_fuse has compiled no graph.")]
    modes = ", ".join(dict.fromkeys(_mode(g) + (", dynamic shapes" if g.dynamic else "") for g in graphs))
    targets = ", ".join(dict.fromkeys(g.target for g in graphs))
    nodes = sum(g.nodes for g in graphs)
    size = f"{_plural(len(graphs), 'graph')}, {nodes} nodes"
    title = ", ".join(filter(None, (subject, modes, f"target {targets}", size)))
    parts: list[RenderableType] = [Text(title, style="bold")]
    grouped = rows(site for graph in graphs for site in graph.sites)
    if grouped:
        parts.append(_table(grouped))
    parts.append(Text(totals(graphs), style="bold"))
    for graph in graphs:
        for error in graph.errors:
            fault = f"Fault in npu_fuse, graph {graph.graph_id} left as it was: {error}"
            parts.append(Text(fault, style="red"))
    return parts


def _table(grouped: list[Row]) -> Table:
    table = Table(box=box.HORIZONTALS, header_style="bold", pad_edge=False, show_lines=True)
    table.add_column("op", min_width=11)
    table.add_column("sites", justify="right")
    table.add_column("where", overflow="fold", ratio=9)
    table.add_column("tensor", overflow="fold", ratio=6)
    table.add_column("each saves / why not", overflow="fold", ratio=7)
    table.add_column("error in ulp", overflow="fold")
    for row in grouped:
        site = row.site
        table.add_row(
            Text.assemble((site.op, "bold"), "\n", (_words(site.status), _STYLE.get(site.status, "yellow"))),
            str(row.count),
            Text("\n".join(_where(row))),
            Text("\n".join(_tensor(site))),
            Text("\n".join(_outcome(site))),
            Text("\n".join(_errors(site.proof))),
        )
    return table


def _where(row: Row) -> list[str]:
    """The module's path, its last name on a line of its own where it is long, and the line of code."""
    module = row.module or ""
    if len(module) > _LONG_MODULE and "." in module:
        head, _, tail = module.rpartition(".")
        lines = [head + ".", tail]
    else:
        lines = [module]
    return [line for line in (*lines, place(row.site) if row.site.file else "") if line]


def _tensor(site: SiteReport) -> list[str]:
    """Dtype and shape, the rounding path where it leaves that dtype, and the parameters."""
    lines = [f"{short_dtype(site.dtype)}[{', '.join(site.shape)}]" if site.dtype else ""]
    path = list(dict.fromkeys(short_dtype(d) for d in site.rounding))
    if path and path != [short_dtype(site.dtype)]:
        lines.append("via " + " > ".join(short_dtype(d) for d in site.rounding))
    if site.params:
        lines.append(" ".join(f"{k}={short_dtype(v)}" for k, v in site.params.items()))
    return [line for line in lines if line]


def _outcome(site: SiteReport) -> list[str]:
    if site.status is Status.FUSED:
        return [*_saved(site.before, site.after), *filter(None, (site.reason,)), *site.notes]
    return [site.reason + (f" [{site.code}]" if site.code else ""), *site.notes]


def _saved(before: Cost, after: Cost) -> list[str]:
    """Lines such as "ops 6 -> 1"; what costs nothing in either form is left out."""
    about = "~" if before.symbolic or after.symbolic else ""
    lines = [f"ops {before.ops} -> {after.ops}"] if before.ops or after.ops else []
    for what, old, new in (
        ("moved", before.bytes_moved, after.bytes_moved),
        ("kept", before.bytes_saved, after.bytes_saved),
    ):
        if old or new:
            lines.append(f"{what} {about}{human_bytes(old, new)}")
    return lines


def _errors(proof: ProofFacts | None) -> list[str]:
    """The errors of both forms against float64, original first."""
    if proof is None:
        return ["not proved"]
    if proof.original_ulp is None or proof.fused_ulp is None:
        lines = [f"f64 {proof.same_function:.1e}"]
    else:
        lines = [f"{proof.original_ulp:.2f} -> {proof.fused_ulp:.2f}"]
    return lines + (["bit-equal"] if proof.bit_equal else [])


def _stop(item: Break | Failure) -> RenderableType:
    """A graph break or a failure: where, why, and the first hint (JSON has all)."""
    from npu_fuse.stops import Failure

    where = Text(item.file or "place unknown", style="cyan")
    where.append(f":{item.line}" if item.line else "")
    where.append(f" in {item.function}" if item.function else "", style="default")
    lines = [Text(item.source, style="dim")] if item.source else []
    if isinstance(item, Failure):
        lines.append(Text(f"{item.error}: {item.reason}", style="red"))
        lines.append(Text("torch.compile raises this." if item.fatal else "The function runs in eager."))
    else:
        where.append(f" (x{item.count})" if item.count > 1 else "", style="dim")
        lines.append(Text(item.reason))
        if item.eager_function:
            lines.append(Text(f"Dynamo gave up on {item.eager_function}: all of it runs in eager."))
        hints = [hint for hint in item.hints if "report an issue" not in hint]
        lines += [Text(f"Hint: {hint}", style="dim") for hint in hints[:1]]
    return Group(Padding(where, (0, 0, 0, 2)), *(Padding(line, (0, 0, 0, 6)) for line in lines))


# --------------------------------------------------------------------------------------------------- helpers


def human_bytes(*counts: int) -> str:
    """1536 as "1.54 kB"; several as "1.54 -> 0.2 kB", in the unit of the largest."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min((len(str(max(map(abs, counts), default=0))) - 1) // 3, len(units) - 1)
    return " -> ".join(f"{count / 1000**power:.3g}" for count in counts) + f" {units[power]}"


def short_dtype(dtype: str) -> str:
    """bf16 for "bfloat16" and "torch.bfloat16"."""
    name = dtype.removeprefix("torch.")
    return _SHORT_DTYPE.get(name, name)


def place(site: SiteReport) -> str:
    """The site's line as modeling_llama.py:63."""
    if not site.file:
        return site.module or "an unknown line"
    return f"{os.path.basename(site.file)}:{site.line}" if site.line else os.path.basename(site.file)


def first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "no message"


def _identity(site: SiteReport) -> Any:
    """Equal for sites that a reader takes for one: all but the layer's number and where a proof came from."""
    proof = site.proof
    errors = (proof.original_ulp, proof.fused_ulp, proof.bit_equal) if proof else None
    pattern = None if site.module is None else _starred(site.module)
    return (
        (site.op, site.status, site.code, site.reason, site.file, site.line, pattern, site.dtype, site.shape),
        (tuple(site.params.items()), site.rounding, errors, site.before, site.after, site.notes),
    )


def _starred(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _pattern(modules: Sequence[str | None]) -> str | None:
    """The path that all modules share, with "*" where they differ."""
    paths = [m.split(".") for m in dict.fromkeys(modules) if m]
    if not paths:
        return None
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*paths, strict=True))


def sum_costs(costs: Iterable[Cost]) -> Cost:
    every = list(costs)
    return Cost(
        ops=sum(c.ops for c in every),
        bytes_moved=sum(c.bytes_moved for c in every),
        bytes_saved=sum(c.bytes_saved for c in every),
        symbolic=any(c.symbolic for c in every),
    )


def _mode(graph: GraphReport) -> str:
    return "training" if graph.training else "inference"


def _words(status: Status) -> str:
    return status.value.replace("_", " ")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
