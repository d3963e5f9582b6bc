"""Propose a grouped form of a block of experts: read its routing and its experts off two runs, write them down.

The block's own code makes the indices and weights and what it does with the sum; only the experts' part is
written anew. The proposal is a guess: `block_proof` says whether it computes what the block computes.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from npu_fuse import experts as grouped
from npu_fuse.block_inputs import Example
from npu_fuse.expert_params import Params
from npu_fuse.expert_segment import Segment, segment_of
from npu_fuse.expert_source import attribute, experts_text
from npu_fuse.routing_read import Routing, routing_of
from npu_fuse.source import CannotWrite, Writer, function_text
from npu_fuse.tape import Step, Tape, cut, record, tensors_in


@dataclass(frozen=True)
class Form:
    """`function(self, *tensors)` computes what the block's forward does; `text` is its source."""

    function: Callable[..., Any]
    text: str
    experts: int
    k: int
    notes: tuple[str, ...] = ()


@dataclass
class Run:
    """One recorded run of the block."""

    example: Example
    tape: Tape
    result: Any
    segment: Segment


def propose(block: nn.Module, examples: tuple[Example, Example], experts: int, rest: bool) -> Form | str:
    """A form, or what stands in its way. rest: indices may name no expert (sentinels)."""
    params = Params(block)
    runs = []
    for example in examples:
        before = [dict(vars(m)) for m in block.modules()]
        tape, result = record(block.forward, example.args, dict(example.kwargs), _full_precision(block))
        left = _left_behind(block, before, tape, params)
        if left:
            return left
        if not any(s.reads for s in tape.steps):
            return "nothing in it depends on values: it is one graph as it is"
        segment = segment_of(tape, params, experts)
        if isinstance(segment, str):
            return segment
        runs.append(Run(example, tape, result, segment))
    first, second = runs
    if first.segment.experts != second.segment.experts:
        return "two runs have experts of different kinds"
    try:
        return _written(block, params, first, second, rest)
    except CannotWrite as problem:
        return str(problem)


def _left_behind(block: nn.Module, before: list[dict[str, Any]], tape: Tape, params: Params) -> str:
    """What a run leaves in the block, which the grouped form would not."""
    for module, kept in zip(block.modules(), before, strict=False):
        changed = [n for n, v in vars(module).items() if n not in kept or kept[n] is not v]
        if changed:
            return f"its forward leaves a value in the attribute '{changed[0]}'"
    own = {id(t) for t in (*block.parameters(), *block.buffers())}
    for step in tape.steps:
        if step.writes and step.args and any(id(t) in own for t in tensors_in(step.args[0])):
            return f"its forward writes into {params.paths[id(step.args[0])]}"
    return ""


def _full_precision(block: nn.Module) -> bool:
    return all(p.dtype is torch.float32 for p in block.parameters())


