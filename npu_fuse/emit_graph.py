"""Write a form into a graph: the nodes, their example values, and where they stand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from npu_fuse import dialect as d
from npu_fuse.emit import without_writing
from npu_fuse.groups import Group, communicator
from npu_fuse.targets import Target
from npu_fuse.view import same_size, static

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


class GraphEmitter:
    """Writes a form as nodes of the graph, behind `after`; shared values right behind what they need."""

    example = "example_value"
    """The key under which the graph's nodes carry their example values."""

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
        self.written: set[Node] = set()
        """Values that the graph writes into somewhere: what is made of them depends on where it is made."""
        self.scope: dict[Node, int] = {}
        """Grad mode and autocast of each node, as numbers: what is made under others is something else."""

    def begin(self, origin: Node) -> None:
        """The nodes made from now on stand for `origin` (its source line, its module)."""
        self.origin = origin
        self.made = []

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        node = self.graph.call_function(function, args, kwargs)
        self._mark(node)
        self._fake(node, function, args, kwargs)
        return node

    def _mark(self, node: Node) -> None:
        """Ours, and written where its origin was."""
        self.made.append(node)
        if self.origin is not None:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in self.origin.meta:
                    node.meta[key] = self.origin.meta[key]
        node.meta["npu_fuse"] = True

    def _fake(self, node: Node, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if self.fake_mode is None:
            return
        if function is operator.getitem and isinstance(found := d.value(args[0]), tuple):
            node.meta[self.example] = found[args[1]]
            return
        values = torch.fx.node.map_arg(args, d.value)
        named = torch.fx.node.map_arg(kwargs, d.value)
        trained = self._carries_gradient(node)
        try:
            key = (function, _kind(values), _kind(named), trained)
            known = key in self.examples
        except TypeError:  # an argument that cannot be hashed
            key, known = None, False
        if not known:
            with self.fake_mode, torch.no_grad():
                self.examples[key] = _with_gradient(function(*values, **named), trained)
        node.meta[self.example] = self.examples[key]

    def _carries_gradient(self, node: Node) -> bool:
        """Rules that look at the graph later ask which values are trained."""
        result = d.tensor(self.origin) if self.origin is not None else None
        if result is None or not result.requires_grad:
            return False
        return any(t.requires_grad for n in node.all_input_nodes for t in _tensors(d.value(n)))

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
        made = self.call(torch.Tensor.to, value, dtype)
        if found is not None and found.dtype.itemsize < dtype.itemsize:
            _cheap_to_make_again(made)
        return made

    def cheap(self, value: Any) -> Any:
        node = value
        while isinstance(node, Node) and d.name(node) in CHEAP and not d.mutates(node):
            operands = d.tensors_in(node)
            if len(operands) != 1:
                break
            _cheap_to_make_again(node)
            node = operands[0]
        return value

    def again(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        recorded = d.tensor(node)
        if d.name(node) == "cast" and recorded is not None:
            return self.cast(args[0], recorded.dtype)
        return self.call(without_writing(node), *args, **{k: v for k, v in kwargs.items() if k != "inplace"})

    def moved(self, node: Node, value: Any) -> Any:
        return self.call(d.function_of(node), value, *node.args[1:], **node.kwargs)

    def local(self, value: Any) -> Any:
        found = d.tensor(value)
        kind: Any = type(found)
        return self.call(kind.to_local, value) if hasattr(found, "_local_tensor") else value

    def wrapped(self, value: Any, like: Any, placements: Sequence[Any]) -> Any:
        from npu_fuse.dtensors import wrap_like

        return self.call(wrap_like, value, like, tuple(placements))

    def size(self, size: Any, like: Any) -> Any:
        known = static(size)
        if known is not None:
            return known
        found = d.local(like)
        for i, other in enumerate(found.shape if found is not None else ()):
            if same_size(size, other):
                return self.call(torch.Tensor.size, like, i)
        raise LookupError(f"the size {size} is no size of {like}")

    def group(self, group: Group) -> str:
        return group.name

    def communicator(self, group: Group) -> str:
        return communicator(group.name)

    def shared(self, key: Hashable, values: Sequence[Any], build: Callable[..., Any]) -> Any:
        if any(v in self.written for v in values if isinstance(v, Node)):
            return build(*values)
        scope = self.scope.get(self.origin) if self.origin is not None else None
        full_key = (key, tuple(values), scope)
        if full_key not in self.memo:
            latest = _latest([v for v in values if isinstance(v, Node)])
            if latest is None:
                self.memo[full_key] = build(*values)
            else:
                latest = _past_placeholders(latest)
                while self.scope.get(latest, scope) != scope and latest.next is not self.origin:
                    latest = latest.next
                with self.graph.inserting_before(latest.next):
                    self.memo[full_key] = build(*values)
        return self.memo[full_key]

    def unwidened(self, value: Any) -> Any:
        if not isinstance(value, Node) or not value.args or not isinstance(value.args[0], Node):
            return value
        source = value.args[0]
        if d.moves(value) and d.name(value) != "getitem" and value.all_input_nodes == [source]:
            narrow = self.unwidened(source)
            return (
                value if narrow is source else self.call(d.function_of(value), narrow, *value.args[1:], **value.kwargs)
            )
        before, after = d.tensor(source), d.tensor(value)
        if before is None or after is None or (before.dtype, after.dtype) != (torch.int32, torch.int64):
            return value
        return source if value.meta.get("npu_fuse") and d.name(value) == "cast:other" else value

    def filled(self, shape: Sequence[int], fill: float, like: Any, dtype: torch.dtype) -> Any:
        found = d.tensor(like)
        device = found.device if found is not None else torch.device("cpu")
        key = ("filled", tuple(shape), fill, str(device), dtype)
        if key not in self.memo:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.memo[key] = self.call(torch.full, tuple(shape), fill, dtype=dtype, device=device)
        return self.memo[key]


CHEAP = frozenset(("cast", "add", "sub", "mul", "div", "reshape", "view"))


def _cheap_to_make_again(node: Node) -> None:
    """Autograd keeps the narrow value: AOTAutograd would keep the wide one, which an opaque op reads."""
    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    node.meta.setdefault("ac_graph_id", 0)


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def _with_gradient(value: Any, wanted: bool) -> Any:
    for found in _tensors(value) if wanted else ():
        if found.is_floating_point() and not found.requires_grad:
            found.requires_grad_()
    return value


def _kind(value: Any) -> Hashable:
    """Equal for arguments on which an op gives results of the same shapes, strides and dtypes. Adds no guard."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride())
        known = tuple([s if s.__class__ is int else _kind(s) for s in sizes])
        return (value.__class__, value.dtype, value.device, known, getattr(value, "placements", None))
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
