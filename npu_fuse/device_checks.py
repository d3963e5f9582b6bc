"""What a real device is asked: the calls that npu_fuse emits, gradients, limits, and what no document says.

A check returns a fact, or raises: `AssertionError` where the device's numbers are wrong, anything else where the call
does not run. The judge is the reference op in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import npu_fuse.passes  # noqa: F401  (registers the ops)
from npu_fuse.chip_names import family
from npu_fuse.device_cases import CASES, Case
from npu_fuse.device_edges import EDGES
from npu_fuse.limits import OLD_CHIPS
from npu_fuse.targets.chips import chip_limit

Checked = Callable[[], str]


class Skipped(Exception):
    """The check cannot be made on this machine; the message says why."""


def checks() -> dict[str, Checked]:
    """Every check by name, "<kind>: <what>", in the order in which they are made."""
    from npu_fuse.device_blocks import blocks
    from npu_fuse.device_probes import PROBES

    made: dict[str, Checked] = {}
    for case in CASES:
        for dtype in case.dtypes:
            what = f"{case} {str(dtype)[6:]}"
            made[f"call: {what}"] = lambda case=case, dtype=dtype: call(case, dtype)  # type: ignore[misc]
            if case.backward:
                made[f"gradient: {what}"] = lambda case=case, dtype=dtype: gradient(case, dtype)  # type: ignore[misc]
    made |= {f"block: {name}": check for name, check in blocks().items()}
    made |= {f"limit: {name}": lambda name=name: edge(name) for name in EDGES}  # type: ignore[misc]
    made |= {f"probe: {name}": check for name, check in PROBES.items()}
    return made


def npu(name: str) -> Any:
    return getattr(torch.ops.npu, name).default


def reference(name: str) -> Any:
    return getattr(torch.ops.npu_fuse, name).default


def on(device: str, values: Any, dtype: torch.dtype | None = None) -> Any:
    """Tensors among the arguments of a call moved, floating-point ones to `dtype` as well."""

    def move(v: Any) -> Any:
        if isinstance(v, list):
            return [move(item) for item in v]
        if not isinstance(v, torch.Tensor):
            return v
        return v.to(device) if dtype is None or not v.is_floating_point() else v.to(device, dtype)

    return {k: move(v) for k, v in values.items()} if isinstance(values, dict) else [move(v) for v in values]


def several(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def call(case: Case, dtype: torch.dtype) -> str:
    """The op's results, to one rounding of their dtype; add_rms_norm, which rounds its sum first, to three of x's."""
    _documented(case, dtype)
    args, named = case.make(dtype)
    given = several(npu(case.op)(*on("npu", args), **on("npu", named)))
    exact = several(reference(case.op)(*on("cpu", args, torch.float64), **named))
    given, exact = ([t for i, t in enumerate(r) if i not in case.unwritten] for r in (given, exact))
    added = case.op == "npu_add_rms_norm"
    return _worst(given, exact, 3.0 if added else 1.0, dtype if added else None)


def gradient(case: Case, dtype: torch.dtype) -> str:
    """The op's own backward as torch_npu calls it, to four roundings of the largest gradient."""
    _documented(case, dtype)
    args, named = case.make(dtype)
    device, exact = on("npu", args), on("cpu", args, torch.float64)
    for i in case.differentiable:
        device[i].requires_grad_()
        exact[i].requires_grad_()
    given = several(npu(case.op)(*device, **on("npu", named)))[0]
    true = several(reference(case.op)(*exact, **named))[0]
    weights = torch.randn_like(true)
    got = torch.autograd.grad(given, [device[i] for i in case.differentiable], weights.to("npu", dtype))
    want = torch.autograd.grad(true, [exact[i] for i in case.differentiable], weights.to(dtype).double())
    return _worst(list(got), list(want), 4.0)


def _documented(case: Case, dtype: torch.dtype) -> None:
    limit = chip_limit(case.op, torch.npu.get_device_name(), dtype)  # type: ignore[attr-defined]
    if limit is not None:
        raise Skipped(limit)


def edge(name: str) -> str:
    """A call just beyond a documented limit, and one that only just keeps it. "taken" is a limit that is not there."""
    soc = str(torch.npu.get_device_name())  # type: ignore[attr-defined]
    if family(soc) in OLD_CHIPS:
        raise Skipped(f"the edges are those of later chips than {soc}")
    beyond, within = EDGES[name]
    within()
    torch.npu.synchronize()  # type: ignore[attr-defined]
    try:
        beyond()
        torch.npu.synchronize()  # type: ignore[attr-defined]
    except (RuntimeError, ValueError, TypeError) as refusal:
        return f"refused: {str(refusal).strip().splitlines()[0][:160]}"
    return "taken: the document's limit is not this device's"


def _worst(
    given: list[torch.Tensor], exact: list[torch.Tensor], rounds: float, dtype: torch.dtype | None = None
) -> str:
    worst = 0.0
    for one, true in zip(given, exact, strict=True):
        assert one.shape == true.shape, f"the shape is {tuple(one.shape)}, not {tuple(true.shape)}"
        if not one.is_floating_point():
            assert torch.equal(one.cpu().long(), true.long()), "whole numbers differ"
            continue
        worst = max(worst, roundings(one, true, dtype))
    assert worst <= rounds, f"off by {worst:.3g} roundings of the largest value"
    return f"off by {worst:.3g} roundings of the largest value"


def roundings(given: torch.Tensor, true: torch.Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest error, in roundings of the largest value: by `dtype` (its own), by sixteen of float32 at least."""
    got = given.detach().cpu().double()
    assert not got.isnan().any(), "NaN, or memory that was not written"
    eps = max(torch.finfo(dtype or given.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    scale = float(true.abs().max()) or 1.0
    return float((got - true.double()).abs().max()) / (eps * scale)
