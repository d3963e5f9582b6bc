"""What a rotation is replaced by: its tables, written once for all layers, and the nodes that go."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import algebra
from npu_fuse import dialect as d
from npu_fuse.emit import Emitter
from npu_fuse.rotation_tables import Table
from npu_fuse.view import View


def narrowing_tail(view: View, output: Node) -> tuple[Node, list[Node]]:
    """The casts behind the result that narrow it, where nobody else sees the wide value."""
    tail: list[Node] = []
    while len(output.users) == 1:
        user = next(iter(output.users))
        if not user.op.startswith("call") or d.name(user) != "cast" or not view.same_version(output, user):
            break
        before, after = d.tensor(output), d.tensor(user)
        if before is None or after is None or after.dtype.itemsize >= before.dtype.itemsize:
            break
        tail.append(user)
        output = user
    return output, tail


def nodes_between(view: View, output: Node, inputs: tuple[Node, ...], allowed: set[Node]) -> algebra.Between:
    """What the fused op replaces: the way from its inputs, writes into a fresh buffer included."""
    writes = [n for n in allowed if n.target is operator.setitem]
    return algebra.between(view, [output, *writes], inputs, lambda n: n in allowed or d.name(n) == "cast")


def emit_table(e: Emitter, node: Any, table: Table, dtype: torch.dtype) -> Any:
    """r1 or r2, once for all layers that use the same cos or sin."""

    def build(value: Any) -> Any:
        if table.part:
            parts = e.call(torch.view_as_real, e.call(torch.resolve_conj, value))
            value = e.call(torch.select, parts, -1, 0 if table.part == "real" else 1)
        if table.flatten:
            value = e.call(torch.flatten, value, -table.flatten)
        if table.arrange == "tile":
            value = e.call(torch.cat, (value, value), -1)
        elif table.arrange == "repeat":
            value = e.call(torch.repeat_interleave, value, 2, -1)
        elif table.arrange:
            value = e.call(torch.stack, tuple(e.call(torch.select, value, -1, i) for i in table.arrange), -1)
        if isinstance(table.sign, tuple):
            value = _signed(e, value, table.sign)
        elif table.sign == -1:
            value = e.call(torch.neg, value)
        for i in table.insert:
            value = e.call(torch.unsqueeze, value, i)
        return e.cast(value, dtype)

    return e.shared((table.key, dtype), (node,), build)


def _signed(e: Emitter, value: Any, signs: tuple[int, ...]) -> Any:
    """Each element times its sign: runs of equal signs are negated and joined (no constant to bring to a device)."""
    parts, start = [], 0
    for sign, run in itertools.groupby(signs):
        length = len(list(run))
        part = e.call(torch.narrow, value, -1, start, length)
        parts.append(e.call(torch.neg, part) if sign == -1 else part)
        start += length
    return e.call(torch.cat, tuple(parts), -1)


def emit_deinterleave(e: Emitter, value: Any) -> Any:
    """[x0, x1, x2, x3, …] -> [x0, x2, …, x1, x3, …]."""
    return e.call(torch.cat, (value_slice(e, value, 0), value_slice(e, value, 1)), -1)


def value_slice(e: Emitter, value: Any, start: int) -> Any:
    return e.call(operator.getitem, value, (Ellipsis, slice(start, None, 2)))
