"""What ranks tell each other through the store of their process group, without a collective.

Each rank posts one digit for every collective of its graph, and all take the same verdict. A rank that compiles
alone, again or later than others, finds what was settled for the same collectives before and does not wait. If it
cannot do what was settled, the code is another one than before: it asks all ranks anew, who come if it is another
one for them, too. Waiting is limited to half of the group's own timeout. Who gives up settles for the plain form, and
a rank that comes later finds that. On an NPU two forms of one collective would wait for each other: there who gives
up takes the form that all ranks settled for the same lines before in another graph, for they are running that; or it
raises. So nothing hangs here, and no rank fuses what another has left.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch

from npu_fuse.errors import RanksDisagree
from npu_fuse.groups import Group, resolve

logger = logging.getLogger("npu_fuse")

LONGEST_WAIT = 300.0
"""Seconds for which a rank waits for others, however long the group's own timeout."""
POLL = 0.01
"""Seconds between two looks into the store. A blocking wait would keep the store's client from other threads."""
TOLD_AFTER = 5.0
PLAIN = "another rank leaves this collective as it is, or did when this line was compiled before"
MIXED = "m"
"""Of a line, on which some collectives are fused and others are not."""


def settle(group: Group, key: str, own: str, kinds: Sequence[str], npu: bool) -> tuple[str, str]:
    """What all ranks can fuse, digit by digit, and why what this one could is left.

    own: this rank's digits, kinds: what each stands for in any graph. npu: the fused form is another kernel, which
    works within one host. Raises `RanksDisagree` where no form of a collective goes with the other ranks'.
    """
    process_group = resolve(group.name)
    if process_group is None:
        return "0" * len(own), f"the group of {group} is gone"
    if torch.distributed.get_backend(process_group) == "fake":
        return own, ""  # one process plays all ranks
    try:
        return _through_store(process_group, group, f"npu_fuse/{key}", own, kinds, npu)
    except RanksDisagree:
        raise
    except Exception as fault:
        logger.debug("ranks could not be asked", exc_info=True)
        return "0" * len(own), f"the other ranks could not be asked: {type(fault).__name__}: {fault}"


def _through_store(
    process_group: Any, group: Group, key: str, own: str, kinds: Sequence[str], npu: bool
) -> tuple[str, str]:
    store = torch.distributed.distributed_c10d._get_process_group_store(process_group)  # type: ignore[attr-defined, unused-ignore]
    settled = _settled(store, key)
    if settled is None:
        return _ask(store, process_group, group, key, own, kinds, npu)
    if not _breaks(own, settled):
        return settled, PLAIN
    anew = f"{key}/{own}"
    settled = _settled(store, anew)
    return (settled, PLAIN) if settled is not None else _ask(store, process_group, group, anew, own, kinds, npu)


def _settled(store: Any, key: str) -> str | None:
    verdict = f"{key}/settled"
    return store.get(verdict).decode().partition(" ")[0] if store.check([verdict]) else None


def _breaks(own: str, settled: str) -> bool:
    """Something was settled that this rank cannot do."""
    return any(mine == "0" and ours == "1" for mine, ours in zip(own, settled, strict=True))


def _ask(
    store: Any, process_group: Any, group: Group, key: str, own: str, kinds: Sequence[str], npu: bool
) -> tuple[str, str]:
    verdict = f"{key}/settled"
    posts = [f"{key}/rank {rank}" for rank in range(group.size)]
    store.set(posts[process_group.rank()], f"{own} {socket.gethostname()}")
    agreed, why, together = own, "", True
    if "1" in own or (npu and any(digit != "0" for digit in _last(store, kinds))):
        missing = _wait(store, posts, verdict, _patience(process_group), group)
        together = not missing
        if missing:
            agreed = _before(store, kinds) if npu else "0" * len(own)
            why = f"rank {', '.join(map(str, missing))} did not say in time whether it fuses this, too"
        elif not store.check([verdict]):
            agreed, why = _count(store, posts, npu)
    settled = store.compare_set(verdict, "", f"{agreed} {why}").decode()
    agreed, _, why = settled.partition(" ")
    if together and npu:
        _remember(store, kinds, agreed)
    return agreed, why or PLAIN


def _count(store: Any, posts: Sequence[str], one_host: bool) -> tuple[str, str]:
    said = [store.get(post).decode().split(" ") for post in posts]
    every, hosts = [words[0] for words in said], {words[1] for words in said}
    if one_host and len(hosts) > 1:
        return "0" * len(every[0]), f"the group spans {len(hosts)} hosts, the fused kernels work in one"
    return "".join("1" if set(digits) == {"1"} else "0" for digits in zip(*every, strict=True)), ""


def _remember(store: Any, kinds: Sequence[str], agreed: str) -> None:
    found: dict[str, set[str]] = {}
    for kind, digit in zip(kinds, agreed, strict=True):
        found.setdefault(kind, set()).add(digit)
    for kind, digits in found.items():
        key = f"npu_fuse/kind/{kind}"
        wanted = digits.pop() if len(digits) == 1 else MIXED
        if store.compare_set(key, "", wanted).decode() != wanted:
            store.set(key, MIXED)


def _last(store: Any, kinds: Sequence[str]) -> list[str]:
    """What all ranks settled for these kinds of collectives last; plain where they settled nothing."""
    keys = [f"npu_fuse/kind/{kind}" for kind in kinds]
    return [store.get(key).decode() if store.check([key]) else "0" for key in keys]


def _before(store: Any, kinds: Sequence[str]) -> str:
    found = _last(store, kinds)
    if MIXED in found:
        raise RanksDisagree(
            "this rank compiles alone a graph with collectives of which the other ranks fuse some and leave others,"
            " and cannot tell which these are: their kernels would wait for each other",
            remedy="let all ranks compile the same code, or leave out mm_all_reduce, mm_reduce_scatter and"
            " all_gather_mm with the option skip",
        )
    return "".join(found)


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
