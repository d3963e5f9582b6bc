"""How far two forms are from the truth, and how much further the fused one may be.

Errors are in ulps of each row's largest magnitude, against float64. Obligations 1 and 2 of `prove` are judged here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from npu_fuse.probes import Probe
from npu_fuse.report import ProofFacts

FLOAT64_TOLERANCE = 1e-9


@dataclass
class Errors:
    """Error statistics over all probes."""

    original: float = 0.0
    fused: float = 0.0
    original_sum: float = 0.0
    fused_sum: float = 0.0
    same: float = 0.0
    gradients: float | None = None
    bit_equal: bool = True
    overflow_avoided: bool = False


class Fails(Exception):
    pass


def facts_of(errors: Errors, probes: int) -> ProofFacts:
    return ProofFacts(probes, errors.same, errors.gradients, errors.original, errors.fused, errors.bit_equal)


def relative(expected: torch.Tensor, actual: torch.Tensor, only_finite: bool = False) -> float:
    """Largest difference over the largest magnitude; infinite where non-finite places or kinds differ."""
    if expected.dtype.is_complex:
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    expected, actual = expected.detach(), actual.detach().to(expected.dtype)
    if expected.numel() == 0:
        return 0.0
    finite = torch.isfinite(expected)
    if not only_finite:
        same_kind = torch.equal(expected.isnan(), actual.isnan()) and torch.equal(
            expected.nan_to_num(nan=0.0) * expected.isinf(), actual.nan_to_num(nan=0.0) * actual.isinf()
        )
        if not same_kind:
            return float("inf")
    if not bool(finite.any()):
        return 0.0
    left, right = expected[finite], actual[finite]
    scale = float(left.abs().max())
    difference = float((left - right).abs().max())
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0 else float("inf")


def measure(exact: torch.Tensor, before: torch.Tensor, after: torch.Tensor, probe: Probe, errors: Errors) -> None:
    if not before.dtype.is_floating_point or before.dtype == torch.float64:
        return
    usable = torch.isfinite(exact) & torch.isfinite(before)
    if bool((torch.isfinite(before) & ~torch.isfinite(after)).any()):
        raise Fails("no less accurate: the fused form overflows where the original does not")
    errors.overflow_avoided |= bool((~torch.isfinite(before) & torch.isfinite(after)).any())
    errors.overflow_avoided |= bool((_lost(exact, before) & ~_lost(exact, after)).any())
    if not probe.judge_accuracy or not bool(usable.any()):
        return
    row = exact.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True) if exact.dim() else exact.abs()
    info = torch.finfo(before.dtype)
    ulp = torch.exp2(torch.floor(torch.log2(row.clamp_min(info.smallest_normal)))) * info.eps
    left = ((before.double() - exact).abs() / ulp)[usable.expand_as(exact)]
    right = ((after.double() - exact).abs() / ulp)[usable.expand_as(exact)]
    errors.original = max(errors.original, float(left.max()))
    errors.fused = max(errors.fused, float(right.max()))
    errors.original_sum += float(left.mean())
    errors.fused_sum += float(right.mean())


def _lost(exact: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Elements that are off by half their size: something before them overflowed to infinity and came back as 0."""
    return (value.double() - exact).abs() > 0.5 * exact.abs().clamp_min(torch.finfo(value.dtype).smallest_normal)


def _only_sums_otherwise(dtype: torch.dtype, errors: Errors) -> bool:
    """Long sums in float32: their order is the kernel's own, and the largest error is an accident of it.

    The mean over all probes is none: of the same matmuls in two orders, with gates and clamps in between, the
    largest errors differed up to 2.2 times either way and the means by less than 1.1. 16-bit results are judged
    by their rounding, sums or not.
    """
    if dtype != torch.float32:
        return False
    return errors.fused <= 4 * errors.original + 2.0 and errors.fused_sum <= 1.1 * errors.original_sum + 0.01


def accurate(dtype: torch.dtype | None, errors: Errors, numerics: str, sums: bool) -> None:
    """Raise `Fails` where the fused form's errors are larger than allowed; `sums`: it adds in an order of its own."""
    if numerics == "exact" and not errors.bit_equal:
        raise Fails("numerics='exact': results are not bit-equal in the graph's dtypes on every probe")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return
    allowed = 2.0 if dtype == torch.float32 else 0.25
    if errors.fused > errors.original + allowed and not (sums and _only_sums_otherwise(dtype, errors)):
        raise Fails(
            f"no less accurate: largest error {errors.fused:.2f} ulp, the original's is {errors.original:.2f} ulp"
        )
    if dtype != torch.float32 and errors.fused_sum > 1.1 * errors.original_sum + 0.01:
        raise Fails(
            f"no less accurate: mean error {errors.fused_sum / errors.original_sum:.2f} times the original's"
            if errors.original_sum
            else "no less accurate: the original is exact and the fused form is not"
        )
