"""Prove a rewrite: run the replaced nodes and the fused form side by side on seeded probes.

Translation validation, three obligations (all must hold on every probe):

1. same function: with every cast lifted to float64, values and vector-Jacobian products agree to 1e-9;
2. no less accurate: in the graph's own dtypes the fused form's error against float64 is at most that of
   the code it replaces, in ulps of each row's largest magnitude;
3. same interface: shape and dtype.

Structure decides and probes confirm: a proof is a test on chosen inputs, not a theorem. Limits count
elements, never seconds, so that every rank decides alike.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from npu_fuse import dialect as d
from npu_fuse.accuracy import FLOAT64_TOLERANCE, Errors, Fails, accurate, facts_of, measure, relative
from npu_fuse.emit import RunEmitter
from npu_fuse.epsilon import default_epsilon
from npu_fuse.experts import grouped_mm_in_float64
from npu_fuse.probes import PROBES, SEED, Probe, make_inputs
from npu_fuse.products import NAMES
from npu_fuse.replay import ATTEMPTS, CannotShrink, Sizes, choose_sizes, replay
from npu_fuse.report import ProofFacts
from npu_fuse.sites import Form, Site
from npu_fuse.targets import REFERENCE, Target

MAX_ELEMENTS = 1 << 20
"""Largest probe tensor: 8 MB in float64."""
WITHOUT_FLOAT64: Mapping[str, Callable[..., Any]] = {"grouped_mm": grouped_mm_in_float64}
"""What torch computes in no float64: the same mathematics, written out."""


@dataclass(frozen=True)
class Verdict:
    """Whether a form holds; if not, which obligation failed and by how much."""

    holds: bool
    reason: str = ""
    facts: ProofFacts = ProofFacts()
    form: str = ""
    notes: tuple[str, ...] = ()


def prove(site: Site, form: Form, numerics: str = "fused", target: Target = REFERENCE) -> Verdict:
    """Run every probe. Raises nothing for a wrong rewrite; the verdict says what failed."""
    started = time.perf_counter()
    with isolated():
        verdict = _prove(site, form, numerics, target)
    return replace(verdict, facts=replace(verdict.facts, seconds=time.perf_counter() - started), form=form.name)


class isolated:
    """Autocast off, gradients on, float32 by default, and all as it was afterwards. Generators are our own.

    Hooks on saved tensors are kept out: those of a checkpointed region, inside of which a model is compiled, would
    take the proof's tensors for the model's.
    """

    def __enter__(self) -> None:
        self._stack: list[Any] = [
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.utils._python_dispatch._disable_current_modes(),
            torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _unchanged),
        ]
        self._dtype = torch.get_default_dtype()
        for context in self._stack:
            context.__enter__()
        if self._dtype != torch.float32:
            torch.set_default_dtype(torch.float32)

    def __exit__(self, *exc: Any) -> None:
        if self._dtype != torch.float32:
            torch.set_default_dtype(self._dtype)
        for context in reversed(self._stack):
            context.__exit__(*exc)


def _unchanged(saved: torch.Tensor) -> torch.Tensor:
    return saved


def _prove(site: Site, form: Form, numerics: str, target: Target) -> Verdict:
    errors = Errors()
    done = 0
    try:
        for emit in (form.emit, *form.also):
            errors = Errors()
            for index, probe in enumerate(PROBES):
                _run_probe(site, replace(form, emit=emit), probe, index, errors, target)
                done += 1
            _judge_accuracy(site, errors, numerics)
    except Fails as failure:
        return Verdict(False, str(failure), facts_of(errors, done))
    except CannotShrink as problem:
        return Verdict(False, f"no small probe can be made: {problem}", facts_of(errors, done))
    notes = ("the original overflows where the fused form does not",) if errors.overflow_avoided else ()
    return Verdict(True, "", facts_of(errors, done), notes=notes)


def _run_probe(site: Site, form: Form, probe: Probe, index: int, errors: Errors, target: Target) -> None:
    sizes = _sizes(site, probe)
    generator = torch.Generator().manual_seed(SEED + index)
    own = make_inputs(site, probe, index, sizes, generator)
    lifted = {n: _lift(v) for n, v in own.items()}
    name = f"probe {index} (scale {probe.scale:g}{', ' + probe.special if probe.special else ''})"

    gradients = [n for n in site.inputs if _wants_gradient(n)] if _has_gradient(site.output) else []
    if probe.special == "nonfinite" or probe.scale > 1e5:
        gradients = []
    expected, expected_grads = _run(site, form, lifted, sizes, "original", gradients, target)
    actual, actual_grads = _run(site, form, lifted, sizes, "fused", gradients, target)
    for left, right in zip(expected, actual, strict=True):
        if left.shape != right.shape:
            raise Fails(f"interface: shape {tuple(left.shape)} became {tuple(right.shape)} at {name}")
        # Where experts of weight zero are left out, infinity times zero is no NaN any more.
        difference = relative(left, right, only_finite=bool(site.facts.get("dense")))
        errors.same = max(errors.same, difference)
        if not difference <= FLOAT64_TOLERANCE:
            raise Fails(f"same function: values differ by {difference:.3g} in float64 at {name}")
    for node, left, right in zip(gradients, expected_grads, actual_grads, strict=True):
        difference = relative(left, right, only_finite=True)
        errors.gradients = max(errors.gradients or 0.0, difference)
        if not difference <= FLOAT64_TOLERANCE * 10:
            raise Fails(f"same function: the gradient to {node.name} differs by {difference:.3g} at {name}")
    with torch.no_grad():
        before, _ = _run(site, form, own, sizes, "own", [], target)
        after, _ = _run(site, form, own, sizes, "fused_own", [], target)
    for exact, left, right in zip(expected, before, after, strict=True):
        if left.dtype != right.dtype:
            raise Fails(f"interface: dtype {left.dtype} became {right.dtype}")
        if not torch.equal(left.nan_to_num(), right.nan_to_num()):
            errors.bit_equal = False
        measure(exact.detach(), left, right, probe, errors)


def _sizes(site: Site, probe: Probe) -> Sizes:
    """Shrink as far as the site's literals allow; large full-size probes are refused."""
    kept = int(site.facts.get("kept", 1))
    tensors = [n for n in site.inputs if d.tensor(n) is not None]
    problem: Exception | None = None
    for shrink, alike in ATTEMPTS:
        sizes = choose_sizes(tensors, kept, site.pool or probe.pool, shrink, alike)
        if shrink and site.sizes:
            sizes = replace(sizes, literal={**sizes.literal, **site.sizes})
        if site.ranges:
            sizes = replace(sizes, ranges={n: sizes.of(a) * sizes.of(b) for n, (a, b) in site.ranges.items()})
        for node in tensors:
            elements = torch.Size(sizes.shape(d.local(node).shape)).numel()  # type: ignore[union-attr]
            if elements > MAX_ELEMENTS:
                raise CannotShrink(f"a probe of {elements} elements is over the limit of {MAX_ELEMENTS}") from problem
        try:
            _dry_run(site, sizes)
            return sizes
        except (CannotShrink, RuntimeError, IndexError, ValueError) as error:
            problem = error
    raise CannotShrink(str(problem))


