"""What the documents do not say and only a device can: each probe returns what it saw.

A probe fails where npu_fuse relies on the answer and the device gives another one; else it only tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npu_fuse.device_checks import Skipped, npu, reference, roundings

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (8, 48, 64, 576, 4096, 12288)


def _share(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given.cpu() != wanted).float().mean())


def norm_rounding() -> str:
    """npu_rms_norm: one rounding, after gamma? Some tilings may round the quotient first."""
    told = []
    for dtype in (F16, BF16):
        for width in WIDTHS:
            x, gamma = torch.randn(16, width).to(dtype), (1 + torch.rand(width)).to(dtype)
            y = npu("npu_rms_norm")(x.npu(), gamma.npu(), 1e-6)[0]  # type: ignore[attr-defined]
            wide = x.double()
            quotient = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
            once = _share(y, (quotient * gamma.double()).to(dtype))
            twice = _share(y, (quotient.to(dtype).double() * gamma.double()).to(dtype))
            told.append((dtype, width, "once" if once <= twice else "before gamma, too"))
    other = [f"{str(t)[6:]} {w}" for t, w, how in told if how != "once"]
    assert not other, f"rounds before gamma at {', '.join(other)}: proofs take one rounding"
    return f"one rounding, after gamma, at widths {', '.join(map(str, WIDTHS))} in float16 and bfloat16"


def add_norm_sum() -> str:
    """npu_add_rms_norm: does it normalise the sum as it is rounded, or before?"""
    told = []
    for width in WIDTHS:
        x1, x2 = torch.randn(16, width).to(BF16), torch.randn(16, width).to(BF16)
        gamma = (1 + torch.rand(width)).to(BF16)
        y = npu("npu_add_rms_norm")(x1.npu(), x2.npu(), gamma.npu(), 1e-6)[0]  # type: ignore[attr-defined]
        rounded = _share(y, reference("npu_add_rms_norm")(x1, x2, gamma, 1e-6)[0])
        wide = _share(y, reference("npu_add_rms_norm_unrounded")(x1, x2, gamma, 1e-6)[0])
        told.append(f"{width}: {'the rounded' if rounded <= wide else 'the unrounded'}")
    return f"the sum that is normalised, by width: {', '.join(told)} (a proof takes both)"


def rotary_large_tables() -> str:
    """npu_rotary_mul: cos and sin are documented within [-1, 1]; scaled ones are larger."""
    x, angles = torch.randn(1, 2, 24, 64), torch.randn(1, 1, 24, 64)
    cos, sin = 1.7 * angles.cos(), 1.7 * angles.sin()
    y = npu("npu_rotary_mul")(*(v.npu() for v in (x, cos, sin)), "half")  # type: ignore[attr-defined]
    off = roundings(y, reference("npu_rotary_mul")(x.double(), cos.double(), sin.double(), "half"))
    assert off <= 1, f"tables of 1.7 are off by {off:.3g} roundings"
    return f"tables of 1.7 are off by {off:.3g} roundings"


def swiglu_unaligned() -> str:
    """npu_swiglu's backward: x is documented as aligned to 64 bytes."""
    x = torch.randn(5, 14, dtype=torch.float64)
    given, true = x.to("npu", F32).requires_grad_(), x.clone().requires_grad_()
    dy = torch.randn(5, 7, dtype=torch.float64)
    got = torch.autograd.grad(npu("npu_swiglu")(given, -1), given, dy.to("npu", F32))[0]
    off = roundings(got, torch.autograd.grad(reference("npu_swiglu")(true, -1), true, dy.float().double())[0])
    assert off <= 4, f"rows of 56 bytes are off by {off:.3g} roundings"
    return f"rows of 56 bytes are off by {off:.3g} roundings"


def _grouped(x: torch.Tensor, w: torch.Tensor, ends: list[int], kind: int) -> torch.Tensor:
    groups = torch.tensor(ends, device="npu")
    made: torch.Tensor = npu("npu_grouped_matmul")(
        [x], [w], group_list=groups, split_item=2 if kind == 0 else 3, group_type=kind, group_list_type=0
    )[0]
    return made


def grouped_like_a_loop() -> str:
    """npu_grouped_matmul: bit-equal to one matmul for each expert?"""
    x, w = torch.randn(24, 64).to("npu", BF16), torch.randn(4, 64, 32).to("npu", BF16)
    ends = [3, 3, 11, 24]
    y = _grouped(x, w, ends, 0)
    loop = torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True))])
    return "bit-equal to a loop" if torch.equal(y, loop) else f"{_share(y, loop.cpu()):.1%} of elements differ"


