"""A chain of products by gathered weights as a site: rows go in the order of their experts and come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra, experts
from npu_fuse import dialect as d
from npu_fuse.emit import Emitter, item
from npu_fuse.expert_blocks import Block, ranges
from npu_fuse.expert_rows import Chain, Product
from npu_fuse.sites import Emit, Form, Miss, Site
from npu_fuse.view import View, same_size, static

DENSE = "experts of weight zero are not computed: where one of them overflowed, the code gave NaN for the token"
ROWS, EXPERTS, ALIGNED = 96, 6, (16, 8)
SLOTS = frozenset("repeat_interleave unsqueeze expand reshape view flatten getitem contiguous clone cast".split())
Matmul = Callable[[Emitter, Product, Any, Mapping[Node, Any], Any], Any]
"""Writes a product as a grouped matmul: of sorted rows, with its matrices from a mapping, and ends of groups."""


def site_of(view: View, name: str, chain: Chain, matmul: Matmul, trained: bool) -> Site | Miss:
    """Permute, every product as a grouped matmul with the steps between them as they are, unpermute."""
    tokens, indices = _origin(view, chain)
    weights = chain.weights
    inputs = tuple(dict.fromkeys((tokens, indices, *weights, *chain.gathered.values(), *chain.vectors)))
    inner = {n for p in chain.products for n in p.nodes} | chain.steps | set(chain.gathered)
    allowed = inner | _path(chain.slots, tokens) | _path(chain.ids, indices)
    found = algebra.between(view, [chain.out], inputs, lambda n: n in allowed or _path_twin(view, n, chain))
    if found.stopped is not None:
        return Miss(name, chain.out, f"{name}.between", f"{found.stopped.name} stands between the experts' matmuls")
    writers = [n for n in chain.steps if d.mutates(n)]
    sources = [n for w in writers for n in w.all_input_nodes if n in inner]
    more = algebra.between(view, [chain.out, *sources], inputs, lambda n: n in allowed or _path_twin(view, n, chain))
    nodes = tuple(sorted({*more.nodes, *writers}, key=view.position.__getitem__))
    emit = _emit(chain, tokens, indices, matmul)
    value = d.tensor(indices)
    assert value is not None
    params = {"experts": str(_shape(weights[0])[0]), "rows": "gathered weights", "matmuls": str(len(chain.products))}
    return Site(
        name, chain.out, inputs, nodes, (Form("rows by expert", emit, (trained,)),), chain.products[0].nodes[0], params,
        twins=more.twins, probes={indices: experts.indices_probe(weights[0])}, pool=(ROWS, EXPERTS, 3, 16),
        sizes=_sizes(tokens, indices, weights), facts={"kept": 0, "sums": True},
    )  # fmt: skip


def _shape(node: Node) -> Any:
    found = d.tensor(node)
    assert found is not None
    return found.shape


def _origin(view: View, chain: Chain) -> tuple[Node, Node]:
    """tokens [T, H] and indices [T, k] where the slots are the tokens, k times each; else slots and ids."""
    indices = chain.ids
    while indices.op.startswith("call") and d.name(indices) in ("view", "reshape", "flatten"):
        if not isinstance(indices.args[0], Node) or d.tensor(indices.args[0]) is None:
            break
        indices = indices.args[0]
    if len(_shape(indices)) != 2:
        return chain.slots, chain.ids
    node: Any = chain.slots
    while isinstance(node, Node) and (value := d.tensor(node)) is not None:
        if node is not chain.slots and value.dim() == 2 and same_size(value.shape[0], _shape(indices)[0]):
            return node, indices
        if not node.op.startswith("call") or d.name(node) not in SLOTS:
            break
        node = node.args[0]
    return chain.slots, chain.ids


def _path(node: Node, end: Node) -> set[Node]:
    found: set[Node] = set()
    while node is not end and node.op.startswith("call"):
        found.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _path_twin(view: View, node: Node, chain: Chain) -> bool:
    """The same indices or slots, computed once more."""
    return view.value_number[node] in (view.value_number[chain.ids], view.value_number[chain.slots])


def _sizes(tokens: Node, indices: Node, weights: tuple[Node, ...], listed: int = 0) -> dict[int, int]:
    """Widths keep their ratios and stay multiples of what kernels ask for; few experts, rows enough for all."""
    shapes = [_shape(tokens), _shape(indices), *(_shape(w) for w in weights)]
    widths = [s for shape in shapes[2:] for s in (shape if len(shape) < 3 else shape[1:])] + [shapes[0][-1]]
    literal = {w for w in widths if isinstance(w, int)}
    common = math.gcd(*literal) if literal else 1
    unit = next((common // a for a in ALIGNED if common % a == 0), 1)
    made = {listed: listed} if listed else {}
    made |= {shapes[2][0]: EXPERTS} if not listed and isinstance(shapes[2][0], int) and shapes[2][0] > EXPERTS else {}
    made |= {shapes[0][0]: ROWS} if isinstance(shapes[0][0], int) and shapes[0][0] > ROWS else {}
    return {**made, **{w: w // unit for w in literal}}


def block_site(view: View, name: str, block: Block, matmul: Matmul, trained: bool) -> Site:
    """From tokens, indices and routing weights to the sum of a token's experts."""
    chain = block.chain
    rows, output = d.tensor(chain.out), d.tensor(block.output)
    assert rows is not None and output is not None

    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        if block.before is not None:
            y = _of_weighted(e, env, block, matmul)
        else:
            made, mapping = _experts(e, env, chain, block.tokens, block.indices, matmul)
            y = e.fused("npu_moe_token_unpermute", made, mapping, env[block.probs])
        return e.cast(_in_batches(e, y, output), output.dtype)

    weights = chain.weights
    number = chain.count or chain.listed or _shape(weights[0])[0]
    params = {"experts": str(number), "k": str(_shape(block.indices)[1]), "matmuls": str(len(chain.products))}
    distinct = block.dense and d.name(block.indices) == "getitem"  # of a top-k
    probe = experts.indices_probe(weights[0], chain.count or chain.listed, chain.zero_rest, distinct)
    return Site(
        name, block.output, block.inputs, block.nodes, (Form("permute and unpermute", emit, (trained,)),),
        chain.products[0].out, params, twins=block.twins,
        probes={block.indices: probe}, pool=(ROWS, EXPERTS, 3, 16),
        sizes=_sizes(block.tokens, block.indices, weights, chain.count or chain.listed) | _batch_sizes(output),
        ranges=ranges(block),
        facts={"kept": 0, "sums": True, "listed": chain.listed, "dense": block.dense},
        notes=(DENSE,) if block.dense else (), stand_ins=block.stand_ins,
    )  # fmt: skip


