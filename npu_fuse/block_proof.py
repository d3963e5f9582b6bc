"""Does a grouped form compute what the block computes? The block's own forward and the form, on seeded probes.

The same obligations as for every rewrite (`prove.py`): equal functions with every cast lifted to float64, values
and gradients of inputs and parameters; no less accurate in the block's dtype; the same interface.
"""

from __future__ import annotations

import contextlib
import copy
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from npu_fuse.accuracy import FLOAT64_TOLERANCE, Errors, Fails, accurate, facts_of, measure, relative
from npu_fuse.block_inputs import Example, Signature, make
from npu_fuse.probes import SEED, Probe
from npu_fuse.prove import isolated
from npu_fuse.report import ProofFacts

Call = Callable[[nn.Module, Example], Any]


@dataclass(frozen=True)
class Case:
    """One probe: (batch, sequence), experts of each token where they are given, what is special, magnitude."""

    def __str__(self) -> str:
        special = f", {self.how}" if self.how else ""
        return f"({self.size[0]} × {self.size[1]} tokens{special}, scale {self.scale:g})"

    size: tuple[int, int]
    k: int = 2
    how: str = ""
    scale: float = 1.0


CASES = (
    Case((2, 3)), Case((1, 1)), Case((3, 11), scale=3.0), Case((2, 5), how="one"), Case((3, 7), how="same"),
    Case((2, 6), k=1), Case((2, 4), k=1 << 30), Case((2, 9), how="zero"), Case((5, 13), scale=1e-2), Case((1, 2)),
    Case((4, 16), scale=30.0),
)  # fmt: skip
NOISE = 1e-14
"""Differences of gradients up to this share of the largest one are rounding in float64."""
SEARCHES = 48
"""Batches of 256 rows in which a row for each expert is looked for."""
REST = (Case((3, 6), how="rest"), Case((1, 4), k=1, how="rest"))


@dataclass(frozen=True)
class BlockVerdict:
    holds: bool
    reason: str = ""
    facts: ProofFacts = ProofFacts()
    autocast: bool = False
    """Holds under autocast too."""
    unseen: tuple[int, ...] = ()
    """Experts that no probe was routed to."""


def prove_block(block: nn.Module, form: Callable[..., Any], signature: Signature, rest: bool,
                numerics: str = "fused") -> BlockVerdict:  # fmt: skip
    """Run every case on a float64 copy and on the block itself; what a case writes is put back by the caller."""
    started = time.perf_counter()
    errors = Errors()
    cases = (*CASES, *REST) if rest else CASES
    try:
        with isolated():
            examples = [
                (f"case {i} {case}", make(signature, block, case.size, SEED + i, case.k, case.how, case.scale))
                for i, case in enumerate(cases)
            ]
            cover, unseen = covering(block, form, signature)
            examples += [("the case of all experts", cover)] if cover is not None else []
            wide = copy.deepcopy(block).double()
            exact = [_same_function(wide, form, example, name, i, errors) for i, (name, example) in enumerate(examples)]
            for values, (name, example) in zip(exact, examples, strict=True):
                _own_dtype(block, form, example, name, values, errors)
            dtype = next(p.dtype for p in block.parameters() if p.is_floating_point())
            accurate(dtype, errors, numerics, sums=True)
    except Fails as failure:
        return BlockVerdict(False, str(failure), facts_of(errors, len(cases)))
    except (RuntimeError, IndexError, ValueError) as fault:
        return BlockVerdict(False, f"a probe does not run: {fault}", facts_of(errors, len(cases)))
    autocast = dtype is torch.float32 and _under_autocast(block, form, [e for _, e in examples], exact)
    facts = replace(facts_of(errors, len(examples)), seconds=time.perf_counter() - started)
    return BlockVerdict(True, "", facts, autocast, tuple(unseen))


def covering(block: nn.Module, form: Callable[..., Any], signature: Signature) -> tuple[Example | None, set[int]]:
    """Rows that are routed to every expert, and the experts that no row was found for.

    Only the routing is run: of many seeded rows, one for each expert is kept.
    """
    unseen = set(range(signature.experts))
    if "indices" in signature.kinds.values():
        return make(signature, block, (1, signature.experts), SEED, 2, "each"), set()
    kept: list[torch.Tensor] = []
    example = None
    for i in range(SEARCHES):
        example = make(signature, block, (4, 64), SEED + 1000 + i, scale=(1.0, 0.1, 10.0)[i % 3])
        rows = example.tensors[0].reshape(-1, signature.width)
        chosen = _chosen(form, block, example)
        for expert in sorted(unseen & set(chosen.flatten().tolist())):
            kept.append(rows[(chosen == expert).any(-1).nonzero()[0, 0]])
            unseen.discard(expert)
        if not unseen:
            break
    if not kept or example is None:
        return None, unseen
    states = torch.stack(kept)
    states = states.unsqueeze(0) if signature.rank == 3 else states
    return replace(example, tensors=(states,), kwargs={example.names[0]: states}), unseen


class _Seen(Exception):
    pass


def _chosen(form: Callable[..., Any], block: nn.Module, example: Example) -> torch.Tensor:
    """The experts [T, k] that the form sends its rows to; nothing behind the routing is run."""

    def stop(_: Any, x: torch.Tensor, indices: torch.Tensor, *rest: Any) -> Any:
        raise _Seen(indices)

    routing = types.FunctionType(form.__code__, {**form.__globals__, "routed": stop})
    try:
        with torch.no_grad():
            routing(block, *example.tensors)
    except _Seen as seen:
        found: torch.Tensor = seen.args[0]
        return found
    raise Fails("the form sends no rows to experts")


