"""Follow the values of one eager run and note every RMSNorm, rotation and gate that is computed.

`Flow` is a dispatch mode: it sees each aten operation with its real tensors, whatever module, function or
spelling it came from. It carries a few facts along with each value (comes from this projection, is this
activation, is an inverse root, is a product of these two), and where facts meet in the right way it verifies
by numbers (`checks`) that a site has been computed. No graph is made and no order of operations is matched.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import checks, gates, rotation
from .facts import (
    CLAMPS,
    MOVES,
    NOTHING,
    PROJECTIONS,
    SAME_SHAPE_MOVES,
    Facts,
    Origin,
    Root,
    Site,
    changed,
    ids,
    key,
)

Rule = Callable[[str, Sequence[Any], list[Facts], Tensor], Facts]


class Flow(TorchDispatchMode):
    """Run a model under this; `sites` then holds what it computed, one entry per call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self._facts: dict[tuple[Any, ...], Facts] = {}
        self._alive: list[Any] = []  # keeps storages from being reused, so that a key names one value
        self._written: set[int] = set()
        self._rotations = rotation.Rotations()
        self._roots: dict[int, Site] = {}
        self._modules: list[nn.Module] = []
        self._names = {m: name for name, m in model.named_modules()}
        for t in itertools.chain(model.parameters(), model.buffers()):
            self._facts[key(t)] = Facts(constant=True)

    # ------------------------------------------------------------------ plumbing
    def __enter__(self) -> Flow:
        hooks = nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def forget(self) -> None:
        """Forget the sites found so far, for another run."""
        self.sites.clear()
        self._rotations = rotation.Rotations()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._modules.append(module)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._modules.pop()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self.sites += self._roots.values()
        self._roots.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        inputs = [self.facts(a) for a in args]
        out = func(*args, **(kwargs or {}))
        self._alive.append((args, out))
        if name.endswith("_") and not all(f.constant for f in inputs):
            self._written.add(args[0].untyped_storage().data_ptr())  # a buffer of constants no more
        outs = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        if outs:
            base = name if name in MOVES else name.removesuffix("_")
            rule = self._rule(base)
            found = rule(base, args, inputs, outs[0])
            for t in outs:
                self._facts[key(t)] = found
        return out

    def facts(self, value: Any) -> Facts:
        """What is known about an argument; numbers are constants."""
        if isinstance(value, Tensor):
            found = self._facts.get(key(value), NOTHING)
            written = found.constant and value.untyped_storage().data_ptr() in self._written
            return NOTHING if written else found
        items = value if isinstance(value, (list, tuple)) else ()
        return Facts(constant=all(self.facts(item).constant for item in items))

    def note(self, kind: str) -> Site:
        """Record a site at the line of model code that is running."""
        frame = _model_frame()
        module = self._modules[-1] if self._modules else None
        site = Site(
            kind,
            f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}",
            frame.f_code.co_name,
            self._names.get(module, "?") if module is not None else "",
            " > ".join(type(m).__name__ for m in self._modules[-2:]),
        )
        self.sites.append(site)
        return site

    # ------------------------------------------------------------------ rules, by operation
    def _rule(self, name: str) -> Rule:
        if name in MOVES:
            return self._move
        if name in PROJECTIONS or "convolution" in name:
            return self._project
        if name in CLAMPS:
            return self._clamp
        rule: Rule = getattr(self, f"op_{name}", self._other)
        return rule

    def _move(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        known = inputs[1] if name == "copy_" else inputs[0]
        return known if name in SAME_SHAPE_MOVES else replace(known, product=None)

    def _project(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        if all(f.constant for f in inputs):
            return Facts(constant=True)
        tensors = [(a, f) for a, f in zip(args, inputs, strict=True) if isinstance(a, Tensor)]
        data = [a for a, f in tensors if not f.constant]
        if not any(f.constant and a.dim() > 1 for a, f in tensors):
            return NOTHING  # two computed values, as in attention
        return Facts(origin=Origin(next(ids), "conv" if "convolution" in name else "linear", data[0]))

    def _clamp(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        first = inputs[0]
        return replace(first, origin=changed(first.origin, "clamp"), product=None)

    def _other(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return Facts(constant=all(f.constant for f in inputs))

    def op_cat(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        parts = [self.facts(part).origin for part in args[0]]
        joined = parts[0] if all(part and part.operation == "linear" for part in parts) else None
        return Facts(constant=inputs[0].constant, origin=replace(joined, uid=next(ids)) if joined else None)

    def op_neg(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return replace(inputs[0], activation=None, square=False, mean_square=False, root=None)

    # activations
    def op_silu(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return Facts(origin=inputs[0].origin, activation="silu")

    def op_gelu(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return Facts(origin=inputs[0].origin, activation="gelu")

    def op_inner(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        origin = changed(inputs[0].origin, name)
        return Facts(constant=inputs[0].constant, origin=origin, inner=(name, args[0]))

    op_sigmoid = op_tanh = op_erf = op_exp = op_inner

    def op__fused_rms_norm(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        self.note("rmsnorm").weighted = args[2] is not None
        return Facts(site=len(self.sites) - 1)

    # roots
    def op_square(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return Facts(square=True, constant=inputs[0].constant)

    def op_pow(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        if isinstance(args[1], Tensor):
            return NOTHING
        if args[1] == 2:
            return self.op_square(name, args, inputs, out)
        return self._take_root(inputs[0], float(args[1])) if args[1] in (0.5, -0.5) else NOTHING

    def op_sqrt(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return self._take_root(inputs[0], 0.5)

    def op_rsqrt(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return self._take_root(inputs[0], -0.5)

    def op_linalg_vector_norm(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return self._take_root(inputs[0], 0.5) if len(args) < 2 or args[1] == 2 else NOTHING

    op_norm = op_linalg_vector_norm

    def op_reciprocal(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        root = inputs[0].root
        return Facts(root=replace(root, power=-root.power)) if root else NOTHING

    def op_mean(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        return Facts(mean_square=inputs[0].square, constant=inputs[0].constant)

    def op_sum(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        if inputs[0].product and len(args) > 1 and rotation.is_matrix(inputs[0].product, args[1]):
            self.note("rope")
        return Facts(constant=inputs[0].constant)

    def _take_root(self, of: Facts, power: float) -> Facts:
        if of.constant:
            return Facts(constant=True)
        root = Root(next(ids), power, of.mean_square)
        if of.mean_square and power:
            self._roots[root.uid] = Site("rms_statistic", *_place(self))
        return Facts(root=root)

    # sums
    def op_add(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        a, b = inputs[0], inputs[1]
        if a.product and b.product and self._rotations.complete(out, a.product, b.product):
            self.note("rope")
        if a.constant and b.constant:
            return Facts(constant=True)
        for known, other, value in ((a, b, args[1]), (b, a, args[0])):
            if other.constant:  # a bias, an epsilon, a "+ 1"
                origin = known.origin if isinstance(value, Tensor) else changed(known.origin, "+const")
                return replace(known, origin=origin, product=None, activation=None, square=False, site=None)
        return NOTHING

    op_sub = op_rsub = op_add

    def op_addcmul(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        product = inputs[0].product
        if product and self._rotations.complete(out, product, (args[1], args[2])):
            self.note("rope")
        return NOTHING

    # products
    def op_mul(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        a, b = args[0], args[1]
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return self._scaled(inputs[0] if isinstance(a, Tensor) else inputs[1], b if isinstance(a, Tensor) else a)
        if out.is_complex():
            if a.is_complex() and b.is_complex() and rotation.is_complex(a, b):
                self.note("rope")
            return NOTHING
        if inputs[0].constant and inputs[1].constant:
            return Facts(constant=True)
        if key(a) == key(b) or (a.shape == b.shape and torch.equal(a, b)):
            return Facts(square=True)
        for (x, fx), (y, fy) in itertools.permutations(zip((a, b), inputs[:2], strict=True)):
            found = self._norm(x, fx, y, fy) or gates.activation(x, fx, y, fy, self.facts) or self._gate(fx, fy)
            if found:
                return replace(found, product=(a, b))
        for known, other in ((inputs[0], inputs[1]), (inputs[1], inputs[0])):
            if other.constant:
                if known.site is not None:
                    self.sites[known.site].weighted = True
                return replace(self._scaled(known, None), product=(a, b))
        return Facts(product=(a, b))

    def op_div(self, name: str, args: Sequence[Any], inputs: list[Facts], out: Tensor) -> Facts:
        a, b = args[0], args[1]
        if not isinstance(b, Tensor):
            return self._scaled(inputs[0], b)
        root = inputs[1].root
        if not isinstance(a, Tensor) or (inputs[0].constant and root):
            return Facts(root=replace(root, power=-root.power)) if root else NOTHING
        if root:
            return self._normalised(a, root, checks.narrowed(b).double().square()) or NOTHING
        inner = inputs[1].inner
        if inner and inner[0] == "exp" and checks.sigmoid_scale(a, -inner[1]):
            return Facts(origin=inputs[0].origin, activation="silu")
        return NOTHING

    def _scaled(self, known: Facts, factor: Any) -> Facts:
        """known times a constant."""
        if known.constant:
            return known
        origin = known.origin if factor == 1 else changed(known.origin, "scale")
        return replace(known, origin=origin, product=None, square=False, root=None, mean_square=known.square)

    def _norm(self, x: Tensor, fx: Facts, y: Tensor, fy: Facts) -> Facts | None:
        if fy.root is None or fy.root.power != -0.5:
            return None
        return self._normalised(x, fy.root, checks.narrowed(y).double().pow(-2))

    def _normalised(self, x: Tensor, root: Root, statistic: Tensor) -> Facts | None:
        kind = checks.norm_kind(x, statistic)
        if kind is None:
            return None
        self._roots.pop(root.uid, None)
        self.note({"rms": "rmsnorm", "l2": "l2norm", "layer": "layernorm_inline"}[kind])
        return Facts(site=len(self.sites) - 1)

    def _gate(self, fx: Facts, fy: Facts) -> Facts | None:
        kind = gates.kind(fx, fy, [type(m).__name__ for m in self._modules[-2:]])
        if kind is None:
            return None
        self.note(kind)
        return NOTHING


def _model_frame() -> Any:
    """The innermost frame that is neither torch's nor this file's."""
    frame: Any = sys._getframe(1)
    while frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return frame


def _place(flow: Flow) -> tuple[str, str, str, str]:
    site = flow.note("")
    flow.sites.pop()
    return site.where, site.function, site.module, site.module_class
