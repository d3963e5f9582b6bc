"""A whole block on npu:0, compiled by npu_fuse and handed to real compilers: equal to eager, and still fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.real_wheel

WIDTH, HEADS, HEAD = 64, 4, 32


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Layer(nn.Module):
    """A decoder layer as llama has it; `normed` adds qwen3's norms of q and k."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.before, self.after = Norm(WIDTH), Norm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.q_norm, self.k_norm = (Norm(HEAD) if normed else nn.Identity() for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 96, bias=False) for _ in range(2))
        self.down = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.before(x)
        q, k, v = (p(h).view(*h.shape[:2], HEADS, HEAD) for p in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = torch.softmax(q @ k.mT / HEAD**0.5, -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        h = self.after(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(normed) for _ in range(2))
        self.last = Norm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * torch.linspace(1, 0.1, HEAD // 2, device=x.device)
        full = torch.cat((angles, angles), -1)[None, None]
        cos, sin = full.cos().to(x.dtype), full.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.last(x)


def made(normed: bool, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    model = Model(normed).to("npu", dtype)
    return model, torch.randn(2, 12, WIDTH).to("npu", dtype)


def compiled(model: nn.Module, handoff: str | None, **options: Any) -> Any:
    chosen = {"target": "npu", **({"handoff": handoff} if handoff else {}), **options}
    return torch.compile(model, backend="npu_fuse", options=chosen)


def fused_launches() -> dict[str, int]:
    import npu_host_ops

    casts = ("npu::_npu_dtype_cast", "npu::_npu_dtype_cast_backward")
    return {k[5:]: v.launches for k, v in npu_host_ops.counts().items() if k.startswith("npu::") and k not in casts}


TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t)[6:])
NORMED = pytest.mark.parametrize("normed", [False, True], ids=["llama", "qwen3"])
FORWARD = {"npu_add_rms_norm": 4, "npu_rotary_mul": 4, "npu_swiglu": 2}


def taken(handoff: str) -> str:
    """npugraphs imports the NPU's Inductor, which up to torch_npu 2.12 asks Triton for an NPU driver: none here."""
    wants_triton = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13)
    return "aot_eager" if handoff == "npugraphs" and wants_triton else handoff


def test_npugraphs_falls_back_where_its_inductor_cannot_be_imported() -> None:
    import npu_fuse

    model, x = made(False, torch.float32)
    npu_fuse.clear_reports()
    with torch.no_grad():
        compiled(model, "npugraphs")(x)
    (report,) = npu_fuse.reports()
    assert report.handoff == taken("npugraphs")
    if report.handoff == "aot_eager":
        assert "torch_npu._inductor" in report.handoff_reason and "triton-ascend" in report.handoff_reason


@DTYPES
@NORMED
@pytest.mark.parametrize("handoff", ["aot_eager", "npugraph_ex", "npugraphs"])
def test_inference(handoff: str, normed: bool, dtype: torch.dtype) -> None:
    import npu_host_ops

    import npu_fuse

    model, x = made(normed, dtype)
    with torch.no_grad():
        want = model(x)
        fast = compiled(model, handoff)
        for _ in range(3):  # npugraphs warms up, then captures; npugraph_ex replays from the second on
            torch.compiler.cudagraph_mark_step_begin()
            npu_host_ops.reset_counts()
            got = fast(x)
    assert npu_fuse.reports()[-1].handoff == taken(handoff)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert fused_launches() == {**FORWARD, "npu_rms_norm": 5 if normed else 1}


@DTYPES
@NORMED
@pytest.mark.parametrize("handoff", ["aot_eager", "npugraph_ex"])
def test_training(handoff: str, normed: bool, dtype: torch.dtype) -> None:
    import npu_host_ops

    model, x = made(normed, dtype)
    model(x).float().square().mean().backward()
    want = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    fast = compiled(model, handoff)
    npu_host_ops.reset_counts()
    fast(x).float().square().mean().backward()
    norms = 9 if normed else 5
    forward = {"npu_rms_norm": norms, "npu_rotary_mul": 4, "npu_swiglu": 2}
    assert fused_launches() == {**forward, **{f"{name}_backward": n for name, n in forward.items()}}
    for name, parameter in model.named_parameters():
        scale = want[name].abs().max().item()
        bound = 4 * TOLERANCE[dtype] * scale
        torch.testing.assert_close(parameter.grad, want[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_replay_sees_weights_changed_in_place() -> None:
    """A rollout after a weight update: the captured graph reads the parameters' memory."""
    model, x = made(True, torch.float32)
    with torch.no_grad():
        fast = compiled(model, "npugraph_ex")
        fast(x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        other = torch.randn_like(x)
        torch.testing.assert_close(fast(other), model(other), rtol=1e-4, atol=1e-4)


def test_npugraph_ex_keeps_the_fused_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the graph that it captures, by its own dump."""
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    model, x = made(True, torch.float32)
    with torch.no_grad(), torch._dynamo.config.patch(debug_dir_root=str(tmp_path)):
        compiled(model, "npugraph_ex")(x)
    (code,) = tmp_path.rglob("output_code.py")
    text = code.read_text()
    counts = {name: text.count(f"torch.ops.npu.{name}.default(") for name in (*FORWARD, "npu_rms_norm")}
    assert counts == {**FORWARD, "npu_rms_norm": 5}


def test_a_size_that_changes_is_captured_again() -> None:
    model, x = made(False, torch.float32)
    with torch.no_grad():
        fast = compiled(model, "npugraph_ex")
        for length in (12, 9, 12, 5):
            part = x[:, :length].contiguous()
            torch.testing.assert_close(fast(part), model(part), rtol=1e-5, atol=1e-5)


def overlapping(x: torch.Tensor) -> torch.Tensor:
    y = torch.cat((x, 2 * x), -1)
    return y[:, 1:] - y[:, :-1]


def test_overlapping_slices_survive_npugraph_ex() -> None:
    """Its in-place pass subtracts them in place; npu_fuse switches the pass off. When the first comparison
    fails, torch_npu is right and `SAFE_OPTIONS` can go."""
    x = torch.randn(2, 24, device="npu")
    with torch.no_grad():
        want = overlapping(x)
        alone = torch.compile(overlapping, backend="npugraph_ex")(x)
        assert not torch.allclose(alone, want)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(overlapping, "npugraph_ex")(x), want)
