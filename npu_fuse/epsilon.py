"""The epsilon that `F.rms_norm(x, shape)` takes where none is given: asked of the torch that is installed."""

from __future__ import annotations

import functools

import torch


@functools.cache
def default_epsilon(dtype: torch.dtype) -> float:
    """Depends on x's dtype, and on the release for 16-bit types: measured once on a value of its size."""
    candidates = {torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps}
    with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        x = torch.full((1, 4), 2.0**-13, dtype=dtype, device="cpu")
        got = float(torch.nn.functional.rms_norm(x, (4,))[0, 0])
        exact = x.double()
        return min(candidates, key=lambda e: abs(float((exact * (exact.square().mean() + e).rsqrt())[0, 0]) - got))
