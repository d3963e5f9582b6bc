"""Ranks fuse a collective alike or not at all.

Before anything is emitted each rank posts, in the store of the process group, one digit for every collective of
its graph (could it be fused here?), and takes what all ranks posted. No collective is issued: a rank that
compiles alone, again or later than others, finds what was settled for the same collectives before and does not
wait. Waiting is limited to half of the group's own timeout; who gives up settles for the plain form, and a rank
that comes later finds that. So nothing hangs here, and no rank fuses what another has left.

The posts are keyed by what is alike on all ranks: which collectives stand on which lines of code, over which
ranks, in which dtype; not by lengths, shards or a bias that one rank has.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import collectives, dtensor_rows, dtensors, exchanges, functions
from npu_fuse import dialect as d
from npu_fuse.groups import Group, claim, claimed, group_of, initialised, resolve
from npu_fuse.options import Options
from npu_fuse.report import Status
from npu_fuse.steps import Candidate
from npu_fuse.targets import Target
from npu_fuse.view import View, source_of, static

logger = logging.getLogger("npu_fuse")

LONGEST_WAIT = 300.0
"""Seconds for which a rank waits for others, however long the group's own timeout."""
POLL = 0.01
"""Seconds between two looks into the store. A blocking wait would keep the store's client from other threads."""
TOLD_AFTER = 5.0
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
    for group, anchors in _collectives(view).items():
        own = "".join("1" if _possible(by_anchor.get(n)) else "0" for n in anchors)
        agreed, why = _exchange(group, _key(anchors, choices), own, target.name == "npu")
        for anchor, mine, ours in zip(anchors, own, agreed, strict=True):
            candidate = by_anchor.get(anchor)
            if candidate is not None and mine == "1" and ours == "0":
                candidate.refuse(Status.MISSED, f"{candidate.op}.ranks", why)
            elif mine == "0" and ours == "1":
                logger.warning("npu_fuse: the other ranks fuse the collective at %s, this one cannot", _place(anchor))
        if target.name == "npu":
            _one_communicator(group, [by_anchor[n] for n in anchors if n in by_anchor])


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
        reduction = functions.reduction_of(node)
        return reduction.group if isinstance(reduction, collectives.Reduction) else None
    if exchanges.is_scatter(node) or exchanges.is_gather(node):
        group = group_of(exchanges.group_argument(node))
    elif collectives.is_all_reduce(node):
        group = group_of(collectives.group_argument(node))
    else:
        return None
    return group if isinstance(group, Group) else None


def _key(anchors: Sequence[Node], choices: object) -> str:
    parts = [(_described(n), _place(n)) for n in anchors]
    return hashlib.sha256(repr((torch.__version__, choices, parts)).encode()).hexdigest()


def _described(node: Node) -> tuple[str, ...]:
    value = d.tensor(node) if d.tensor(node) is not None else d.tensor(functions.operand_of(node))
    if value is None:
        return (d.raw_name(node),)
    last = static(value.shape[-1]) if value.dim() else None
    return (d.raw_name(node), "*" if last is None else str(last), str(value.dtype))


def _place(node: Node) -> str:
    source = source_of(node)
    name = source.file.replace("\\", "/").rpartition("/")[2] if source.file else ""
    return f"{name}:{source.line}"


def _exchange(group: Group, key: str, own: str, one_host: bool) -> tuple[str, str]:
    """What all ranks can fuse, and why what this one could is left."""
    process_group = resolve(group.name)
    if process_group is None:
        return "0" * len(own), f"the group of {group} is gone"
    if torch.distributed.get_backend(process_group) == "fake":
        return own, ""  # one process plays all ranks
    try:
        return _through_store(process_group, group, f"npu_fuse/{key}", own, one_host)
    except Exception as fault:
        logger.debug("ranks could not be asked", exc_info=True)
        return "0" * len(own), f"the other ranks could not be asked: {type(fault).__name__}: {fault}"


def _through_store(process_group: Any, group: Group, key: str, own: str, one_host: bool) -> tuple[str, str]:
    store = torch.distributed.distributed_c10d._get_process_group_store(process_group)  # type: ignore[attr-defined, unused-ignore]
    verdict = f"{key}/settled"
    posts = [f"{key}/{rank}" for rank in range(group.size)]
    if not store.check([verdict]):
        store.set(posts[process_group.rank()], f"{own} {socket.gethostname()}")
        agreed, why = own, ""
        if "1" in own:
            missing = _wait(store, posts, verdict, _patience(process_group), group)
            if missing:
                agreed = "0" * len(own)
                why = f"rank {', '.join(map(str, missing))} did not say in time whether it fuses this, too"
            elif not store.check([verdict]):
                said = [store.get(post).decode().split(" ") for post in posts]
                every, hosts = [words[0] for words in said], {words[1] for words in said}
                agreed = "".join("1" if set(digits) == {"1"} else "0" for digits in zip(*every, strict=True))
                if one_host and len(hosts) > 1:
                    agreed, why = "0" * len(own), f"the group spans {len(hosts)} hosts, the fused kernels work in one"
        settled = store.compare_set(verdict, "", f"{agreed} {why}").decode()
    else:
        settled = store.get(verdict).decode()
    agreed, _, why = settled.partition(" ")
    return agreed, why or "another rank leaves this collective as it is"


def _wait(store: Any, posts: Sequence[str], verdict: str, patience: float, group: Group) -> list[int]:
    """The global ranks that posted nothing in time; empty as soon as all have, or it is settled anyway."""
    started, told = time.monotonic(), False
    while not store.check([verdict]):
        missing = [rank for rank, post in zip(group.ranks, posts, strict=True) if not store.check([post])]
        waited = time.monotonic() - started
        if not missing or waited > patience:
            return missing
        if waited > TOLD_AFTER and not told:
            told = True
            logger.info("npu_fuse waits up to %.0f s for ranks %s to compile the same code", patience, missing)
        time.sleep(POLL)
    return []


def _patience(process_group: Any) -> float:
    """Half of the group's timeout: ranks that wait in a collective for this one must not give up meanwhile."""
    limits = [LONGEST_WAIT]
    for device in process_group._device_types:
        options = getattr(process_group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if timeout is not None:
            limits.append(timeout.total_seconds() / 2)
    return min(limits)
