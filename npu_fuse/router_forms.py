"""The ways to write a router with the NPU's ops: which op, how many launches, and what torch does around it.

Weights that no op gives are computed by torch of the scores that it gives away; in training the op chooses and torch
computes all weights, since torch_npu's ops have no backward that can be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.emit import Emitter, item
from npu_fuse.router_choice import LOGITS, SIGMOID, SOFTMAX
from npu_fuse.routers import Router
from npu_fuse.sites import Emit, Form
from npu_fuse.view import View

Write = Callable[[Emitter, Any, Any, Mapping[Node, Any]], tuple[Any, Any]]
"""Weights and experts from logits and bias in a dtype that the op takes, and the values of the site's inputs."""


@dataclass(frozen=True)
class Way:
    """One way to write the router: the op that it calls, launches but for casts, whether it gives the code's dtype."""

    name: str
    op: str
    launches: int
    write: Write
    own_dtype: bool = False


SOFT, SCORES, GATED = "npu_moe_gating_top_k_softmax_v2", "npu_moe_gating_top_k_softmax", "npu_moe_gating_top_k"


def launches_saved(router: Router, nodes: Sequence[Node]) -> int:
    """Kernels of the code whose results nothing else reads."""
    gone: set[Node] = set()
    for node in reversed(nodes):
        if node in (router.output, router.ids) or all(u in gone for u in node.users):
            gone.add(node)
    return kernels_of(gone)


def kernels_of(nodes: Iterable[Node]) -> int:
    return sum(not d.moves(n) and d.name(n) != "getitem" for n in nodes)


def ways(view: View, router: Router, trained: bool) -> list[Way]:
    """Those that compute the router's weights, the fewest launches first."""
    choice, after = router.choice, kernels_of(router.tail)
    rank = d.tensor(choice.x).dim()  # type: ignore[union-attr]
    plain = choice.bias is None and choice.groups is None
    if rank > (3 if plain and choice.kind != SIGMOID else 2):
        return []
    if trained:
        op = SOFT if choice.kind == LOGITS else SCORES if plain and choice.kind == SOFTMAX else GATED
        head = _head(view, router)
        number = 3 + kernels_of(head) + after
        return [Way("experts by the op, weights by torch", op, number, _apart(router, op, head), True)]
    if choice.kind == LOGITS:
        return [Way("softmax of the largest", SOFT, 1 + (router.scale != 1.0), _soft(router))]
    if choice.kind == SIGMOID:
        if router.normalised and router.epsilon is not None:
            return [Way("whole", GATED, 1, _gated(router, router.scale, router.epsilon))]
        return [Way("scores of the op gathered", GATED, 3 + after, _gathered(router), True)]
    rest = Way("normalised by torch", SCORES if plain else GATED, 1 + after, _normalised(router, plain), True)
    if router.normalised:
        soft = Way("softmax of the largest", SOFT, 1 + (router.scale != 1.0), _soft(router))
        return [soft, rest] if plain and router.epsilon == 0.0 else [rest]
    whole = Way("whole", GATED, 1, _gated(router, router.scale, 0.0))
    return (
        [Way("largest of the softmax", SCORES, 1, _scores(router)), whole] if plain and router.scale == 1.0 else [whole]
    )


def forms(
    router: Router, ways: Sequence[Way], dtype: torch.dtype, result: torch.dtype
) -> tuple[tuple[Form, ...], dict[str, tuple[str, int]]]:  # fmt: skip
    """As the kernel takes it first; then with the logits in float32. And the op and the launches of each."""
    made: list[Form] = []
    launches: dict[str, tuple[str, int]] = {}
    bias, values = d.tensor(router.choice.bias), d.tensor(router.values)
    assert values is not None
    for way in ways:
        for width in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
            least = values.dtype if way.own_dtype and way.op != SOFT else result
            if width.itemsize < least.itemsize or (bias is not None and width.itemsize < bias.dtype.itemsize):
                continue  # the code keeps digits that this form has rounded away
            casts = (width != dtype) + (bias is not None and bias.dtype != width)
            casts += width != result and not way.own_dtype
            name = way.name if width == dtype else f"{way.name}, x in {str(width)[6:]}"
            launches[name] = way.op, way.launches + casts
            made.append(Form(name, _emit(router, way, width, result), (way.op, width)))
    return tuple(made), launches


