"""Write the fused computation once; run it on tensors (the proof) or as graph nodes (lowering).

What is proved is what is emitted: a form is one function of an `Emitter`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.fx import Graph, Node

from npu_fuse import dialect as d
from npu_fuse import ops
from npu_fuse.targets import REFERENCE, Target

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


class Emitter(Protocol):
    """What a form may do. `target` says for whom it is written; a form may differ between targets."""

    target: Target

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Any torch function."""

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The target's op of that name."""

    def dense(self, value: Any) -> Any:
        """Contiguous where the target's op would not keep the strides that its meta kernel promises."""

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A rounding mark: lifted to float64 in the proof of equal functions."""

    def shared(self, key: Hashable, values: Sequence[Any], build: Callable[..., Any]) -> Any:
        """`build(*values)`, once per graph for the same key and values (tables of cos and sin)."""

    def filled(self, shape: Sequence[int], fill: float, like: Any, dtype: torch.dtype) -> Any:
        """A constant tensor on the device of `like`, made once per graph."""


class RunEmitter:
    """Runs a form on tensors with the reference ops. `lifted` computes everything in float64."""

    def __init__(self, lifted: bool = False, target: Target = REFERENCE) -> None:
        self.lifted = lifted
        self.target = target

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return ops.op(name)(*args, **kwargs)

    def dense(self, value: Any) -> Any:
        return value

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        return value.to(torch.float64 if self.lifted else dtype)

    def shared(self, key: Hashable, values: Sequence[Any], build: Callable[..., Any]) -> Any:
        return build(*values)

    def filled(self, shape: Sequence[int], fill: float, like: Any, dtype: torch.dtype) -> Any:
        return torch.full(tuple(shape), fill, device=like.device, dtype=torch.float64 if self.lifted else dtype)


class GraphEmitter:
    """Writes a form as nodes of the graph, behind `after`; shared values right behind what they need."""

    def __init__(
        self, graph: Graph, target: Target, fake_mode: FakeTensorMode | None, memo: dict[Hashable, Node]
    ) -> None:
        self.graph = graph
        self.target = target
        self.fake_mode = fake_mode
        self.memo = memo
        self.origin: Node | None = None
        self.made: list[Node] = []
        self.examples: dict[Hashable, Any] = {}

    def begin(self, origin: Node) -> None:
        """The nodes made from now on stand for `origin` (its source line, its module)."""
        self.origin = origin
        self.made = []

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        node = self.graph.call_function(function, args, kwargs)
        self.made.append(node)
        if self.origin is not None:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in self.origin.meta:
                    node.meta[key] = self.origin.meta[key]
        node.meta["npu_fuse"] = True
        self._fake(node, function, args, kwargs)
        return node

    def _fake(self, node: Node, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if self.fake_mode is None:
            return
        if function is operator.getitem and isinstance(found := d.value(args[0]), tuple):
            node.meta["example_value"] = found[args[1]]
            return
        values = torch.fx.node.map_arg(args, d.value)
        named = torch.fx.node.map_arg(kwargs, d.value)
        try:
            key = (function, _kind(values), _kind(named))
            known = key in self.examples
        except TypeError:  # an argument that cannot be hashed
            key, known = None, False
        if not known:
            with self.fake_mode, torch.no_grad():
                self.examples[key] = function(*values, **named)
        node.meta["example_value"] = self.examples[key]

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.target.resolve(name), *args, **kwargs)

    def dense(self, value: Any) -> Any:
        found = d.tensor(value)
        if self.target.name != "npu" or found is None or found.is_contiguous():
            return value
        return self.call(torch.Tensor.contiguous, value)

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        found = d.tensor(value)
        if found is not None and found.dtype == dtype:
            return value
        return self.call(torch.Tensor.to, value, dtype)

    def shared(self, key: Hashable, values: Sequence[Any], build: Callable[..., Any]) -> Any:
        full_key = (key, tuple(values))
        if full_key not in self.memo:
            latest = _latest([v for v in values if isinstance(v, Node)])
            if latest is None:
                self.memo[full_key] = build(*values)
            else:
                latest = _past_placeholders(latest)
                with self.graph.inserting_before(latest.next):
                    self.memo[full_key] = build(*values)
        return self.memo[full_key]

    def filled(self, shape: Sequence[int], fill: float, like: Any, dtype: torch.dtype) -> Any:
        found = d.tensor(like)
        device = found.device if found is not None else torch.device("cpu")
        key = ("filled", tuple(shape), fill, str(device), dtype)
        if key not in self.memo:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.memo[key] = self.call(torch.full, tuple(shape), fill, dtype=dtype, device=device)
        return self.memo[key]


def _kind(value: Any) -> Hashable:
    """Equal for arguments on which an op gives results of the same shapes, strides and dtypes. Adds no guard."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride())
        known = tuple([s if s.__class__ is int else _kind(s) for s in sizes])
        return (value.__class__, value.dtype, value.device, known)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("symbol", value.node.expr)
    if isinstance(value, (tuple, list)):
        return tuple([_kind(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _kind(v)) for k, v in sorted(value.items())])
    if isinstance(value, slice):
        return ("slice", _kind(value.start), _kind(value.stop), _kind(value.step))
    return (value.__class__, value)


def _latest(nodes: Sequence[Node]) -> Node | None:
    latest: Node | None = None
    for node in nodes:
        if latest is None or latest < node:
            latest = node
    return latest


def _past_placeholders(node: Node) -> Node:
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def item(emitter: Emitter, value: Any, index: int) -> Any:
    """One of several results of a call."""
    return emitter.call(operator.getitem, value, index)