def _dry_run(site: Site, sizes: Sizes) -> None:
    """On zeros: do the rewritten literals fit together?"""
    env = {}
    for node in site.inputs:
        found = d.local(node)
        env[node] = torch.zeros(sizes.shape(found.shape), dtype=found.dtype) if found is not None else 1.0
    env |= {twin: env[node] for twin, node in site.twins}
    with torch.no_grad():
        replay(site.nodes, env, sizes, _apply_own, site.stand_ins)


def _lift(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not (value.is_floating_point() or value.is_complex()):
        return value.clone()
    return value.detach().to(torch.complex128 if value.dtype.is_complex else torch.float64).clone()


def _has_gradient(node: Node) -> bool:
    found = d.tensor(node)
    return found is not None and found.requires_grad


def _wants_gradient(node: Node) -> bool:
    found = d.tensor(node)
    return found is not None and found.requires_grad and not found.dtype.is_complex


def _run(site: Site, form: Form, inputs: Mapping[Node, Any], sizes: Sizes, how: str, gradients: Sequence[Node],
         target: Target) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """Values and gradients of one form: original or fused, lifted to float64 or in the graph's dtypes."""
    leaves = {n: v.detach().clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    if how.endswith("own"):
        leaves = {
            n: v.as_strided(v.size(), v.stride()) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()
        }
    for node in gradients:
        leaves[node].requires_grad_()
    if how in ("original", "own"):
        # In-place nodes of the site must not write into the probe.
        copies = any(d.mutates(n) for n in site.nodes)
        env = {n: v.clone() if copies and isinstance(v, torch.Tensor) else v for n, v in leaves.items()}
        env |= {twin: env[node] for twin, node in site.twins}
        apply = _lifted_apply(copies) if how == "original" else _apply_own
        env = replay(site.nodes, env, sizes, apply, site.stand_ins)
        outputs = [env[n] for n in (site.output, *site.extra_outputs)]
    else:
        result = form.emit(RunEmitter(how == "fused", target, sizes), leaves)
        outputs = list(result) if site.extra_outputs else [result]
    if not gradients:
        return outputs, []
    state = torch.Generator().manual_seed(SEED)
    cotangents = [torch.randn(o.shape, generator=state, dtype=_real(o.dtype)) for o in outputs]
    wanted = [leaves[n] for n in gradients]
    with_grad = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not with_grad:
        return outputs, [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad([o for o, _ in with_grad], wanted, [c for _, c in with_grad], allow_unused=True)
    zeros = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
    return outputs, zeros


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.float64


def _lifted_apply(copies: bool) -> Any:
    def apply(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if d.name(node) == "cast":
            return args[0].clone() if copies else args[0]
        kwargs = {k: torch.float64 if _is_float_dtype(v) else v for k, v in kwargs.items()}
        args = tuple(torch.float64 if _is_float_dtype(a) else a for a in args)
        args, kwargs = _frozen_epsilon(node, args, kwargs)
        return WITHOUT_FLOAT64.get(d.name(node), _on_cpu(node, args))(*args, **kwargs)

    return apply


def _on_cpu(node: Node, args: tuple[Any, ...]) -> Any:
    """What the node computes; a model on an accelerator counts integers, for which the CPU has no kernel."""
    function = d.function_of(node)
    counted = args[0] if args else None
    if d.name(node) != "histc" or not isinstance(counted, torch.Tensor) or counted.is_floating_point():
        return function
    return lambda x, *rest, **named: function(x.double(), *rest, **named).to(x.dtype)


def _is_float_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point


def _frozen_epsilon(
    node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`F.rms_norm(eps=None)` takes the epsilon of its input's dtype: freeze it at the graph's."""
    if d.name(node) != "rms_norm":
        return args, kwargs
    epsilon = d.operand(node, 3, "eps")
    if epsilon is None:
        found = d.tensor(node.args[0])
        epsilon = default_epsilon(found.dtype) if found is not None else None
        return args[:3], {k: v for k, v in kwargs.items() if k != "eps"} | {"eps": epsilon}
    return args, kwargs


def _apply_own(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In the graph's dtypes. Autocast is explicit: what it made wider was computed wider, and products narrower."""
    recorded = d.tensor(node)
    if d.name(node) == "cast" and recorded is not None:
        return args[0].to(recorded.dtype)
    if node.target is operator.setitem or recorded is None:
        return _on_cpu(node, args)(*args, **kwargs)
    dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
    if d.name(node) in d.POINTWISE | d.REDUCTIONS and recorded.dtype.is_floating_point and "dtype" not in kwargs:
        if dtypes and all(t.is_floating_point and t.itemsize < recorded.dtype.itemsize for t in dtypes):
            args = tuple(a.to(recorded.dtype) if isinstance(a, torch.Tensor) else a for a in args)
    if d.name(node) in NAMES and any(t.is_floating_point and t.itemsize > recorded.dtype.itemsize for t in dtypes):
        args, kwargs = tree_map_only(torch.Tensor, lambda a: a.to(recorded.dtype), (args, kwargs))
    result = _on_cpu(node, args)(*args, **kwargs)
    if isinstance(result, torch.Tensor) and result.dtype != recorded.dtype and not d.mutates(node):
        result = result.to(recorded.dtype)
    return result


def _judge_accuracy(site: Site, errors: Errors, numerics: str) -> None:
    found = d.tensor(site.output)
    if numerics == "exact" and site.facts.get("ties"):
        raise Fails("numerics='exact': which of several tied values is taken is unspecified")
    accurate(found.dtype if found is not None else None, errors, numerics, bool(site.facts.get("sums")))
