"""Write the fused computation once; run it on tensors (the proof) or as graph nodes (lowering).

What is proved is what is emitted: a form is one function of an `Emitter`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse import ops, pretend
from npu_fuse.groups import Group
from npu_fuse.replay import Sizes, resized
from npu_fuse.targets import REFERENCE, Target


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

    def cheap(self, value: Any) -> Any:
        """Small, and pointwise of what is kept anyway (`1 + w`): backward makes it again and keeps nothing."""

    def again(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A node of the site once more, on other operands. It writes into none of them."""

    def moved(self, node: Node, value: Any) -> Any:
        """A movement node of the site once more, on another value of its operand's shape."""

    def local(self, value: Any) -> Any:
        """A rank's own part of a DTensor; other tensors as they are."""

    def wrapped(self, value: Any, like: Any, placements: Sequence[Any]) -> Any:
        """A DTensor on the mesh of `like`, of which this rank holds `value`."""

    def size(self, size: Any, like: Any) -> Any:
        """A size of the graph where the form runs; one that is not known is found among those of `like`."""

    def group(self, group: Group) -> str:
        """A process group as the ops of collectives take it: by name, in a proof a pretended one."""

    def communicator(self, group: Group) -> str:
        """A process group as the NPU's own ops take it: by HCCL's name, in a proof a pretended one."""

    def shared(self, key: Hashable, values: Sequence[Any], build: Callable[..., Any]) -> Any:
        """`build(*values)`, once per graph for the same key and values (tables), but for values that are written."""

    def unwidened(self, value: Any) -> Any:
        """Whole numbers before a cast to wider ones that npu_fuse has written itself."""

    def filled(self, shape: Sequence[int], fill: float, like: Any, dtype: torch.dtype) -> Any:
        """A constant tensor on the device of `like`, made once per graph."""


class RunEmitter:
    """Runs a form on tensors with the reference ops. `lifted` computes everything in float64."""

    def __init__(self, lifted: bool = False, target: Target = REFERENCE, sizes: Sizes | None = None) -> None:
        self.lifted = lifted
        self.target = target
        self.sizes = sizes

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return ops.op(name)(*args, **kwargs)

    def dense(self, value: Any) -> Any:
        return value

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        return value.to(torch.float64 if self.lifted else dtype)

    def cheap(self, value: Any) -> Any:
        return value

    def again(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        recorded = d.tensor(node)
        if d.name(node) == "cast" and recorded is not None:
            return self.cast(args[0], recorded.dtype)
        if self.lifted:
            args, kwargs = [_in_float64(a) for a in args], {k: _in_float64(v) for k, v in kwargs.items()}
        result = without_writing(node)(*args, **{k: v for k, v in kwargs.items() if k != "inplace"})
        if recorded is not None and recorded.is_floating_point() and not self.lifted:
            return result.to(recorded.dtype)  # what autocast made of it
        return result

    def moved(self, node: Node, value: Any) -> Any:
        source = node.args[0]
        assert isinstance(source, Node)
        args, kwargs = resized(node, {source: value}, self.sizes or Sizes())
        return d.function_of(node)(*args, **kwargs)

    def local(self, value: Any) -> Any:
        return value

    def wrapped(self, value: Any, like: Any, placements: Sequence[Any]) -> Any:
        return value

    def size(self, size: Any, like: Any) -> Any:
        return (self.sizes or Sizes()).of(size)

    def group(self, group: Group) -> str:
        return pretend.name(group.size)

    def communicator(self, group: Group) -> str:
        return pretend.name(group.size)

    def shared(self, key: Hashable, values: Sequence[Any], build: Callable[..., Any]) -> Any:
        return build(*values)

    def unwidened(self, value: Any) -> Any:
        return value

    def filled(self, shape: Sequence[int], fill: float, like: Any, dtype: torch.dtype) -> Any:
        return torch.full(tuple(shape), fill, device=like.device, dtype=torch.float64 if self.lifted else dtype)


def _in_float64(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


_NOT_IN_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}  # fmt: skip


def without_writing(node: Node) -> Callable[..., Any]:
    """The function that computes what the node computes, and leaves its operands as they are."""
    name = d.raw_name(node)
    out_of_place = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if node.op == "call_method":
        return getattr(torch.Tensor, out_of_place)  # type: ignore[no-any-return]
    function = d.function_of(node)
    if function in _NOT_IN_PLACE:
        return _NOT_IN_PLACE[function]
    if not d.mutates(node) or node.kwargs.get("inplace") is True:
        return function
    return getattr(torch, out_of_place)  # type: ignore[no-any-return]


def item(emitter: Emitter, value: Any, index: int) -> Any:
    """One of several results of a call."""
    return emitter.call(operator.getitem, value, index)
