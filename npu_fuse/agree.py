"""Ranks fuse a collective alike or not at all.

Before anything is emitted each rank says for every collective of its graph whether it could be fused here, and
takes what all ranks said (`ballots`). What is said is keyed by what is alike on all ranks: which collectives stand
on which lines of code, over which ranks, in which dtype; not by lengths, shards or a bias that one rank has.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from npu_fuse import ballots, collectives, copies, dtensor_rows, dtensors, exchanges, functions
from npu_fuse import dialect as d
from npu_fuse.errors import RanksDisagree
from npu_fuse.groups import Group, claim, claimed, group_of, initialised
from npu_fuse.options import Options
from npu_fuse.places import frames_of
from npu_fuse.report import Status
from npu_fuse.steps import Candidate
from npu_fuse.targets import Target
from npu_fuse.view import View, is_one, static

logger = logging.getLogger("npu_fuse")

ROWS = ".rows"
"""Ends the code of a refusal that rests on a size alike on all ranks: the site could be fused, here and there."""


def settle(view: View, candidates: Sequence[Candidate], training: bool, options: Options, target: Target) -> None:
    """Refuse what not every rank of the group can fuse. A rank that fuses nothing says so and waits for nobody."""
    if not initialised():
        return
    choices = (
        training,
        target,
        sorted(options.skip),
        options.fuse if isinstance(options.fuse, str) else sorted(options.fuse),
        options.numerics,
    )
    by_anchor = {c.site.anchor: c for c in candidates if c.site is not None and "group" in c.site.facts}
    npu = target.name == "npu"
    for group, anchors in _collectives(view).items():
        own = "".join("1" if _possible(by_anchor.get(n)) else "0" for n in anchors)
        kinds = [_digest((_described(n)[0], _dtype(n), frames_of(n)[:1])) for n in anchors]
        agreed, why = ballots.settle(
            group, _digest((choices, [(_described(n), _place(n)) for n in anchors])), own, kinds, npu
        )
        for anchor, mine, ours in zip(anchors, own, agreed, strict=True):
            candidate = by_anchor.get(anchor)
            if candidate is not None and mine == "1" and ours == "0":
                candidate.refuse(Status.MISSED, f"{candidate.op}.ranks", why)
            elif mine == "0" and ours == "1":
                _cannot(anchor, npu)
        if npu:
            _one_communicator(group, [by_anchor[n] for n in anchors if n in by_anchor])


def _cannot(anchor: Node, npu: bool) -> None:
    """The others fuse a collective, and this rank, which compiles alone, finds it in a graph where it cannot.

    Over one process group both forms are the same collective. On an NPU they are different kernels, which would
    wait for each other until the group's timeout.
    """
    place = _place(anchor)
    if npu:
        raise RanksDisagree(
            f"the other ranks fuse the collective at {place}, and in the graph that this rank compiles now, alone, it"
            " cannot be fused: their kernels would wait for each other",
            remedy="let all ranks compile the same code, or leave this op out with the option skip on all of them",
        )
    logger.warning("npu_fuse: the other ranks fuse the collective at %s, this one cannot", place)


def _one_communicator(group: Group, candidates: Sequence[Candidate]) -> None:
    """Ascend's kernels of one process share a communicator: the first group that is fused has it."""
    chosen = [c for c in candidates if c.form is not None]
    taken = claimed()
    if chosen and (taken is None or taken.same(group)):
        claim(group)
    elif chosen:
        for candidate in chosen:
            why = f"the fused kernels of a process share one communicator, and {taken} have it; this group is {group}"
            candidate.refuse(Status.REFUSED_BY_TARGET, f"{candidate.op}.communicator", why)


def _possible(candidate: Candidate | None) -> bool:
    if candidate is None:
        return False
    return candidate.form is not None or candidate.code.endswith(ROWS)


def _collectives(view: View) -> dict[Group, list[Node]]:
    """The collectives of the graph that fused ops could stand for, by group, in their order."""
    found: dict[tuple[int, ...], tuple[Group, list[Node]]] = {}
    for node in view.nodes:
        group = _group(node)
        if group is not None and group.size > 1:
            found.setdefault(group.ranks, (group, []))[1].append(node)
    return dict(found.values())


def _group(node: Node) -> Group | None:
    if dtensors.is_reduction(node) or dtensor_rows.is_scatter(node) or dtensor_rows.is_gather(node):
        layout = dtensors.layout_of(node.args[0])
        return layout.group if layout is not None and len(layout.placements) == 1 else None
    if functions.is_function(node):
        return functions.group_of(node)
    copied = copies.group_of(node)
    if copied is not None:
        return copied
    if exchanges.is_scatter(node) or exchanges.is_gather(node):
        group = group_of(exchanges.group_argument(node))
    elif collectives.is_all_reduce(node):
        group = group_of(collectives.group_argument(node))
    else:
        return None
    return group if isinstance(group, Group) else None


def _digest(parts: object) -> str:
    return hashlib.sha256(repr((torch.__version__, parts)).encode()).hexdigest()


def _described(node: Node) -> tuple[object, ...]:
    """The name first. Of rows that are scattered or gathered all ranks have alike which dimensions are 1, too."""
    value = _value(node)
    if value is None:
        return (d.raw_name(node),)
    last = static(value.shape[-1]) if value.dim() else None
    facts = (d.raw_name(node), "*" if last is None else str(last), str(value.dtype))
    distributed = dtensor_rows.is_scatter(node) or dtensor_rows.is_gather(node)
    if not distributed and not exchanges.is_scatter(node) and not exchanges.is_gather(node):
        return facts
    source = d.tensor(node.args[0]) if node.args else None
    shape = source.shape if source is not None else value.shape
    ranks = dtensor_rows.ranks_of(node) if distributed else 1
    even = [statically_known_true(size % ranks == 0) for size in shape]
    return (*facts, [is_one(size) for size in shape], even)


def _value(node: Node) -> torch.Tensor | None:
    found = d.tensor(node)
    return found if found is not None else d.tensor(functions.operand_of(node))


def _dtype(node: Node) -> str:
    found = _value(node)
    return "" if found is None else str(found.dtype)


def _place(node: Node) -> str:
    """Where the collective stands, and who called: lines of the model's own code, alike on all ranks."""
    return " < ".join(f"{file}:{line}" for file, line in frames_of(node))
