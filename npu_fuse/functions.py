"""Autograd functions around collectives, as Megatron writes them: one thing forward, the true gradient backward.

Dynamo keeps the two bodies as graphs of their own. They are read as terms (`bodies`): a function that takes one tensor
and gives back its sum over ranks, its scattered sum, its gathered value or itself, and whose gradient is what it is for
such a collective. Products in bodies are `layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from npu_fuse import bodies, exchanges, groups, pretend
from npu_fuse import dialect as d
from npu_fuse.bodies import GATHERED, GRADIENT, SCATTERED, SUM, Term, argument, over_ranks
from npu_fuse.collectives import Reduction, group_argument, is_all_reduce
from npu_fuse.exchanges import Exchange, is_gather, is_scatter
from npu_fuse.groups import Group
from npu_fuse.sites import NO_VALUE, StandIn, passed_on
from npu_fuse.view import same_shape

COLLECTIVE: dict[str, Callable[[Node], bool]] = {SUM: is_all_reduce, SCATTERED: is_scatter, GATHERED: is_gather}


@dataclass(frozen=True)
class Function:
    """What a function with one result computes. `gradients`: of each operand, None where it gets none."""

    node: Node
    value: Node
    operands: tuple[Any, ...]
    forward: Term
    gradients: tuple[Term | None, ...]
    bodies: tuple[Node, ...]
    saved: tuple[Any, ...] = ()
    """What is kept for the backward."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.bodies, self.node, self.value)

    def stand_ins(self, operands: tuple[Node, ...], run: Callable[..., Any], key: Any) -> dict[Node, StandIn]:
        found = {body: NO_VALUE for body in self.bodies}
        return {**found, self.node: StandIn(operands, run, key), self.value: passed_on(self.node, "item")}


def is_function(node: Node) -> bool:
    return node.op == "call_function" and d.raw_name(node) == "autograd_function_apply"


def operand_of(node: Node) -> Node | None:
    """The first tensor that the function is given."""
    return next(iter(_tensors(node)), None)


def _tensors(node: Node) -> list[Node]:
    return [a for a in node.args[2:] if isinstance(a, Node) and d.tensor(a) is not None]


def holds(node: Node, kind: str, backward: bool = False) -> bool:
    """Whether such a collective stands in the function's body."""
    body = _body(node, 1 if backward else 0)
    return body is not None and any(COLLECTIVE[kind](n) for n in body.graph.nodes)


def body_of(node: Node) -> GraphModule | None:
    return _body(node, 0)


def _body(node: Node, index: int) -> GraphModule | None:
    name = node.args[index]
    owner = node.graph.owning_module
    if not isinstance(name, Node) or name.op != "get_attr" or owner is None:
        return None
    found = getattr(owner, str(name.target), None)
    return found if isinstance(found, GraphModule) else None


def read(node: Node) -> Function | str:
    """What the function computes, or why this cannot be said."""
    forward, backward = _body(node, 0), _body(node, 1)
    users, operands = list(node.users), tuple(node.args[2:])
    if forward is None or backward is None:
        return "the autograd function has no bodies"
    if len(users) != 1 or d.raw_name(users[0]) != "getitem" or node.kwargs.get("non_differentiable_idx"):
        return "the autograd function gives back several values"
    first = bodies.read(forward, [argument(i) for i in range(len(operands))])
    if isinstance(first, str):
        return f"in the autograd function {first}"
    made, saved = _halves(first.result)
    if made is None:
        return "the autograd function gives back several values"
    if made.kind == "computed":
        return f"in the autograd function {made}"
    if first.written and not all(made.kind == SUM and made.of == (term,) for term in first.written):
        return "the autograd function writes into what it is given"
    second = bodies.read(backward, [GRADIENT, *[s if isinstance(s, Term) else Term("number") for s in saved]])
    if isinstance(second, str):
        return f"in the autograd function's backward {second}"
    if second.written - {GRADIENT}:
        return "the autograd function's backward writes into what was saved"
    gradients = second.result if isinstance(second.result, tuple) else (second.result,)
    if len(gradients) != len(operands):
        return "in the autograd function's backward other gradients are given back than it has operands"
    read_bodies = tuple(a for a in node.args[:2] if isinstance(a, Node))
    return Function(node, users[0], operands, made, gradients, read_bodies, saved)