class Lifted(TorchFunctionMode):
    """Everything in float64, whatever dtype the code asks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("float", "half", "bfloat16", "double") and args and isinstance(args[0], torch.Tensor):
            return args[0].double() if not args[0].is_complex() else args[0]
        given = {k: _lifted(v) for k, v in (kwargs or {}).items()}
        return func(*[_lifted(a) for a in args], **given)


def _lifted(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Everything that runs inside asks for float64, whatever it says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Lifted():
            yield
    finally:
        torch.set_default_dtype(before)


def _original(block: nn.Module, example: Example) -> Any:
    return block.forward(*example.args, **example.kwargs)


def _formed(form: Callable[..., Any]) -> Call:
    return lambda block, example: form(block, *example.tensors)


def _same_function(block: nn.Module, form: Callable[..., Any], example: Example, at: str, index: int,
                   errors: Errors) -> list[Any]:  # fmt: skip
    example = _floats(example, lambda t: t.double())
    with in_float64():
        expected, wanted = _values_and_gradients(block, _original, example, index)
        actual, got = _values_and_gradients(block, _formed(form), example, index)
    _same_kind(expected, actual, at)
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        difference = relative(a, b) if a.is_floating_point() else float(not torch.equal(a, b))
        errors.same = max(errors.same, difference)
        if not difference <= FLOAT64_TOLERANCE:
            raise Fails(f"same function: values differ by {difference:.3g} in float64 at {at}")
    largest = max((float(g.abs().max()) for g in wanted.values() if g.numel()), default=0.0)
    for name, left in wanted.items():
        difference = relative(left, got[name], only_finite=True)
        if left.numel() == 0 or float((left - got[name]).abs().max()) <= NOISE * largest:
            continue  # zero but for rounding, such as that to a weight divided by itself
        errors.gradients = max(errors.gradients or 0.0, difference)
        if not difference <= FLOAT64_TOLERANCE * 10:
            raise Fails(f"same function: the gradient to {name} differs by {difference:.3g} at {at}")
    return _tensors(expected)


def _floats(example: Example, change: Callable[[torch.Tensor], torch.Tensor]) -> Example:
    tensors = tuple(change(t) if t.is_floating_point() else t for t in example.tensors)
    return replace(example, tensors=tensors, kwargs=dict(zip(example.names, tensors, strict=True)))


def _values_and_gradients(block: nn.Module, call: Call, example: Example,
                          index: int) -> tuple[Any, dict[str, torch.Tensor]]:  # fmt: skip
    """Outputs, and gradients of a fixed projection of them to inputs and parameters (zeros where there is none)."""
    leaves = _floats(example, lambda t: t.detach().clone().requires_grad_())
    result = call(block, leaves)
    outputs = [t for t in _tensors(result) if t.requires_grad]
    generator = torch.Generator().manual_seed(SEED + index)
    wanted = {n: t for n, t in zip(leaves.names, leaves.tensors, strict=True) if t.requires_grad}
    wanted |= {n: p for n, p in block.named_parameters() if p.requires_grad}
    if not outputs:
        return result, {n: torch.zeros_like(t) for n, t in wanted.items()}
    factors = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in outputs]
    found = torch.autograd.grad(outputs, list(wanted.values()), factors, allow_unused=True)
    return result, {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), found, strict=True)}


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]


def _same_kind(left: Any, right: Any, at: str) -> None:
    one, other = tree_flatten(left), tree_flatten(right)
    if str(one[1]) != str(other[1]):
        raise Fails(f"interface: another structure of results at {at}")
    for a, b in zip(one[0], other[0], strict=True):
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
            raise Fails(f"interface: {type(a).__name__} became {type(b).__name__} at {at}")
        if not isinstance(a, torch.Tensor):
            if a != b:
                raise Fails(f"interface: {a!r} became {b!r} at {at}")
        elif a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
            raise Fails(f"interface: {_kind(a)} became {_kind(b)} at {at}")


def _kind(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}{' with a gradient' if t.requires_grad else ''}"


def _own_dtype(block: nn.Module, form: Callable[..., Any], example: Example, at: str, exact: list[torch.Tensor],
               errors: Errors) -> None:  # fmt: skip
    before, after = _original(block, example), form(block, *example.tensors)
    _same_kind(before, after, f"{at} in the block's dtype")
    given, made = ([t.detach() for t in _tensors(v)] for v in (before, after))
    for wide, left, right in zip(exact, given, made, strict=True):
        if not torch.equal(left.nan_to_num(), right.nan_to_num()):
            errors.bit_equal = False
        if left.is_floating_point():
            measure(wide.detach(), left, right, Probe(()), errors)


def _under_autocast(block: nn.Module, form: Callable[..., Any], examples: Sequence[Example],
                    exact: list[list[torch.Tensor]]) -> bool:  # fmt: skip
    """In bfloat16 autocast no further from float64 than the block, and of the same dtypes."""
    errors = [0.0, 0.0, 0.0, 0.0]
    device = next(block.parameters()).device.type
    with isolated(), torch.autocast(device, torch.bfloat16), torch.no_grad():
        for values, example in zip(exact, examples, strict=True):
            try:
                before, after = _original(block, example), form(block, *example.tensors)
                _same_kind(before, after, "")
            except (Fails, RuntimeError):
                return False
            for wide, left, right in zip(values, _tensors(before), _tensors(after), strict=True):
                if left.is_floating_point():
                    scale = float(wide.abs().max()) or 1.0
                    off = [(t.double() - wide.detach()).abs() / scale for t in (left, right)]
                    errors[0], errors[1] = max(errors[0], float(off[0].max())), max(errors[1], float(off[1].max()))
                    errors[2], errors[3] = errors[2] + float(off[0].mean()), errors[3] + float(off[1].mean())
    return errors[1] <= errors[0] * 1.25 + 2**-9 and errors[3] <= errors[2] * 1.1 + 2**-12
