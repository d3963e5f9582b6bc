"""The canonical view of one graph: value numbers, versions of mutated storages, scopes, source lines.

The graph itself is not touched. Everything here is one sweep, linear in nodes, and asks sizes only
in ways that add no guard (`str(size)`, identity).
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from npu_fuse import dialect as d
from npu_fuse.sites import Site

NUMBERED = d.MOVEMENT | d.POINTWISE | d.REDUCTIONS | {"cast", "rms_norm", "normalize", "detach", "polar"}


@dataclass
class View:
    """What rules read. Build it with `view_of`; it is valid until the graph is edited."""

    graph: Graph
    nodes: list[Node]
    position: dict[Node, int] = field(default_factory=dict)
    value_number: dict[Node, int] = field(default_factory=dict)
    scope: dict[Node, int] = field(default_factory=dict)
    in_functorch: set[Node] = field(default_factory=set)
    storage: dict[Node, int] = field(default_factory=dict)
    mutations: dict[int, list[int]] = field(default_factory=dict)
    """Positions at which each mutated storage is written."""
    aliases: dict[int, list[Node]] = field(default_factory=dict)
    """The nodes that share each mutated storage."""
    claimed: dict[Node, str] = field(default_factory=dict)
    """Nodes inside a site found by an earlier rule, and the rule's name."""
    found: list[Site] = field(default_factory=list)
    """Sites found so far, for rules that compose them."""
    outputs: set[Node] = field(default_factory=set)
    """Outputs of sites found so far: values that a later rule takes as they are."""
    memo: dict[Hashable, Any] = field(default_factory=dict)
    """Answers of rules that hold for every site of the same structure."""
    calls: dict[str, list[Node]] = field(default_factory=dict)
    """Calls by canonical name, in the graph's order."""

    def named(self, *names: str) -> list[Node]:
        """Calls of these names, in the graph's order."""
        lists = [self.calls[name] for name in names if name in self.calls]
        if len(lists) == 1:
            return lists[0]
        return sorted((node for found in lists for node in found), key=self.position.__getitem__)

    def vn(self, node: Node) -> int:
        """Equal numbers mean equal values; casts between float types that lose nothing are erased."""
        return self.value_number[self.exact(node)]

    def exact(self, node: Node, reader: Node | None = None) -> Node:
        """The node before the float casts that lose nothing (to a type at least as wide).

        With a reader, only casts in its own grad mode and autocast region are passed.
        """
        while d.name(node) == "cast" and widens(node) and isinstance(node.args[0], Node):
            if not self.same_version(node.args[0], node):
                return node
            if reader is not None and self.scope[node] != self.scope[reader]:
                return node
            node = node.args[0]
        return node

    def version(self, node: Node, at: int) -> int:
        """How often the node's storage was written before position `at`."""
        writes = self.mutations.get(self.storage.get(node, -1))
        return bisect.bisect_left(writes, at) if writes else 0

    def same_version(self, node: Node, reader: Node) -> bool:
        """The reader sees the node's value as it was made."""
        if self.storage.get(node, -1) not in self.mutations:
            return True
        made = self.position[node] + (1 if d.mutates(node) else 0)
        return self.version(node, self.position[reader]) == self.version(node, made)

    def written_between(self, node: Node, first: Node, last: Node) -> bool:
        """The node's storage is written at or after `first` and before `last`."""
        writes = self.mutations.get(self.storage.get(node, -1))
        if not writes:
            return False
        return self.version(node, self.position[first]) != self.version(node, self.position[last])

    def written_after(self, node: Node, position: int) -> bool:
        writes = self.mutations.get(self.storage.get(node, -1))
        return writes is not None and bool(writes) and writes[-1] > position


def widens(node: Node) -> bool:
    """A float cast whose result holds every value of its operand."""
    before, after = d.tensor(node.args[0]), d.tensor(node)
    if before is None or after is None:
        return False
    return before.dtype == after.dtype or (
        before.dtype.itemsize < after.dtype.itemsize and after.dtype.is_floating_point
    )


def view_of(graph: Graph) -> View:
    """Number values, count writes and label scopes in one sweep."""
    nodes = list(graph.nodes)
    view = View(graph, nodes, {node: i for i, node in enumerate(nodes)})
    _find_mutations(view)
    _label_scopes(view)
    _number_values(view)
    return view


