"""Follow every element of a few nodes: movement becomes an index map, sums of products polynomials.

The nodes are run on int64 tensors whose elements are ids of polynomials in the elements of the
leaves. Movement needs no table of spellings: `roll`, `flip`, `stack + flatten` run as they are, on
ids. Products and sums combine ids through a hash-consed table, so equal values have equal ids.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.contractions import Contraction, aligned, contraction_of
from npu_fuse.replay import Sizes, replay

Monomial = tuple[tuple[int, ...], float]
"""Sorted ids of leaf elements, and the coefficient."""
Polynomial = tuple[Monomial, ...]

MAX_TERMS, MAX_FACTORS = 4, 3
UNKNOWN = -1
BUFFERS = frozenset(("empty_like", "zeros_like", "ones_like"))
"""Fresh buffers that a rule accepts where every element is written afterwards."""


class Untraceable(Exception):
    """A node of the site is neither movement nor a short sum of products."""


@dataclass(frozen=True)
class Complex:
    """A complex value: ids of its real and of its imaginary parts."""

    real: torch.Tensor
    imag: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.real.shape


@dataclass
class Tracer:
    """The hash-consed table. Leaf elements are numbered in the order in which leaves are added."""

    polynomials: list[Polynomial] = field(default_factory=list)
    ids: dict[Polynomial, int] = field(default_factory=dict)
    leaf_of_element: list[int] = field(default_factory=list)
    position_in_leaf: list[int] = field(default_factory=list)
    leaves: int = 0

    def intern(self, polynomial: Polynomial) -> int:
        found = self.ids.get(polynomial)
        if found is None:
            found = self.ids[polynomial] = len(self.polynomials)
            self.polynomials.append(polynomial)
        return found

    def leaf(self, shape: Sequence[int]) -> torch.Tensor:
        """A tensor of fresh elements."""
        count = int(torch.Size(shape).numel())
        start = len(self.leaf_of_element)
        self.leaf_of_element += [self.leaves] * count
        self.position_in_leaf += range(count)
        self.leaves += 1
        made = [self.intern((((start + i,), 1.0),)) for i in range(count)]
        return torch.tensor(made, dtype=torch.int64).reshape(tuple(shape))

    def complex_leaf(self, shape: Sequence[int]) -> Complex:
        """Real and imaginary parts are one leaf with a trailing dimension of two, as `view_as_real` shows it."""
        both = self.leaf((*shape, 2))
        return Complex(both[..., 0], both[..., 1])

    def combine(self, a: Any, b: Any, rule: Callable[[Polynomial, Polynomial], Polynomial]) -> torch.Tensor:
        left, right = torch.broadcast_tensors(self._tensor(a), self._tensor(b))  # type: ignore[no-untyped-call]
        if bool((left < 0).any()) or bool((right < 0).any()):
            raise Untraceable("an element that was never written is read")
        base = len(self.polynomials) + 1
        pairs, inverse = torch.unique(left * base + right, return_inverse=True)
        results = [
            self.intern(rule(self.polynomials[pair // base], self.polynomials[pair % base])) for pair in pairs.tolist()
        ]
        return torch.tensor(results, dtype=torch.int64)[inverse].reshape(left.shape)

    def _tensor(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(self.intern((((), float(value)),) if value else ()))
        raise Untraceable(f"operand of type {type(value).__name__}")

    def add(self, a: Any, b: Any, scale: float = 1.0) -> Any:
        if isinstance(a, Complex) or isinstance(b, Complex):
            left, right = _as_complex(self, a), _as_complex(self, b)
            return Complex(self.add(left.real, right.real, scale), self.add(left.imag, right.imag, scale))
        return self.combine(a, b, lambda p, q: _sum(p, q, scale))

    def mul(self, a: Any, b: Any) -> Any:
        if isinstance(a, Complex) and isinstance(b, Complex):
            real = self.add(self.mul(a.real, b.real), self.mul(a.imag, b.imag), -1.0)
            return Complex(real, self.add(self.mul(a.real, b.imag), self.mul(a.imag, b.real)))
        if isinstance(a, Complex):
            return Complex(self.mul(a.real, b), self.mul(a.imag, b))
        if isinstance(b, Complex):
            return self.mul(b, a)
        return self.combine(a, b, _product)

    def neg(self, a: Any) -> Any:
        return self.mul(a, -1.0)


def _as_complex(tracer: Tracer, value: Any) -> Complex:
    if isinstance(value, Complex):
        return value
    return Complex(value, tracer.mul(value, 0))


def _sum(p: Polynomial, q: Polynomial, scale: float) -> Polynomial:
    total = dict(p)
    for factors, coefficient in q:
        total[factors] = total.get(factors, 0.0) + scale * coefficient
    kept = tuple(sorted((f, c) for f, c in total.items() if c != 0.0))
    if len(kept) > MAX_TERMS:
        raise Untraceable("a sum of more than four products")
    return kept


def _product(p: Polynomial, q: Polynomial) -> Polynomial:
    total: dict[tuple[int, ...], float] = {}
    for left, a in p:
        for right, b in q:
            factors = tuple(sorted(left + right))
            if len(factors) > MAX_FACTORS:
                raise Untraceable("a product of more than three values")
            total[factors] = total.get(factors, 0.0) + a * b
    kept = tuple(sorted((f, c) for f, c in total.items() if c != 0.0))
    if len(kept) > MAX_TERMS:
        raise Untraceable("a sum of more than four products")
    return kept


def sums_many(nodes: Sequence[Node], sizes: Sizes) -> bool:
    """Whether a sum is over more elements than a polynomial has terms: seen before products are formed."""
    for node in nodes:
        value = d.tensor(node.args[0]) if d.name(node) == "sum" and isinstance(node.args[0], Node) else None
        if value is None:
            continue
        dims = _dims(node.args, node.kwargs)
        if len(dims) != 1 or sizes.of(value.shape[dims[0]]) > MAX_TERMS:
            return True
    return False


def trace(nodes: Sequence[Node], env: Mapping[Node, Any], sizes: Sizes, tracer: Tracer) -> dict[Node, Any]:
    """Ids of every element of every node, from the ids of the leaves in `env`."""
    return replay(nodes, dict(env), sizes, lambda node, args, kwargs: _apply(tracer, node, args, kwargs))


def _apply(tracer: Tracer, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = d.name(node)
    if node.target is operator.setitem:
        target, index, value = args
        target[index] = value
        return None
    result = _compute(tracer, node, name, args, kwargs)
    if d.mutates(node) and isinstance(result, torch.Tensor) and isinstance(args[0], torch.Tensor):
        return args[0].copy_(result)
    return result


def _compute(tracer: Tracer, node: Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in ("cast", "contiguous", "clone", "alias", "resolve_conj", "resolve_neg"):
        return args[0].clone() if name == "clone" and isinstance(args[0], torch.Tensor) else args[0]
    if name == "mul":
        return tracer.mul(*_two(args, kwargs))
    if name in ("add", "sub"):
        first, second = _two(args, kwargs)
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        return tracer.add(first, second, float(alpha) * (1 if name == "add" else -1))
    if name == "rsub":
        first, second = _two(args, kwargs)
        return tracer.add(second, first, -1.0)
    if name == "addcmul":
        return tracer.add(args[0], tracer.mul(args[1], args[2]), float(kwargs.get("value", 1)))
    if name == "neg":
        return tracer.neg(args[0])
    if name == "conj" and isinstance(args[0], Complex):
        return Complex(args[0].real, tracer.neg(args[0].imag))
    if name == "div" and isinstance(args[1], (int, float)):
        return tracer.mul(args[0], 1.0 / float(args[1]))
    if name in ("sum",) and isinstance(args[0], torch.Tensor):
        return _sum_along(tracer, args, kwargs)
    contraction = contraction_of(node)
    if contraction is not None:
        return _contracted(tracer, contraction, args)
    if name in BUFFERS:
        return torch.full(tuple(args[0].shape), UNKNOWN)
    if name not in d.MOVEMENT:
        raise Untraceable(f"{name} is neither movement nor a product")
    return _move(node, name, args, kwargs)


def _two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if len(args) > 1:
        return args[0], args[1]
    return args[0], kwargs["other"]


def _dims(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    return [dims] if isinstance(dims, int) else list(dims or [])


def _sum_along(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    dims = _dims(args, kwargs)
    if len(dims) != 1 or args[0].shape[dims[0]] > MAX_TERMS:
        raise Untraceable("a sum over more than four elements")
    total = reduce(tracer.add, args[0].unbind(dims[0]))
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    result: torch.Tensor = total.unsqueeze(dims[0]) if keepdim else total
    return result


def _contracted(tracer: Tracer, found: Contraction, args: tuple[Any, ...]) -> torch.Tensor:
    flat = [b for a in args for b in (a if isinstance(a, (tuple, list)) else (a,))]
    operands = [a for a in flat if isinstance(a, torch.Tensor)]
    if len(operands) != 2:
        raise Untraceable("a contraction of other than two real tensors")
    total: torch.Tensor = tracer.mul(*aligned(found, operands))
    for _ in found.summed:
        total = reduce(tracer.add, total.unbind(-1))
    return total


def _move(node: Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name == "view_as_complex":
        return Complex(args[0][..., 0], args[0][..., 1])
    if name == "view_as_real":
        return torch.stack([args[0].real, args[0].imag], -1)
    if name in ("real", "imag") and isinstance(args[0], Complex):
        return args[0].real if name == "real" else args[0].imag
    if name == "adjoint" and isinstance(args[0], Complex):
        raise Untraceable("a conjugate transpose")
    function = d.function_of(node)
    if name == "expand_as":  # through methods that exist for both dialects
        args, function = (args[0], args[1].shape), torch.Tensor.expand
    elif name in d.LIKE_ANOTHER:
        args, function = (args[0], args[1].shape), torch.Tensor.reshape
    if any(isinstance(a, Complex) for a in args) or (
        args and isinstance(args[0], (tuple, list)) and any(isinstance(a, Complex) for a in args[0])
    ):
        parts = []
        for part in ("real", "imag"):
            taken = [_part(a, part) for a in args]
            parts.append(function(*taken, **kwargs))
        return Complex(parts[0], parts[1])
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return function(*args, **kwargs)


def _part(arg: Any, part: str) -> Any:
    if isinstance(arg, Complex):
        return getattr(arg, part)
    if isinstance(arg, (tuple, list)):
        return type(arg)(_part(a, part) for a in arg)
    return arg