def _emit(router: Router, way: Way, width: torch.dtype, result: torch.dtype) -> Emit:
    choice = router.choice

    def emit(e: Emitter, env: Mapping[Node, Any]) -> tuple[Any, Any]:
        x = e.dense(e.cast(env[choice.x], width))
        bias = None
        if choice.bias is not None:
            bias = e.cast(e.call(torch.Tensor.reshape, env[choice.bias], (-1,)), width)
        y, experts = way.write(e, x, bias, env)
        return e.cast(y, result), e.call(torch.Tensor.to, experts, torch.int64)

    return emit


def _call(e: Emitter, router: Router, x: Any, bias: Any, op: str = GATED, **named: Any) -> tuple[Any, Any, Any]:
    """Weights, experts (int32) and the third result of the op."""
    if op == SOFT:
        made = e.fused("npu_moe_gating_top_k_softmax_v2", x, k=router.k, renorm=1)
    elif op == SCORES:
        made = e.fused("npu_moe_gating_top_k_softmax", x, k=router.k)
    else:
        groups = router.choice.groups
        if groups is not None and groups.count > 1:
            named |= {"k_group": groups.kept, "group_count": groups.count, "group_select_mode": int(groups.pairs)}
        named |= {"bias": bias} if bias is not None else {}
        kind = int(router.choice.kind == SIGMOID)
        made = e.fused("npu_moe_gating_top_k", x, router.k, norm_type=kind, **named)
    return item(e, made, 0), item(e, made, 1), item(e, made, 2)


def _soft(router: Router) -> Write:
    def write(e: Emitter, x: Any, bias: Any, env: Mapping[Node, Any]) -> tuple[Any, Any]:
        y, experts, _ = _call(e, router, x, bias, SOFT)
        return (e.call(torch.mul, y, router.scale) if router.scale != 1.0 else y), experts

    return write


def _scores(router: Router) -> Write:
    return lambda e, x, bias, env: _call(e, router, x, bias, SCORES)[:2]


def _gated(router: Router, scale: float, epsilon: float) -> Write:
    return lambda e, x, bias, env: _call(e, router, x, bias, routed_scaling_factor=scale, eps=epsilon)[:2]


def _normalised(router: Router, plain: bool) -> Write:
    def write(e: Emitter, x: Any, bias: Any, env: Mapping[Node, Any]) -> tuple[Any, Any]:
        y, experts, _ = _call(e, router, x, bias, SCORES if plain else GATED)
        return _after(e, router, y), experts

    return write


def _gathered(router: Router) -> Write:
    def write(e: Emitter, x: Any, bias: Any, env: Mapping[Node, Any]) -> tuple[Any, Any]:
        _, experts, scores = _call(e, router, x, bias, out_flag=True)
        return _after(e, router, _taken(e, scores, experts)), experts

    return write


def _apart(router: Router, op: str, head: Sequence[Node]) -> Write:
    def write(e: Emitter, x: Any, bias: Any, env: Mapping[Node, Any]) -> tuple[Any, Any]:
        fixed = None if bias is None else e.call(torch.Tensor.detach, bias)
        _, experts, _ = _call(e, router, e.call(torch.Tensor.detach, x), fixed, op)
        made: dict[Node, Any] = {router.choice.x: env[router.choice.x]}
        _again(e, head, made)
        scores = made[head[-1]] if head else env[router.choice.x]
        return _after(e, router, _taken(e, scores, experts)), experts

    return write


def _taken(e: Emitter, scores: Any, experts: Any) -> Any:
    return e.call(torch.gather, scores, -1, e.call(torch.Tensor.to, experts, torch.int64))


def _head(view: View, router: Router) -> list[Node]:
    """From the logits to the scores that are gathered."""
    found: set[Node] = set()
    stack = [router.choice.scores]
    while stack:
        node = stack.pop()
        if node is not router.choice.x and node not in found:
            found.add(node)
            stack += d.data_inputs(node)
    return sorted(found, key=view.position.__getitem__)


def _after(e: Emitter, router: Router, values: Any) -> Any:
    """What the code does to the chosen scores."""
    made = {router.values: values}
    _again(e, router.tail, made)
    return made[router.output]


def _again(e: Emitter, nodes: Sequence[Node], made: dict[Node, Any]) -> None:
    for node in nodes:
        args = torch.fx.node.map_arg(node.args, made.__getitem__)
        made[node] = e.again(node, args, torch.fx.node.map_arg(node.kwargs, made.__getitem__))
