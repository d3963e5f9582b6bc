"""Process groups as graphs name them: resolved, compared by their ranks, and known to HCCL by another name.

torch's group names are counters of one process ("0", "5"): the same ranks have other names on other ranks of a
mesh, and a name comes back for another group after `destroy_process_group`. So a name is resolved when a graph
is lowered, groups are equal when their ranks are, and nothing on disk is keyed by a name.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node

from npu_fuse import dialect as d


@dataclass(frozen=True)
class Group:
    """The global ranks of a group in their order; `name` is torch's name for it in this process."""

    ranks: tuple[int, ...]
    name: str

    @property
    def size(self) -> int:
        return len(self.ranks)

    def same(self, other: Group) -> bool:
        return self.ranks == other.ranks

    def __str__(self) -> str:
        return f"ranks {', '.join(map(str, self.ranks))}"


def initialised() -> bool:
    """Whether there are process groups: without any, no graph talks to other ranks."""
    return dist.is_available() and dist.is_initialized()


def group_of(argument: Any) -> Group | str:
    """The group that a collective's argument names, or the reason why it is not known.

    A name in all default cases; vLLM's own names ("tp:0") are looked up in its registry. A group that comes in as
    a value of the graph (`compile_on_one_rank`) differs from run to run, and is refused.
    """
    if isinstance(argument, Node):
        return "the group is a value of the graph, which may be another one in the next call"
    if not initialised():
        return "no process group is initialised"
    if isinstance(argument, dist.ProcessGroup):
        return described(argument)
    if not isinstance(argument, str):
        return f"the group is given as {type(argument).__name__}"
    found = resolve(argument)
    return described(found) if found is not None else f"no group is named {argument!r} in this process"


def resolve(name: str) -> Any:
    """The process group of this name now, torch's or vLLM's; None where there is none."""
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]
    except (RuntimeError, LookupError, ValueError):
        return _of_vllm(name)


def _of_vllm(name: str) -> Any:
    import sys

    state: Any = sys.modules.get("vllm.distributed.parallel_state")
    reference = getattr(state, "_groups", {}).get(name)
    coordinator = reference() if reference is not None else None
    return getattr(coordinator, "device_group", None)


def described(group: Any) -> Group:
    """The group by its ranks."""
    return Group(tuple(dist.get_process_group_ranks(group)), str(group.group_name))


_communicators: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""HCCL's names by group: a new group, though torch gives it an old name, asks anew. Never written to disk."""


def communicator(name: str) -> str:
    """HCCL's name of the group. The first call for a group is a collective act: every rank of it must come.

    Called when a graph is lowered, in the order of the graph: alike on all ranks, and before any capture. Takes
    the global rank, from which older releases of torch_npu derive the device.
    """
    group = resolve(name)
    if group is None:
        raise RuntimeError(f"the process group {name!r} is gone; compile again after init_process_group")
    taken = claimed()
    if taken is not None and taken.same(described(group)):
        group = resolve(taken.name)  # another group of the same ranks: theirs serves
    if group not in _communicators:
        backend = group._get_backend(torch.device("npu"))
        _communicators[group] = str(backend.get_hccl_comm_name(dist.get_rank()))
    return _communicators[group]


_claim: list[Group] = []
"""The group whose communicator the fused kernels of this process use."""


def claimed() -> Group | None:
    """The first group for which a fused kernel was emitted, as long as that group lives."""
    if _claim:
        found = resolve(_claim[0].name)
        if found is not None and described(found).same(_claim[0]):
            return _claim[0]
        _claim.clear()
    return None


def claim(group: Group) -> None:
    """Use this group's communicator, and get its name: a collective act, alike and in one order on all ranks."""
    if claimed() is None:
        _claim.append(group)
    communicator(group.name)


def speaks_hccl(name: str) -> bool:
    group = resolve(name)
    return group is not None and "hccl" in str(dist.get_backend_config(group))


def has_communicator(name: str) -> bool:
    """Whether the fused kernels can run at once: nothing has to be made, which a capture would forbid."""
    group, taken = resolve(name), claimed()
    if group is not None and taken is not None and taken.same(described(group)):
        group = resolve(taken.name)
    return group is not None and group in _communicators


COLLECTIVES = frozenset(
    "all_reduce all_reduce_ reduce_scatter_tensor all_gather_into_tensor all_to_all_single broadcast"
    " all_reduce_coalesced reduce_scatter_tensor_coalesced all_gather_into_tensor_coalesced all_gather"
    " reduce_scatter redistribute full_tensor".split()
)


def is_collective(node: Node) -> bool:
    """A call that talks to other ranks (of DTensors: that may), itself or in a body that it runs."""
    if not node.op.startswith("call"):
        return False
    if d.raw_name(node) in COLLECTIVES:
        return True
    owner = node.graph.owning_module
    bodies = (getattr(owner, str(a.target), None) for a in node.args if isinstance(a, Node) and a.op == "get_attr")
    return any(isinstance(b, GraphModule) and any(map(is_collective, b.graph.nodes)) for b in bodies)