def _written(block: nn.Module, params: Params, first: Run, second: Run, rest: bool) -> Form:
    inner = Writer({}, "rows.device")
    expert_lines = experts_text(first.segment, second.segment, params, inner, rest)
    function = compiled(expert_lines, inner.values, "experts")
    number = first.segment.experts

    def run_experts(rows: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = function(block, rows, ids, ends)
        return result

    with torch.no_grad():
        route = routing_of(first.tape, first.segment, first.example, run_experts, number)
        other = route.in_run(second.tape, second.example, run_experts, number)
    outer = Writer(_sizes(first.example, second.example), f"{first.example.names[0]}.device")
    outer.values |= {**inner.values, "routed": grouped.routed}
    lines = _block_lines(params, first, second, route, other, outer, number, rest)
    arguments = ("self", *first.example.names)
    text = f"{expert_lines}\n\n{function_text('block', arguments, lines)}"
    outer.values["experts"] = None  # defined by the text itself
    return Form(compiled(text, outer.values, "block"), text, number, route.k, _notes(expert_lines))


def _notes(text: str) -> tuple[str, ...]:
    return ("the experts' biases are put together in every call",) if "torch.stack(" in text else ()


def _sizes(first: Example, second: Example) -> Mapping[str, tuple[int, int]]:
    """Leading sizes of the hidden states, and how many rows they have."""
    name, one, other = first.names[0], first.tensors[0], second.tensors[0]
    sizes = {f"{name}.shape[{i}]": (one.shape[i], other.shape[i]) for i in range(one.dim() - 1)}
    rows = " * ".join(f"{name}.shape[{i}]" for i in range(one.dim() - 1))
    whole = (one.numel() // one.shape[-1], other.numel() // other.shape[-1])
    return {**sizes, f"({rows})": whole} if one.dim() > 2 else sizes


def _block_lines(params: Params, first: Run, second: Run, route: Routing, other: Routing, writer: Writer,
                 number: int, rest: bool) -> list[str]:  # fmt: skip
    inputs = [{id(t) for t in run.example.tensors} for run in (first, second)]
    for one, two, name in zip(first.example.tensors, second.example.tensors, first.example.names, strict=True):
        writer.name(one, two, name)
    parts = [_cut(run, params, r, given) for run, r, given in zip((first, second), (route, other), inputs, strict=True)]
    if len(parts[0]) != len(parts[1]):
        raise CannotWrite("the block takes another way for other sizes")
    for step, twin in zip(*parts, strict=True):
        for a, b in zip(step.inputs(), twin.inputs(), strict=True):
            _name_one(a, b, step, twin, params, route, other, writer, number, rest)
        if step.writes and any(id(t) in inputs[0] or id(t) in params.paths for t in tensors_in(step.args[0])):
            raise CannotWrite("the block writes into its inputs or parameters")
        writer.step(step, twin)
    end = len(first.tape.steps), len(second.tape.steps)
    text = _output(first.result, second.result, end, params, route, other, writer, number, rest)
    writer.line(f"return {text}")
    return writer.lines


def _cut(run: Run, params: Params, route: Routing, inputs: set[int]) -> list[Step]:
    end = len(run.tape.steps)

    def stop(tensor: torch.Tensor, before: int) -> bool:
        return id(tensor) in inputs or id(tensor) in params.paths or route.is_sum(run.tape, tensor, before)

    wanted = [(t, end) for t in tensors_in(run.result)]
    wanted += [(t, at) for t, at in route.sources()]
    return cut(run.tape, wanted, stop)


def _name_one(a: torch.Tensor, b: torch.Tensor, step: Step, twin: Step, params: Params, route: Routing, other: Routing,
              writer: Writer, number: int, rest: bool) -> None:  # fmt: skip
    """Parameters by their path, and the experts' sum as the grouped form of it."""
    if id(a) in params.paths and a is b:
        writer.name(a, b, attribute(params.paths[id(a)]))
    elif _is_sum(a, b, (step.index, twin.index), route, other):
        writer.name(a, b, _sum(a, b, route, other, writer, number, rest))


def _is_sum(a: torch.Tensor, b: torch.Tensor, at: tuple[int, int], route: Routing, other: Routing) -> bool:
    return route.is_sum(route.tape, a, at[0]) and other.is_sum(other.tape, b, at[1])


def _sum(a: torch.Tensor, b: torch.Tensor, route: Routing, other: Routing, writer: Writer, number: int,
         rest: bool) -> str:  # fmt: skip
    """The experts' sum in the shape and dtype that the block has it in here."""
    if not route.written:
        x, indices, weights = (
            writer.expression(one, two) for one, two in zip(route.tensors(), other.tensors(), strict=True)
        )
        writer.line(f"tokens = {x}.reshape(-1, {route.x.shape[-1]})")
        k = f"{indices}.shape[-1]" if route.indices.dim() > 1 and route.indices.shape[-1] == route.k else str(route.k)
        chosen, factors = (f"{v}.reshape(-1, {k})" for v in (indices, weights))
        if route.full:
            factors = f"{weights}.reshape(-1, {number}).gather(1, {chosen}.long())"
        writer.line(
            "mixed = routed(lambda rows, ids, ends: experts(self, rows, ids, ends), tokens, "
            f"{chosen}, {factors}, {number}, {route.before}, {rest})"
        )
        route.written = True
    shape = ", ".join(writer.expression(one, two) for one, two in zip(a.shape, b.shape, strict=True))
    return f"mixed.reshape({shape}).to({a.dtype})"


def _output(a: Any, b: Any, at: tuple[int, int], params: Params, route: Routing, other: Routing, writer: Writer,
            number: int, rest: bool) -> str:  # fmt: skip
    if isinstance(a, torch.Tensor):
        if not writer.known(a):
            if id(a) in params.paths:
                writer.name(a, b, attribute(params.paths[id(a)]))
            elif _is_sum(a, b, at, route, other):
                return _sum(a, b, route, other, writer, number, rest)
        return writer.expression(a, b)
    if type(a) in (tuple, list):
        pairs = zip(a, b, strict=True)
        inner = ", ".join(_output(x, y, at, params, route, other, writer, number, rest) for x, y in pairs)
        return f"[{inner}]" if isinstance(a, list) else f"({inner}{',' if len(a) == 1 else ''})"
    return writer.expression(a, b)


def compiled(text: str, values: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """The function `name` of a source text, with the text where tracebacks and reports look for it."""
    file = f"<npu_fuse experts {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope = dict(values)
    exec(compile(text, file, "exec"), scope)
    made: Callable[..., Any] = scope[name]
    return made
