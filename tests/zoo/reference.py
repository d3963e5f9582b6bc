"""The judge of results: an eager float64 run, and the bound within which a fused run must stay.

The bound, with e(run) = |run − exact| / |exact| (euclidean norms over the whole tensor):

- output: e(fused) ≤ 1.5 · e(unfused) + floor, and the same for the largest element's error with factor 2.5;
- all parameter gradients as one vector: as for the output;
- each parameter's gradient: e(fused) ≤ 3 · e(unfused) + 10 · floor, where |exact| is at least 1 % of the mean
  gradient's norm (a gradient that is zero in exact arithmetic has no relative error).

`floor` is 1e-3 in bfloat16 and 2e-6 in float32: a quarter, and sixteen times, one unit in the last place.

A model that decides by comparing (top-k routing, sorting) may decide otherwise after any rounding, fused or
not; for those, in bfloat16, rows of the output are compared instead: the median over rows of e, with the same
factor. In float32 they are held to the whole bound.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .models import Built, first_tensor

DECIDING = frozenset("topk sort argsort argmax argmin max_dim multinomial bucketize searchsorted".split())
LOW = (torch.float32, torch.bfloat16, torch.float16)
FLOORS = {True: 1e-3, False: 2e-6}  # low precision or not


@dataclass(frozen=True)
class Mode:
    """How a model is run. `autocast` is bfloat16 over float32 parameters."""

    dtype: torch.dtype
    train: bool = False
    autocast: bool = False
    dynamic: bool = False


@dataclass(frozen=True)
class Results:
    """A model's first output and its parameters' gradients, by name."""

    output: Tensor
    gradients: Mapping[str, Tensor]
    decides: bool = False


@dataclass(frozen=True)
class Accuracy:
    """Errors of the unfused and the fused run, each a pair, and whether the bound holds."""

    output: tuple[float, float]
    largest: tuple[float, float]
    gradient: tuple[float, float] | None
    worst_parameter: tuple[str, float, float] | None
    decides: bool
    bit_equal: bool
    within_bound: bool
    outside: tuple[str, ...] = ()


class _Float64(TorchDispatchMode):
    """Casts from float64 to a narrower type stay in float64; notes whether the model decides by comparing."""

    def __init__(self) -> None:
        super().__init__()
        self.decides = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        data = next((a for a in args if isinstance(a, Tensor)), None)
        if name in DECIDING and data is not None and data.is_floating_point():
            self.decides = True
        if data is not None and data.dtype == torch.float64 and kwargs.get("dtype") in LOW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def run_float64(built: Built, train: bool) -> Results:
    """The same weights and inputs in float64, eagerly."""
    model = _eager_experts(copy.deepcopy(built.model)).double()
    inputs = {k: v.double() if _is_float(v) else v for k, v in built.inputs.items()}
    mode = _Float64()
    with torch.set_grad_enabled(train), mode:
        output = first_tensor(model(**inputs))
        results = with_gradients(model, output) if train else Results(output, {})
    return Results(results.output, results.gradients, mode.decides)


def _eager_experts(model: nn.Module) -> nn.Module:
    """Experts as a loop: the grouped matrix product has no float64 form."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"
    return model


def with_gradients(model: nn.Module, output: Tensor) -> Results:
    """Backward through a fixed random projection of the output."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=rng).to(output.dtype)
    (output * weights).sum().backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return Results(output.detach().clone(), gradients)


def compare(plain: Results, fused: Results, exact: Results, mode: Mode) -> Accuracy:
    """Both runs against the exact one."""
    low = mode.autocast or mode.dtype != torch.float32
    floor = FLOORS[low]
    by_row = exact.decides and low
    output = (_error(plain.output, exact.output, by_row), _error(fused.output, exact.output, by_row))
    largest = (_largest(plain.output, exact.output), _largest(fused.output, exact.output))
    outside = [] if _holds(output, 1.5, floor) else ["output"]
    if not by_row and not _holds(largest, 2.5, floor):
        outside.append("largest element")
    gradient, worst = None, None
    if exact.gradients:
        gradient = (
            _error(_flat(plain, exact), _flat(exact, exact)),
            _error(_flat(fused, exact), _flat(exact, exact)),
        )
        worst = _worst_parameter(plain, fused, exact)
        if not by_row and not _holds(gradient, 1.5, floor):
            outside.append("gradient")
        if not by_row and worst and not _holds(worst[1:], 3.0, 10 * floor):
            outside.append(f"gradient of {worst[0]}")
        missing = set(plain.gradients) ^ set(fused.gradients)
        outside += [f"gradient of {name} is there in one run only" for name in sorted(missing)]
    equal = _same_places(plain.output, fused.output)
    if not equal:
        outside.append("NaN or Inf in other places")
    return Accuracy(
        output,
        largest,
        gradient,
        worst,
        exact.decides,
        torch.equal(plain.output, fused.output),
        not outside,
        tuple(outside),
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _holds(errors: tuple[float, float], factor: float, floor: float) -> bool:
    return errors[1] <= factor * errors[0] + floor


def _error(run: Tensor, exact: Tensor, by_row: bool = False) -> float:
    run, exact = run.double().nan_to_num(), exact.double().nan_to_num()
    if by_row and run.dim() > 1:
        rows = (run - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
        return float(rows.median())
    return float((run - exact).norm() / exact.norm().clamp_min(1e-30))


def _largest(run: Tensor, exact: Tensor) -> float:
    run, exact = run.double().nan_to_num(), exact.double().nan_to_num()
    if not run.numel():
        return 0.0
    return float((run - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def _same_places(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


def _flat(run: Results, exact: Results) -> Tensor:
    """All gradients as one vector, zeros where a run has none."""
    parts = [run.gradients.get(n, torch.zeros_like(g)).double().flatten() for n, g in exact.gradients.items()]
    return torch.cat(parts)


def _worst_parameter(plain: Results, fused: Results, exact: Results) -> tuple[str, float, float] | None:
    """The parameter whose gradient lost most by fusing."""
    norms = {n: float(g.double().norm()) for n, g in exact.gradients.items()}
    least = 0.01 * sum(norms.values()) / max(1, len(norms))
    found: list[tuple[float, str, float, float]] = []
    for name, norm in norms.items():
        if norm >= least and norm > 0 and name in plain.gradients and name in fused.gradients:
            a = _error(plain.gradients[name], exact.gradients[name])
            b = _error(fused.gradients[name], exact.gradients[name])
            found.append((b / max(a, 1e-12), name, a, b))
    return max(found)[1:] if found else None
