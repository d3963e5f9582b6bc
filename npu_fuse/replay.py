"""Run the nodes of a site again, small: leading dimensions shrunk, literal sizes rewritten to match.

A Dynamo graph carries literal sizes (`view(2, 4096, 32, 128)`). To run a few of its nodes on probes
that cost milliseconds at any width, each literal is re-derived from the sizes of the operands it is
applied to. Where that is not possible `CannotShrink` is raised and the caller takes larger probes.
Feature dimensions (the last `kept` of each input) keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from npu_fuse import dialect as d
from npu_fuse.sites import StandIn

SMALL = 4
"""Sizes up to this stay: the three position streams of mrope, two halves, four experts."""


FEATURE = 4
"""A symbolic width is about this many times a size of the pool."""


class CannotShrink(Exception):
    """A literal size of the site cannot be derived from the sizes of its operands."""


@dataclass(frozen=True)
class Sizes:
    """New values for leading sizes: literal ones by value, symbolic ones by symbol."""

    literal: Mapping[int, int] = field(default_factory=dict)
    symbols: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    kept: int = 1
    ranges: Mapping[int, int] = field(default_factory=dict)
    """New lengths of `arange`."""

    def of(self, size: Any, feature: bool = False) -> int:
        if isinstance(size, torch.SymInt):
            return self.evaluate(size.node.expr)
        return int(size) if feature else self.literal.get(int(size), int(size))

    def evaluate(self, expression: Any) -> int:
        substituted = sympy.sympify(expression).subs(self.symbols)
        if substituted.free_symbols:
            raise CannotShrink(f"size {expression} depends on something outside the site")
        return int(substituted)

    def shape(self, shape: Sequence[Any]) -> tuple[int, ...]:
        first_feature = len(shape) - self.kept
        return tuple(self.of(s, feature=i >= first_feature) for i, s in enumerate(shape))


ATTEMPTS = ((True, False), (False, False), (False, True))
"""(shrink, alike) of `choose_sizes`, in the order to try them."""


def choose_sizes(
    inputs: Sequence[Node], kept: int, pool: Sequence[int], shrink: bool = True, alike: bool = False
) -> Sizes:
    """Small sizes for every leading dimension of the inputs, taken from `pool` in order.

    shrink: literal sizes too. alike: each input's symbols get the pool from its start, for inputs whose symbols
    differ and whose sizes a guard holds equal ([s0 · s1, D] and [s2 · s3, D]).
    """
    literal: dict[int, int] = {}
    shapes = [found.shape for n in inputs if (found := d.local(n)) is not None]
    symbols = _feature_symbols(shapes, kept, pool)
    fresh = iter(pool)
    for shape in shapes:
        fresh = iter(pool) if alike else fresh
        for i, size in enumerate(shape):
            if isinstance(size, torch.SymInt):
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    if symbol not in symbols:
                        symbols[symbol] = next(fresh, 2)
            elif shrink and i < len(shape) - kept and size > SMALL and size not in literal:
                literal[size] = min(next(fresh, 2), size)
    return Sizes(literal, symbols, kept)


def _feature_symbols(shapes: Sequence[Any], kept: int, pool: Sequence[int]) -> dict[sympy.Symbol, int]:
    """Widths that are symbolic, another one for another pool: odd ones too, if they are not known to be even."""
    fresh = iter(pool)
    symbols: dict[sympy.Symbol, int] = {}
    for shape in shapes:
        for size in shape[max(0, len(shape) - kept) :]:
            if isinstance(size, torch.SymInt):
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    if symbol not in symbols:
                        small = next(fresh, 2)
                        even = statically_known_true(size % 2 == 0)
                        symbols[symbol] = FEATURE * small + (0 if even else small % 2)
    return symbols


Apply = Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]


NONE: Mapping[Node, StandIn] = {}


def replay(
    nodes: Sequence[Node], env: dict[Node, Any], sizes: Sizes, apply: Apply, stand_ins: Mapping[Node, StandIn] = NONE
) -> dict[Node, Any]:
    """Compute `nodes` in order from the values in `env`, by `apply(node, args, kwargs)` or by their stand-ins."""
    for node in nodes:
        other = stand_ins.get(node)
        if other is not None:
            env[node] = other.run(*[env[n] for n in other.operands])
            continue
        args, kwargs = resized(node, env, sizes)
        env[node] = apply(node, args, kwargs)
    return env


def resized(node: Node, env: Mapping[Node, Any], sizes: Sizes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with values from `env` and literal sizes made to fit them."""

    def look_up(arg: Any) -> Any:
        if isinstance(arg, Node):
            if arg in env:
                return env[arg]
            found = d.value(arg)
            if isinstance(found, torch.SymInt):
                return sizes.evaluate(found.node.expr)
            if isinstance(found, (int, float)):
                return found
            if isinstance(found, torch.Size):
                return torch.Size(sizes.shape(found))
            raise CannotShrink(f"operand {arg} lies outside the site")
        if isinstance(arg, tuple) and type(arg) is not tuple:
            return type(arg)(look_up(a) for a in arg)
        if isinstance(arg, (tuple, list)):
            return type(arg)(look_up(a) for a in arg)
        if isinstance(arg, slice):
            return slice(look_up(arg.start), look_up(arg.stop), look_up(arg.step))
        if isinstance(arg, torch.SymInt):
            return sizes.evaluate(arg.node.expr)
        return arg

    name = d.name(node)
    if name == "cast":
        return (look_up(node.args[0]),), {}
    if name in ("zeros", "new_zeros") and (made := d.tensor(node)) is not None:
        first = (look_up(node.args[0]),) if name == "new_zeros" else ()
        return (*first, sizes.shape(made.shape)), {"dtype": made.dtype}
    if name in d.LIKE_ANOTHER:
        return _like_another(node, look_up(node.args[0]), sizes), {}
    args = tuple(look_up(a) for a in node.args)
    kwargs = {k: look_up(v) for k, v in node.kwargs.items()}
    fix = _FIXES.get(name)
    if fix is None and name != "arange":
        return args, kwargs
    source, result = d.tensor(node.args[0]) if node.args else None, d.tensor(node)
    if name == "arange":
        return tuple(sizes.ranges.get(a, a) if isinstance(a, int) else a for a in args), kwargs
    if source is None or not isinstance(args[0], (torch.Tensor, _HasShape)):
        return args, kwargs
    assert fix is not None
    fixed: tuple[tuple[Any, ...], dict[str, Any]] = fix(args, kwargs, source, result, sizes)
    return fixed


