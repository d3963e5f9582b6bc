"""Put proved sites into the graph. The graph module is edited in place, one site after the other.

A site is written completely before any use is redirected; a fault in between takes its nodes out
again. Replaced nodes are erased last first, and only those of a site: dead-code elimination on a
Dynamo graph would delete in-place operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from npu_fuse import dialect as d
from npu_fuse.aten import AtenEmitter, Decompositions
from npu_fuse.emit_graph import GraphEmitter
from npu_fuse.sites import Form, Site
from npu_fuse.targets import Target
from npu_fuse.view import View, same_size


@dataclass(frozen=True)
class Accepted:
    """A site and the form that was proved."""

    site: Site
    form: Form
    index: int


@dataclass(frozen=True)
class Lowered:
    """The nodes that stand for a site now, or why it was left."""

    index: int
    made: tuple[Node, ...] = ()
    erased: int = 0
    refused: str = ""
    error: str = ""


def lower(
    gm: GraphModule, view: View, accepted: Sequence[Accepted], target: Target, fake_mode: Any,
    aten: Decompositions | None = None,
) -> list[Lowered]:  # fmt: skip
    """Write every accepted site into the graph of `gm`, in the order of the graph.

    aten: the graph is a functionalised one of overloads, and whoever compiles it decomposes these.
    """
    emitter: GraphEmitter
    if aten is None:
        emitter = GraphEmitter(gm.graph, target, fake_mode, {})
    else:
        emitter = AtenEmitter(gm.graph, target, fake_mode, {}, decompositions=aten)
    emitter.scope.update(view.scope)
    emitter.written.update(n for n, key in view.storage.items() if key in view.mutations)
    replaced: dict[Node, Node] = {}
    results = []
    ordered = sorted(accepted, key=lambda a: _place(view, a.site))
    for entry in ordered:
        results.append(_lower_one(emitter, view, entry, replaced))
    for entry in reversed(ordered):
        for node in reversed(entry.site.nodes):
            if not node.users and entry.site.output in replaced and not node._erased:
                gm.graph.erase_node(node)
    results = [_tidied(r) for r in results]
    if results:
        gm.recompile()
    return results


def _tidied(result: Lowered) -> Lowered:
    """Without what another site's form made needless: casts of whole numbers that it reads as they were, and views
    of them that it alone read."""
    needless: list[Node] = []
    for node in result.made:
        unread = _unread(node) if d.name(node) == "cast:other" else None
        needless += unread or []
    for node in needless:
        node.graph.erase_node(node)
    return replace(result, made=tuple(n for n in result.made if n not in needless))


def _unread(node: Node) -> list[Node] | None:
    """The node and the views of it, last first, if nothing reads any of them."""
    found = [_unread(user) if d.moves(user) and not d.mutates(user) else None for user in node.users]
    parts = [part for part in found if part is not None]
    return [*(n for part in parts for n in part), node] if len(parts) == len(found) else None


def _last(view: View, site: Site) -> Node:
    return max((*site.nodes, site.output), key=view.position.__getitem__)


def _lower_one(emitter: GraphEmitter, view: View, entry: Accepted, replaced: dict[Node, Node]) -> Lowered:
    site = entry.site
    emitter.begin(site.output)
    env = {n: replaced.get(n, n) for n in site.inputs}
    outputs = (site.output, *site.extra_outputs)
    try:
        with emitter.graph.inserting_before(_insertion_point(view, site)):
            result = entry.form.emit(emitter, env)
            new = list(result) if site.extra_outputs else [result]
            new = [_same_layout(emitter, old, made) for old, made in zip(outputs, new, strict=True)]
    except Exception as fault:
        _take_out(emitter.made)
        return Lowered(entry.index, error=f"{type(fault).__name__}: {fault}")
    inner = set(site.nodes)
    for old, made in zip(outputs, new, strict=True):
        problem = _interface(old, made)
        if problem:
            _take_out(emitter.made)
            return Lowered(entry.index, refused=problem)
    for old, made in zip(outputs, new, strict=True):
        old.replace_all_uses_with(made, delete_user_cb=lambda user: user not in inner)
        replaced[old] = made
        emitter.scope[made] = view.scope[old]
        if old in emitter.written:
            emitter.written.add(made)
        made.meta = {**old.meta, **{k: made.meta[k] for k in ("npu_fuse",) if k in made.meta}}
    return Lowered(entry.index, tuple(emitter.made), len(inner))


def _place(view: View, site: Site) -> int:
    """Where the site is written: behind its last node, or at the first of several outputs."""
    if site.extra_outputs:
        return min(view.position[n] for n in (site.output, *site.extra_outputs))
    return view.position[_last(view, site)] + 1


def _insertion_point(view: View, site: Site) -> Node:
    if site.extra_outputs:
        return view.nodes[_place(view, site)]
    return _last(view, site).next


def _same_layout(emitter: GraphEmitter, old: Node, made: Node) -> Node:
    """A contiguous result stays contiguous: a later `view` relies on it."""
    before, after = d.tensor(old), d.tensor(made)
    if before is None or after is None:
        return made
    if before.is_contiguous() and not after.is_contiguous():
        return emitter.call(torch.Tensor.contiguous, made)  # type: ignore[no-any-return]
    return made


def _interface(old: Node, made: Node) -> str:
    before, after = d.tensor(old), d.tensor(made)
    if before is None or after is None:
        return ""
    if before.dtype != after.dtype:
        return f"the fused op gives {after.dtype}, the graph wants {before.dtype}"
    if before.dim() != after.dim():
        return f"the fused op gives rank {after.dim()}, the graph wants {before.dim()}"
    for left, right in zip(before.shape, after.shape, strict=True):
        if not same_size(left, right):
            return f"the fused op gives shape {tuple(after.shape)}, the graph wants {tuple(before.shape)}"
    return ""


def _take_out(made: Sequence[Node]) -> None:
    for node in reversed(made):
        if not node.users and not node._erased:
            node.graph.erase_node(node)
