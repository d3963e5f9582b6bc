"""Where gate and up lie in one tensor, read off element ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.proofs import structure_key
from npu_fuse.replay import CannotShrink, choose_sizes
from npu_fuse.sites import Form, Site
from npu_fuse.trace import Tracer, Untraceable, trace
from npu_fuse.view import View, static


@dataclass(frozen=True)
class Halves:
    """gate and up lie in one tensor: `arrange` is "gate_up", "up_gate", "interleaved" or "interleaved_up_gate"."""

    source: Node
    arrange: str
    start: int
    width: int
    nodes: tuple[Node, ...]


def halves_of(view: View, gate: Node, up: Node) -> Halves | None:
    """The tensor whose last dimension holds gate and up, and how."""
    wanted = d.tensor(gate)
    half = None if wanted is None or wanted.dim() < 1 else static(wanted.shape[-1])
    if wanted is None or half is None:
        return None
    above_gate, above_up = _movement_above(gate), _movement_above(up)
    numbers = {view.vn(n): n for n in above_up}
    for source in above_gate:
        if view.vn(source) not in numbers:
            continue
        found = d.tensor(source)
        if found is None or found.dim() != wanted.dim():
            continue
        width = static(found.shape[-1])
        if width is None or width < 2 * half:
            continue
        halves = _traced_halves(view, source, gate, up, above_gate, above_up)
        if halves is not None:
            return halves
    return None


def _movement_above(node: Node) -> list[Node]:
    """The node, and what it is moved out of, nearest first."""
    found = [node]
    while node.op.startswith("call") and (d.moves(node) or d.name(node) == "cast") and len(found) < 12:
        operands = d.tensors_in(node)
        if not operands or d.name(node) in ("cat", "stack"):
            break
        node = operands[0]
        found.append(node)
    return found


def _traced_halves(
    view: View, source: Node, gate: Node, up: Node, above_gate: list[Node], above_up: list[Node]
) -> Halves | None:
    number = view.vn(source)
    nodes = {*_until(view, above_gate, number), *_until(view, above_up, number)}
    region = tuple(sorted(nodes, key=view.position.__getitem__))
    twins = {n for n in (*above_gate, *above_up) if view.vn(n) == number and n not in nodes}
    pseudo = Site("glu_trace", gate, (source,), region, (), gate, extra_outputs=(up,),
                  twins=tuple((t, source) for t in twins if t is not source))  # fmt: skip
    key = ("halves", structure_key(pseudo, Form("trace", lambda e, env: None), ""))
    if key not in view.memo:
        view.memo[key] = _arrangement(source, gate, up, region, twins)
    found = view.memo[key]
    return None if found is None else Halves(source, found[0], found[1], found[2], region)


def _until(view: View, above: list[Node], number: int) -> list[Node]:
    kept = []
    for node in above:
        if view.vn(node) == number:
            break
        kept.append(node)
    return kept


def _arrangement(
    source: Node, gate: Node, up: Node, region: tuple[Node, ...], twins: set[Node]
) -> tuple[str, int, int] | None:
    tracer = Tracer()
    value = d.tensor(source)
    assert value is not None
    width = static(value.shape[-1])
    if width is None:
        return None
    try:
        sizes = choose_sizes((source,), 1, (2, 2, 2))
        shape = sizes.shape(value.shape)
        if torch.Size(shape).numel() > 1 << 19:
            return None
        ids = torch.arange(torch.Size(shape).numel()).reshape(shape)
        env = trace(region, dict.fromkeys({source, *twins}, ids), sizes, tracer)
    except (Untraceable, CannotShrink, RuntimeError, IndexError, ValueError, TypeError):
        return None
    first, second = env[gate], env[up]
    half = first.shape[-1]
    if first.shape != second.shape or first.shape[:-1] != ids.shape[:-1] or half == 0:
        return None
    if width == 2 * half:
        for name, left, right in (
            ("gate_up", ids[..., :half], ids[..., half:]), ("up_gate", ids[..., half:], ids[..., :half]),
            ("interleaved", ids[..., 0::2], ids[..., 1::2]), ("interleaved_up_gate", ids[..., 1::2], ids[..., 0::2]),
        ):  # fmt: skip
            if torch.equal(first, left) and torch.equal(second, right):
                return name, 0, half
    start = int(first.reshape(-1)[0])
    for name, begin, at_gate, at_up in (
        ("gate_up", start, 0, half), ("up_gate", int(second.reshape(-1)[0]), half, 0),
    ):  # fmt: skip
        if begin >= 0 and begin + 2 * half <= width:
            part = ids[..., begin : begin + 2 * half]
            if torch.equal(first, part[..., at_gate : at_gate + half]) and torch.equal(
                second, part[..., at_up : at_up + half]
            ):
                return name, begin, half
    return None