def _find_mutations(view: View) -> None:
    mutated: set[int] = set()
    for node in view.nodes:
        found = d.tensor(node)
        if found is None:
            continue
        try:
            key = found.untyped_storage()._cdata
            view.storage[node] = key
            if found._version > 0:
                mutated.add(key)
        except (RuntimeError, NotImplementedError):  # subclasses without a storage of their own
            continue
    for i, node in enumerate(view.nodes):
        if not d.mutates(node):
            if mutated and d.raw_name(node) == "autograd_function_apply":  # its body writes into its arguments
                written = {view.storage.get(n, -1) for n in node.all_input_nodes} & mutated
                for key in written | (_filled(view, node) & mutated):
                    view.mutations.setdefault(key, []).append(i)
            continue
        targets: list[Any] = [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema.arguments
            targets += [a for a, s in zip(node.args, schema, strict=False) if s.alias_info and s.alias_info.is_write]
        elif not targets:
            targets = [node.args[0] if node.args else node.kwargs.get("input")]
        for target in _flat_nodes(targets):
            key = view.storage.get(target, -1)
            if key != -1 and (not view.mutations.get(key) or view.mutations[key][-1] != i):
                view.mutations.setdefault(key, []).append(i)
    for key in mutated - set(view.mutations):
        # Written by something that no name tells: treat every position as a write.
        view.mutations[key] = list(range(len(view.nodes)))
    for node, key in view.storage.items():
        if key in view.mutations:
            view.aliases.setdefault(key, []).append(node)


def _filled(view: View, function: Node) -> set[int]:
    """Storages of an autograd function's results that its own body made, and that nobody wrote into but that body."""
    owner, name = function.graph.owning_module, function.args[0]
    body = getattr(owner, str(name.target), None) if isinstance(name, Node) else None
    if not isinstance(body, GraphModule):
        return set()
    given = body.graph.output_node().args[0]
    results = _flat_nodes(given[:1]) if isinstance(given, (tuple, list)) else []
    made = [t._version if (t := d.tensor(n)) is not None else 0 for n in results]
    found: set[int] = set()
    for user in function.users:
        value, index = d.tensor(user), user.args[1] if len(user.args) > 1 else None
        if value is not None and isinstance(index, int) and index < len(made) and 0 < value._version == made[index]:
            found.add(view.storage.get(user, -1))
    return found


def _flat_nodes(values: Iterable[Any]) -> list[Node]:
    found: list[Node] = []
    for item in values:
        if isinstance(item, Node):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            found += _flat_nodes(item)
    return found


def _label_scopes(view: View) -> None:
    """Grad mode, autocast regions and functorch levels are positions in a flat list.

    Autocast for a device that the graph has no tensor on changes nothing.
    """
    stack: list[str] = []
    devices: set[str] = set()
    grad: str = "ambient"
    depth = 0
    labels: dict[tuple[Any, ...], int] = {}
    label = labels.setdefault((grad, (), depth), 0)
    for node in view.nodes:
        view.scope[node] = label
        if depth > 0:
            view.in_functorch.add(node)
        raw = d.raw_name(node) if node.op == "call_function" else ""
        if not raw.startswith("_"):
            continue
        if raw == "_set_grad_enabled":
            grad = str(node.args[0])
        elif raw == "_enter_autocast":
            devices = devices or {t.device.type for n in view.nodes if (t := d.tensor(n)) is not None}
            stack.append(str(node.args) if node.args[0] in devices else "")
        elif raw == "_exit_autocast" and stack:
            stack.pop()
        elif raw.endswith("_increment_nesting"):
            depth += 1
        elif raw.endswith("_decrement_nesting"):
            depth -= 1
        label = labels.setdefault((grad, tuple(filter(None, stack)), depth), len(labels))
        view.scope[node] = label
        if depth > 0:
            view.in_functorch.add(node)


def _number_values(view: View) -> None:
    table: dict[Hashable, int] = {}
    for node in view.nodes:
        key: Hashable = ("node", node)
        if node.op == "get_attr":
            key = ("attr", node.target)
        elif node.op in ("call_function", "call_method"):
            name = d.name(node)
            view.calls.setdefault(name, []).append(node)
            if name in NUMBERED and not _impure(node):
                found = value_key(view, node)
                if found is not None:
                    key = (name, view.scope[node], *found)
        try:
            number = table.setdefault(key, len(table))
        except TypeError:
            number = table.setdefault(("node", node), len(table))
        view.value_number[node] = number


def _impure(node: Node) -> bool:
    return node.kwargs.get("out") is not None or node.target is operator.setitem


def value_key(view: View, node: Node) -> tuple[Hashable, ...] | None:
    """Operands as value numbers, everything else as text; None where an operand changed in between."""
    given = node.kwargs
    try:
        args = tuple([_encode(view, node, a) for a in node.args])
        kwargs = tuple([(k, _encode(view, node, given[k])) for k in sorted(given)]) if given else ()
    except _ChangedOperandError:
        return None
    found = d.tensor(node)
    return (args, kwargs, found.dtype if found is not None else None)


def _encode(view: View, reader: Node, arg: Any) -> Hashable:
    if isinstance(arg, Node):
        if not view.same_version(arg, reader):
            raise _ChangedOperandError
        return view.value_number[arg]
    if isinstance(arg, (tuple, list)):
        return ("tuple", *[_encode(view, reader, a) for a in arg])
    if isinstance(arg, slice):
        return ("slice", *[_encode(view, reader, a) for a in (arg.start, arg.stop, arg.step)])
    return (arg.__class__, str(arg))


class _ChangedOperandError(Exception):
    pass


def static(size: Any) -> int | None:
    """The integer that a size is known to be, symbolic or not; asks no guard."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else None


def same_size(left: Any, right: Any) -> bool:
    """Equal without asking a guard: the same integer, or symbolic ones that the guards so far make equal."""
    left, right = (s if static(s) is None else static(s) for s in (left, right))
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if isinstance(left, int) or isinstance(right, int):
        return False
    return bool(left.node.expr == right.node.expr) or statically_known_true(left == right)


def same_shape(left: Iterable[Any], right: Iterable[Any]) -> bool:
    first, second = list(left), list(right)
    return len(first) == len(second) and all(same_size(a, b) for a, b in zip(first, second, strict=True))


def is_one(size: Any) -> bool:
    return static(size) == 1
