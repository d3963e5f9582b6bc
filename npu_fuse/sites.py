"""The words between rules, proof and lowering: `Site`, `Form`, `Miss`, `Rule`.

A rule recognises; it never edits the graph. A site says which nodes are replaced, what goes in, and
in which forms the fused computation may be written; the proof picks the first form that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from npu_fuse.emit import Emitter
    from npu_fuse.report import Status
    from npu_fuse.targets import Target
    from npu_fuse.view import View

Emit = Callable[["Emitter", Mapping[Node, Any]], Any]
"""Writes the fused computation: called with proxies of the site's inputs, returns the output's."""
MakeInput = Callable[[Mapping[Node, Any], tuple[int, ...], int, "Generator"], "Tensor"]
"""Values of an input for one probe: from the inputs before it, its shape, the probe's index, a generator."""


@dataclass(frozen=True)
class StandIn:
    """How a proof computes a node that it cannot run (a collective): `run` on the values of `operands`."""

    operands: tuple[Node, ...]
    run: Callable[..., Any]
    key: Hashable
    """What the node does, in the proof's key in place of its target and arguments."""


def passed_on(operand: Node, key: Hashable = "same") -> StandIn:
    """For a node that gives on what it is given: a wait, an item, a change of description."""
    return StandIn((operand,), _itself, key)


def _itself(value: Any) -> Any:
    return value


def _nothing() -> None:
    return None


NO_VALUE = StandIn((), _nothing, "body")
"""For a node that stands for no tensor: the body of a function."""


@dataclass(frozen=True)
class Form:
    """One way to write a site. `emit` uses no literal size but those of the feature dimensions."""

    name: str
    emit: Emit
    key: tuple[Any, ...] = ()
    """What `emit` depends on besides the inputs: part of the proof's key."""
    note: str = ""
    """For the report, where this form is taken."""
    also: tuple[Emit, ...] = ()
    """Other roundings of the same kernel (its tiling decides): each must pass the proof as well."""


@dataclass(frozen=True)
class Site:
    """A computation that a fused op can replace.

    `inputs` are the values that go in, in order; `nodes` every node between them and `output`
    (itself included), in the order of the graph.
    """

    op: str
    output: Node
    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    forms: tuple[Form, ...]
    anchor: Node
    params: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra_outputs: tuple[Node, ...] = ()
    """Further nodes that the fused op computes too (the sum of add + RMSNorm); `emit` returns a tuple."""
    twins: tuple[tuple[Node, Node], ...] = ()
    """Nodes that the original reads in an input's place: they compute the same value once more."""
    replaces: Site | None = None
    """The simpler site that this one contains: it is taken where this one is refused."""
    probes: Mapping[Node, MakeInput] = field(default_factory=dict)
    """Inputs that no random numbers can stand for: indices of experts, ends of groups."""
    pool: tuple[int, ...] | None = None
    """Sizes that the proof shrinks to, where a kernel asks for aligned ones."""
    sizes: Mapping[int, int] = field(default_factory=dict)
    """Literal sizes that shrink together: a gated projection stays twice as wide as what follows it."""
    ranges: Mapping[int, tuple[Any, Any]] = field(default_factory=dict)
    """Literal lengths of ranges, each as the product of two sizes of inputs."""
    stand_ins: Mapping[Node, StandIn] = field(default_factory=dict)
    """Nodes that the proof computes in another way: what talks to other ranks."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What targets ask: dtype, gamma, operands that have to be concatenated…"""


@dataclass(frozen=True)
class Miss:
    """A candidate whose spine matched and that is no site. `reason` is a fact about the graph."""

    op: str
    anchor: Node
    code: str
    reason: str


@dataclass(frozen=True)
class Refusal:
    """A limit of the target that a form of a site breaks, with its source in the reason."""

    status: Status
    code: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """One fused op: its name, how to find it, and what targets cannot run."""

    name: str
    recognise: Callable[[View], list[Site | Miss]]
    limits: Callable[[Site, Form, Target], Refusal | None] | None = None
    training: bool = True
    """False where the fused op has no backward: the site is then left to the rules it composes."""
    first: bool = False
    """Rewritten before all others are looked for: they read what it leaves."""
    communicates: bool = False
    """Its sites talk to other ranks, which must fuse alike."""
    order: int = 20
    """Rules of a lower order come first; a composition needs what it composes before it."""
