"""The graphs inside a graph: bodies of checkpointed regions, branches and nested compile regions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule

from npu_fuse import dialect as d

OPAQUE = frozenset(("autograd_function_apply", "while_loop", "scan", "associative_scan", "map_impl", "flex_attention",
                    "flex_attention_backward"))  # fmt: skip
"""Higher-order ops whose bodies follow other rules (a user's own backward, carried state)."""


def graphs_of(gm: GraphModule) -> Iterator[GraphModule]:
    """`gm` and every body that may be rewritten, each once however often it is called."""
    seen: set[int] = set()

    def visit(module: GraphModule) -> Iterator[GraphModule]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield module
        for node in module.graph.nodes:
            if node.op != "get_attr":
                continue
            body = _attribute(module, str(node.target))
            if isinstance(body, GraphModule) and not any(d.raw_name(user) in OPAQUE for user in node.users):
                yield from visit(body)

    yield from visit(gm)


def calls_of(gm: GraphModule) -> dict[int, int]:
    """How often each body (by id) runs in one call of `gm`."""
    counts: dict[int, int] = {}

    def visit(module: GraphModule) -> None:
        counts[id(module)] = counts.get(id(module), 0) + 1
        for node in module.graph.nodes:
            if node.op == "get_attr":
                body = _attribute(module, str(node.target))
                if isinstance(body, GraphModule):
                    for _ in node.users:
                        visit(body)

    visit(gm)
    return counts


def _attribute(module: torch.nn.Module, path: str) -> object:
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
