"""Graphs of any depth without tracing them: one decoder layer captured by Dynamo, its nodes copied N times."""

from __future__ import annotations

from typing import Any

import _common as common
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg


def captured_layer(width: int = 64) -> GraphModule:
    """The graph of one Qwen3 layer: (hidden_states, cos, sin) and its parameters to hidden_states."""
    model: Any = common.decoder("qwen3", width, 1, train=False, dtype=torch.float32, head_dim=16).model
    layer, rotary = model.layers[0], model.rotary_emb
    hidden = torch.zeros(2, 16, width)
    tables = rotary(hidden, torch.arange(16)[None])
    found: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, backend=keep, fullgraph=True)(hidden, position_embeddings=tables)
    torch._dynamo.reset()
    return found[0]


def stacked(layer: GraphModule, times: int) -> GraphModule:
    """`times` layers in a row: parameters are each layer's own, cos and sin are shared by all."""
    graph = Graph()
    placeholders = [n for n in layer.graph.nodes if n.op == "placeholder"]
    body = [n for n in layer.graph.nodes if n.op not in ("placeholder", "output")]
    output = next(n for n in layer.graph.nodes if n.op == "output")
    entry = next(n for n in placeholders if "args_0" in n.name or "hidden_states" in n.name)
    first = {n: graph.node_copy(n) for n in placeholders}
    inputs = [first] + [
        {n: _renamed(graph.node_copy(n), depth) if "parameters" in n.name else first[n] for n in placeholders}
        for depth in range(1, times)
    ]
    hidden = first[entry]
    for given in inputs:
        env: dict[Node, Node] = {**given, entry: hidden}
        for node in body:
            args, kwargs = (map_arg(given, env.__getitem__) for given in (node.args, node.kwargs))
            env[node] = graph.create_node(node.op, node.target, args, kwargs)
            env[node].meta = dict(node.meta)
        result = output.args[0]
        hidden = env[result[0] if isinstance(result, (tuple, list)) else result]  # type: ignore[index]
    graph.output((hidden,))
    return _LazyGraphModule(torch.nn.Module(), graph)  # what Dynamo makes: its code is written when it runs


def _renamed(placeholder: Node, depth: int) -> Node:
    placeholder.target = f"{placeholder.target}_{depth}"
    return placeholder


def depth_for(layer: GraphModule, nodes: int) -> int:
    """How many layers give about `nodes` nodes."""
    return max(1, round(nodes / len(layer.graph.nodes)))