def grouped_rest() -> str:
    """npu_grouped_matmul: rows past the last group are not written; npu_fuse never reads them."""
    y = _grouped(torch.randn(8, 64).to("npu", BF16), torch.randn(2, 64, 32).to("npu", BF16), [2, 5], 0)
    assert not y[:5].isnan().any(), "rows of groups hold NaN"
    return "rows past the last group are zeros" if not y[5:].cpu().any() else "rows past the last group are anything"


def grouped_empty_gradient() -> str:
    """The weight's gradient of an expert without rows must be zeros, in every dtype."""
    for dtype in (F32, F16, BF16):
        x, dy = torch.randn(8, 64).to("npu", dtype), torch.randn(8, 32).to("npu", dtype)
        dw = _grouped(x.t(), dy, [3, 3, 8], 2)
        assert not dw[1].cpu().any(), f"{str(dtype)[6:]}: the gradient of an expert without rows is not zero"
    return "zeros in float32, float16 and bfloat16"


def permute_is_stable() -> str:
    """npu_moe_token_permute: rows of one expert stay in the order of their tokens."""
    x = torch.arange(32.0).unsqueeze(1).expand(32, 16).contiguous()
    experts = torch.randint(0, 4, (32, 2), generator=torch.Generator().manual_seed(0))
    rows, _ = npu("npu_moe_token_permute")(x.npu(), experts.npu())  # type: ignore[attr-defined]
    wanted = x[torch.sort(experts.flatten(), stable=True).indices // 2]
    assert torch.equal(rows.cpu(), wanted), "rows of one expert are in another order"
    return "rows of one expert keep the order of their tokens"


def top_k_ties() -> str:
    """torch.topk among equal values, on the device and on the CPU: unspecified in both."""
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 2.0]])
    there, here = scores.npu().topk(2).indices.cpu().tolist(), scores.topk(2).indices.tolist()  # type: ignore[attr-defined]
    return f"the device takes {there[0]}, the CPU {here[0]}, of equal values at 1, 2, 3 and 5"


def capture_and_replay() -> str:
    """A captured graph of fused calls sees weights that were changed in place between replays."""
    from npu_fuse.device_blocks import norm, swiglu

    gamma, w = (1 + torch.rand(64)).npu(), torch.randn(64, 128).npu()  # type: ignore[attr-defined]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return swiglu(norm(x, gamma) @ w)

    torch._dynamo.reset()
    fast = torch.compile(layer, backend="npu_fuse", options={"target": "npu"}, dynamic=False)
    x = torch.randn(6, 64).npu()  # type: ignore[attr-defined]
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        gamma.mul_(2)
        w.neg_()
        off = roundings(fast(x), layer(x).cpu())
    import npu_fuse

    handoff = npu_fuse.reports()[-1].handoff
    assert off <= 4, f"{handoff}: off by {off:.3g} roundings after a change in place"
    return f"{handoff}: new weights are seen, off by {off:.3g} roundings"


def two_ranks() -> str:
    """npu_mm_all_reduce_base on two devices gives the sum over ranks."""
    devices: Any = torch.npu.device_count()  # type: ignore[attr-defined]
    if devices < 2:
        raise Skipped(f"it needs two devices, here is {devices}")
    from npu_fuse.device_ranks import on_two_ranks

    off = on_two_ranks()
    assert off <= 3, f"off by {off:.3g} roundings"
    return f"off by {off:.3g} roundings"


PROBES: dict[str, Callable[[], str]] = {
    "rms_norm rounds once, after gamma": norm_rounding,
    "add_rms_norm, which sum": add_norm_sum,
    "rotary_mul with tables beyond 1": rotary_large_tables,
    "swiglu backward, unaligned rows": swiglu_unaligned,
    "grouped_matmul beside a loop": grouped_like_a_loop,
    "grouped_matmul, rows of no group": grouped_rest,
    "grouped_matmul, gradient of an empty expert": grouped_empty_gradient,
    "moe_token_permute is stable": permute_is_stable,
    "top-k among equal scores": top_k_ties,
    "capture and replay": capture_and_replay,
    "matmul and all-reduce on two ranks": two_ranks,
}