def _in_batches(e: Emitter, y: Any, output: torch.Tensor) -> Any:
    """[T, N] as [B, S, N] where the code has it so; one of B and S is known."""
    if output.dim() == 2:
        return y
    batch, length, width = output.shape
    known = static(length) is not None
    shape = (-1, e.size(length, y), e.size(width, y)) if known else (e.size(batch, y), -1, e.size(width, y))
    return e.call(torch.Tensor.reshape, y, shape)


def _batch_sizes(output: torch.Tensor) -> dict[int, int]:
    """Fewer tokens are as many batches of shorter sequences."""
    batch, length = output.shape[0], output.shape[1]
    if output.dim() == 2 or not isinstance(batch, int) or not isinstance(length, int) or batch * length <= ROWS:
        return {}
    short = max(1, ROWS // batch)
    return {length: short, batch * length: batch * short}


def _of_weighted(e: Emitter, env: Mapping[Node, Any], block: Block, matmul: Matmul) -> Any:
    """Slots [T·k, H] are weighted, go to their experts and come back; a token's are added."""
    assert block.before is not None
    scatter, steps = block.before
    made = {scatter: env[block.probs]}
    for node in steps:
        args = torch.fx.node.map_arg(node.args, lambda n: made.get(n, n))
        made[node] = e.again(node, args, torch.fx.node.map_arg(node.kwargs, lambda n: made.get(n, n)))
    factor = made[steps[-1]] if steps else made[scatter]
    tokens = e.call(torch.Tensor.unsqueeze, env[block.tokens], 1)
    slots = e.call(torch.mul, tokens, e.call(torch.Tensor.unsqueeze, factor, -1))
    given = {block.tokens: e.call(torch.Tensor.flatten, slots, 0, 1), block.indices: _flat(e, env[block.indices])}
    rows, mapping = _experts(e, {**env, **given}, block.chain, block.tokens, block.indices, matmul)
    if _shape(block.indices)[1] == 1:
        return e.fused("npu_moe_token_unpermute", rows, mapping)
    return e.fused("npu_moe_token_unpermute", rows, mapping, e.call(torch.ones_like, factor))


def _flat(e: Emitter, indices: Any) -> Any:
    return e.call(torch.Tensor.reshape, indices, (-1,))


def _emit(chain: Chain, tokens: Node, indices: Node, matmul: Matmul) -> Emit:
    def emit(e: Emitter, env: Mapping[Node, Any]) -> Any:
        return e.fused("npu_moe_token_unpermute", *_experts(e, env, chain, tokens, indices, matmul))

    return emit


def _experts(e: Emitter, env: Mapping[Node, Any], chain: Chain, tokens: Node, indices: Node,
             matmul: Matmul) -> tuple[Any, Any]:  # fmt: skip
    """The chain's result on rows sorted by expert, and in which row each slot is."""
    ends_of = {p.out: p for p in chain.products}
    first = env[chain.products[0].weight]
    number = chain.listed
    ids = e.unwidened(env[indices])
    rows, mapping = _permuted(e, env[tokens], ids)
    slots = d.tensor(chain.slots)
    assert slots is not None
    if number:
        key = ("expert_ends", number)
        ends = e.shared(key, (ids,), lambda i: e.fused("ends_of_experts", i, number))
    else:
        ends = e.shared("expert_ends", (ids, first), lambda i, w: e.fused("expert_ends", i, w))
    made: dict[Node, Any] = {chain.slots: e.cast(rows, slots.dtype)}
    made |= {v: env[v] for v in chain.vectors}
    for node, source in chain.gathered.items():
        made[node] = e.call(torch.Tensor.__getitem__, env[source], _sorted_ids(e, env[indices]))
    for node in sorted((*ends_of, *chain.steps)):
        if node in ends_of:
            product = ends_of[node]
            made[node] = matmul(e, product, made[product.rows], env, ends)
            continue
        args = torch.fx.node.map_arg(node.args, made.__getitem__)
        made[node] = e.again(node, args, torch.fx.node.map_arg(node.kwargs, made.__getitem__))
        if d.mutates(node):
            made[node.args[0]] = made[node]  # type: ignore[index]
    return made[chain.out], mapping


def _permuted(e: Emitter, tokens: Any, indices: Any) -> tuple[Any, Any]:
    both = e.fused("npu_moe_token_permute", tokens, indices)
    return item(e, both, 0), item(e, both, 1)


def _sorted_ids(e: Emitter, indices: Any) -> Any:
    def build(given: Any) -> Any:
        flat = e.call(torch.Tensor.reshape, given, -1)
        return item(e, e.call(torch.sort, flat), 0)

    return e.shared("sorted_ids", (indices,), build)