def _halves(found: Any) -> tuple[Term | None, tuple[Any, ...]]:
    """The only result and what is saved, from ((result,), (saved, …))."""
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], tuple):
        return None, ()
    first = found[0]
    while isinstance(first, tuple) and len(first) == 1:
        first = first[0]
    return (first if isinstance(first, Term) else None), found[1]


def _region(node: Node) -> tuple[Function, Node, Term] | str:
    """A function of one tensor, that tensor, and its gradient."""
    tensors = _tensors(node)
    if len(tensors) != 1:
        return "the autograd function takes several tensors"
    function = read(node)
    if isinstance(function, str):
        return function
    gradient = function.gradients[function.operands.index(tensors[0])]
    if gradient is None:
        return "the autograd function's backward gives back no gradient"
    before, after = d.tensor(tensors[0]), d.tensor(function.value)
    if before is None or after is None or not same_shape(before.shape[1:], after.shape[1:]):
        return "the autograd function changes the shape of its rows"
    return function, tensors[0], gradient


def _forward(function: Function, operand: Node, kind: str) -> Group | str:
    """The group over which the function does this with its operand."""
    made, only = function.forward, argument(function.operands.index(operand))
    if made.kind != kind or made.of != (only,) or made.group is None:
        return f"the autograd function does not give back its operand's {kind}"
    return "the group has one rank: nothing is communicated" if made.group.size == 1 else made.group


def _other(gradient: Term, what: str) -> str:
    if gradient.kind == "computed":
        return f"in the autograd function's backward {gradient}"
    if gradient.of == (GRADIENT,) and gradient.group is not None:
        what = "another group" if what in gradient.kind else f"the {gradient.kind} over ranks"
        return f"the autograd function's backward gives back {what}"
    return f"the autograd function's backward gives back no {what} of the gradient"


def reduction_of(node: Node) -> Reduction | str | None:
    """The reduction that this function is; None where it reduces nothing, a reason where it does more."""
    if not holds(node, SUM):
        return None
    found = _region(node)
    if isinstance(found, str):
        return found
    function, operand, gradient = found
    group = _forward(function, operand, SUM)
    if isinstance(group, str):
        return group
    if gradient not in (GRADIENT, over_ranks(SUM, GRADIENT, group)):
        return _other(gradient, SUM)
    meaning = "identity" if gradient == GRADIENT else "all_reduce"
    run = partial(pretend.all_reduce, size=group.size, gradient=meaning)
    stand_ins = function.stand_ins((operand,), run, (SUM, meaning))
    return Reduction(
        node, operand, group, function.value, False, function.nodes, meaning, False, stand_ins
    )  # fmt: skip


def exchange_of(node: Node, kind: str) -> Exchange | str | None:
    """The reduce-scatter or all-gather of rows that this function is; None where it has none."""
    if not holds(node, kind):
        return None
    found = _region(node)
    if isinstance(found, str):
        return found
    function, operand, gradient = found
    group = _forward(function, operand, kind)
    if isinstance(group, str):
        return group
    back = GATHERED if kind == SCATTERED else SCATTERED
    if gradient != over_ranks(back, GRADIENT, group):
        return _other(gradient, back)
    run = pretend.reduce_scatter if kind == SCATTERED else pretend.all_gather
    stand_ins = function.stand_ins((operand,), partial(run, size=group.size), (kind, group.size))
    return Exchange(node, operand, group, function.value, function.nodes, stand_ins=stand_ins)


def copied_over(node: Node) -> Group | None:
    """The group of a function that gives back its argument, and whose gradient is the sum of the gradients."""
    if not holds(node, SUM, backward=True):
        return None
    found = _region(node)
    if isinstance(found, str):
        return None
    function, operand, gradient = found
    if function.forward != argument(function.operands.index(operand)) or gradient.group is None:
        return None
    return gradient.group if gradient == over_ranks(SUM, GRADIENT, gradient.group) else None


def group_of(node: Node) -> Group | None:
    """The group of the first collective in the function's bodies."""
    for body in (_body(node, 0), _body(node, 1)):
        for inner in body.graph.nodes if body is not None else ():
            of_rows = is_scatter(inner) or is_gather(inner)
            if of_rows or is_all_reduce(inner):
                found = groups.group_of(exchanges.group_argument(inner) if of_rows else group_argument(inner))
                return found if isinstance(found, Group) else None
    return None
