"""Write fused forms into a functionalised aten graph, such as the one that Inductor's or vLLM's own passes get.

Forms are written with torch's functions; after autograd a graph holds operator overloads only. Each call is
traced on the graph's own fake values, with the decompositions of whoever compiles the graph, and copied in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from npu_fuse import dialect as d
from npu_fuse import ops
from npu_fuse.emit_graph import GraphEmitter

Decompositions = Mapping[Any, Callable[..., Any]]


def inductor_decompositions() -> Decompositions:
    """What Inductor traced the graph with, and the bodies of our ops: it then generates code for all of it."""
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), **ops.decompositions()}


class AtenEmitter(GraphEmitter):
    """A `GraphEmitter` whose nodes call overloads only, none of those in `decompositions`."""

    example = "val"

    def __init__(self, graph: Graph, *rest: Any, decompositions: Decompositions) -> None:
        super().__init__(graph, *rest)
        self.decompositions = decompositions

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if function is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        if isinstance(function, torch._ops.OpOverload) and function not in self.decompositions:
            return super().call(function, *args, **kwargs)
        if function is operator.getitem and isinstance(d.value(args[0]), tuple):
            return super().call(function, *args, **kwargs)
        if function is torch.Tensor.size:
            return super().call(torch.ops.aten.sym_size.int, *args)
        return self._traced(function, args, kwargs)

    def _traced(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = _nodes_in((*args, *kwargs.values()))

        def run(*values: Any) -> Any:
            env = dict(zip(given, values, strict=True))
            taken, named = torch.fx.node.map_arg((args, kwargs), env.__getitem__)
            return function(*taken, **named)

        assert self.fake_mode is not None
        with self.fake_mode, torch.no_grad():
            traced = make_fx(run, dict(self.decompositions))(*[d.value(node) for node in given])
        names = [node for node in traced.graph.nodes if node.op == "placeholder"]
        return self._copied(traced.graph, dict(zip(names, given, strict=True)))

    def _copied(self, traced: Graph, env: dict[Node, Node]) -> Any:
        result = None
        for node in traced.nodes:
            if node.op == "call_function":
                made = env[node] = self.graph.node_copy(node, env.__getitem__)
                self._mark(made)
            elif node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], env.__getitem__)
            elif node.op != "placeholder":
                raise NotImplementedError(f"a {node.op} inside a fused form")
        return result


def _nodes_in(values: Any) -> list[Node]:
    found: dict[Node, None] = {}
    torch.fx.node.map_arg(values, found.setdefault)
    return list(found)