def _like_another(node: Node, value: Any, sizes: Sizes) -> tuple[Any, Any]:
    """`x.view_as(y)`: any tensor of y's new shape will do."""
    source, result = d.tensor(node.args[0]), d.tensor(node)
    if source is None or result is None:
        raise CannotShrink(f"{d.name(node)} of something that is no tensor")
    if d.name(node) == "expand_as":
        shape = _expand((value,), {}, source, result, sizes)[0][1]
    else:
        shape = regroup(list(source.shape), list(value.shape), list(result.shape), sizes)
    return value, torch.empty((), dtype=torch.int64).expand(shape)


class _HasShape:
    """Values that stand for tensors (the index tracer's) share this base."""

    shape: tuple[int, ...]


def _unchanged(old: Sequence[Any], new: Sequence[int]) -> bool:
    return all(isinstance(o, int) and o == n for o, n in zip(old, new, strict=True))


def _view(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    old_in, new_in = list(source.shape), list(args[0].shape)
    if result is None or _unchanged(old_in, new_in) or (len(args) > 1 and isinstance(args[1], torch.dtype)):
        return args, kwargs
    return (args[0], regroup(old_in, new_in, list(result.shape), sizes)), {}


def regroup(old_in: list[Any], new_in: list[int], old_out: list[Any], sizes: Sizes) -> tuple[int, ...]:
    """The output shape of a reshape on `new_in` that does what `old_in -> old_out` does."""
    old_in_n, old_out_n = [_concrete(s) for s in old_in], [_concrete(s) for s in old_out]
    new_out = [1] * len(old_out)
    ins = [i for i, s in enumerate(old_in_n) if s != 1]
    outs = [i for i, s in enumerate(old_out_n) if s != 1]
    a = b = 0
    while a < len(ins) or b < len(outs):
        left: list[int] = []
        right: list[int] = []
        product_in = product_out = 1
        while not left or not right or product_in != product_out:
            if (product_in <= product_out and a < len(ins)) or b >= len(outs):
                if a >= len(ins):
                    raise CannotShrink(f"reshape {old_in} to {old_out}")
                left.append(ins[a])
                product_in *= old_in_n[ins[a]]
                a += 1
            else:
                right.append(outs[b])
                product_out *= old_out_n[outs[b]]
                b += 1
        total = math.prod(new_in[i] for i in left)
        if len(right) == 1:
            new_out[right[0]] = total
        elif all(new_in[i] == old_in_n[i] for i in left):
            for j in right:
                new_out[j] = old_out_n[j]
        else:
            _split_group(left, right, old_in_n, new_in, old_out, new_out, total, sizes)
    return tuple(new_out)


def _split_group(left: list[int], right: list[int], old_in: list[int], new_in: list[int], old_out: list[Any],
                 new_out: list[int], total: int, sizes: Sizes) -> None:  # fmt: skip
    """[B*S] -> [B, S], or [S, H*D] -> [S*H, D]: take the known sizes and check the product."""
    last = right[-1]
    feature = left[-1] == len(old_in) - 1 and new_in[left[-1]] == old_in[left[-1]]
    for j in right:
        keep = j == last and feature and last == len(old_out) - 1
        new_out[j] = _concrete(old_out[j]) if keep else sizes.of(old_out[j])
    if math.prod(new_out[j] for j in right) != total:
        rest = math.prod(new_out[j] for j in right[1:])
        if total % rest:
            raise CannotShrink("a split of a shrunk dimension")
        new_out[right[0]] = total // rest


def _concrete(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    if hint is None:
        raise CannotShrink("an unbacked size")
    return int(hint)


def _expand(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    if result is None:
        return args, kwargs
    old_in, new_in = [None] * (result.dim() - source.dim()) + list(source.shape), list(args[0].shape)
    new_in = [1] * (result.dim() - len(new_in)) + new_in
    shape = []
    for i, (old, new, out) in enumerate(zip(old_in, new_in, result.shape, strict=True)):
        widened = old is None or (isinstance(old, int) and old == 1 and not (isinstance(out, int) and out == 1))
        feature = i >= result.dim() - sizes.kept
        shape.append(sizes.of(out, feature) if widened else new)
    return (args[0], tuple(shape)), {}


def _index(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    """`x[...]`: a slice of a shrunk dimension must cover it."""
    index = args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(1 for i in items if i is not None and i is not Ellipsis)
    dim = 0
    fixed: list[Any] = []
    for item in items:
        if item is Ellipsis:
            dim = source.dim() - (consumed - _consumed_before(items, item))
            fixed.append(item)
        elif item is None:
            fixed.append(item)
        else:
            fixed.append(_cover(item, source.shape[dim], args[0].shape[dim]))
            dim += 1
    return (args[0], tuple(fixed) if isinstance(index, tuple) else fixed[0]), kwargs


def _consumed_before(items: list[Any], marker: Any) -> int:
    count = 0
    for item in items:
        if item is marker:
            return count
        count += item is not None
    return count


def _cover(item: Any, old: Any, new: int) -> Any:
    if isinstance(old, torch.SymInt) or old == new:
        return item
    if isinstance(item, torch.Tensor) and item.dtype in (torch.int32, torch.int64):
        return item  # computed on the way: a row that is not there fails when it is read
    if isinstance(item, slice) and item.step in (None, 1) and item.start in (None, 0):
        if item.stop is None or item.stop >= old:
            return slice(None)
    if isinstance(item, slice) and item.stop is None and isinstance(item.step, int) and not old % item.step:
        if not new % item.step and 0 <= (item.start or 0) < item.step:
            return item  # every step-th of a multiple
    if isinstance(item, int) and -new <= item < new:
        return item  # one row is like another
    raise CannotShrink("an index into a shrunk dimension")


def _splitting(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    old, new = source.shape[dim], args[0].shape[dim]
    if not isinstance(old, torch.SymInt) and old != new:
        raise CannotShrink("a split along a shrunk dimension")
    return args, kwargs


def _chunking(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    """Equal parts stay equal parts."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    parts = args[1] if len(args) > 1 else kwargs.get("chunks")
    old, new = source.shape[dim], args[0].shape[dim]
    if isinstance(old, int) and isinstance(parts, int) and old % parts == 0 and new % parts == 0:
        return args, kwargs
    return _splitting(args, kwargs, source, result, sizes)


def _counting(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    """`histc` with one bin for each expert."""
    given = dict(zip(("bins", "min", "max"), args[1:], strict=False)) | kwargs
    bins = given.get("bins", 100)
    if bins not in sizes.literal:
        return args, kwargs
    if given.get("min") != 0 or given.get("max") != bins - 1:
        raise CannotShrink("bins of other values than indices")
    return args[:1], {"bins": sizes.literal[bins], "min": 0, "max": sizes.literal[bins] - 1}


def _counting_all(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    if kwargs.get("minlength") in sizes.literal:
        return args, {**kwargs, "minlength": sizes.literal[kwargs["minlength"]]}
    return args, kwargs


def _dividing(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    """The token of a slot: slots by experts of each."""
    return (args[0], sizes.literal.get(args[1], args[1]) if isinstance(args[1], int) else args[1], *args[2:]), kwargs


def _repeating(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    """Rows repeated k times, k being the size of another dimension (a token's experts)."""
    repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
    if not isinstance(repeats, int) or repeats not in sizes.literal:
        return args, kwargs
    rest = {k: v for k, v in kwargs.items() if k not in ("repeats", "output_size")}
    return (args[0], sizes.literal[repeats], *args[2:]), rest


def _tiling(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    """All of it once for each of something that has shrunk (experts)."""
    given = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return (args[0], tuple(sizes.literal.get(r, r) if isinstance(r, int) else r for r in given)), kwargs


def _selecting(args: Any, kwargs: Any, source: Any, result: Any, sizes: Sizes) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    old, new = source.shape[dim], args[0].shape[dim]
    if isinstance(old, torch.SymInt) or old == new:
        return args, kwargs
    if len(args) > 3 and args[2] in (0, None) and isinstance(args[3], int) and args[3] >= old:
        return (args[0], dim), kwargs
    raise CannotShrink("a selection along a shrunk dimension")


_FIXES: dict[str, Callable[..., Any]] = {
    "view": _view, "reshape": _view, "expand": _expand, "broadcast_to": _expand, "getitem": _index,
    "chunk": _chunking, "split": _splitting, "unsafe_split": _splitting, "unsafe_chunk": _chunking,
    "repeat_interleave": _repeating, "repeat": _tiling, "tensor_split": _splitting, "slice": _selecting,
    "narrow": _selecting, "select": _selecting, "histc": _counting, "bincount": _counting_all,
    "floordiv": _dividing, "floor_divide": _dividing,
}  # fmt: skip
