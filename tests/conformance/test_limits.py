"""The stand-in refuses what its documents refuse, and npu_fuse emits nothing that it refuses.

The stand-in's limits are written from the operators' documents, the target's in the passes: each checks
the other. `EDGES` has one call for every limit, beside a call that only just keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from npu_fuse.device_edges import BF16, EDGES, F16, F32, clipped, rms, rope, t

pytestmark = pytest.mark.real_wheel


@pytest.mark.parametrize("limit", EDGES)
def test_each_limit(limit: str) -> None:
    broken, kept = EDGES[limit]
    kept()
    with pytest.raises(RuntimeError, match=r"^npu_host: npu_"):
        broken()


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910A"])
def test_old_chips(soc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_HOST_SOC", soc)
    rms(t(2, 64, dtype=F16), t(64, dtype=F16))
    for call in (
        lambda: rms(t(2, 64, dtype=BF16), t(64, dtype=BF16)),
        lambda: rms(t(2, 64, dtype=F16), t(64)),
        lambda: rope(t(1, 2, 4, 64), t(1, 1, 4, 64)),
        lambda: clipped(t(2, 8)),
    ):
        with pytest.raises(RuntimeError, match="npu_host: npu_"):
            call()


def test_rows_past_the_groups_stay_unwritten() -> None:
    y = clipped(t(6, 8), group_index=torch.tensor([1, 3], device="npu"))
    assert not y[:4].isnan().any() and y[4:].isnan().all()


def test_an_operator_without_a_kernel_says_its_name() -> None:
    with pytest.raises(NotImplementedError, match="npu_host: the stand-in has no kernel for npu::npu_mrope"):
        torch.ops.npu.npu_mrope(t(2).long(), t(2, 64), t(2, 64), t(8, 64), 64)


# --- what npu_fuse emits runs, at and around every limit ----------------------------------------------------


def lowered(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` with npu_fuse's calls in it, run as Dynamo's graph without any other compiler."""
    torch._dynamo.reset()
    chosen = {"target": "npu", "handoff": lambda gm, inputs: gm.forward, **options}
    return torch.compile(function, backend="npu_fuse", options=chosen, dynamic=False)


def runs_like(function: Callable[..., Any], *args: torch.Tensor) -> None:
    """Equal to eager, or left alone. A call that the stand-in refuses raises here."""
    leaves = [a for a in args if a.requires_grad]
    want = function(*args)
    got = lowered(function)(*args)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    if leaves:
        grads = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (got, want)]
        torch.testing.assert_close(grads[0], grads[1], rtol=5e-2, atol=5e-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + turned * sin


SIZES = [(2, 4, 24), (2, 18, 2), (4, 2, 3), (1, 40, 1), (2, 5, 1), (50, 20, 2)]


@pytest.mark.parametrize("turn", [rotate, rotate_pairs])
@pytest.mark.parametrize("width", [64, 24])
@pytest.mark.parametrize("training", [False, True])
def test_rotations(turn: Callable[..., Any], width: int, training: bool) -> None:
    """Sizes × tables × layouts: [B, N, S, D] as it is, and as a transpose of [B, S, N, D]."""
    for (batch, heads, length), shared, swapped in product(SIZES, (True, False), (True, False)):
        shape = (batch, length, heads, width) if swapped else (batch, heads, length, width)
        x = torch.randn(shape, device="npu", requires_grad=training)
        angles = torch.randn(1 if shared else batch, 1, length, width // 2, device="npu")
        full = torch.cat((angles, angles), -1) if turn is rotate else angles.repeat_interleave(2, -1)

        def rope_of(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, swapped: bool = swapped) -> torch.Tensor:
            return turn(x.transpose(1, 2) if swapped else x, cos, sin)

        runs_like(rope_of, x, full.cos(), full.sin())


@pytest.mark.parametrize("training", [False, True])
def test_pairs_of_a_batch_that_is_left_open(training: bool) -> None:
    """One graph: the kernel for 4 and 996 rows of batch · heads, the plain form for 1000, which the kernel refuses."""
    import npu_host_ops

    torch._dynamo.reset()
    chosen = {"target": "npu", "handoff": "aot_eager"}
    fast = torch.compile(rotate_pairs, backend="npu_fuse", options=chosen)
    for batch, kernels in ((3, 1), (249, 1), (250, 0)):
        x = torch.randn(batch, 4, 6, 16, requires_grad=training)
        angles = torch.randn(1, 1, 6, 8).repeat_interleave(2, -1)
        on = x.detach().npu().requires_grad_(training)
        torch._dynamo.mark_dynamic(on, 0)
        npu_host_ops.reset_counts()
        got = fast(on, angles.cos().npu(), angles.sin().npu())
        launches = npu_host_ops.counts().get("npu::npu_rotary_mul")
        assert (launches.launches if launches else 0) == kernels
        want = rotate_pairs(x.double(), angles.cos().double(), angles.sin().double())
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
        if training:
            dy = torch.randn(x.shape)
            (dx,) = torch.autograd.grad(got, on, dy.npu())
            (true,) = torch.autograd.grad(want, x, dy.double())
            torch.testing.assert_close(dx.cpu(), true, rtol=1e-5, atol=1e-5)


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F16, F16), (F32, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_norms(dtypes: tuple[torch.dtype, torch.dtype], training: bool) -> None:
    for shape in ((8,), (3, 8), (2, 3, 4, 8), (1,) * 8 + (8,), (0, 8)):
        if training and 0 in shape:
            continue
        x = torch.randn(shape, device="npu", dtype=dtypes[0], requires_grad=training)
        w = torch.rand(8, device="npu", dtype=dtypes[1], requires_grad=training)
        runs_like(norm, x, w)
        runs_like(lambda x, w: norm(x + 1, w), x, w)
        if len(shape) > 2:
            runs_like(lambda x, w: norm(x.transpose(0, 1), w).transpose(0, 1), x, w)
            runs_like(lambda x, w: norm(x.transpose(0, 1), w).reshape(-1), x, w)


def gated(kind: str) -> Callable[..., torch.Tensor]:
    def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(a) * b

    def gelu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(a, approximate="tanh") * b

    def clamped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.clamp(max=7.0), b.clamp(-7.0, 7.0)
        return (b + 1) * (a * torch.sigmoid(a * 1.702))

    return {"silu": silu, "gelu": gelu, "clamped": clamped}[kind]


@pytest.mark.parametrize("kind", ["silu", "gelu", "clamped"])
@pytest.mark.parametrize("training", [False, True])
def test_gates(kind: str, training: bool) -> None:
    act = gated(kind)
    for shape in ((16,), (3, 16), (2, 3, 16), (1,) * 8 + (16,)):
        x = torch.randn(shape, device="npu", requires_grad=training)
        runs_like(lambda x: act(*x.chunk(2, -1)), x)
        runs_like(lambda x: act(x[..., 0::2], x[..., 1::2]), x)
        runs_like(lambda x: act(x[..., 2:6], x[..., 6:10]), x)
        runs_like(lambda x: act(x, x + 1), x)
        if len(shape) > 1:
            runs_like(lambda x: act(*x.transpose(0, -2).chunk(2, -1)), x)
