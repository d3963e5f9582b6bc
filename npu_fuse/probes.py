"""Inputs that proofs run on: magnitudes, zero and non-finite rows, strides; seeded, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from npu_fuse import dialect as d
from npu_fuse.replay import Sizes
from npu_fuse.sites import Site

SEED = 20251125
LARGEST_HALF = 1e4


@dataclass(frozen=True)
class Probe:
    """Magnitudes of activations and weights, and what is special about the rows."""

    pool: tuple[int, ...]
    scale: float = 1.0
    weights: float = 1.0
    scalar: float = 1e-6
    special: str = ""
    judge_accuracy: bool = True


PROBES = (
    Probe((2, 3, 5, 2)),
    Probe((3, 2, 4, 2), scale=1e-3, scalar=1e-5),
    Probe((2, 5, 3, 2), scale=1e2, scalar=1e-3),
    Probe((2, 3, 2, 2), scale=3.0, weights=1e3, scalar=1e-2, judge_accuracy=False),
    Probe((3, 4, 2, 2), scale=1.0, scalar=0.5, special="strided"),
    Probe((2, 4, 2, 2), scale=30.0, special="zero_rows"),
    Probe((2, 4, 3, 2), scale=1.0, weights=1e-2, scalar=1.5),
    Probe((2, 3, 2, 2), special="nonfinite", judge_accuracy=False),
    Probe((2, 3, 2, 2), scale=1e6, judge_accuracy=False),
)


def make_inputs(site: Site, probe: Probe, index: int, sizes: Sizes, generator: torch.Generator) -> dict[Node, Any]:
    made: dict[Node, Any] = {}
    shapes = {n: sizes.shape(t.shape) for n in site.inputs if (t := d.local(n)) is not None}
    largest = max((torch.Size(s).numel() for s in shapes.values()), default=0)
    for node in sorted(site.inputs, key=lambda n: n in site.probes):  # these look at the others
        found = d.tensor(node)
        if found is None:
            made[node] = _scalar(node, probe, sizes, len(made))
            continue
        shape = shapes[node]
        if node in site.probes:
            made[node] = site.probes[node](made, shape, index, generator).to(found.dtype)
            continue
        is_weight = torch.Size(shape).numel() < largest
        made[node] = _values(shape, found.dtype, probe, is_weight, generator)
    return made


def _scalar(node: Node, probe: Probe, sizes: Sizes, index: int) -> Any:
    """Different for each scalar of the site, so that one is not taken for another."""
    found = d.value(node)
    if isinstance(found, torch.SymInt):
        return sizes.evaluate(found.node.expr)
    return probe.scalar * (1 + 3 * index) if isinstance(found, torch.SymFloat) else found


def _values(shape: tuple[int, ...], dtype: torch.dtype, probe: Probe, weight: bool, generator: Any) -> torch.Tensor:
    scale = probe.weights if weight else probe.scale
    real = dtype if not dtype.is_complex else torch.float64
    if dtype == torch.float16:
        scale = min(scale, LARGEST_HALF)  # finite, and too large to square
    filled = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    if dtype.is_complex:
        imaginary = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return torch.complex(filled, imaginary).to(dtype)
    if not weight and len(shape) > 1 and probe.special in ("zero_rows", "nonfinite"):
        rows = filled.reshape(-1, shape[-1])
        if probe.special == "zero_rows":
            rows[0] = 0.0
        else:
            rows[0, 0], rows[-1, -1] = float("inf"), float("nan")
            rows[rows.shape[0] // 2, shape[-1] // 2] = float("-inf")
        filled = rows.reshape(shape)
    result = filled.to(real)
    if probe.special == "strided" and len(shape) > 1:
        result = _strided(result)
    return result


def _strided(value: torch.Tensor) -> torch.Tensor:
    """Rows that do not follow one another in memory; elements of a row do, as complex views demand."""
    if value.dim() > 2:
        return value.transpose(0, -2).contiguous().transpose(0, -2)
    return torch.nn.functional.pad(value, (0, 8))[..., :-8]
